"""`losscast fit`: finished runs, or curves, to law.json."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from monitor.forecast.law import Law

LARGE = 500
"""Runs from which a fit takes so long that it says so first."""


def register(sub: argparse._SubParsersAction) -> None:
    """Add the command."""
    p = sub.add_parser(
        "fit",
        help="fit a scaling law to finished runs",
        description="Fit a scaling law to finished runs (run,params,tokens,loss[,flops]) or to curves (run,step,loss,tokens,params[,lr]).",
    )
    p.add_argument(
        "points", metavar="POINTS|CURVES", help="CSV or Parquet; a file with a 'step' column holds curves"
    )
    p.add_argument(
        "--curves",
        metavar="CURVES",
        help="the same runs' curves, so that predictions know the way to the final loss",
    )
    p.add_argument("-o", "--out", metavar="LAW", help="where to write law.json")
    p.add_argument(
        "--form",
        default="auto",
        help="auto (default), chinchilla (plain: Huber, no priors), frontier, power or curve",
    )
    p.add_argument(
        "--metric",
        choices=("pass_rate", "bpb", "accuracy"),
        help="also foretell a benchmark's figure: pass_rate from compute, bpb or accuracy from the loss",
    )
    p.add_argument(
        "--floor", type=float, default=0.0, help="what guessing scores, with --metric accuracy (default 0)"
    )
    p.add_argument(
        "--batch-tokens", type=float, metavar="B", help="tokens a step, for curves without a tokens column"
    )
    p.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="OURS=THEIRS",
        help="what the file calls params, tokens, loss ...",
    )
    p.add_argument("--where", nargs="+", default=[], metavar="COLUMN=VALUE", help="keep only these rows")
    p.add_argument(
        "--include", nargs="+", default=[], metavar="RUN", help="keep these runs whatever the cleaning says"
    )
    p.add_argument("--exclude", nargs="+", default=[], metavar="RUN", help="leave these runs out")
    p.add_argument("--plot", metavar="PICTURE", help="draw the law to a PNG, SVG or PDF file")
    p.add_argument("--json", action="store_true", help="print the law's figures as JSON")
    p.set_defaults(func=run)


def pairs(texts: list[str], flag: str) -> dict[str, str]:
    """`a=b` arguments as a dict. Raises WrongInput for one without `=`."""
    from monitor.errors import WrongInput

    for text in texts:
        if "=" not in text:
            raise WrongInput(f"{flag} {text}: need NAME=VALUE")
    return {key.strip(): value.strip() for key, value in (text.split("=", 1) for text in texts)}


def run(args: argparse.Namespace) -> int:
    """Fit, write, and say what was found."""
    from monitor.cli.replay import passed_over
    from monitor.forecast.fit import fit
    from monitor.forecast.points import is_curves, read_curves, read_points

    if args.metric:
        return finish(args, fit_metric(args))
    columns, where = pairs(args.columns, "--columns"), pairs(args.where, "--where")
    if is_curves(args.points):
        read = read_curves(args.points, columns, where, args.batch_tokens)
        if read.without_loss:
            print(f"note: {args.points}: {passed_over(read.without_loss)}", file=sys.stderr)
        law = fit(
            read,
            args.form,
            include=args.include,
            exclude=args.exclude,
        )
    else:
        curves = read_curves(args.curves, batch_tokens=args.batch_tokens) if args.curves else None
        points = read_points(args.points, columns, where)
        if len(points.run) > LARGE:
            print(f"fitting {len(points.run):,} runs, which takes a while", file=sys.stderr)
        law = fit(
            points,
            args.form,
            curves=curves,
            include=args.include,
            exclude=args.exclude,
        )
    return finish(args, law)


def fit_metric(args: argparse.Namespace) -> "Law":
    """The law of a task's metric."""
    from dataclasses import replace

    import numpy as np

    from monitor.errors import WrongInput
    from monitor.forecast.columns import NAMES
    from monitor.forecast.fit import fit
    from monitor.forecast.fit_clean import ends_with_metric
    from monitor.forecast.points import points_of, read_curves, select
    from monitor.forecast.table import read_table, renamed
    from monitor.forecast.task import fit_link, metric_values, pass_rate_table

    table = renamed(
        select(read_table(args.points), pairs(args.where, "--where")), pairs(args.columns, "--columns")
    )
    if not 0 <= args.floor < 1:
        raise WrongInput(f"--floor {args.floor:g}: what guessing scores lies in 0 to 1")
    if args.metric == "pass_rate":
        law = fit(points_of(pass_rate_table(table)), "power", include=args.include, exclude=args.exclude)
        said = {
            "the loss is empty or not finite": "no problem solved, all solved, or no figure: -ln(pass rate) is not finite"
        }
        excluded = tuple(
            {**e, "reason": next((new for old, new in said.items() if old in e["reason"]), e["reason"])}
            for e in law.excluded
        )
        return replace(law, task={"metric": "pass_rate"}, excluded=excluded)
    if table.find(NAMES["step"]) is not None:
        points, curves = ends_with_metric(table, args.metric, args.batch_tokens, args.include)
    else:
        points = points_of(table)
        curves = read_curves(args.curves, batch_tokens=args.batch_tokens) if args.curves else None
    law = fit(points, args.form, curves=curves, include=args.include, exclude=args.exclude)
    kept = np.array([run in law.runs["run"] for run in points.run])
    return replace(
        law,
        task=fit_link(points.loss[kept], metric_values(points, args.metric)[kept], args.metric, args.floor),
    )


