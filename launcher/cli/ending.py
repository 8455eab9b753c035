"""`losscast stop | resume | end`: let a run rest, go on with it, or close one that nobody holds any more."""

import argparse
import sys
import time
from typing import Any

from launcher.cli.finding import RUN_HELP, on_kubernetes, seconds

PACER_S = 60.0
"""How long `stop` waits for the run's pacer."""
PATIENCE_S = 900.0
"""How long `stop` waits for a step and a checkpoint before it says that it goes on alone."""


def register(commands: Any) -> None:
    stop = commands.add_parser(
        "stop",
        help="commit a checkpoint, then end at the next step",
        description="Ask the run to commit a checkpoint and end at its next step, and wait until it has. "
        "`losscast resume` goes on from there.",
    )
    stop.add_argument("run", metavar="RUN", help=RUN_HELP)
    stop.add_argument("--no-wait", action="store_true", help="ask, and return at once")
    stop.add_argument(
        "--timeout",
        type=seconds,
        default=PATIENCE_S,
        metavar="S",
        help="seconds to wait (default %(default)g)",
    )
    stop.add_argument("--now", action="store_true", help="end the job at once, without a checkpoint")
    stop.set_defaults(func=stop_run)
    resume = commands.add_parser(
        "resume",
        help="go on from the newest checkpoint that verifies",
        description="Submit a run again. Its job goes on from the newest committed checkpoint that verifies, and says "
        "why it passed over a newer one.",
    )
    from launcher.cli.submit import options

    resume.add_argument("run", metavar="RUN", help=RUN_HELP)
    resume.add_argument(
        "--back-to",
        type=int,
        metavar="STEP",
        help="go on from the newest checkpoint of this step or before, and have newer ones count no more",
    )
    resume.add_argument(
        "--skip",
        type=_steps,
        metavar="FIRST:LAST",
        help="with --back-to: leave the batches of these steps out, as the advice names them",
    )
    options(resume)
    resume.set_defaults(func=resume_run)
    end = commands.add_parser(
        "end",
        help="close a run that vanished",
        description="Close a run that was taken, did not say how it ended, and that nobody holds any more: an entry in its log, after which "
        "whoever wakes up late can write nothing, and run_ended to the monitor. It can still be resumed.",
    )
    end.add_argument("run", metavar="RUN", help=RUN_HELP)
    end.add_argument("--reason", default="vanished", help="told to the monitor (default %(default)s)")
    end.set_defaults(func=end_run)


def stop_run(args: argparse.Namespace) -> int:
    """Ask, wait, say what was committed."""
    from launcher.cli import kuberay

    spec = on_kubernetes(args.run)
    if spec is not None:
        return kuberay.stop(spec, args)
    from launcher.cli.finding import folder_of, reach, standing_of
    from launcher.errors import Failed, WrongInput
    from launcher.jobs.cluster import Unknown
    from launcher.jobs.standing import LIVE
    from launcher.jobs.submit import end_job, note_stopped, read_submission
    from launcher.storage.remote import ask_to_stop

    folder = folder_of(args.run)
    facts, word, known = standing_of(folder)
    job = read_submission(folder)
    if word == "vanished" and getattr(known, "status", None) in ("PENDING", "RUNNING") and not args.now:
        raise Failed(
            f"{folder.name}: nobody renews its lease, so nobody would hear the wish; yet Ray counts job {known.submission} as "
            f"{known.status}. `losscast stop --now {args.run}` ends that job, `losscast why {args.run}` says more."
        )
    if word not in LIVE and not (args.now and word == "vanished"):
        print(f"{folder.name}: {word} already; nothing to stop", file=sys.stderr)
        return 0
    if args.now or (word == "pending" and job is not None):
        if job is None:
            raise WrongInput(
                f"{folder.name}: torchrun started it, so there is no job to end: leave out --now, or end its processes on their machine."
            )
        try:
            end_job(job, reach(job.dashboard))
        except Unknown:
            print(f"{folder.name}: its cluster knows nothing of job {job.job} any more", file=sys.stderr)
        except Failed as error:
            raise Failed(
                f"{error} Nothing was ended: what is there goes on, or begins, when it is back."
            ) from error
        note_stopped(folder, job)
        print(
            f"{folder.name}: its job is ended" + ("" if args.now else "; it had not begun"), file=sys.stderr
        )
        _with_its_pacer(facts.spec, now=True)
        return 0
    ask_to_stop(folder)
    if args.no_wait:
        print("asked; the run commits a checkpoint and ends at its next step", file=sys.stderr)
        return 0
    print(f"{folder.name}: asked; waiting for its next step and a checkpoint", file=sys.stderr)
    until = time.monotonic() + args.timeout
    while time.monotonic() < until:
        time.sleep(0.5)
        facts, word, _ = standing_of(folder, ask=False)
        if word not in LIVE:
            break
        if not folder.stop.exists():
            ask_to_stop(folder)  # a restart began in between, and took the wish for an old one
    else:
        raise Failed(
            f"{folder.name}: has not ended after {args.timeout:g} s; it was asked and may still. `losscast status {args.run}` tells, "
            f"`losscast stop --now {args.run}` ends it without a checkpoint."
        )
    commit = facts.committed
    kept = (
        f"the checkpoint of step {commit.fields.get('step')} is committed"
        if commit
        else "no checkpoint was committed"
    )
    print(f"{folder.name}: {word} at step {facts.step}; {kept}", file=sys.stderr)
    _with_its_pacer(facts.spec, now=False)
    if word == "stopped":
        print(f"next: losscast resume {args.run}", file=sys.stderr)
    return 0 if word in ("stopped", "finished") else 1


