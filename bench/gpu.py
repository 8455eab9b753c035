"""The gpt workload on this machine's GPUs, under torchrun: tokens/s and MFU in bf16 by ZeRO stage, reporter on and off.

    python bench/gpu.py [--steps N] [--rounds N] [--layers L --width W --heads H --context T] [--batch-tokens N] [--json OUT]

Reporter on is a live monitor on this machine that gets every step; rounds alternate with it off. tokens/s is the batch over the
median time between steps, the first quarter left out. MFU counts 6 FLOPs a parameter and token, and attention scores without
taking the causal half off (`launcher.runspec.accounting`), over the dense bf16 peak of `launcher.runspec.gpus`. Goal: tokens/s with the
reporter at least 0.995 of that without. Without a GPU it says so and measures nothing.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from steps import monitor, step_times, torchrun_command

from launcher.runspec.accounting import attention_flops_per_token, flops_per_token
from launcher.runspec.gpus import gpu_named
from launcher.runspec.model import RunSpec
from launcher.storage.runfolder import RunFolder


def spec_of(
    name: str, args: argparse.Namespace, zero: int, ranks: int, runs: Path, url: str | None
) -> RunSpec:
    """One case: data parallel over all GPUs."""
    return RunSpec.from_dict(
        {
            "name": name,
            "workload": {k: getattr(args, k) for k in ("layers", "width", "heads", "context")},
            "data": {"path": "stdlib", "holdout_tokens": 2 * args.context},
            "train": {
                "tokens": args.steps * args.batch_tokens,
                "batch_tokens": args.batch_tokens,
                "lr": 1e-4,
                "precision": "bf16",
            },
            "parallel": {"dp": ranks, "zero": zero},
            "cluster": {"gpus_per_node": ranks, "gpu": args.gpu},
            "checkpoints": {"url": str(runs), "every_steps": 10 * args.steps, "keep": 1},
            **({"monitor": {"url": url}} if url else {}),
        }
    )


def step_seconds(spec: RunSpec, home: Path, left_out: float = 0.25) -> float:
    """Train it under torchrun: median seconds between steps, a first share left out. Raises RuntimeError with what it said
    when it fails."""
    done = subprocess.run(torchrun_command(spec, home), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{spec.name}: {done.stderr[-2000:]}")
    times = step_times(RunFolder(home / "runs" / spec.name).curve(1))
    times = times[int(left_out * len(times)) :]
    return statistics.median(b - a for a, b in itertools.pairwise(times))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    for name, default in (("layers", 12), ("width", 1024), ("heads", 16), ("context", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batch-tokens", type=int, default=131_072)
    parser.add_argument("--json", metavar="OUT", help="write the dated table as JSON")
    args = parser.parse_args()
    try:
        import torch
    except ImportError:
        print("skipped: torch is not installed here")
        return 0
    if not torch.cuda.is_available():
        print("skipped: no GPU here")
        return 0
    ranks, args.gpu = torch.cuda.device_count(), torch.cuda.get_device_name(0)
    known = gpu_named(args.gpu)
    peak = known.bf16_flops if known else None
    table: list[dict[str, Any]] = []
    worst = 1.0
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        os.environ.setdefault("LOSSCAST_CACHE", str(home / "cache"))
        with monitor(home / "store") as (url, _):
            for zero in (0, 1, 2, 3):
                rates: dict[str, list[float]] = {"off": [], "on": []}
                for turn in range(args.rounds):
                    for how in rates:
                        name = f"z{zero}-{how}-{turn}"
                        spec = spec_of(name, args, zero, ranks, home / "runs", url if how == "on" else None)
                        rates[how].append(args.batch_tokens / step_seconds(spec, home))
                off, on = (statistics.median(rates[how]) for how in ("off", "on"))
                work = (flops_per_token(spec) or 0.0) + attention_flops_per_token(spec)
                mfu = work * on / (peak * ranks) if peak else None
                worst = min(worst, on / off)
                table.append(
                    {"zero": zero, "tokens_per_s": {"off": off, "on": on}, "ratio": on / off, "mfu": mfu}
                )
                said = "peak unknown" if mfu is None else f"MFU {mfu:.1%}"
                print(
                    f"zero {zero}: {off:10.0f} tokens/s, {on:10.0f} with the reporter, ratio {on / off:.4f}, {said}",
                    flush=True,
                )
    if args.json:
        day = time.strftime("%Y-%m-%d", time.gmtime())
        head = {
            "date": day,
            "gpus": ranks,
            "gpu": args.gpu,
            "torch": torch.__version__,
            "settings": vars(args),
        }
        Path(args.json).write_text(json.dumps({**head, "table": table}, indent=1))
    print(f"{ranks} x {args.gpu}; worst ratio {worst:.4f}, goal 0.995")
    return 0 if worst >= 0.995 else 1


if __name__ == "__main__":
    sys.exit(main())
