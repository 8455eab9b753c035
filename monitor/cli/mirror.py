"""`losscast mirror RUN --to wandb|mlflow|tensorboard`: a run of a monitor, on the screen people are used to."""

import argparse
import sys
from pathlib import Path
from typing import Any

from monitor.cli.watch import URL


def register(commands: Any) -> None:
    """Add `mirror` to the command."""
    p = commands.add_parser(
        "mirror",
        help="tell a run again to W&B, MLflow or TensorBoard",
        description="Tell W&B, MLflow or TensorBoard every step of a run that a monitor knows, with what was expected of "
        "it. Called again it goes on where it ended (TensorBoard: begins anew). Where each of them is, and who you are there, is said "
        "as always: WANDB_API_KEY, WANDB_MODE, MLFLOW_TRACKING_URI. Steps trained again after a restart keep their first value.",
    )
    p.add_argument("run", metavar="RUN", help="a run's name")
    p.add_argument("--to", required=True, choices=("wandb", "mlflow", "tensorboard"))
    p.add_argument(
        "--place",
        metavar="NAME",
        help="W&B's project or MLflow's experiment (default losscast), TensorBoard's folder (default ./tensorboard)",
    )
    p.add_argument("--follow", "-f", action="store_true", help="go on until the run has ended")
    p.add_argument(
        "--every", type=float, default=10.0, metavar="SECONDS", help="between two looks (default %(default)s)"
    )
    p.add_argument("--url", help=f"the monitor (default $LOSSCAST_URL, or {URL})")
    p.add_argument(
        "--token-env",
        default="LOSSCAST_TOKEN",
        metavar="NAME",
        help="variable that holds a token (default %(default)s)",
    )
    p.set_defaults(func=mirror)


def mirror(args: argparse.Namespace) -> int:
    """Find the run before anything is made where it is told to."""
    from monitor import mirroring
    from monitor.cli.watch import asking
    from monitor.errors import WrongInput
    from monitor.schema import is_run_id

    if not is_run_id(args.run):
        raise WrongInput(
            f"{args.run!r} is no run's name: small letters, digits and hyphens, as in run.yaml's `name`"
        )
    if not args.every > 0:
        raise WrongInput(f"--every {args.every:g}: must be more than 0 seconds")
    ask = asking(args)
    ask(f"/v1/runs/{args.run}")
    if args.to == "wandb":
        sink: mirroring.Sink = mirroring.Wandb(args.run, args.place or "losscast")
    elif args.to == "mlflow":
        sink = mirroring.Mlflow(args.run, args.place or "losscast")
    else:
        sink = mirroring.TensorBoard(args.run, Path(args.place or "tensorboard"))
    try:
        told = mirroring.mirror(
            ask,
            args.run,
            sink,
            follow=args.follow,
            every_s=args.every,
            say=lambda words: print(words, file=sys.stderr),
        )
    finally:
        sink.close()
    print(f"{args.run}: {told} steps told to {args.to}", file=sys.stderr)
    return 0
