"""`losscast submit RUN`: show what a run will be and cost, ask, and hand it to a cluster, its prediction written down first."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.cli.finding import local_home as local_home


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "submit",
        help="show the priced plan, ask, and hand a run to a Ray cluster",
        description="Show what the run will be and cost, ask, and hand it to its cluster as a job, its prediction written "
        "down first. Without a terminal there is nobody to ask: --yes is needed, except for `to: local`, which rents "
        "nothing. Exit 75 when somebody else holds the run.",
    )
    parser.add_argument("run", metavar="RUN", help="run.yaml")
    parser.add_argument(
        "--to", metavar="WHERE", help="another place than the spec's: local, an address, kuberay"
    )
    parser.add_argument("--law", metavar="LAW", help="law.json to predict from; default the spec's own")
    parser.add_argument(
        "--pacer",
        action="store_true",
        help="hand in the run's pacer alone (policy.pacer: auto): one that failed, or on kuberay",
    )
    parser.add_argument("--dry-run", action="store_true", help="show the plan, and stop there")
    options(parser)
    parser.set_defaults(func=run)


def options(parser: argparse.ArgumentParser) -> None:
    """What `submit` and `resume` have in common."""
    parser.add_argument("--yes", "-y", action="store_true", help="don't ask")
    parser.add_argument(
        "--follow",
        "-f",
        action="store_true",
        help="print what the run prints until it ends; exit 1 if it fails",
    )
    parser.add_argument("--json", action="store_true", help="print the submission as JSON")


def cluster_of(to: str) -> tuple[str, dict[str, str]]:
    """URL of the Jobs API and the RAY_* settings for a spec's `cluster.to`. `local` starts a Ray where none runs."""
    from launcher.cli.finding import settings

    if to == "local":
        from launcher.jobs import local_ray

        head = local_ray.running_or_started(local_home(), lambda text: print(text, file=sys.stderr))
        return head.dashboard, head.environment()
    return to, settings()


def prediction_for(spec: Any, law_path: Path | None) -> dict[str, Any] | None:
    """prediction.json of this run under the law that its spec names; None where it names none."""
    if law_path is None:
        return None
    from launcher.errors import WrongInput
    from launcher.runspec.accounting import parameter_count, total_tokens
    from monitor.forecast.law import Law
    from monitor.forecast.prediction import predict

    params = parameter_count(spec)
    if params is None:
        raise WrongInput("law: a prediction needs the number of parameters. Set workload.params.")
    made = predict(
        Law.read(law_path),
        params=float(params),
        tokens=float(total_tokens(spec)),
        batch_tokens=float(spec.train.batch_tokens),
    )
    return made.to_dict()


def run(args: argparse.Namespace) -> int:
    """Show, ask, submit, and with --follow stay until the end."""
    from launcher.cli.plan import check_law, moved_to
    from launcher.runspec.document import read_document
    from launcher.runspec.file import spec_in

    document = read_document(args.run)
    moved_to(document, args.to)
    spec = spec_in(document)
    if args.pacer:
        from launcher.jobs.pacer import spec_of_pacer

        twin = spec_of_pacer(spec)
        return hand_in(twin, args, twin.name, law=None)
    law = None if spec.law is None else Path(args.run).resolve().parent / spec.law
    law = Path(args.law) if args.law else law
    if law is not None:
        for doubt in check_law(document, spec, str(law)):
            print(f"warning: {', '.join(doubt['keys'])}: {doubt['message']}", file=sys.stderr)
    return hand_in(spec, args, args.run, law=law)


def hand_in(
    spec: Any,
    args: argparse.Namespace,
    said: str,
    *,
    law: Path | None,
    first: Callable[[], None] = lambda: None,
) -> int:
    """The common end of `submit` and `resume`.

    said   how the person named the run, for the commands to go on with
    law    a law to predict from; None registers no prediction and leaves the one there is
    first  done once it was agreed to, before the run is handed in
    """
    from launcher.cli.finding import remember, went_missing
    from launcher.data.feed import refuse_unfit
    from launcher.data.tokens import cache_folder
    from launcher.jobs.owncode import refuse_uncallable
    from launcher.jobs.pacer import start
    from launcher.jobs.submit import may_submit, refuse_shadows, submit, untold
    from launcher.plan.plan import make_plan
    from launcher.plan.text import summary

    refuse_shadows(Path.cwd())
    if spec.cluster.to == "kuberay":
        from launcher.cli.kuberay import may_submit_there

        may_submit_there(spec)
    else:
        # before anything is asked or started: a run that is held, finished, or can't be
        folder = may_submit(spec)
        if went_missing(folder):
            print(
                f"warning: {folder.path}: {spec.name} was submitted to here before and is not here now. If its disk is only not "
                "mounted, mount it: this begins the run anew",
                file=sys.stderr,
            )
    refuse_uncallable(spec, Path.cwd())
    refuse_unfit(spec, cache_folder())
    prediction = prediction_for(spec, law)
    plan = make_plan(spec)
    if law is not None and prediction is not None:
        from launcher.cli.plan import under_law

        plan |= under_law(spec, str(law))
    print(summary(plan), file=sys.stderr)
    for warning in plan["warnings"]:
        print(f"warning: {', '.join(warning['keys'])}: {warning['message']}", file=sys.stderr)
    missing_token = untold(spec, f"ingest:{spec.name},read")
    if missing_token is not None:
        print(f"warning: {missing_token}", file=sys.stderr)
    if getattr(args, "dry_run", False):
        if args.json:
            from monitor.schema import spell

            print(json.dumps(spell(plan), indent=2, allow_nan=False))
        return 0
    if not args.yes and not agreed(spec, sys.stdin.isatty()):
        print("losscast: not submitted", file=sys.stderr)
        return 1
    first()
    if prediction is not None:
        print(f"prediction {prediction['digest']}", file=sys.stderr)
    if spec.cluster.to == "kuberay":
        from launcher.cli.kuberay import hand_over

        return hand_over(spec, args, said, prediction, again=not hasattr(args, "dry_run"))
    dashboard, ray_env = cluster_of(spec.cluster.to)
    done = submit(spec, dashboard, ray_env, prediction=prediction)
    remember(spec.name, done.folder)
    pacer = start(spec, dashboard, ray_env)
    if pacer is not None:
        print(pacer.said, file=sys.stderr)
        if pacer.submission is not None:
            remember(pacer.submission.run, pacer.submission.folder)
    if args.json:
        beside = None if pacer is None or pacer.submission is None else pacer.submission.__dict__
        print(json.dumps(done.__dict__ | ({} if pacer is None else {"pacer": beside})))
    else:
        print(done.job)
    if args.follow:
        from launcher.cli.logs import follow
        from launcher.storage.runfolder import RunFolder

        return follow(RunFolder.at(done.folder))
    print(
        "next: " + "   ".join(f"losscast {c} {said}" for c in ("logs -f", "status", "why", "stop")),
        file=sys.stderr,
    )
    return 0


def agreed(spec: Any, terminal: bool, what: str = "it") -> bool:
    """Ask the person. Where there is none, only a run on this machine goes on. Raises WrongInput for others."""
    from launcher.errors import WrongInput

    if not terminal:
        if spec.cluster.to == "local":
            return True
        raise WrongInput(
            f"submit to {spec.cluster.to} asks before it spends anything, and there is no terminal to ask on. Add --yes."
        )
    print(f"submit {what}? [y/N] ", end="", file=sys.stderr, flush=True)
    try:
        return sys.stdin.readline().strip().lower() in ("y", "yes")
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return False
