"""`losscast predict`: law.json to the loss a run should end at, and show on the way."""

import argparse
import json
import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from monitor.forecast.law import Law

read_run: Callable[[str], dict[str, Any]] | None = None
"""run.yaml -> params, tokens, batch_tokens and schedule, set by whoever knows run.yaml: the monitor does not."""


def register(sub: argparse._SubParsersAction) -> None:
    """Add the command."""
    p = sub.add_parser(
        "predict",
        help="predict a run's loss from a law",
        description="Predict the loss a run should end at, and, where the law knows curves, the loss at each step.",
    )
    p.add_argument(
        "law",
        metavar="LAW",
        help="law.json from `losscast fit`, or a published law by name: hoffmann, hoffmann_tex, epoch, kaplan",
    )
    p.add_argument(
        "run_file", nargs="?", metavar="RUN", help="run.yaml to take params, tokens, batch and schedule from"
    )
    p.add_argument("--params", type=float, metavar="N", help="parameters (count)")
    p.add_argument("--tokens", type=float, metavar="D", help="training tokens (count)")
    p.add_argument(
        "--flops",
        type=float,
        metavar="C",
        help="training compute, instead of --params and --tokens, for a frontier law",
    )
    p.add_argument(
        "--batch-tokens", type=float, metavar="B", help="tokens a step; the fitted runs' when left out"
    )
    p.add_argument(
        "--schedule",
        metavar="KIND|FILE.csv",
        help="learning-rate schedule; the fitted runs' shape when left out",
    )
    p.add_argument(
        "-o", "--out", metavar="PREDICTION", help="where to write prediction.json; never overwrites"
    )
    p.add_argument("--json", action="store_true", help="print the prediction as JSON")
    p.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Predict, write, print."""
    from monitor.cli.fit import told_of_folder
    from monitor.errors import WrongInput
    from monitor.forecast.prediction import predict
    from monitor.forecast.presets import NO_ERRORS, named

    target = {
        "params": args.params,
        "tokens": args.tokens,
        "batch_tokens": args.batch_tokens,
        "schedule": args.schedule,
    }
    if args.run_file is not None:
        if read_run is None:
            raise WrongInput(f"{args.run_file}: run files can't be read here; give --params and --tokens")
        told = read_run(args.run_file)
        target = {k: v if v is not None else told.get(k) for k, v in target.items()}
    law = named(args.law)
    made = predict(
        law,
        params=target["params"],
        tokens=target["tokens"],
        flops=args.flops,
        batch_tokens=target["batch_tokens"],
        schedule=target["schedule"],
    )
    body = made.to_dict()
    if args.out:
        told_of_folder(args.out, made.write)
        print(f"wrote {args.out} ({made.digest[:15]}...)", file=sys.stderr)
    if not body["in_range"]:
        print(f"warning: {outside(law, body)}", file=sys.stderr)
    if untrained := above_untrained(law, body):
        print(f"warning: {untrained}", file=sys.stderr)
    if law.conventions.get("tokens", "").startswith("optimizer steps"):
        print(f"warning: the law's tokens are {law.conventions['tokens']}", file=sys.stderr)
    if isinstance(body["schedule"], dict) and not body["schedule"]["honoured"]:
        print(
            "warning: the law knows no learning rates, so --schedule changes nothing: fit it to curves with a column lr",
            file=sys.stderr,
        )
    if isinstance(body["schedule"], dict) and body["schedule"]["honoured"] and body["schedule"]["note"]:
        print(f"warning: {body['schedule']['note']}", file=sys.stderr)
    if args.json and body["curve"] is None:
        print("note: no curve: fit with --curves, and give --tokens and --batch-tokens", file=sys.stderr)
    if not body["identifiable"]:
        print(f"warning: not identifiable: {body['why']}", file=sys.stderr)
    if args.json:
        print(json.dumps(body, allow_nan=False))
    else:
        final = made.final_loss
        if body["metric"]:
            m = body["metric"]
            print(f"{m['name']} {m['p50']:.4f} ({m['p05']:.4f} to {m['p95']:.4f}, 90% of the time)")
            return 0
        middle, low, high = (figure(v) for v in (final.p50, final.p05, final.p95))
        sure = "drift alone" if law.why.startswith(NO_ERRORS) else "90% of the time"
        print(f"{middle} ({low} to {high}, {sure})")
    return 0


MOST_VOCABULARY = 262_144
"""Entries of the largest vocabularies in use."""


def above_untrained(law: "Law", body: dict[str, Any]) -> str:
    """Words for a loss that is more than a model has before it is trained, the logarithm of its vocabulary; else empty."""
    known = law.conventions.get("vocabulary")
    words = int(known) if known else MOST_VOCABULARY
    loss = body["final_loss"]["p50"]
    if law.task or loss <= math.log(words):
        return ""
    return (
        f"a loss of {figure(loss)} is more than an untrained model has (ln {words:,} = {math.log(words):.1f}): "
        "so far outside its runs the law says nothing"
    )


def figure(loss: float) -> str:
    """A loss as people read it: four decimals, or five digits where those say little."""
    return f"{loss:.4f}" if 0.1 <= loss < 1e4 else f"{loss:.5g}"


def outside(law: "Law", body: dict[str, Any]) -> str:
    """In what a run lies outside the range of the runs that the law was fitted to."""
    ratio, said = body["extrapolation"]["flops_ratio"], []
    if ratio > 1:
        said.append(f"{ratio:.3g} times the compute of the largest fitted run")
    for key, (low, high) in law.range().items():
        value = body.get(key)
        if value is not None and not low <= value <= high:
            said.append(f"{value:.3g} {key}, fitted runs have {low:.3g} to {high:.3g}")
    return "; ".join(said) or "less compute than the smallest fitted run"
