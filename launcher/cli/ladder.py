"""`losscast ladder LADDER`: the small runs, then their law."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "ladder",
        help="the small runs, then their law",
        description="Show the runs of a ladder file and what they will cost, ask unless they stay on this machine, make those "
        "that are not finished yet, and fit a law to all of them. The same command again goes on where it was cut off. Exit 1 "
        "where a rung failed; the law is of the others. With --plan, propose which runs to make instead.",
    )
    parser.add_argument("ladder", metavar="LADDER", nargs="?", help="ladder.yaml")
    parser.add_argument(
        "-o", "--out", metavar="LAW", default="law.json", help="where the law goes (default %(default)s)"
    )
    parser.add_argument(
        "--at-once", type=int, help="runs in flight (default: the file's at_once, or as many as fit)"
    )
    parser.add_argument("--yes", "-y", action="store_true", help="don't ask")
    parser.add_argument(
        "--dry-run", action="store_true", help="show the rungs and their price, and stop there"
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
    parser.add_argument(
        "--law",
        metavar="LAW",
        help="with --plan: a law to assume: law.json of earlier runs, or a published one by name",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(func=run)


def plan(args: argparse.Namespace) -> int:
    """Print the ladders worth making, the narrowest expected interval first."""
    from launcher.errors import WrongInput
    from monitor.forecast.plan_ladder import parse_target, plan_ladder
    from monitor.forecast.presets import named

    if args.target is None:
        raise WrongInput(
            "--plan needs --target, as in: losscast ladder --plan --target params=7e9,tokens=1.4e11"
        )
    params, tokens = parse_target(args.target)
    found = plan_ladder(params, tokens, args.budget, law=named(args.law) if args.law else None)
    if args.json:
        print(json.dumps({"ladders": [f.to_dict() for f in found]}))
        return 0
    for ladder in found[:3]:
        print(
            f"{len(ladder.rungs)} runs, {100 * ladder.share:.2g}% of the target's compute: 90% interval about "
            f"{100 * ladder.width:.1f}% wide, off by {100 * ladder.error:.1f}%, held the truth in "
            f"{round(ladder.hold * ladder.simulations)} of {ladder.simulations} simulations"
        )
        for rung in ladder.rungs:
            print(
                f"    {rung.params:>12,.0f} parameters  {rung.tokens:>16,.0f} tokens  {rung.flops:.2e} FLOPs"
            )
    return 0


def place_for(specs: list[Any]) -> Any:
    """Where the rungs are made: the cluster that the base names. `local` starts a Ray where none runs."""
    to = specs[0].cluster.to
    if to != "kuberay":
        from launcher.cli.submit import cluster_of
        from launcher.jobs.climbing import RayPlace

        return RayPlace(*cluster_of(to))
    from launcher.cli.kuberay import remember
    from launcher.kuberay.api import connect
    from launcher.kuberay.rungs import KubePlace

    api = connect()
    print(f"cluster {api.context or 'of the current context'}: {api.host}", file=sys.stderr)
    for spec in specs:
        remember(spec)
    return KubePlace(api, specs)


def _refuse_unwritable(out: Path) -> None:
    """Make the folder of the law. Raises WrongInput where the law could not be written."""
    from launcher.errors import WrongInput

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WrongInput(f"-o {out}: {error.strerror}. Give a path that you may write.") from None
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        why = "is a folder" if out.is_dir() else f"{out.parent} may not be written"
        raise WrongInput(f"-o {out}: {why}. Give the path of a file that you may write.")


def _refuse_unfit(left: list[Any]) -> None:
    """Warn of rungs whose ranks would not find their data or code. Raises WrongInput where that is all of them."""
    from launcher.data.feed import refuse_unfit
    from launcher.data.tokens import cache_folder
    from launcher.errors import WrongInput
    from launcher.jobs.owncode import refuse_uncallable

    unfit: list[str] = []
    for spec in left:
        try:
            refuse_uncallable(spec, Path.cwd())
            refuse_unfit(spec, cache_folder())
        except WrongInput as error:
            unfit.append(f"rung {spec.name}: {error}")
    if unfit and len(unfit) == len(left):
        raise WrongInput(unfit[0])
    for said in unfit:
        print(f"warning: it will fail, and the others go on: {said}", file=sys.stderr)


def run(args: argparse.Namespace) -> int:
    """Run the ladder, write points.csv, curves.csv and the law. Exit 1 when no rung finished."""
    from launcher.errors import Failed, WrongInput

    if args.plan:
        return plan(args)
    if args.ladder is None:
        raise WrongInput("need a ladder file, as in: losscast ladder examples/ladder.yaml, or --plan")
    from launcher.cli.ladder_display import Display, priced
    from launcher.cli.submit import agreed
    from launcher.jobs.climbing import run_ladder, standing, write_points
    from launcher.jobs.ladder import read_file
    from launcher.jobs.submit import refuse_shadows, untold
    from launcher.plan.lawcheck import conventions
    from launcher.plan.plan import make_plan
    from monitor.forecast.fit import fit
    from monitor.forecast.points import read_curves, read_points

    if args.at_once is not None and args.at_once < 1:
        raise WrongInput(f"--at-once {args.at_once}: give 1 or more.")
    ladder, specs = read_file(args.ladder)
    refuse_shadows(Path.cwd())
    out = Path(args.out)
    to = specs[0].cluster.to
    if to == "kuberay":
        from launcher.kuberay.rungs import refuse_out_of_sight

        refuse_out_of_sight(specs)
    rungs = standing(specs)
    left = [r.spec for r in rungs if r.state != "finished"]
    _refuse_unfit(left)
    if left:
        print(priced(ladder.name, [make_plan(s) for s in left]), file=sys.stderr)
    if len(left) < len(rungs):
        print(f"{len(rungs) - len(left)} of {len(rungs)} runs are finished already", file=sys.stderr)
    missing_token = untold(left[0], "ingest,read") if left else None
    if missing_token is not None:
        print(f"warning: {missing_token}", file=sys.stderr)
    if args.dry_run:
        return 0
    if left and not args.yes and not (to == "local" or agreed(specs[0], sys.stdin.isatty(), "the ladder")):
        print("losscast: not submitted", file=sys.stderr)
        return 1
    _refuse_unwritable(out)  # before hours of training, not after them
    display = Display(ladder.name, sys.stderr)
    try:
        if left:
            at_once, every_s = args.at_once or ladder.at_once, 5.0 if to == "kuberay" else 1.0
            rungs = run_ladder(
                rungs, place_for(specs), at_once=at_once, tick=display.show, interval_s=every_s
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
        name = rung.spec.name if to == "kuberay" else rung.folder.address
        print(f"next: losscast why {name}", file=sys.stderr)
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
