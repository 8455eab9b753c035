"""SIGKILL of a worker to the first new step: losscast beside Ray Train's default, the same job on the same machine in one run.

    python bench/recovery.py [--rounds 3] [--actor]

The job is a ZeRO-1 gpt on two ranks with a checkpoint every 20 steps. Both sides train with the same worker
(`launcher.training.loop.train`) and resume from the newest verified checkpoint; Ray Train's own part is what restarts it
(TorchTrainer, FailureConfig, nothing else changed). Rounds of the two alternate, each on a Ray cluster of its own, so that
both see the same machine. Seconds, by the clock that also stamps each step in curve.csv. `--actor` kills losscast's Ray
actor, which owns the process that trains, instead of that process; Ray Train's worker is its actor.
"""

import argparse
import importlib.util
import json
import os
import shlex
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launcher.jobs import local_ray
from launcher.jobs.cluster import Cluster
from launcher.storage.runfolder import RunFolder, write_whole
from tests.faults.training import command_line, spec_of, start, until

STEPS = 100_000
RAY_TRAIN_NEEDS = ("pandas", "fsspec", "tensorboardX")
TRAIN = """
import os, sys
import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

def loop(config):
    import torch.distributed as dist
    from launcher.data.tokens import cache_folder
    from launcher.training import loop as worker
    from launcher.training.assignment import Assignment
    from launcher.training.engine import join
    from launcher.training.saving import newest_verified
    from launcher.storage.remote import store_of
    from launcher.storage.runfolder import RunFolder, read_json
    from launcher.storage.runlog import RunLog
    os.environ["OMP_NUM_THREADS"] = "1"
    join()
    told = [None]
    if dist.get_rank() == 0:
        folder = RunFolder.at(config["folder"])
        # a lease of half a second: what a killed worker held must not count against Ray Train
        holding = RunLog(store_of(folder), folder.name, term_s=0.5).take("ray-train")
        resume = newest_verified(folder, print)
        told[0] = Assignment(
            spec=read_json(folder.spec), folder=folder.address, attempt=holding.attempt, cache=str(cache_folder()),
            resume_step=resume.step if resume else 0, resume_from=str(resume.path) if resume else None,
        )
    dist.broadcast_object_list(told, src=0)
    worker.train(told[0])

ray.init(log_to_driver=False)
TorchTrainer(
    loop, train_loop_config={"folder": sys.argv[1]}, scaling_config=ScalingConfig(num_workers=2),
    run_config=RunConfig(storage_path=sys.argv[2], failure_config=FailureConfig(max_failures=3)),
).fit()
"""


def first_step(folder: RunFolder, attempt: int) -> float:
    """When the attempt made its first step, seconds since the epoch."""

    def row() -> str:
        try:
            lines = folder.curve(attempt).read_text().splitlines()
        except OSError:
            return ""
        return lines[1] if len(lines) > 2 else ""

    return float(until(row, f"a step of attempt {attempt}", 400.0).rsplit(",", 1)[1])


def losscast(home: Path, kill_actor: bool) -> tuple[float, float]:
    """Seconds from submit to the first step, and from the kill to the first new one."""
    head = local_ray.start(home / "ray", cpus=2)
    try:
        began = time.time()
        run = start(spec_of(home, "ours", steps=STEPS), head)
        started = first_step(run.folder, 1) - began
        run.reached(100, attempt=1)
        victim = (run.actors() if kill_actor else run.training())[-1]
        killed = time.time()
        os.kill(victim, signal.SIGKILL)
        return started, first_step(run.folder, 2) - killed
    finally:
        local_ray.stop(head)


def ray_train(home: Path) -> tuple[float, float]:
    """The same of Ray Train, handed in as a job as well."""
    head = local_ray.start(home / "ray", cpus=3)  # its controller takes a CPU slot too
    spec = spec_of(home, "theirs", steps=STEPS)
    folder = RunFolder.of(spec.checkpoints.url, spec.name)
    write_whole(folder.spec, spec.to_dict())
    (home / "train.py").write_text(TRAIN)
    variables = {
        "RAY_AUTH_MODE": "token", "RAY_TRAIN_V2_ENABLED": "1", "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]), "LOSSCAST_CACHE": os.environ.get("LOSSCAST_CACHE", ""),
    }  # fmt: skip
    cluster = Cluster(head.dashboard, head.environment())
    words = (sys.executable, str(home / "train.py"), str(folder.path), str(home / "storage"))
    try:
        began = time.time()
        cluster.submit(
            {
                "entrypoint": shlex.join(words),
                "submission_id": "theirs",
                "runtime_env": {"env_vars": {k: v for k, v in variables.items() if v}},
            }
        )
        started = first_step(folder, 1) - began
        until(lambda: len(folder.curve(1).read_text().splitlines()) > 100, "step 100")
        workers = [p for p in local_ray.descendants(head.pid) if "RayTrainWorker" in command_line(p)]
        killed = time.time()
        os.kill(workers[-1], signal.SIGKILL)
        return started, first_step(folder, 2) - killed
    except AssertionError:
        print(cluster.log("theirs")[-3000:], file=sys.stderr)
        raise
    finally:
        local_ray.stop(head)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--actor", action="store_true")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no Ray is left behind
    missing = [name for name in RAY_TRAIN_NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"Ray Train needs {', '.join(missing)}: pip install -e '.[bench]'")
    ours, theirs = [], []
    for n in range(args.rounds):
        with tempfile.TemporaryDirectory(prefix="lc-bench-") as folder:
            (Path(folder) / "a").mkdir()
            (Path(folder) / "b").mkdir()
            ours.append(losscast(Path(folder) / "a", args.actor))
            theirs.append(ray_train(Path(folder) / "b"))
        print(
            f"round {n + 1}: kill to first new step: losscast {ours[-1][1]:.1f} s, Ray Train {theirs[-1][1]:.1f} s "
            f"(start to first step {ours[-1][0]:.1f}, {theirs[-1][0]:.1f}; load {os.getloadavg()[0]:.1f})",
            file=sys.stderr,
        )
    mine, his = (statistics.median(r[1] for r in rows) for rows in (ours, theirs))
    print(
        json.dumps(
            {
                "killed": "actor" if args.actor else "training process",
                "losscast_s": [round(r[1], 2) for r in ours], "ray_train_s": [round(r[1], 2) for r in theirs],
                "median_losscast_s": round(mine, 2), "median_ray_train_s": round(his, 2),
                "ratio": round(mine / his, 3),
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
