"""`losscast janitor`: delete old checkpoints, as an identity that may. A trainer at az:// deletes nothing itself."""

import argparse
import json
import sys
import time
from typing import Any

from launcher.cli.finding import seconds


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "janitor",
        help="delete old checkpoints of runs, never the newest that verifies",
        description="Keep of each run its newest committed checkpoints, the newest one that verifies, what a rollback would need, "
        "and every Nth step; delete the others, and what attempts that died left behind. At az:// the trainer's identity needs no right to delete: this "
        "command runs as one that has it, once or every so often.",
    )
    parser.add_argument(
        "place",
        metavar="PLACE",
        help="a run (run.yaml, folder, az://.../name), or a spec's checkpoints.url: every run there",
    )
    parser.add_argument(
        "--keep", type=_count, metavar="K", help="newest commits to keep (default: what each run's spec says)"
    )
    parser.add_argument("--every-nth", type=_count, metavar="N", help="keep also those of every Nth step")
    parser.add_argument("--every", type=seconds, metavar="S", help="go on, a round every S seconds")
    parser.add_argument("--dry-run", action="store_true", help="delete nothing, print what would go")
    parser.add_argument("--json", action="store_true", help="print a JSON object a round")
    parser.set_defaults(func=run)


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: give a whole number from 1 on")
    return value


def run(args: argparse.Namespace) -> int:
    while True:
        status = one_round(args)
        if args.every is None:
            return status
        time.sleep(max(1.0, args.every))


def one_round(args: argparse.Namespace) -> int:
    """Look at every run once. A run that can't be cleaned is said, and the others go on."""
    from infra.objects import Missing
    from launcher.errors import Failed, WrongInput, one_line
    from launcher.storage.remote import store_of
    from launcher.storage.retention import Onsets, retain
    from launcher.storage.runlog import RunLog

    answers, bad = [], 0
    for folder in runs_at(args.place):
        store = store_of(folder)
        try:
            spec = json.loads(store.get("spec.json"))
            keep = args.keep or int(spec["checkpoints"]["keep"])
            onsets = Onsets.of(spec, folder.name)
            gone = retain(
                store,
                RunLog(store, folder.name),
                keep,
                args.every_nth,
                dry=args.dry_run,
                onset=onsets.earliest() if onsets else None,
                tail=onsets is not None,
            )
        except (OSError, Failed, WrongInput, Missing, ValueError, KeyError) as error:
            bad += 1
            print(f"{folder.address}: left as it is: {one_line(error)}", file=sys.stderr)
            continue
        answers.append(
            {"run": folder.name, "keep": keep, "deleted": [store.where(prefix) for prefix in gone]}
        )
    if args.json:
        print(json.dumps({"dry_run": args.dry_run, "runs": answers}), flush=True)
    else:
        for place in (p for answer in answers for p in answer["deleted"]):
            print(place, flush=True)
        count = sum(len(answer["deleted"]) for answer in answers)
        would = "would be deleted" if args.dry_run else "deleted"
        print(f"{count} checkpoints of {len(answers)} runs {would}", file=sys.stderr)
    return 1 if bad else 0


def runs_at(place: str) -> list[Any]:
    """The run at a place, or every run below it. Raises WrongInput where there is none."""
    from pathlib import Path

    from launcher.cli.finding import folder_of
    from launcher.errors import WrongInput
    from launcher.storage.remote import runs_below
    from launcher.storage.runfolder import RunFolder
    from launcher.storage.store import open_store

    if not place.startswith("az://") and not Path(place).is_dir():
        return [folder_of(place)]
    if open_store(place).list("log/"):
        return [RunFolder.at(place)]
    found = runs_below(place)
    if not found:
        raise WrongInput(f"{place}: no runs are there. Give a run, or the checkpoints.url of your specs.")
    return found
