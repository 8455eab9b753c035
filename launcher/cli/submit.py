"""`losscast submit RUN`: hand a run to a cluster, its prediction written down first."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "submit", help="hand a run to a Ray cluster as a job, its prediction written down first"
    )
    parser.add_argument("run", metavar="RUN", help="run.yaml")
    parser.add_argument(
        "--follow",
        "-f",
        action="store_true",
        help="print what the job prints until it ends; exit 1 if it fails",
    )
    parser.add_argument("--json", action="store_true", help="print the submission as JSON")
    parser.set_defaults(func=run)


def cluster_of(to: str) -> tuple[str, dict[str, str]]:
    """URL of the Jobs API and the RAY_* settings for a spec's `cluster.to`. `local` starts a Ray where none runs."""
    from launcher.errors import WrongInput

    if to == "local":
        from launcher import local_ray

        home = local_home()
        head = local_ray.running(home)
        if head is None:
            print("starting a local Ray (end it with: losscast ray down)", file=sys.stderr)
            head = local_ray.start(home, cpus=max(2, os.cpu_count() or 2))
        return head.dashboard, head.environment()
    if to == "kuberay":
        raise WrongInput(
            "cluster.to: kuberay: can't be submitted to so far. Give the address of a Ray cluster, or local."
        )
    settings = {k: v for k, v in os.environ.items() if k.startswith("RAY_AUTH_")}
    settings.setdefault("RAY_AUTH_MODE", "disabled")  # unset, a stray ~/.ray/auth_token would turn it on
    return to, settings


def local_home() -> Path:
    """Where the local Ray's token, logs and address lie: LOSSCAST_HOME, or the user's state folder."""
    base = os.environ.get("LOSSCAST_HOME") or os.path.join(
        os.environ.get("XDG_STATE_HOME") or "~/.local/state", "losscast"
    )
    return Path(base).expanduser() / "ray"


def prediction_for(spec: Any, law_path: Path | None) -> dict[str, Any] | None:
    """prediction.json of this run under the law that its spec names; None where it names none."""
    if law_path is None:
        return None
    from launcher.accounting import parameter_count, total_tokens
    from launcher.errors import WrongInput
    from monitor.law import Law
    from monitor.prediction import predict

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
    """Submit, and with --follow stay until the end."""
    from launcher.specfile import read_spec
    from launcher.submit import refuse_shadows, submit

    spec = read_spec(args.run)
    refuse_shadows(Path.cwd())
    law = None if spec.law is None else Path(args.run).resolve().parent / spec.law
    prediction = prediction_for(spec, law)
    if prediction is not None:
        q = prediction["final_loss"]
        print(
            f"predicted {q['p50']:.4f} (90% interval {q['p05']:.4f} to {q['p95']:.4f}), {prediction['digest']}",
            file=sys.stderr,
        )
    dashboard, ray_env = cluster_of(spec.cluster.to)
    done = submit(spec, dashboard, ray_env, prediction=prediction)
    if args.json:
        print(json.dumps(done.__dict__))
    else:
        print(done.job)
    if not args.follow:
        print(
            f"next: losscast logs -f {args.run}   losscast status {args.run}   losscast stop {args.run}",
            file=sys.stderr,
        )
        return 0
    from launcher.cli.runs import follow

    return follow(done, ray_env)
