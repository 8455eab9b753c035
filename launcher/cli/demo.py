"""`losscast demo`: the whole line on this machine, in minutes and with nothing made up.

A ladder of tiny byte-level GPTs on the Python library's own source; a law; a prediction, hashed before the run it is
about; that run under the live monitor; the same run broken on purpose, twice; and a page that shows it all.
Every run goes through the same `submit` as any job. Nothing is tuned to the seed: what comes out is printed.
"""

import argparse
import json
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="the whole line on this machine: ladder, fit, predict, train, break it, see the alert",
        description="The whole line on this machine, with real runs: a ladder of tiny GPTs, a law, a prediction hashed before "
        "the run it is about, that run under the live monitor, the same run broken on purpose, and a page.",
    )
    parser.add_argument("--seed", type=int, default=0, help="of data order and initial weights (default 0)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a shorter form, for a first look; its law has little to stand on, and may miss the learning-rate drill",
    )
    parser.add_argument(
        "--keep",
        metavar="DIR",
        help="keep store, runs and logs in DIR (default: a temporary folder, removed)",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        default="losscast-demo",
        help="where the page and the picture go (default %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON document on stdout")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the demo and print where its page is."""
    from launcher.cli.demo_stage import Stage, check_machine
    from launcher.cli.demo_story import FULL, QUICK, story
    from monitor.errors import writing

    machine = check_machine()
    signal.signal(signal.SIGTERM, _interrupt)
    out = Path(args.out).resolve()
    with writing(out, "Give --out a folder that is there and can be written."):
        out.mkdir(parents=True, exist_ok=True)
    if args.keep:
        work = Path(args.keep).resolve()
        if work.exists() and any(work.iterdir()):
            from launcher.errors import WrongInput

            raise WrongInput(f"--keep {args.keep}: is not empty. Give a new folder, or remove what is in it.")
        work.mkdir(parents=True, exist_ok=True)
    else:
        work = Path(tempfile.mkdtemp(prefix="losscast-"))
    size = QUICK if args.quick else FULL
    try:
        with Stage(work) as stage:
            data = story(args.seed, size, stage, work, machine)
            data["seconds"]["all"] = round(sum(data["seconds"].values()), 1)
            data["machine"]["peak_memory_gib"] = round(stage.peak_memory_bytes / 2**30, 2)
    finally:
        if not args.keep:
            shutil.rmtree(work, ignore_errors=True)
    return _finish(data, out, args)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _finish(data: dict[str, Any], out: Path, args: argparse.Namespace) -> int:
    from launcher.cli.demo_progress import clock
    from monitor.web.report import report_html, report_png

    page, picture = out / "index.html", out / "losscast.png"
    page.write_text(report_html(data), encoding="utf-8")
    (out / "result.json").write_text(json.dumps(data, default=str))
    try:
        report_png(data, picture)
        pictured = str(picture)
    except ImportError:
        pictured = "no picture: matplotlib is not installed (pip install 'losscast[plot]')"
    if args.json:
        print(json.dumps({k: v for k, v in data.items() if k != "law"}, default=str))
    else:
        print(f"page     {page}\npicture  {pictured}")
        print(
            f"took {clock(data['seconds']['all'])}, at most {data['machine']['peak_memory_gib']} GiB of memory\nnext:"
        )
        for command in data["commands"]:
            print(f"  {command['command']}\n      {command['what']}")
    return 0
