"""`losscast logs RUN`: what a run printed, from its own storage, so that it is there when the cluster is not."""

import argparse
import re
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

from launcher.cli.finding import RUN_HELP, on_kubernetes

POLL_S = 0.5
LOOK_S = 2.0
"""Between two looks at whether a followed run has ended."""
COLOUR = re.compile(rb"\x1b\[[0-9;]*m")


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "logs",
        help="what a run printed, kept in its own storage",
        description="Print what the newest job of a run printed: its driver and rank 0. With --rank, everything that one "
        "rank printed, of the newest attempt if no other is named. Read from the run's storage, so it outlives the cluster. Of a run on Kubernetes: what its "
        "submitter's pod printed, and with --rank what lies in the storage, where that can be reached from here.",
    )
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument(
        "--follow", "-f", action="store_true", help="go on until the run ends; exit 1 if it failed"
    )
    parser.add_argument("--rank", type=int, metavar="N", help="one rank's own output")
    parser.add_argument(
        "--attempt", type=int, metavar="K", help="of an earlier attempt (with --rank; default 0)"
    )
    parser.add_argument("--tail", type=int, metavar="LINES", help="begin with the last so many lines")
    parser.set_defaults(func=logs_of)


def logs_of(args: argparse.Namespace) -> int:
    """Print, and with -f go on until the run has ended."""
    from launcher.cli import kuberay
    from launcher.errors import WrongInput

    if args.tail is not None and args.tail < 0:
        raise WrongInput(f"--tail {args.tail}: give a count of lines, 0 or more.")
    spec = on_kubernetes(args.run)
    if spec is not None and args.rank is None and args.attempt is None:
        return kuberay.logs(spec, args)
    from launcher.cli.finding import folder_of
    from launcher.storage.carried import bring

    folder = (
        folder_of(args.run) if spec is None else kuberay.storage(spec, "--rank: is kept in the run's storage")
    )
    rank = args.rank if args.rank is not None or args.attempt is None else 0
    bring(folder, logs=True)
    path = wanted(folder, rank, args.attempt)
    if args.follow:
        return follow(folder, rank=rank, attempt=args.attempt, tail=args.tail)
    if path is None or not path.exists():
        return _elsewhere(folder, rank, args.attempt)
    with path.open("rb") as file:
        if args.tail is not None:
            _seek_lines(file, args.tail)
        _copy(file)
    if path.stat().st_size == 0:
        print(
            f"{folder.name}: {path.relative_to(folder.path)} is empty: nothing was printed", file=sys.stderr
        )
    return 0


def wanted(folder: Any, rank: int | None, attempt: int | None) -> Path | None:
    """The file that was asked for; None while the run has no such attempt, or no job."""
    from launcher.storage.output import job_log, rank_log
    from launcher.storage.runfolder import read_json

    if rank is not None:
        attempts = folder.attempts()
        number = attempt if attempt is not None else (attempts[-1] if attempts else None)
        return None if number is None else rank_log(folder, number, rank)
    submission = read_json(folder.path / "submission.json")
    return None if submission is None else job_log(folder, submission["job"])


def _elsewhere(folder: Any, rank: int | None, attempt: int | None) -> int:
    """What was asked for is not in storage: say what is, or print what the cluster has."""
    from launcher.cli.finding import reach
    from launcher.errors import WrongInput
    from launcher.jobs.submit import logs, read_submission

    if rank is not None:
        there = sorted(
            p.relative_to(folder.path).as_posix() for p in folder.path.glob("attempts/*/output/rank-*.log")
        )
        shown = f" There are: {', '.join(there[:12])}{' ...' if len(there) > 12 else ''}." if there else ""
        which = "newest attempt" if attempt is None else f"attempt {attempt}"
        raise WrongInput(f"{folder.name}: rank {rank} of its {which} left no output.{shown}")
    submission = read_submission(folder)
    if submission is None:
        raise WrongInput(
            f"{folder.name}: trained without Ray, so no job has printed anything. Its curve lies in attempts/<n>/curve.csv."
        )
    print("nothing is kept in the run's storage yet; this is what the cluster has:", file=sys.stderr)
    print(logs(submission, reach(submission.dashboard)), end="")
    return 0


def follow(
    folder: Any, *, rank: int | None = None, attempt: int | None = None, tail: int | None = None
) -> int:
    """Print what is added until the run has ended. 0 when it finished or was stopped."""
    from launcher.cli.finding import standing_of
    from launcher.jobs.standing import LIVE
    from launcher.storage.carried import bring

    path: Path | None = None
    file: BinaryIO | None = None
    word, looked = "pending", 0.0
    try:
        while True:
            now = wanted(folder, rank, attempt)
            if now is not None and now != path and now.exists():
                if file is not None:
                    _copy(file)
                    file.close()
                    print(f"--- {now.relative_to(folder.path)}", file=sys.stderr)
                path, file = now, now.open("rb")
                if tail is not None:
                    _seek_lines(file, tail)
            if file is not None:
                _copy(file)
            if time.monotonic() - looked > LOOK_S:
                _, word, job = standing_of(folder)
                bring(folder, logs=True)
                looked = time.monotonic()
                if word not in LIVE:
                    break
            time.sleep(POLL_S)
        if file is not None:
            _copy(file)
        elif getattr(job, "status", None) is not None:
            _elsewhere(folder, None, None)
    finally:
        if file is not None:
            file.close()
    print(f"{folder.name}: {word}", file=sys.stderr)
    if word in ("failed", "vanished"):
        print(f"next: losscast why {folder.name}", file=sys.stderr)
    return 0 if word in ("finished", "stopped", "ended") else 1


def _copy(file: BinaryIO) -> None:
    """What is left of the file to stdout; colours only where a terminal shows them."""
    colours = sys.stdout.isatty()
    while data := file.read(1 << 16):
        sys.stdout.buffer.write(data if colours else COLOUR.sub(b"", data))
    sys.stdout.flush()


def _seek_lines(file: BinaryIO, lines: int) -> None:
    """Put the file where its last so many lines begin."""
    end = at = file.seek(0, 2)
    block = b""
    while at > 0 and block.count(b"\n") <= lines:
        length = min(1 << 16, at)
        at -= length
        file.seek(at)
        block = file.read(length) + block
    kept = block.splitlines(keepends=True)[-lines:] if lines else []
    file.seek(end - sum(map(len, kept)))
