"""`losscast ladder LADDER`: the small runs, then their law."""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "ladder",
        help="the small runs, then their law",
        description="Make the runs of a ladder file that are not finished yet, then fit a law to them. "
        "With --plan, propose which runs to make instead.",
    )
    parser.add_argument("ladder", metavar="LADDER", nargs="?", help="ladder.yaml")
    parser.add_argument(
        "-o", "--out", metavar="LAW", default="law.json", help="where the law goes (default %(default)s)"
    )
    parser.add_argument(
        "--at-once", type=int, help="runs in flight (default: the file's at_once, or as many as fit)"
    )
    parser.add_argument(
        "--plan", action="store_true", help="propose runs for --target; nothing is trained (about 20 s)"
    )
    parser.add_argument("--target", metavar="params=N,tokens=D", help="with --plan: the run to foretell")
    parser.add_argument(
        "--budget",
        type=float,
        default=0.01,
        help="with --plan: share of the target's compute (default %(default)s)",
    )
    parser.add_argument("--law", metavar="LAW", help="with --plan: a law to assume, from earlier runs")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(func=run)


def plan(args: argparse.Namespace) -> int:
    """Print the ladders worth making, the narrowest expected interval first."""
    from launcher.errors import WrongInput
    from monitor.forecast.law import Law
    from monitor.forecast.plan_ladder import parse_target, plan_ladder

    if args.target is None:
        raise WrongInput(
            "--plan needs --target, as in: losscast ladder --plan --target params=7e9,tokens=1.4e11"
        )
    params, tokens = parse_target(args.target)
    found = plan_ladder(params, tokens, args.budget, law=Law.read(args.law) if args.law else None)
    if args.json:
        print(json.dumps({"ladders": [f.to_dict() for f in found]}))
        return 0
    for ladder in found[:3]:
        print(
            f"{len(ladder.rungs)} runs, {100 * ladder.share:.2g}% of the target's compute: 90% interval about "
            f"{100 * ladder.width:.1f}% wide, held the truth in {100 * ladder.hold:.0f}% of simulations"
        )
        for rung in ladder.rungs:
            print(
                f"    {rung.params:>12,.0f} parameters  {rung.tokens:>16,.0f} tokens  {rung.flops:.2e} FLOPs"
            )
    return 0


BAR = 20
QUIET_S = 30.0
"""Between two lines that say the same states, where there is no terminal."""


class Display:
    """The whole ladder's progress: a block that is redrawn on a terminal, elsewhere a line when something changed."""

    def __init__(self, name: str, out: Any, now: Callable[[], float] = time.monotonic) -> None:
        self._name, self._out, self._now = name, out, now
        self._drawn, self._said, self._said_at = 0, "", -QUIET_S
        self._began, self._done_at_start = now(), -1.0

    def show(self, rungs: list[Any]) -> None:
        """The rungs as they stand."""
        head = self.headline(rungs)
        if not self._out.isatty():
            states = head.partition(",  ")[0]
            if states != self._said or self._now() - self._said_at > QUIET_S:
                self._said, self._said_at = states, self._now()
                print(head, file=self._out, flush=True)
            return
        wide = max(len(r.spec.name) for r in rungs)
        lines = [head, *(f"  {r.spec.name:<{wide}}  {rung_line(r)}" for r in rungs)]
        up = f"\x1b[{self._drawn}F" if self._drawn else ""
        columns = shutil.get_terminal_size().columns
        self._out.write(up + "".join(f"\x1b[2K{text[: columns - 1]}\n" for text in lines))
        self._out.flush()
        self._drawn = len(lines)

    def headline(self, rungs: list[Any]) -> str:
        """One line for all of them; shares of work are by 6ND, or by steps where N is not known."""
        from launcher.spec.accounting import total_flops

        work = [total_flops(r.spec) or float(r.spec.total_steps) for r in rungs]
        parts = [1.0 if r.state == "finished" else min(1.0, r.step / r.spec.total_steps) for r in rungs]
        done = sum(w * p for w, p in zip(work, parts, strict=True)) / sum(work)
        if self._done_at_start < 0:
            self._done_at_start = done
        gone, gained = self._now() - self._began, done - self._done_at_start
        lost = sum(
            w * (1 - p) for w, p, r in zip(work, parts, rungs, strict=True) if r.state == "failed"
        ) / sum(work)
        states = [r.state for r in rungs]
        counts = ", ".join(
            f"{states.count(s)} {s}" for s in ("finished", "running", "waiting", "failed") if states.count(s)
        )
        left = ""
        if gained > 0.02 and gone > 10:
            minutes = max(0.0, gone * (1 - lost - done) / gained) / 60
            left = f", about {minutes:.0f} min left" if minutes >= 1.5 else ", about a minute left"
        return f"{self._name}: {counts},  {100 * done:.0f}%{left}"

    def close(self) -> None:
        self._out.flush()


