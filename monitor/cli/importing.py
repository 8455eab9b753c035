"""`losscast import FILE`: a run that was trained elsewhere, sent to a monitor, which judges it like any other."""

import argparse
import math
import os
import sys
from typing import Any


def register(commands: Any) -> None:
    """Add `import` to the command."""
    p = commands.add_parser(
        "import",
        help="send a run trained elsewhere to a monitor: TensorBoard events, CSV, JSON lines",
        description="Send a recorded run to a monitor, which judges it and shows it like any other, and pages nobody for it. "
        "Sent again it changes nothing. Reads .csv, .tsv, .jsonl, TensorBoard event files and folders of them.",
    )
    p.add_argument("file", metavar="FILE")
    p.add_argument("--run", metavar="NAME", help="its name in the monitor (default: from the file's name)")
    p.add_argument("--only", metavar="RUN", help="of a file with a column `run`, this one")
    p.add_argument(
        "--map", action="append", default=[], metavar="FIELD=COLUMN",
        help="a column that goes by another name, such as loss=train/ce; may be given again",
    )  # fmt: skip
    p.add_argument("--prediction", metavar="FILE", help="prediction.json to hold it against")
    p.add_argument("--target-loss", type=float, metavar="X")
    p.add_argument("--team", metavar="NAME")
    p.add_argument("--url", help="the monitor (default $LOSSCAST_URL, or http://127.0.0.1:8700)")
    p.add_argument(
        "--token-env",
        default="LOSSCAST_TOKEN",
        metavar="NAME",
        help="variable that holds a token (default %(default)s)",
    )
    p.add_argument("--running", action="store_true", help="it still trains: do not end it")
    p.add_argument("--dry-run", action="store_true", help="only say what would be sent")
    p.add_argument("--json", action="store_true")
    p.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Read the file, send it, say what was taken for what."""
    import json
    from pathlib import Path

    from monitor.cli.replay import count
    from monitor.errors import WrongInput, some
    from monitor.schema import is_run_id
    from monitor.service.importing import read, run_id

    chosen = {}
    for given in args.map:
        name, equals, column = given.partition("=")
        if not equals:
            raise WrongInput(f"--map {given}: need FIELD=COLUMN, such as loss=train/ce")
        chosen[name] = column
    if args.target_loss is not None and not 0 < args.target_loss < math.inf:
        raise WrongInput(f"--target-loss {args.target_loss:g}: need a number above 0, nats per token")
    path = Path(args.file)
    name = args.run or run_id(
        args.only or (path.resolve().name if path.is_dir() else path.name.split(".")[0])
    )
    if not is_run_id(name):
        raise WrongInput(
            f"--run {name!r}: small letters, digits and hyphens, at most 63, such as {run_id(name)}"
        )
    prediction = _prediction(args.prediction)
    found = read(path, chosen, args.only)
    said: dict[str, Any] = {
        "run": name, "samples": len(found.samples), "first_step": found.samples[0]["step"], "last_step": found.samples[-1]["step"],
        "columns": found.columns, "unused": found.unused, "rows_without_loss": found.without_loss, "repeated_steps": found.repeated,
    }  # fmt: skip
    url = (args.url or os.environ.get("LOSSCAST_URL") or "http://127.0.0.1:8700").rstrip("/")
    if not args.dry_run:
        from monitor.cli.watch import token
        from monitor.sending import send

        said |= send(
            url, token(args.token_env), name, found.samples, prediction=prediction, ended=not args.running,
            target_loss=args.target_loss, team=args.team,
        )  # fmt: skip
    if args.json:
        print(json.dumps(said))
        return 0
    for field, column in found.columns.items():
        print(f"{field:13} {column}")
    if found.unused:
        print(f"not used: {some(found.unused, 12)}", file=sys.stderr)
    if found.without_loss or found.repeated:
        rows, steps = count(found.without_loss, "row"), count(found.repeated, "repeated step")
        print(f"{rows} without a loss, passed over; {steps}", file=sys.stderr)
    what = "would be sent" if args.dry_run else f"sent, {said['duplicates']} of them known already"
    print(
        f"{name}: {count(len(found.samples), 'sample')}, steps {said['first_step']} to {said['last_step']}, {what}"
    )
    if not args.dry_run:
        print(f"look at it: {url}/?run={name}", file=sys.stderr)
    return 0


def _prediction(path: str | None) -> dict[str, Any] | None:
    from monitor.errors import WrongInput
    from monitor.forecast.law import read_json

    if path is None:
        return None
    found = read_json(path, "the file that `losscast predict -o` wrote")
    if not isinstance(found, dict) or "final_loss" not in found:
        raise WrongInput(
            f"{path}: no prediction; `losscast predict law.json ... -o prediction.json` makes one"
        )
    return found
