"""Submit to first step: `losscast submit` against plain `ray job submit` of the same training script, in one run.

    python bench/submit.py [--pairs N] [--ranks R]

Both go to one local Ray with token authentication, in turns, each with a fresh run. The clock starts before the
command's process does and stops at the time that the first optimizer step wrote into the run's curve. Plain means:
`ray job submit --no-wait -- torchrun --nproc-per-node R -m launcher.worker run.yaml`, the same worker without
losscast's driver, placement, ownership hand-over and plan. Goal: a ratio of at most 1.1.
"""

import argparse
import csv
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from launcher.jobs import local_ray

SPEC = """
name: {name}
workload: {{kind: gpt, layers: 2, width: 16, heads: 1, context: 64}}
data: {{path: stdlib, holdout_tokens: 8192}}
train: {{tokens: 5120, batch_tokens: 512, lr: 0.01}}
parallel: {{dp: {ranks}, zero: 1}}
checkpoints: {{url: {runs}, every_steps: 100}}
"""
PATIENCE_S = 180.0


def first_step(folder: Path, name: str) -> float:
    """When the run's first step was done, seconds since the epoch. Waits for it."""
    until = time.monotonic() + PATIENCE_S
    path = folder / "runs" / name / "attempts" / "1" / "curve.csv"
    while time.monotonic() < until:
        try:
            with path.open(newline="") as file:
                row = next(csv.DictReader(file), None)
            if row is not None and row.get("time"):
                return float(row["time"])
        except (OSError, ValueError):
            pass
        time.sleep(0.2)
    raise SystemExit(f"{name}: no step within {PATIENCE_S:.0f} s; see {folder}")


def finished(folder: Path, name: str) -> None:
    """Wait until the run has ended, so that it is not in the next one's way."""
    until = time.monotonic() + PATIENCE_S
    while not (folder / "runs" / name / "result.json").exists() and time.monotonic() < until:
        time.sleep(0.2)
    time.sleep(2.0)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no Ray is left behind
    if args.pairs < 1 or args.ranks < 1:
        parser.error("--pairs and --ranks are 1 or more")
    with tempfile.TemporaryDirectory(prefix="losscast-bench-") as temporary:
        folder = Path(temporary)
        home = folder / "home"
        env = {
            **os.environ,
            "LOSSCAST_HOME": str(home),
            "LOSSCAST_CACHE": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        os.environ.update({k: env[k] for k in ("LOSSCAST_CACHE", "OMP_NUM_THREADS", "DS_ACCELERATOR")})
        head = local_ray.start(home / "ray", cpus=max(2, args.ranks))
        losscast = [sys.executable, "-m", "launcher.cli", "submit"]
        ray = [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "job",
            "submit",
            "--no-wait",
            "--address",
            head.dashboard,
            "--",
        ]
        torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={args.ranks}"]
        seconds: dict[str, list[float]] = {"losscast": [], "plain": []}
        try:
            for pair in range(
                -1, args.pairs
            ):  # the first pair makes the corpus and warms the disk; it is not counted
                for kind in ("losscast", "plain") if pair % 2 else ("plain", "losscast"):
                    name = f"{kind}-{pair + 1}"
                    spec = folder / f"{name}.yaml"
                    spec.write_text(SPEC.format(name=name, ranks=args.ranks, runs=folder / "runs"))
                    port = f"--master-port={local_ray.free_port()}"
                    plain = [*ray, *torchrun, port, "-m", "launcher.worker", str(spec)]
                    command = plain if kind == "plain" else [*losscast, str(spec), "--yes"]
                    began = time.time()
                    done = subprocess.run(
                        command, env={**env, **head.environment()}, capture_output=True, text=True
                    )
                    if done.returncode:
                        raise SystemExit(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")
                    took = first_step(folder, name) - began
                    finished(folder, name)
                    if pair >= 0:
                        seconds[kind].append(took)
                        print(f"pair {pair + 1}  {kind:<8}  {took:6.2f} s", flush=True)
        finally:
            local_ray.stop(head)
    best = {k: min(v) for k, v in seconds.items()}
    middle = {k: statistics.median(v) for k, v in seconds.items()}
    for kind in seconds:
        print(f"{kind:<8}  best {best[kind]:.2f} s   median {middle[kind]:.2f} s")
    ratio = statistics.median(a / b for a, b in zip(seconds["losscast"], seconds["plain"], strict=True))
    print(f"losscast over plain: {ratio:.2f} (median of {args.pairs} pairs); goal 1.1")
    return 0 if ratio <= 1.1 else 1


if __name__ == "__main__":
    sys.exit(main())