def rung_line(rung: Any) -> str:
    """One rung in a line: its state, and how far it is, or what it ended with."""
    total = rung.spec.total_steps
    if rung.state == "finished":
        from launcher.jobs.ladder import result_of

        loss = result_of(rung)["loss"]
        return f"finished  loss {loss:.4f}" if isinstance(loss, float) else "finished"
    if rung.state == "running":
        full = int(BAR * min(1.0, rung.step / total))
        return f"running   [{'#' * full}{'.' * (BAR - full)}] {rung.step} of {total}"
    return f"{rung.state:<9} {rung.why}".rstrip()


def run(args: argparse.Namespace) -> int:
    """Run the ladder, write points.csv, curves.csv and the law. Exit 1 when no rung finished."""
    from launcher.errors import Failed, WrongInput

    if args.plan:
        return plan(args)
    if args.ladder is None:
        raise WrongInput("need a ladder file, as in: losscast ladder examples/ladder.yaml, or --plan")
    from launcher.cli.submit import cluster_of
    from launcher.jobs.ladder import read_file, run_ladder, write_points
    from launcher.jobs.submit import refuse_shadows
    from launcher.plan.lawcheck import conventions
    from monitor.forecast.fit import fit
    from monitor.forecast.points import read_curves, read_points

    if args.at_once is not None and args.at_once < 1:
        raise WrongInput(f"--at-once {args.at_once}: give 1 or more.")
    ladder, specs = read_file(args.ladder)
    refuse_shadows(Path.cwd())
    out = Path(args.out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)  # before hours of training, not after them
    except OSError as error:
        raise WrongInput(f"-o {out}: {error.strerror}. Give a path that you may write.") from None
    dashboard, ray_env = cluster_of(specs[0].cluster.to)
    display = Display(ladder.name, sys.stderr)
    try:
        rungs = run_ladder(
            specs,
            dashboard,
            ray_env,
            at_once=args.at_once or ladder.at_once,
            tick=display.show,
            interval_s=1.0,
        )
    except KeyboardInterrupt:
        print(
            "losscast: interrupted; each run has its last checkpoint, and the same command goes on",
            file=sys.stderr,
        )
        return 130
    display.close()
    failed = [r for r in rungs if r.state != "finished"]
    for rung in failed:
        print(f"{rung.spec.name}: {rung.why}", file=sys.stderr)
        print(f"next: losscast why {rung.folder.address}", file=sys.stderr)
    if failed:
        print(
            f"{len(failed)} of {len(rungs)} did not finish; the law is of the others. The same command tries them again.",
            file=sys.stderr,
        )
    points, curves = out.with_name("points.csv"), out.with_name("curves.csv")
    if write_points(rungs, points, curves) == 0:
        raise Failed(f"none of the {len(rungs)} runs finished, so there is no law to fit")
    law = fit(read_points(points), curves=read_curves(curves), conventions=conventions(specs[0]))
    law.write(out)
    if args.json:
        print(
            json.dumps(
                {
                    "law": str(out),
                    "digest": law.digest,
                    "points": str(points),
                    "curves": str(curves),
                    "finished": [r.spec.name for r in rungs if r.state == "finished"],
                    "failed": {r.spec.name: r.why for r in failed},
                }
            )
        )
    else:
        print(f"{out}  {law.digest}")
    return 1 if failed else 0
