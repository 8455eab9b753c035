"""Training steps/s through losscast over the same worker under plain torchrun, by topology, in one run.

    python bench/steps.py [--windows N] [--seconds S] [--only WORDS] [--json OUT]

Through losscast is everything a run has: a Ray job on a local cluster, the driver, warm ranks, an actor that stands by, a
live monitor that gets every step. Under torchrun there is the worker alone, with no monitor. Two ranks of one thread each, two
micro-batches a step.

A shared machine's speed wanders by more than what is looked for, so both runs are alive at once and take turns: while one
trains for a window, every process of the other is stopped, Ray, driver and monitor included. Neighbouring windows give a
ratio; the figure is the median over turns, with its quartiles. Windows begin when both runs are under way and the standby has
imported what it needs. In a third window of each turn the worker under torchrun has an idle Ray beside it, with as many
actors: on two busy cores Ray's own processes, about a tenth of a core, are most of the difference, and what is left is ours.
Goal: a ratio of 0.98. About three minutes a topology.
"""

import argparse
import contextlib
import csv
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from launcher.jobs import local_ray
from launcher.runspec.model import RunSpec
from launcher.storage.runfolder import RunFolder

SETTLE_S = 0.5
"""Of each window's beginning, left out."""
WARM_STEPS = 50
Window = tuple[float, float]
"""Of time: from, to; seconds since 1970."""
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


def step_times(curve: Path) -> list[float]:
    """When each step of a curve.csv was made, seconds since 1970."""
    with curve.open() as file:
        return [float(row["time"]) for row in csv.DictReader(file)]


def rate(times: list[float], window: Window) -> float:
    """Steps/s within a window of time. Raises RuntimeError where it holds fewer than two steps."""
    within = [t for t in times if window[0] <= t <= window[1]]
    if len(within) < 2:
        raise RuntimeError(
            f"{len(within)} steps within {window[1] - window[0]:.1f} s, of {len(times)} in all: a longer window (--seconds)?"
        )
    return (len(within) - 1) / (within[-1] - within[0])


@contextlib.contextmanager
def monitor(folder: Path) -> Iterator[tuple[str, int]]:
    """`losscast monitor serve`: its address and process id; LOSSCAST_TOKEN is set while it lasts."""
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
            yield f"http://{at}", serving.pid
        finally:
            serving.terminate()
            serving.wait(30)
            os.environ.pop("LOSSCAST_TOKEN", None)


def torchrun_command(spec: RunSpec, home: Path) -> list[str]:
    """The worker under plain torchrun, one process a rank."""
    file = home / f"{spec.name}.yaml"
    file.write_text(json.dumps(spec.to_dict()))
    return [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={spec.ranks}",
        f"--master-port={local_ray.free_port()}", "-m", "launcher.worker", str(file),
    ]  # fmt: skip


@contextlib.contextmanager
def torchrun(spec: RunSpec, home: Path) -> Iterator[int]:
    """The same, running until it is left; torchrun's process id."""
    with (home / f"{spec.name}.log").open("wb") as log:
        process = subprocess.Popen(torchrun_command(spec, home), stdout=log, stderr=log)
        try:
            yield process.pid
        finally:
            RunFolder.of(spec.checkpoints.url, spec.name).stop.touch()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.terminate()
                process.wait(60)


@contextlib.contextmanager
def through_losscast(spec: RunSpec, head: local_ray.Head) -> Iterator[None]:
    """The run as `losscast submit` runs it, stopped at the end."""
    from launcher.jobs.submit import submit, wait

    patient = {"LOSSCAST_HANG_FLOOR_S": "300"}  # stopped for the other's windows, it is not hung
    job = submit(spec, head.dashboard, head.environment(), env=patient)
    try:
        yield
    finally:
        RunFolder.of(spec.checkpoints.url, spec.name).stop.touch()
        wait([job], head.environment())


def until(true: Callable[[], bool], what: str, timeout_s: float = 180.0) -> None:
    """Wait. Raises RuntimeError when it does not come true."""
    deadline = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited {timeout_s:.0f} s for {what}")
        time.sleep(0.2)


def send(roots: list[int], number: int) -> None:
    """A signal to processes and all below them."""
    for pid in {p for root in roots for p in [root, *local_ray.descendants(root)]}:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def standby_ready(head: local_ray.Head) -> bool:
    """Whether the actor that stands by has imported everything: its process sleeps."""
    for pid in local_ray.descendants(head.pid):
        with contextlib.suppress(OSError):
            if b"aside" in Path(f"/proc/{pid}/cmdline").read_bytes():
                before = cpu_ticks(pid)
                time.sleep(1.0)
                return cpu_ticks(pid) == before
    return False


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def ours_alone(head: local_ray.Head, monitor: int) -> list[int]:
    """Of a run's processes those that are not Ray's: ranks and all they start, the driver, the monitor."""
    found = [monitor]
    for pid in local_ray.descendants(head.pid):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
            if b"launcher.training.warm" in words or b"launcher.recovery.driver" in words:
                found.append(pid)
    return found


