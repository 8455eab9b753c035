"""Estimated against measured peak memory of one rank, on CPU, for sizes that train here.

    python bench/memory.py [--only WORDS] [--json OUT]

Each case trains three steps in fresh processes (`launcher.plan.measure`: gloo, peak resident memory over what was resident
before). Bytes of the largest rank of each pipeline stage. Goal: within 15%.
"""

import argparse
import json
import sys
from typing import Any

from launcher.plan.measure import measured_peaks
from launcher.runspec.model import RunSpec
from launcher.training.memory import rank_memory

SMALL = {"layers": 4, "width": 384}
MIDDLE = {"layers": 8, "width": 512}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("7M zero0 dp1", {**SMALL, "zero": 0, "dp": 1}),
    ("7M zero1 dp1", {**SMALL, "zero": 1, "dp": 1}),
    ("7M zero1 dp2", {**SMALL, "zero": 1, "dp": 2}),
    ("25M zero0 dp2", {**MIDDLE, "zero": 0, "dp": 2}),
    ("25M zero1 dp2", {**MIDDLE, "zero": 1, "dp": 2}),
    ("25M zero2 dp2", {**MIDDLE, "zero": 2, "dp": 2}),
    ("25M zero3 dp2", {**MIDDLE, "zero": 3, "dp": 2}),
    ("25M zero1 dp2, long batch", {**MIDDLE, "zero": 1, "dp": 2, "micro": 8}),
    ("34M zero1 dp2, large vocabulary", {**MIDDLE, "zero": 1, "dp": 2, "vocab": 16384}),
    ("25M zero1 dp2, recomputed", {**MIDDLE, "zero": 1, "dp": 2, "micro": 8, "recompute": True}),
    ("25M zero1 dp2, offloaded", {**MIDDLE, "zero": 1, "dp": 2, "offload": "cpu"}),
    ("25M zero2 dp2, offloaded", {**MIDDLE, "zero": 2, "dp": 2, "offload": "cpu"}),
    ("25M zero3 dp2, offloaded", {**MIDDLE, "zero": 3, "dp": 2, "offload": "cpu"}),
    ("25M zero2 dp2, one micro-batch", {**MIDDLE, "zero": 2, "dp": 2, "parts": 1}),
    ("25M zero0 pp2", {**MIDDLE, "zero": 0, "pp": 2, "parts": 4}),
    ("25M zero1 pp2", {**MIDDLE, "zero": 1, "pp": 2, "parts": 4}),
    ("25M zero1 pp2, long batch", {**MIDDLE, "zero": 1, "pp": 2, "parts": 4, "micro": 4}),
    ("25M zero1 pp2, recomputed", {**MIDDLE, "zero": 1, "pp": 2, "parts": 4, "micro": 4, "recompute": True}),
    ("34M zero1 pp2, large vocabulary", {**MIDDLE, "zero": 1, "pp": 2, "parts": 4, "vocab": 16384}),
    ("25M zero0 tp2", {**MIDDLE, "zero": 0, "tp": 2}),
    ("25M zero1 tp2", {**MIDDLE, "zero": 1, "tp": 2}),
    ("25M zero2 tp2, long batch", {**MIDDLE, "zero": 2, "tp": 2, "micro": 4}),
]


def spec_of(case: dict[str, Any]) -> RunSpec:
    """The run of one case."""
    micro, dp, context = case.get("micro", 2), case.get("dp", 1), 256
    batch = micro * dp * context * case.get("parts", 2)
    parallel = {k: case.get(k, 1) for k in ("dp", "pp", "tp")}
    return RunSpec.from_dict(
        {
            "name": "memory",
            "workload": {k: case[k] for k in ("layers", "width")}
            | {"heads": 8, "context": context, "vocab": case.get("vocab", 256)},
            "data": {"path": "stdlib"},
            "train": {"tokens": 3 * batch, "batch_tokens": batch, "lr": 1e-3, "precision": "fp32"},
            "parallel": parallel
            | {
                "zero": case["zero"],
                "micro_batch": micro,
                "offload": case.get("offload", "none"),
                "activation_checkpointing": case.get("recompute", False),
            },
        }
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="OUT", help="write the table as JSON")
    parser.add_argument("--only", metavar="WORDS", help="cases whose name holds this")
    args = parser.parse_args()
    chosen = [(name, case) for name, case in CASES if not args.only or args.only in name]
    if not chosen:
        parser.error(f"no case's name holds {args.only!r}: {'; '.join(name for name, _ in CASES)}")
    table, worst = [], 0.0
    for name, case in chosen:
        spec = spec_of(case)
        stages, peaks = rank_memory(spec) or [], measured_peaks(spec, timeout_s=1200.0)
        for stage, parts in enumerate(stages):
            # ranks of a stage lie together; on CPU the host's share is in the same memory
            share = len(peaks) // len(stages)
            measured = max(peaks[stage * share : (stage + 1) * share])
            estimated = parts.total + parts.host
            worst = max(worst, abs(estimated / measured - 1))
            row = {"case": name, "stage": stage, "estimated": estimated, "measured": measured}
            table.append({**row, "parts": parts.to_dict()})
            which = f"{name}, stage {stage}" if len(stages) > 1 else name
            print(
                f"{which:<42} estimated {estimated / 1e6:7.1f} MB   measured {measured / 1e6:7.1f} MB   "
                f"ratio {estimated / measured:.2f}",
                flush=True,
            )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(table, file, indent=1)
    print(f"worst error {worst:.0%}, goal 15%")
    return 0 if worst <= 0.15 else 1


if __name__ == "__main__":
    sys.exit(main())
