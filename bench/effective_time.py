"""Effective training time on 1,024 and 16,384 GPUs, simulated from failure rates that were published and recovery costs
that are assumed. What it means for planning: docs/scale.md.

    python bench/effective_time.py [--days 54] [--restart-s 60] [--store-gb-s 60] ...

Effective time is the share of wall-clock time spent on steps that still count. Failures arrive as a Poisson process
with the published mean time between failures:

    1,024 GPUs     7.9 h    Kokolis et al. 2024, arXiv:2410.21680; here with 70e9 parameters
    16,384 GPUs    1.8 h    the same, a projection; here with 405e9. (Llama 3, arXiv:2407.21783, met 419 in 54 days: 3.1 h)

Between failures the run trains for an interval, then stands still while each host of 8 GPUs writes its share of the
checkpoint (14 bytes a parameter) to local disk at `disk_gb_s`. The upload goes on beside training, all hosts together at
`store_gb_s`; a failure before its end loses that checkpoint. A failure costs: the steps since the newest uploaded
checkpoint; `detect_s`, or, where it shows only as a hang (a share `hangs`), `hang_s`; `restart_s`; and where a host has to be
replaced (a share `replace`) `replace_s`, until a spare has joined. A failure during a restart starts it again. The
interval is Young's, sqrt(2 save_s MTBF), and at least as long as an upload takes. No failure is silent, and nothing but
failures costs time.

The output says of each cost whether it was measured, and where, or is assumed. Save, upload, hang and replacement are
arithmetic on bytes and bandwidths, not measurements. Of restart, two CPU cores show only that one on warm processes takes
0.7 s from SIGKILL to the first new step; a cluster's is longer: collective set-up over thousands of ranks and loading shards from
storage. So the table has a few seconds, a minute, and five minutes; which of them holds on a given cluster has not been measured.
"""

import argparse
import itertools
import json
import math
import random
import sys

FLEETS: tuple[tuple[int, float, float, float], ...] = ((1024, 7.9, 70e9, 0.97), (16384, 1.8, 405e9, 0.95))
"""GPUs, hours between failures, parameters trained on them, and the share to reach."""
BYTES = 14
"""A parameter in a checkpoint: bf16 weights, fp32 master weights and two moments."""

SOURCES: dict[str, tuple[str, str]] = {
    "hours_between_failures": ("published", "Kokolis et al. 2024; 16,384 GPUs is their projection"),
    "detect_s": ("assumed", "of a process that ends; on one machine of 2 CPU cores Ray told of it within a tenth of a second"),
    "restart_s": ("assumed", "a range: 2 CPU cores show 0.7 s from SIGKILL to the first new step on warm processes (bench/recovery.py); no cluster was at hand"),
    "save_s": ("assumed", "14 bytes a parameter over --disk-gb-s a host: arithmetic"),
    "upload_s": ("assumed", "the same bytes over --store-gb-s: arithmetic on a published limit of Azure, no account was at hand"),
    "hangs": ("assumed", "share of failures that only hang"),
    "hang_s": ("assumed", "what launcher.recovery.hang waits for steps of 30 s: its rule, not a measurement"),
    "replace": ("assumed", "share of failures that take a host"),
    "replace_s": ("assumed", "a spare host that is held ready; with none it is the cloud's time for a new one"),
    "training beside an upload": ("assumed", "costs nothing here"),
}  # fmt: skip
"""Where each cost comes from."""


def told_sources() -> list[str]:
    """For people: what the percentages rest on."""
    found = [f"{how:9s}  {name}: {why}" for name, (how, why) in SOURCES.items()]
    none = [name for name, (how, _) in SOURCES.items() if how == "assumed"]
    return [
        *found,
        f"{len(none)} of {len(SOURCES)} are assumed: read the figures as a plan, not as a result.",
    ]