def turns(
    all_ours: list[int], not_rays: list[int], plain: list[int], args: argparse.Namespace
) -> list[list[Window]]:
    """Let families of processes run by turns: ours, the plain worker, the plain worker beside an idle Ray. When each ran."""
    ran: list[list[Window]] = [[], [], []]
    for turn in range(args.windows):
        for which in (range(3), reversed(range(3)))[turn % 2]:  # a drift hits all alike
            send([*all_ours, *plain], signal.SIGSTOP)
            send(plain if which else all_ours, signal.SIGCONT)
            if which == 2:
                send(all_ours, signal.SIGCONT)
                send(not_rays, signal.SIGSTOP)
            time.sleep(SETTLE_S)
            began = time.time()
            time.sleep(args.seconds)
            ran[which].append((began, time.time()))
    return ran


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


def compare(
    name: str,
    parallel: dict[str, Any],
    args: argparse.Namespace,
    home: Path,
    head: local_ray.Head,
    live: tuple[str, int],
) -> dict[str, Any]:
    """One topology: steps/s of both, and ratios with their quartiles."""
    mine, bare = (
        spec_of(f"{which}-{name}", parallel, 100_000, home / "runs", url)
        for which, url in (("losscast", live[0]), ("torchrun", None))
    )
    curves = [RunFolder(home / "runs" / spec.name).curve(1) for spec in (mine, bare)]
    going = [lambda c=c: c.exists() and len(step_times(c)) > WARM_STEPS for c in curves]
    with through_losscast(mine, head):
        until(going[0], f"{mine.name} to train")
        until(lambda: standby_ready(head), "the standby")
        ours = [head.pid, live[1]]
        with torchrun(bare, home) as pid:  # beside the other: one that stands still for long loses its lease
            until(going[1], f"{bare.name} to train")
            try:
                ran = turns(ours, ours_alone(head, live[1]), [pid], args)
            finally:
                send([*ours, pid], signal.SIGCONT)
    made = [step_times(curves[which]) for which in (0, 1, 1)]
    through, plain, beside = (
        [rate(times, w) for w in windows] for times, windows in zip(made, ran, strict=True)
    )
    return {
        "topology": name,
        "losscast": statistics.median(through),
        "torchrun": statistics.median(plain),
        "ratio": spread(through, plain),
        "idle_ray": spread(beside, plain),
        "over_idle_ray": spread(through, beside),
    }


def spread(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of the ratio of neighbouring windows."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(ours, theirs, strict=True)], n=4)
    return low, middle, high


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=10, help="of each side")
    parser.add_argument("--seconds", type=float, default=3.0, help="of a window")
    parser.add_argument("--only", metavar="WORDS", help="topologies whose name holds this")
    parser.add_argument("--json", metavar="OUT", help="write the table as JSON")
    args = parser.parse_args()
    chosen = [(name, parallel) for name, parallel in TOPOLOGIES if not args.only or args.only in name]
    if not chosen:
        parser.error(f"no topology's name holds {args.only!r}: {', '.join(name for name, _ in TOPOLOGIES)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no Ray is left behind
    os.environ.update({"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"})
    table = []
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        os.environ.setdefault("LOSSCAST_CACHE", str(home / "cache"))
        head = local_ray.start(home / "ray", cpus=2)
        try:
            with monitor(home / "store") as live:
                for name, parallel in chosen:
                    row = compare(name, parallel, args, home, head, live)
                    table.append(row)
                    (low, ratio, high), beside = row["ratio"], row["over_idle_ray"][1]
                    print(
                        f"{name:<16} losscast {row['losscast']:6.2f} steps/s   torchrun {row['torchrun']:6.2f} steps/s   "
                        f"ratio {ratio:.3f} ({low:.3f} to {high:.3f})   over torchrun beside an idle Ray {beside:.3f}",
                        flush=True,
                    )
        finally:
            local_ray.stop(head)
    if args.json:
        Path(args.json).write_text(json.dumps(table, indent=1))
    worst = min(row["ratio"][1] for row in table)
    print(f"worst ratio {worst:.3f}, goal 0.98")
    return 0 if worst >= 0.98 else 1


if __name__ == "__main__":
    sys.exit(main())