def finish(args: argparse.Namespace, law: "Law") -> int:
    """Write the law and say what was found."""
    if args.out:
        told_of_folder(args.out, law.write)
        print(f"wrote {args.out} ({law.digest[:15]}...)", file=sys.stderr)
    if args.plot:
        from monitor.errors import writing
        from monitor.forecast.plot import draw_law

        with writing(args.plot, "Give --plot a file in a folder that is there and can be written."):
            draw_law(law, args.plot)
        print(f"wrote {args.plot}", file=sys.stderr)
    for entry in law.excluded[:SHOWN]:
        print(f"left out {entry['run']}: {entry['reason']}", file=sys.stderr)
    if len(law.excluded) > SHOWN:
        print(f"... and {len(law.excluded) - SHOWN} more left out; --json lists them all", file=sys.stderr)
    if law.conventions.get("tokens", "").startswith("optimizer steps"):
        print(f"note: the law's tokens are {law.conventions['tokens']}", file=sys.stderr)
    if "schedule" in law.conventions:
        print(f"note: {law.conventions['schedule']}", file=sys.stderr)
    if not law.identifiable:
        print(f"not identifiable: {law.why}", file=sys.stderr)
    found = found_by_predict(law)
    if found is not None and found[1] < EXPLAINS:
        print(f"warning: {explains_little(args, law, *found)}", file=sys.stderr)
    if args.json:
        said = {"rmse_predicted": None, "explained": None}
        if found is not None:
            said = {"rmse_predicted": found[0], "explained": found[1]}
        print(json.dumps({**answer(law), **said}, allow_nan=False))
    else:
        print(law.fit["best_form"])
        for name, value in law.parameters.items():
            error = law.standard_errors.get(name)
            known = error is not None and error > 1e-9 * abs(value)  # `x` and `top` are marks, not estimates
            spread = f"({error:.2g})" if known else ""
            print(f"{name:>6} {value:<12.6g} {spread:<10} {meaning(law, name)}".rstrip())
        count = (
            len(law.curve["anneal"]["runs"]) if law.form == "curve" and law.curve else len(law.runs["run"])
        )
        plural = "s" if count != 1 else ""
        what = " in -ln(pass rate)" if (law.task or {}).get("metric") == "pass_rate" else ""
        rmse = f"rmse {law.fit['rmse']:.4g}{what}"
        if found is not None:
            rmse = f"rmse {found[0]:.4g}, that of what predict returns"
            if f"{found[0]:.2g}" != f"{law.fit['rmse']:.2g}":
                rmse += f" ({law.fit['rmse']:.4g} of the form above alone)"
        print(f"{count} run{plural}, {rmse}, {law.fit['seconds'] * 1e3:.0f} ms")
    return 0


