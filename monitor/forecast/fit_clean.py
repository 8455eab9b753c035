"""Which runs a law is fitted to: the ends of curves, and runs left out, each with its reason.

A loss is nats per token. Nothing here is silent: what goes is listed in the law, and `include` keeps it.
"""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np

from monitor.errors import WrongInput
from monitor.forecast.columns import NAMES
from monitor.forecast.fit_members import Runs, fit_mode
from monitor.forecast.points import Curve, Curves, Exclusion, Points, curves_of_table
from monitor.forecast.table import Table, need

WILD = 0.2
"""Distance of ln loss from a robust fit of all the runs beyond which a run is taken for diverged or mislabelled."""


def ends(curves: Curves, include: Collection[str] = ()) -> Points:
    """The final point of each curve: its last validation loss, else the mean of its last 2% of steps, outliers clipped.

    Without tokens, steps serve; without params in the whole file, the runs count as of one size, and their compute is
    their tokens. A run whose learning rate had not come down when others' had is unfinished, and is left out with that reason.
    """
    rows: list[tuple[str, float, float, float]] = []
    excluded: list[Exclusion] = []
    ratios = {c.run: _end_rate(c) for c in curves.runs}
    known = [r for r in ratios.values() if r is not None]
    decayed = min(known) if known else 1.0
    sized = any(c.params is not None for c in curves.runs)
    for c in curves.runs:
        loss = final_loss(c)
        ratio = ratios[c.run]
        tokens = float(c.tokens[-1] if c.tokens is not None else c.step[-1])
        if (c.params is None and sized) or not tokens > 0:
            excluded.append(Exclusion(c.run, "its curve has no params, or no step after the first"))
        elif loss is None:
            excluded.append(Exclusion(c.run, "its last losses are not finite"))
        elif ratio is not None and decayed < 0.3 and ratio > max(2 * decayed, 0.3) and c.run not in include:
            excluded.append(
                Exclusion(
                    c.run,
                    f"unfinished: it ends at {ratio:.0%} of its peak learning rate, others at {decayed:.0%}",
                )
            )
        else:
            rows.append((c.run, c.params or float("nan"), tokens, loss))
    columns = np.array([row[1:] for row in rows], float).reshape(-1, 3)
    flops = np.where(np.isfinite(columns[:, 0]), 6 * columns[:, 0], 1.0) * columns[:, 1]
    return Points(
        tuple(row[0] for row in rows),
        columns[:, 0],
        columns[:, 1],
        columns[:, 2],
        flops,
        tuple(excluded),
        path=curves.path,
    )


def ends_with_metric(
    table: Table, metric: str, batch_tokens: float | None, include: Collection[str] = ()
) -> tuple[Points, Curves]:
    """The ends of a file's curves, each with the last value its run has in the metric's column, and the curves."""
    curves = curves_of_table(table, Path(table.path).stem, batch_tokens)
    points = ends(curves, include)
    own = next((name for name in table.columns if name.lower() == metric), None)
    if own is None:
        return points, curves
    step = table.numbers(need(table, NAMES["step"], "optimizer updates so far"), low=0.0, may_equal=True)
    values = table.numbers(own, low=-np.inf, may_lack=True)
    run_column = table.find(NAMES["run"])
    names = table.texts(run_column) if run_column else [Path(table.path).stem] * len(table)
    last: dict[str, float] = {}
    for i in np.argsort(step, kind="stable"):
        if np.isfinite(values[i]):
            last[names[i]] = float(values[i])
    return replace(points, extra={metric: [last.get(run) for run in points.run]}), curves