def effective(
    mtbf_s: float,
    total_s: float,
    *,
    save_s: float,
    upload_s: float,
    detect_s: float,
    hangs: float,
    hang_s: float,
    restart_s: float,
    replace: float,
    replace_s: float,
    dice: random.Random,
) -> tuple[float, int]:
    """Share of `total_s` that became kept steps, and the failures met. One simulated run."""
    interval = max(upload_s, math.sqrt(2 * save_s * mtbf_s))
    now = kept = 0.0
    failures = 0
    next_failure = dice.expovariate(1 / mtbf_s)
    done: float = 0.0  # seconds of training since the checkpoint that a resume would take
    pending: list[
        tuple[float, float]
    ] = []  # (when the upload ends, seconds of training it holds beyond that one)
    while now < total_s:
        slice_end = now + interval
        if next_failure > min(slice_end + save_s, total_s):
            trained = min(interval, total_s - now)
            done += trained
            now += trained + save_s
            pending.append((now + upload_s, done))
        else:
            failures, failed = failures + 1, next_failure
            done += max(0.0, min(next_failure, slice_end) - now)
            now = failed
            while True:  # a failure during a restart starts it again
                down = hang_s if dice.random() < hangs else detect_s
                down += restart_s + (replace_s if dice.random() < replace else 0.0)
                gap = dice.expovariate(1 / mtbf_s)
                if gap >= down:
                    now, next_failure = now + down, now + gap
                    break
                now += gap
                failures += 1
            safe = max((held for when, held in pending if when <= failed), default=0.0)
            kept, done, pending = kept + safe, 0.0, []
    return min(1.0, (kept + done) / total_s), failures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--days", type=float, default=54.0)
    parser.add_argument("--runs", type=int, default=40, help="simulated runs a row")
    parser.add_argument("--disk-gb-s", type=float, default=2.0, help="of one host, for a snapshot")
    parser.add_argument(
        "--store-gb-s",
        type=float,
        nargs="*",
        default=[7.5, 60.0],
        help="of all uploads together; 7.5 is the 60 Gbit/s that one Azure storage account takes in by default",
    )
    parser.add_argument("--detect-s", type=float, default=1.0)
    parser.add_argument("--hangs", type=float, default=0.1, help="share of failures that only hang")
    parser.add_argument("--hang-s", type=float, default=90.0, help="3 x p99 of a step, 30 s at least")
    parser.add_argument("--restart-s", type=float, nargs="*", default=[5.0, 60.0, 300.0])
    parser.add_argument("--replace", type=float, default=0.5, help="share of failures that take a host")
    parser.add_argument("--replace-s", type=float, default=60.0, help="until a spare host has joined")
    args = parser.parse_args()
    for line in told_sources():
        print(line, file=sys.stderr)
    rows = []
    for fleet, costs in itertools.product(FLEETS, itertools.product(args.store_gb_s, args.restart_s)):
        gpus, hours, params, goal = fleet
        store_gb_s, restart_s = costs
        save_s = params * BYTES / (gpus / 8) / (args.disk_gb_s * 1e9)
        upload_s = params * BYTES / (store_gb_s * 1e9)
        dice = random.Random(0)
        found = [
            effective(
                hours * 3600, args.days * 86400, save_s=save_s, upload_s=upload_s, detect_s=args.detect_s,
                hangs=args.hangs, hang_s=args.hang_s, restart_s=restart_s, replace=args.replace,
                replace_s=args.replace_s, dice=dice,
            )
            for _ in range(args.runs)
        ]  # fmt: skip
        shares = sorted(share for share, _ in found)
        row = {
            "gpus": gpus, "hours_between_failures": hours, "store_gb_s": store_gb_s, "restart_s": restart_s,
            "save_s": round(save_s, 2), "upload_s": round(upload_s, 1),
            "interval_s": round(max(upload_s, math.sqrt(2 * save_s * hours * 3600))),
            "effective": round(sum(shares) / len(shares), 4), "worst": round(shares[0], 4),
            "failures": round(sum(n for _, n in found) / len(found), 1), "reach_for": goal,
        }  # fmt: skip
        rows.append(row)
        print(
            f"{gpus:6d} GPUs, store {store_gb_s:4.1f} GB/s, restart {restart_s:3.0f} s: {100 * row['effective']:.2f}% effective "
            f"(worst of {args.runs}: {100 * row['worst']:.2f}%), save {save_s:.1f} s every {row['interval_s']} s, upload "
            f"{upload_s:.0f} s, {row['failures']:.0f} failures in {args.days:.0f} days; reach for {100 * goal:.0f}%",
            file=sys.stderr,
        )
    sources = {name: {"from": how, "what": why} for name, (how, why) in SOURCES.items()}
    print(json.dumps({"settings": vars(args), "sources": sources, "rows": rows}))


if __name__ == "__main__":
    main()
