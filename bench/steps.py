"""Training steps/s through losscast over the same worker under plain torchrun, by topology, in one run.

    python bench/steps.py [--rounds N] [--steps N] [--only WORDS] [--json OUT]

Through losscast is everything a run has: a Ray job on a local cluster, the driver, warm ranks, a live monitor that gets every
step. Under torchrun there is the worker alone, with no monitor. Rounds take turns in which goes first, and each figure is the
median over rounds of the median time between steps (the first two thirds left out), so that one busy moment of the machine
decides nothing: beside a run's first steps an actor that is to stand by imports torch, for some 20 s on two cores. Two ranks of
one thread each, two micro-batches a step. Goal: a ratio of 0.98. About two minutes a topology and round.
"""

import argparse
import contextlib
import csv
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher.jobs import local_ray
from launcher.runspec.model import RunSpec
from launcher.storage.runfolder import RunFolder

TOPOLOGIES: list[tuple[str, dict[str, Any]]] = [
    ("zero0", {"dp": 2, "zero": 0}),
    ("zero1", {"dp": 2, "zero": 1}),
    ("zero2", {"dp": 2, "zero": 2}),
    ("zero3", {"dp": 2, "zero": 3}),
    ("pp2-zero0", {"pp": 2, "zero": 0}),
    ("pp2-zero1", {"pp": 2, "zero": 1}),
    ("tp2-zero1", {"tp": 2, "zero": 1}),
    ("zero1-offload", {"dp": 2, "zero": 1, "offload": "cpu"}),
    ("zero1-recompute", {"dp": 2, "zero": 1, "activation_checkpointing": True}),
]


def step_seconds(curve: Path, left_out: float = 0.25) -> float:
    """Median seconds between the steps of a curve.csv, a first share of them left out."""
    with curve.open() as file:
        times = [float(row["time"]) for row in csv.DictReader(file)]
    times = times[int(left_out * len(times)) :]
    return statistics.median(b - a for a, b in itertools.pairwise(times))


@contextlib.contextmanager
def monitor(folder: Path) -> Iterator[str]:
    """`losscast monitor serve`, its address; LOSSCAST_TOKEN is set while it lasts."""
    losscast = [sys.executable, "-m", "launcher.cli", "monitor"]
    made = [*losscast, "token", "create", "--store", str(folder), "--scope", "ingest,read"]
    token = subprocess.run(made, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    at = f"127.0.0.1:{local_ray.free_port()}"
    os.environ["LOSSCAST_TOKEN"] = token
    with (folder.parent / "monitor.log").open("wb") as log:
        serving = subprocess.Popen(
            [*losscast, "serve", "--listen", at, "--store", str(folder)], stdout=log, stderr=log
        )
        try:
            yield f"http://{at}"
        finally:
            serving.terminate()
            serving.wait(30)
            os.environ.pop("LOSSCAST_TOKEN", None)


def torchrun(spec: RunSpec, folder: Path, ranks: int) -> None:
    """The worker under plain torchrun, one process a rank. Raises RuntimeError with what it said when it fails."""
    file = folder / f"{spec.name}.yaml"
    file.write_text(json.dumps(spec.to_dict()))
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={local_ray.free_port()}",
        "-m", "launcher.worker", str(file),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{spec.name}: {done.stderr[-2000:]}")


def through_losscast(spec: RunSpec, head: local_ray.Head) -> None:
    """The run as `losscast submit` runs it. Raises RuntimeError with its log when it fails."""
    from launcher.jobs.submit import logs, submit, wait

    job = submit(spec, head.dashboard, head.environment())
    if wait([job], head.environment()) != {spec.name: "SUCCEEDED"}:
        raise RuntimeError(f"{spec.name}: {logs(job, head.environment())[-2000:]}")


def spec_of(name: str, parallel: dict[str, Any], steps: int, runs: Path, url: str | None) -> RunSpec:
    """A byte GPT of 0.1M parameters: small enough that what is beside the arithmetic would show."""
    batch = 2048
    return RunSpec.from_dict(
        {
            "name": name,
            "workload": {"layers": 2, "width": 64, "heads": 4, "context": 128},
            "data": {"path": "stdlib", "holdout_tokens": 4096},
            "train": {"tokens": steps * batch, "batch_tokens": batch, "lr": 1e-3, "precision": "fp32"},
            "parallel": {"micro_batch": 4, **parallel},
            "checkpoints": {"url": str(runs), "every_steps": 10 * steps},
            **({"monitor": {"url": url}} if url else {}),
        }
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--only", metavar="WORDS", help="topologies whose name holds this")
    parser.add_argument("--json", metavar="OUT", help="write the table as JSON")
    args = parser.parse_args()
    os.environ.update({"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"})
    table = []
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        os.environ.setdefault("LOSSCAST_CACHE", str(home / "cache"))
        head = local_ray.start(home / "ray", cpus=2)
        try:
            with monitor(home / "store") as url:
                for name, parallel in TOPOLOGIES:
                    if args.only and args.only not in name:
                        continue
                    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
                    for turn in range(args.rounds):
                        for which in ("ours", "plain") if turn % 2 == 0 else ("plain", "ours"):
                            monitored = url if which == "ours" else None
                            spec = spec_of(
                                f"{which}-{name}-{turn}", parallel, args.steps, home / "runs", monitored
                            )
                            if which == "ours":
                                through_losscast(spec, head)
                            else:
                                torchrun(spec, home, 2)
                            curve = RunFolder(home / "runs" / spec.name).curve(1)
                            seconds[which].append(step_seconds(curve, left_out=2 / 3))
                    a, b = (1 / statistics.median(seconds[which]) for which in ("ours", "plain"))
                    table.append({"topology": name, "losscast": a, "torchrun": b, "ratio": a / b})
                    print(
                        f"{name:<15} losscast {a:7.2f} steps/s   torchrun {b:7.2f} steps/s   ratio {a / b:.3f}",
                        flush=True,
                    )
        finally:
            local_ray.stop(head)
    if args.json:
        Path(args.json).write_text(json.dumps(table, indent=1))
    worst = min((row["ratio"] for row in table), default=1.0)
    print(f"worst ratio {worst:.3f}, goal 0.98")
    return 0 if worst >= 0.98 else 1


if __name__ == "__main__":
    sys.exit(main())