def rates_at_end(curves: Curves, runs: Collection[str]) -> tuple[str, str]:
    """What the ends of the given runs' learning rates make of a law of them: a convention, and a doubt; empty words where none.

    Runs at a constant rate make a law of such runs. Runs cut short on the way down make a law of nothing that will be run.
    """
    known = [r for c in curves.runs if c.run in runs and (r := _end_rate(c)) is not None]
    if not known or min(known) <= 0.3:
        return "", ""
    if min(known) > 0.95:
        return "constant: the runs' learning rate never came down, and the law is of losses at full rate", ""
    return (
        "",
        f"the runs were cut short: their learning rates had come down to no less than {min(known):.0%} of the peak",
    )


def final_loss(curve: Curve) -> float | None:
    """A run's final loss, nats per token; None when its end is not finite."""
    if curve.val_loss is not None and np.isfinite(curve.val_loss).any():
        return float(curve.val_loss[np.isfinite(curve.val_loss)][-1])
    count = max(1, min(len(curve) // 50, 200))
    last = curve.loss[-count:]
    if not np.isfinite(last[-1]) or np.isfinite(last).sum() * 2 < count:
        return None
    last = last[np.isfinite(last)]
    middle = float(np.median(last))
    width = 3 * 1.4826 * float(np.median(np.abs(last - middle)))
    return float(np.mean(np.clip(last, middle - width, middle + width))) if width > 0 else middle


def _end_rate(curve: Curve) -> float | None:
    """Last learning rate over the largest one; None when the curve has none."""
    if curve.lr is None or not np.isfinite(curve.lr).any() or not np.nanmax(curve.lr) > 0:
        return None
    lr = curve.lr[np.isfinite(curve.lr)]
    return float(lr[-1] / lr.max())


def asked_in(points: Points, include: Collection[str]) -> None:
    """Raises WrongInput when a name in `include` is no run's."""
    unknown = set(include) - set(points.run) - {e.run for e in points.excluded}
    if unknown:
        raise WrongInput(f"--include {sorted(unknown)[0]}: {points.path or 'the points'} has no such run")


def asked_out(points: Points, exclude: Collection[str]) -> Points:
    """Without the runs named in `exclude`. Raises WrongInput for a name that is no run's."""
    unknown = set(exclude) - set(points.run)
    if unknown:
        raise WrongInput(f"--exclude {sorted(unknown)[0]}: {points.path or 'the points'} has no such run")
    mask = np.array([run not in exclude for run in points.run], bool)
    return points.keep(mask, {int(i): "asked for with --exclude" for i in np.flatnonzero(~mask)})


def clean(points: Points, include: Collection[str] = ()) -> Points:
    """Without exact repeats of a run, and without runs that came out nothing like the others.

    The latter: over WILD off a robust fit of all, and over 8 times its residual scale; none when they would be more
    than a fifth, since then it is the fit that is wrong. What is left out is listed with its reason; `include` overrides.
    """
    seen: dict[tuple[float, ...], str] = {}
    mask = np.ones(len(points), bool)
    reasons: dict[int, str] = {}
    for i, run in enumerate(points.run):
        key = (points.params[i], points.tokens[i], points.flops[i], points.loss[i])
        if key in seen and run not in include:
            mask[i], reasons[i] = False, f"the same numbers as run {seen[key]}"
        seen.setdefault(key, run)
    points = points.keep(mask, reasons)
    if len(points) < 8:
        return points
    sized = bool(np.all(np.isfinite(points.params) & np.isfinite(points.tokens)))
    runs = Runs.of(points)
    fitted = fit_mode("chinchilla" if sized else "bent", runs)
    off = runs.ln_loss - fitted.log_loss(runs)
    wild = np.abs(off) > max(WILD, 8 * float(np.exp(fitted.z[-1])))
    wild &= np.array([run not in include for run in points.run])
    if not wild.any() or wild.sum() > 0.2 * len(points):
        return points
    ratio = np.exp(off)
    why = {
        int(
            i
        ): f"its loss is {ratio[i]:.2f} times what the other runs make of its size and data: diverged, or not what it says"
        for i in np.flatnonzero(wild)
    }
    return points.keep(~wild, why)