def _with_its_pacer(spec: Any, *, now: bool) -> None:
    """A run's pacer ends with it: wait until it has, and say so."""
    from launcher.cli.finding import reach
    from launcher.jobs.pacer import end

    said = end(spec, reach, now=now, wait_s=PACER_S)
    if said is not None:
        print(said, file=sys.stderr)


def _steps(text: str) -> tuple[int, int]:
    """FIRST:LAST, for argparse."""
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text}: give FIRST:LAST, two steps")
    return int(first), int(last)


def resume_run(args: argparse.Namespace) -> int:
    """Submit again, from the run's own spec unless a run.yaml was given."""
    from launcher.cli.submit import hand_in
    from launcher.errors import WrongInput

    spec = on_kubernetes(args.run)
    if args.skip and args.back_to is None:
        raise WrongInput("--skip: needs --back-to STEP, the checkpoint to go on from.")
    if spec is not None:
        if args.back_to is None:
            return hand_in(spec, args, args.run, law=None)
        from launcher.cli.kuberay import storage

        return going_back(storage(spec, "--back-to: is written into the run's log"), spec, args)
    from pathlib import Path

    from launcher.cli.finding import folder_of, standing_of
    from launcher.cli.submit import hand_in
    from launcher.jobs.why import safe
    from launcher.runspec.file import read_spec

    folder = folder_of(args.run)
    facts, word, _ = standing_of(folder)
    if word == "finished":
        raise WrongInput(f"{folder.name}: is finished; there is nothing to go on with.")
    spec = read_spec(args.run) if Path(args.run).is_file() else facts.spec
    commit = facts.committed
    if args.back_to is not None:
        return going_back(folder, spec, args)
    if commit is not None:
        print(
            f"{folder.name}: goes on from step {commit.fields.get('step')} of {spec.total_steps}, the newest committed checkpoint, "
            "if it verifies",
            file=sys.stderr,
        )
    elif not facts.damaged:
        print(f"{folder.name}: no checkpoint was committed: it begins at step 0", file=sys.stderr)
    if facts.damaged:
        print(f"{folder.name}: {safe(facts)}; it is looked at again", file=sys.stderr)
    return hand_in(spec, args, args.run, law=None)


def going_back(folder: Any, spec: Any, args: argparse.Namespace) -> int:
    """Go on from an older checkpoint: said and agreed to first, then written into the run's log, then handed in."""
    from launcher.cli.submit import hand_in
    from launcher.recovery.rollback import go_back

    step, first = go_back(folder, spec, args.back_to, args.skip)
    left = f", and without the batches of steps {args.skip[0]} to {args.skip[1]}" if args.skip else ""
    print(
        f"{folder.name}: goes back to step {step} of {spec.total_steps}: newer checkpoints count no more{left}",
        file=sys.stderr,
    )
    return hand_in(spec, args, args.run, law=None, first=first)


def end_run(args: argparse.Namespace) -> int:
    """Take the run, write its end, tell the monitor, let go."""
    from launcher.cli.finding import folder_of, standing_of
    from launcher.errors import Held, WrongInput
    from launcher.jobs.closing import close, tell

    folder = folder_of(args.run)
    facts, word, job = standing_of(folder)
    if facts.holder.alive:
        raise Held(
            f"{folder.name} is held by {facts.holder.who()}. `losscast stop {args.run}` ends a run that lives."
        )
    if word in ("finished", "pending"):
        raise WrongInput(f"{folder.name}: {word}: there is nothing to close.")
    if getattr(job, "status", None) == "RUNNING":
        print(
            f"warning: Ray still counts job {job.submission} as running; whatever of it wakes up can write nothing any more. "
            f"`losscast stop --now {args.run}` ends it.",
            file=sys.stderr,
        )
    # closed already: only the monitor may still have to hear of it
    told = tell(facts, args.reason) if word == "ended" else close(facts, args.reason)
    print(f"{folder.name}: ended at step {facts.step}; {told}", file=sys.stderr)
    print(f"next: losscast resume {args.run}   losscast ls", file=sys.stderr)
    return 0
