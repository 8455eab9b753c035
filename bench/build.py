"""Peak memory of building a ZeRO-3 engine in shards, over building the whole model on every rank first, on CPU.

    python bench/build.py [--ranks N] [--layers L --width W --context T] [--precision P] [--steps N] [--json OUT]

Both are built by the same processes, one after the other, and trained for a few steps of random tokens. `model` is the peak
while the model is made, `engine` the peak until DeepSpeed has its optimizer's shards too: resident memory of one rank over
what was resident before, the most of any rank. Bytes. The losses must be the same numbers.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from launcher.ports import free_port
from launcher.runspec.accounting import parameter_count
from launcher.runspec.model import RunSpec


def spec_of(args: argparse.Namespace, layers: int, width: int) -> RunSpec:
    """The run: two sequences a rank and step."""
    batch = 2 * args.ranks * args.context
    return RunSpec.from_dict(
        {
            "name": "build",
            "workload": {"layers": layers, "width": width, "heads": 8, "context": args.context},
            "data": {"path": "stdlib"},
            "train": {"tokens": 10 * batch, "batch_tokens": batch, "lr": 1e-3, "precision": args.precision},
            "parallel": {"dp": args.ranks, "zero": 3},
        }
    )


def status_bytes(field: str) -> int:
    """A figure of this process from the kernel."""
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith(field + ":"))


class Peak:
    """The most memory since it was made."""

    def __init__(self) -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        self._before = status_bytes("VmRSS")
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # VmHWM counts from here

    def bytes(self) -> int:
        return status_bytes("VmHWM") - self._before


def build_and_train(spec: RunSpec, whole: bool, steps: int) -> dict[str, Any]:
    """One way of building, on this rank."""
    import torch

    from launcher.training.engine import build_engine, build_model
    from launcher.training.layouts import layout_of

    peak = Peak()
    model = build_model(spec, whole)
    found: dict[str, Any] = {"model": peak.bytes()}
    del model
    peak = Peak()
    engine = build_engine(spec, whole=whole)
    found["engine"] = peak.bytes()
    layout, draw = layout_of(engine, 1, 1), torch.Generator().manual_seed(int(os.environ["RANK"]))
    losses: list[float] = []
    for _ in range(steps):
        rows = torch.randint(0, 256, (2, spec.context + 1), generator=draw)
        part = ((rows[:, :-1].contiguous(),), rows[:, 1:].contiguous())
        layout.update([part], False, lambda: None, lambda loss: losses.append(loss.item()))
    engine.destroy()
    return {**found, "losses": losses}


def rank(args: argparse.Namespace) -> int:
    """Both ways, on this rank; its table goes to the file named by --json. The exit status."""
    import torch

    from launcher.training.engine import join

    warnings.filterwarnings("ignore", category=FutureWarning)
    join()
    torch.set_num_threads(1)
    for whole in (True, False):
        build_and_train(spec_of(args, 1, 16), whole, 1)  # libraries load here
    spec = spec_of(args, args.layers, args.width)
    table = {how: build_and_train(spec, how == "whole", args.steps) for how in ("whole", "sharded")}
    Path(args.json).write_text(json.dumps(table))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("ranks", 2), ("layers", 8), ("width", 512), ("context", 64), ("steps", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--json", metavar="OUT", help="write the table as JSON")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        from launcher.training.ending import end_with

        end_with(lambda: rank(args))
    common = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(args.ranks),
        "LOCAL_WORLD_SIZE": str(args.ranks), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
        # free memory goes back to the system, or the peak would be the allocator's
        "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        ranks = [
            subprocess.Popen(
                [sys.executable, __file__, *sys.argv[1:], "--rank", "--json", f"{scratch}/{r}.json"],
                env={**os.environ, **common, "RANK": str(r), "LOCAL_RANK": str(r)},
                stdout=subprocess.DEVNULL,
            )
            for r in range(args.ranks)
        ]
        if any([process.wait() for process in ranks]):
            return 1
        tables = [json.loads(Path(scratch, f"{r}.json").read_text()) for r in range(args.ranks)]
    count = parameter_count(spec_of(args, args.layers, args.width)) or 0
    answer: dict[str, Any] = {"params": count, "ranks": args.ranks, "precision": args.precision}
    for how in ("whole", "sharded"):
        answer[how] = {k: max(t[how][k] for t in tables) for k in ("model", "engine")}
        answer[how]["losses"] = [t[how]["losses"] for t in tables]
        model, engine = (answer[how][k] / 1e6 for k in ("model", "engine"))
        print(f"{how:<8} model {model:8.1f} MB   engine {engine:8.1f} MB")
    same = answer["whole"]["losses"] == answer["sharded"]["losses"]
    ratio = answer["sharded"]["model"] / answer["whole"]["model"]
    print(
        f"{count / 1e6:.1f}M parameters on {args.ranks} ranks: the model's peak is {ratio:.2f} of the whole one's, "
        f"the losses are {'the same' if same else 'NOT the same'}"
    )
    if args.json:
        Path(args.json).write_text(json.dumps(answer, indent=1))
    return 0 if same and ratio < 1 else 1


if __name__ == "__main__":
    sys.exit(main())
