"""`losscast ladder LADDER`: the small runs, then their law."""

import argparse
import json
import sys
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
    parser.add_argument("--at-once", type=int, help="runs in flight (default: the file's at_once)")
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
    from monitor.law import Law
    from monitor.plan_ladder import parse_target, plan_ladder

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


def run(args: argparse.Namespace) -> int:
    """Run the ladder, write points.csv, curves.csv and the law. Exit 1 when no rung finished."""
    from launcher.errors import Failed, WrongInput

    if args.plan:
        return plan(args)
    if args.ladder is None:
        raise WrongInput("need a ladder file, as in: losscast ladder examples/ladder.yaml, or --plan")
    from launcher.cli.submit import cluster_of
    from launcher.ladder import read_ladder, run_ladder, specs_of, write_points
    from launcher.lawcheck import conventions
    from launcher.specfile import read_data
    from monitor.fit import fit
    from monitor.points import read_curves, read_points

    ladder = read_ladder(read_data(args.ladder), args.ladder)
    specs = specs_of(ladder)
    dashboard, ray_env = cluster_of(specs[0].cluster.to)

    def tick(rungs: list[Any]) -> None:
        states = [r.state for r in rungs]
        steps = sum(min(r.step, r.spec.total_steps) for r in rungs)
        total = sum(r.spec.total_steps for r in rungs)
        words = f"{states.count('finished')} of {len(rungs)} finished, {states.count('running')} running, {states.count('failed')} failed, {100 * steps / total:.0f}%"
        print(
            "\r" + words if sys.stderr.isatty() else words,
            end="" if sys.stderr.isatty() else "\n",
            file=sys.stderr,
            flush=True,
        )

    rungs = run_ladder(
        specs, dashboard, ray_env, at_once=args.at_once or ladder.at_once, tick=tick, interval_s=2.0
    )
    if sys.stderr.isatty():
        print(file=sys.stderr)
    failed = [r.spec.name for r in rungs if r.state != "finished"]
    for name in failed:
        print(
            f"{name}: did not finish; see `losscast logs`. The others are kept; the same command tries it again.",
            file=sys.stderr,
        )
    out = Path(args.out)
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
                    "failed": failed,
                }
            )
        )
    else:
        print(f"{out}  {law.digest}")
    return 1 if failed else 0
