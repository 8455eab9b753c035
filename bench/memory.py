"""Estimated against measured peak memory of one rank, on CPU, for sizes that train here.

    python bench/memory.py [--only WORDS] [--json OUT]

Each case trains three steps in fresh processes (`launcher.measure`: gloo, peak resident memory over what was resident
before). Bytes of the largest rank. Goal: within 15%.
"""

import argparse
import json
import sys
from typing import Any

from launcher.measure import measured_peaks
from launcher.memory import rank_memory
from launcher.spec import RunSpec

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
]


def spec_of(case: dict[str, Any]) -> RunSpec:
    """The run of one case."""
    micro, dp, context = case.get("micro", 2), case["dp"], 256
    batch = micro * dp * context * 2
    return RunSpec.from_dict(
        {
            "name": "memory",
            "workload": {k: case[k] for k in ("layers", "width")}
            | {"heads": 8, "context": context, "vocab": case.get("vocab", 256)},
            "data": {"path": "stdlib"},
            "train": {"tokens": 3 * batch, "batch_tokens": batch, "lr": 1e-3, "precision": "fp32"},
            "parallel": {"dp": dp, "zero": case["zero"], "micro_batch": micro},
        }
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="OUT", help="write the table as JSON")
    parser.add_argument("--only", metavar="WORDS", help="cases whose name holds this")
    args = parser.parse_args()
    table, worst = [], 0.0
    for name, case in CASES:
        if args.only and args.only not in name:
            continue
        spec = spec_of(case)
        parts = (rank_memory(spec) or [])[0]
        measured = max(measured_peaks(spec))
        worst = max(worst, abs(parts.total / measured - 1))
        table.append({"case": name, "estimated": parts.total, "measured": measured, "parts": parts.to_dict()})
        print(
            f"{name:<34} estimated {parts.total / 1e6:7.1f} MB   measured {measured / 1e6:7.1f} MB   "
            f"ratio {parts.total / measured:.2f}",
            flush=True,
        )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(table, file, indent=1)
    print(f"worst error {worst:.0%}, goal 15%")
    return 0 if worst <= 0.15 else 1


if __name__ == "__main__":
    sys.exit(main())
