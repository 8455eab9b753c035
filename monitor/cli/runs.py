"""`losscast runs`: every run that a monitor knows, for a person or as JSON for whatever comes next."""

import argparse
import json
import shutil
import sys
from typing import Any

from monitor.cli.watch import asking, where


def register(commands: Any) -> None:
    """Add `runs` to the command."""
    p = commands.add_parser(
        "runs",
        help="the runs of a monitor, with state, loss, predicted end and advice",
        description="Every run a monitor knows, the most urgent first. `losscast ls` lists what the storage holds "
        "and asks no monitor.",
    )
    p.add_argument("--json", action="store_true", help="as GET /v1/runs answers, the most urgent first")
    p.add_argument("--find", default="", metavar="TEXT", help="only runs whose name or team holds this")
    p.add_argument("--alerts", action="store_true", help="only runs that are off their line or worse")
    where(p)
    p.set_defaults(func=runs)


def runs(args: argparse.Namespace) -> int:
    """Ask once, print all."""
    from monitor.web.terminal import order, runs_frame, urgency

    found = sorted(asking(args)("/v1/runs")["runs"], key=order)
    chosen = [
        run
        for run in found
        if args.find.lower() in f"{run['run']} {run.get('team') or ''}".lower()
        and (not args.alerts or urgency(run) < 2)
    ]
    if args.json:
        print(json.dumps({"runs": chosen}))
        return 0
    if found and not chosen:
        print(f"losscast: none of {len(found)} runs matches", file=sys.stderr)
        return 0
    width = shutil.get_terminal_size((100, 24)).columns
    print("\n".join(runs_frame(chosen, width=width, height=len(chosen) + 5)))
    return 0
