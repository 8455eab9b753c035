"""The demo's result on five seeds: predicted, actual, error, interval, and how soon each drill was called.

    python bench/demo_seeds.py [SEED ...]        about five minutes a seed on two cores

Every seed is a whole `losscast demo` of its own: other initial weights, another data order, the same recipe. All are
printed, whatever they are.
"""

import json
import subprocess
import sys
import tempfile
import time


def main(seeds: list[int]) -> int:
    print(
        f"{'seed':>4} {'predicted':>9} {'90% interval':>17} {'actual':>8} {'error':>7} {'inside':>6} {'false':>5}  drills: steps to the first call, to the page; in Prometheus; time; memory"
    )
    errors, inside = [], 0
    for seed in seeds:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as out:
            done = subprocess.run(
                [sys.executable, "-m", "launcher.cli", "demo", "--json", "--seed", str(seed), "--out", out],
                stdout=subprocess.PIPE,
                text=True,
                check=False,
            )
        if done.returncode != 0:
            print(f"{seed:>4} failed with exit status {done.returncode}")
            continue
        data = json.loads(done.stdout)
        target, q = data["target"], data["target"]["predicted"]
        errors.append(abs(target["error_percent"]))
        inside += target["inside"]
        drills = []
        for d in data["drills"]:
            called = "never" if d["called_step"] is None else d["called_step"] - d["fault_step"]
            paged = "never" if d["paged_step"] is None else d["paged_step"] - d["fault_step"]
            drills.append(
                f"{d['name']}: {called}, {paged}; {', '.join((d['prometheus'] or {}).get('alerts', [])) or 'none'}"
            )
        print(
            f"{seed:>4} {q['p50']:>9.4f} {q['p05']:>8.4f}-{q['p95']:.4f} {target['actual']:>8.4f} {target['error_percent']:>+6.2f}% "
            f"{'yes' if target['inside'] else 'no':>6} {len(target['alerts']):>5}  {' | '.join(drills)}; "
            f"{time.monotonic() - began:.0f} s; {data['machine']['peak_memory_gib']} GiB",
            flush=True,
        )  # fmt: skip
    print(
        f"median error {sorted(errors)[len(errors) // 2]:.2f}%, {inside} of {len(errors)} inside the 90% interval"
        if errors
        else "none finished"
    )
    return 0 if len(errors) == len(seeds) else 1


if __name__ == "__main__":
    sys.exit(main([int(a) for a in sys.argv[1:]] or [0, 1, 2, 3, 4]))