EXPLAINS = 0.5
"""Share of the losses' variance under which a law says little of its own runs."""
MOST_ASKED = 500
"""Runs whose loss is predicted again to tell the law's error; of more, as many drawn from them."""


def found_by_predict(law: "Law") -> tuple[float, float] | None:
    """Root mean square error of what `predict` returns for the law's own runs, nats per token, and the share of their
    losses' variance that it explains. None for a law of curves or of a task, and of fewer than three runs."""
    import numpy as np

    runs = law.runs
    if law.form == "curve" or (law.task or {}).get("metric") == "pass_rate" or len(runs["run"]) < 3:
        return None
    chosen = np.random.default_rng(0).permutation(len(runs["run"]))[:MOST_ASKED].tolist()
    loss = np.array([runs["loss"][i] for i in chosen], dtype=float)
    told = np.array([law.predict(*(runs[k][i] for k in ("params", "tokens", "flops"))).p50 for i in chosen])
    squares, spread = float(np.mean((told - loss) ** 2)), float(np.var(loss))
    return squares**0.5, 1.0 - squares / spread if spread > 0 else 1.0


def explains_little(args: argparse.Namespace, law: "Law", rmse: float, explained: float) -> str:
    """What to say of a law that misses its own runs by about as much as they differ, with the columns that may tell why."""
    from monitor.forecast.table import read_table

    table, kinds = read_table(args.points), []
    for own in table.columns:
        values = sorted(set(table.texts(own)))
        if 2 <= len(values) <= 8:
            kinds.append(f"{own}={values[0]}")
    share = f"{max(0.0, explained):.0%} of how far their losses differ"
    which = f", such as {', '.join(kinds[:5])}" if kinds else ""
    return (
        f"the law explains {share} (rmse {rmse:.2g}): these may be runs of several kinds, or none that have finished; "
        f"keep one kind with --where COLUMN=VALUE{which}"
    )


def told_of_folder(out: str, write: Callable[[str], None]) -> None:
    """Write, and say so where a folder was made for it: a name mistyped makes one too."""
    folder = Path(out).parent
    is_new = not folder.is_dir()
    write(out)
    if is_new:
        print(f"made the folder {folder}", file=sys.stderr)


SHOWN = 12
"""Runs left out that are told one by one."""
MEANINGS = {
    "E": "irreducible loss",
    "A": "of A / N^alpha, what size leaves",
    "B": "of B / D^beta, what data leave",
    "a": "of a / C^b, what compute leaves",
    "b": "exponent of compute, C",
    "ratio": "ln of the best tokens per parameter, at ln C = x",
    "turn": "its change per e-fold of C",
    "bend": "what leaving it costs: ln loss at e times the best is about half of this",
    "fade": "change of ln bend per e-fold of C",
    "skew": "how much more too many tokens cost than too few",
    "l": "ln of the loss at ln C = x",
    "c": "bend of the power law",
    "late": "ln loss that small runs' handicaps still cost at the largest one",
    "pace": "power of C with which those die out",
    "x": "where the above are counted from, ln C",
    "top": "ln C of the largest run",
}


def meaning(law: "Law", name: str) -> str:
    """What a parameter of a law of finished runs is, in words; the curve law's are in the documentation."""
    return "" if law.form == "curve" else MEANINGS.get(name, "")


def answer(law: "Law") -> dict:
    """What `fit --json` prints."""
    return {
        "form": law.form,
        "best_form": law.fit["best_form"],
        "parameters": law.parameters,
        "standard_errors": law.standard_errors,
        "objective": law.fit["objective"],
        "rmse": law.fit["rmse"],
        "seconds": law.fit["seconds"],
        "excluded": [{"run": e["run"], "reason": e["reason"]} for e in law.excluded],
        "identifiable": law.identifiable,
        "why": law.why,
        "runs": len(law.runs["run"]),
        "noise_sd": law.noise_sd,
        "members": {m.form: m.weight for m in law.members},
        "digest": law.digest,
    }
