"""`losscast replay CURVE`: the live judge over a recorded run."""

import argparse
import json
import math
import sys
from typing import Any


def register(commands: Any) -> None:
    """Add `replay` to the command."""
    p = commands.add_parser(
        "replay",
        help="the live judge over a recorded run",
        description="Run the live judge over a recorded run. A file of several runs gives one answer a run.",
    )
    p.add_argument("curve", help="CSV or Parquet with run,step,loss[,tokens,lr,grad_norm]")
    p.add_argument("--run", help="only this run of the file")
    p.add_argument("--prediction", help="prediction.json to hold the run against")
    p.add_argument(
        "--control",
        action="append",
        default=[],
        metavar="CURVE",
        help="a run of the same recipe, on the same data order or the old runs on theirs; again for more, three and more "
        "(also in one file) say how such runs differ",
    )
    p.add_argument("--target-loss", type=float, help="final loss the run should reach, nats per token")
    p.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="OURS=THEIRS",
        help="what the files call step, loss, val_loss, tokens, lr, grad_norm",
    )
    p.add_argument(
        "--where", nargs="+", default=[], metavar="COLUMN=VALUE", help="keep only these rows of CURVE"
    )
    p.add_argument("--json", action="store_true", help="one JSON document on stdout")
    p.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print every alert and the advice; exit status 3 when the run ends off its prediction."""
    from monitor.cli.fit import pairs
    from monitor.errors import WrongInput, some
    from monitor.forecast.law import read_json
    from monitor.forecast.points import read_curves
    from monitor.judge.line import check
    from monitor.judge.old_runs import old_runs
    from monitor.replay import merged, off_prediction, read_samples, replay, samples_by_run
    from monitor.schema import spell

    if args.target_loss is not None and not 0 < args.target_loss < math.inf:
        raise WrongInput(f"--target-loss {args.target_loss:g}: need a number above 0, nats per token")
    columns, where = pairs(args.columns, "--columns"), pairs(args.where, "--where")
    curves = read_curves(args.curve, columns, where, attempts=True)
    runs, without = samples_by_run(curves), {curve.run: curve.without_loss for curve in curves.runs}
    if curves.without_loss:
        print(f"note: {args.curve}: {passed_over(curves.without_loss)}", file=sys.stderr)
    if args.run is not None:
        if args.run not in runs:
            raise WrongInput(f"{args.curve}: has no run {args.run!r}; it has {some(runs)}")
        runs = {args.run: runs[args.run]}
    prediction = None
    if args.prediction:
        prediction = read_json(args.prediction, "the file that `losscast predict -o` wrote")
        if not isinstance(prediction, dict):
            raise WrongInput(
                f"{args.prediction}: holds no prediction; give the file that `losscast predict -o` wrote"
            )
        try:
            check(prediction)
        except WrongInput as error:
            raise WrongInput(f"{args.prediction}: {error}") from error
    controls = [run for path in args.control for run in read_samples(path, columns).values()]
    control = merged(controls) if controls else None
    old = None
    if len(controls) > 1:
        try:
            old = old_runs(controls)
        except WrongInput as error:
            print(f"note: --control: {error}; the run is held against their mean alone", file=sys.stderr)
    answers = {
        name: {
            **replay(samples, None, prediction, control, args.target_loss, old),
            "rows_without_loss": without[name],
        }
        for name, samples in runs.items()
    }
    if controls:
        for answer in answers.values():
            answer["control"] = {"runs": len(controls), **answer["control"]}
    off = any(off_prediction(answer) for answer in answers.values())
    if args.json:
        print(json.dumps(spell(_document(answers)), allow_nan=False))
    else:
        for name, answer in answers.items():
            _print(name, answer)
    if off:
        print("losscast: the run ends off its line", file=sys.stderr)
    return 3 if off else 0


def _document(answers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One run's answer as it is; of several, their alerts and advice together, each naming its run."""
    if len(answers) == 1:
        return next(iter(answers.values()))
    return {
        "samples": sum(answer["samples"] for answer in answers.values()),
        "alerts": [{"run": name, **alert} for name, answer in answers.items() for alert in answer["alerts"]],
        "final_loss": None,
        "advice": [
            {"run": name, **advice} for name, answer in answers.items() for advice in answer["advice"]
        ],
        "runs": {
            name: {
                key: a[key]
                for key in ("samples", "final_loss", "rows_without_loss", "question", "control")
                if key in a
            }
            for name, a in answers.items()
        },
        "rows_without_loss": sum(answer["rows_without_loss"] for answer in answers.values()),
    }


def beside(told: dict[str, Any]) -> list[str]:
    """What became of the control runs, in words."""
    runs = "1 run" if told["runs"] == 1 else f"the mean of {told['runs']} runs"
    said = [f"{runs}, {told['steps']} samples in common, {told['used']} judged by it"]
    if told["why"]:
        said[0] += f": {told['why']}"
    old = told.get("old_runs")
    if old:
        line = f"{old['runs']} old runs, {old['steps']} steps that they share say how such runs differ"
        apart = old["apart_sigmas"]
        if apart is not None and not abs(apart) < FAR:
            line += f": the run ends {abs(apart):.0f} of their sigmas {'above' if apart > 0 else 'below'} them, are they of its recipe?"
        said.append(line)
    return said


FAR = 8.0
"""Sigmas from the mean of old runs at which a run is hardly of their recipe."""


def passed_over(rows: int) -> str:
    """What became of rows whose loss was empty."""
    return f"{count(rows, 'row')} without a loss, passed over"


def count(n: int, what: str) -> str:
    """`1 sample`, `2 samples`."""
    return f"{n} {what}{'' if n == 1 else 's'}"


def _print(name: str, answer: dict[str, Any]) -> None:
    print(f"{name}: {count(answer['samples'], 'sample')}, {count(len(answer['alerts']), 'alert')}")
    for a in answer["alerts"]:
        expected = "" if a["expected"] is None else f", expected {a['expected']:.4f}"
        until = "open" if a["resolved_step"] is None else f"until step {a['resolved_step']}"
        print(
            f"  step {a['step']:>8}  {a['severity']:8} {a['alert']}: {a['value']:.4f}{expected}, since step {a['since_step']}, {until}"
        )
    if answer["final_loss"]:
        f = answer["final_loss"]
        print(f"  final loss {f['p50']:.4f} ({f['p05']:.4f} to {f['p95']:.4f})")
    if answer["question"]:
        print(f"  {answer['question']}")
    if "control" in answer:
        for line in beside(answer["control"]):
            print(f"  control: {line}")
    if answer["advice"]:
        print(f"  advice: {answer['advice'][-1]['action']}: {'; '.join(answer['advice'][-1]['evidence'])}")
