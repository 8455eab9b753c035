"""How long the commands take that start nothing: seconds of wall clock, best and median of several runs.

    python bench/commands.py [--runs N]

Goal: `losscast --help` 0.3 s, `plan` 1 s.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

EXAMPLE = str(Path(__file__).parents[1] / "examples" / "gpt-125m.yaml")
CASES = [
    ("--help", ["--help"], 0.3),
    ("validate", ["validate", EXAMPLE], 1.0),
    ("plan", ["plan", EXAMPLE], 1.0),
]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    fine = True
    for name, words, goal in CASES:
        seconds = []
        for _ in range(args.runs):
            began = time.perf_counter()
            subprocess.run(
                [sys.executable, "-c", "import sys; from launcher.cli import main; sys.exit(main())", *words],
                check=True,
                capture_output=True,
            )
            seconds.append(time.perf_counter() - began)
        fine &= min(seconds) <= goal
        print(
            f"losscast {name:<9} best {min(seconds):.3f} s   median {statistics.median(seconds):.3f} s   goal {goal} s"
        )
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
