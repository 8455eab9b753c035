"""Task metrics from a law: the second step from loss to a benchmark's figure, and pass rates straight from compute.

    pass_rate   -ln(pass rate) is itself a power law in compute; the law is fitted to it in the loss's place
                (OpenAI 2023, arXiv:2303.08774, section 3.2)
    bpb         ln(bits per byte of the answers) = u + v ln(loss)
    accuracy    floor + (1 - floor) / (1 + exp(-(u + v ln(loss))))      Bhagia et al. 2024, arXiv:2412.04403

bpb in bits per byte; accuracy and pass rate in 0 to 1; floor what guessing gives. The link is fitted to the same
runs as the law, by least squares under weak priors; its draws carry what it can't tell, `sd` what runs scatter.
"""

import math
from typing import Any

import numpy as np

from monitor.errors import WrongInput, some
from monitor.forecast.points import Points
from monitor.forecast.table import FloatArray, Table, need

KINDS = {"bpb": "log", "accuracy": "logit"}


def rates(values: FloatArray, where: str) -> FloatArray:
    """Rates in 0 to 1; a column with values over 1 is taken for percent. Raises WrongInput beyond 100."""
    top = float(np.nanmax(values, initial=0.0))
    if top > 100 or float(np.nanmin(values, initial=0.0)) < 0:
        raise WrongInput(
            f"{where}: rates lie in 0 to 1, or 0 to 100 in percent; got {values[np.nanargmax(values)]:g}"
        )
    return values / 100 if top > 1 else values


def pass_rate_table(table: Table) -> Table:
    """The table with -ln(pass rate) as its loss; rows with no pass or nothing but passes have none (an empty loss)."""
    own = need(table, ("pass_rate", "pass@1", "pass_at_1"), "share of problems solved")
    rate = rates(table.numbers(own, low=0.0, may_equal=True, may_lack=True), f"{table.path}: {own}")
    inside = (rate > 0) & (rate < 1)
    loss = np.where(inside, -np.log(np.where(inside, rate, 0.5)), np.nan)
    columns = {name: cells for name, cells in table.columns.items() if name not in (own, "loss")}
    return Table(table.path, {**columns, "loss": loss.tolist()}, table.lines)


def metric_values(points: Points, metric: str) -> FloatArray:
    """A metric's column (n,), NaN where it is empty. Raises WrongInput when there is none or a value can't be."""
    own = next((name for name in points.extra if name.lower() == metric), None)
    if own is None:
        has = some(points.extra, 10) or "no other columns"
        raise WrongInput(
            f"{points.path}:1:1: no column {metric!r}; the file has {has}. Say --columns {metric}=NAME"
        )
    try:
        values = np.array(
            [np.nan if c is None or str(c).strip() == "" else float(str(c)) for c in points.extra[own]]
        )
    except ValueError as error:
        raise WrongInput(f"{points.path}: {own}: {error}") from None
    if metric == "bpb" and np.any(values <= 0):
        raise WrongInput(f"{points.path}: {own}: bits per byte are above 0; got {np.nanmin(values):g}")
    return rates(values, f"{points.path}: {own}") if metric == "accuracy" else values


def fit_link(
    loss: FloatArray, values: FloatArray, metric: str, floor: float = 0.0, seed: int = 0
) -> dict[str, Any]:
    """The link from loss (n,) to a metric's values (n,), as plain data for law.json. Rows without a value do not count."""
    kind = KINDS[metric]
    good = np.isfinite(values) & np.isfinite(loss)
    if kind == "logit":
        good &= (values > floor) & (values < 1)
    if good.sum() < 2:
        raise WrongInput(
            f"--metric {metric}: {int(good.sum())} runs have a usable value; need 2"
            + (f" above the floor {floor:g}" if floor else "")
        )
    y = _link(values[good], kind, floor)
    centre = float(np.log(loss[good]).mean())
    x = np.log(loss[good]) - centre
    basis = np.column_stack([np.ones_like(x), x])
    slope = 1.0 if kind == "log" else -5.0
    prior = np.diag([1e-6, 1e-4])  # as good as none, unless all runs have one loss
    precision = basis.T @ basis + prior
    found = np.linalg.solve(precision, basis.T @ y + prior @ [0.0, slope])
    rest = y - basis @ found
    sd = math.sqrt((float(rest @ rest) + 2 * 0.02**2) / max(1, good.sum() - 2 + 2))
    draws = (
        found
        + np.random.default_rng(seed).standard_normal((64, 2))
        @ np.linalg.cholesky(np.linalg.inv(precision)).T
        * sd
    )
    return {"metric": metric, "kind": kind, "floor": floor, "centre": centre, "u": float(found[0]), "v": float(found[1]), "sd": sd,
            "draws": [[float(f"{v:.8g}") for v in row] for row in draws], "runs": int(good.sum())}  # fmt: skip


def _link(values: FloatArray, kind: str, floor: float) -> FloatArray:
    if kind == "log":
        return np.log(values)
    share = (values - floor) / (1 - floor)
    return np.log(share / (1 - share))


def metric_quantiles(
    task: dict[str, Any], log_draws: FloatArray, weights: FloatArray, sd: float
) -> dict[str, Any]:
    """p05, p50, p95 of the metric for draws (k,) of ln loss of weights (k,), to which `sd` is to be added."""
    rng = np.random.default_rng(0)
    picked = rng.choice(log_draws, size=4096, p=weights / weights.sum()) + sd * rng.standard_normal(4096)
    if task["metric"] == "pass_rate":
        values = np.exp(-np.exp(picked))
    else:
        draws = np.asarray(task["draws"])[rng.integers(len(task["draws"]), size=picked.size)]
        y = (
            draws[:, 0]
            + draws[:, 1] * (picked - task["centre"])
            + task["sd"] * rng.standard_normal(picked.size)
        )
        values = (
            np.exp(y) if task["kind"] == "log" else task["floor"] + (1 - task["floor"]) / (1 + np.exp(-y))
        )
    low, middle, high = (float(v) for v in np.quantile(values, [0.05, 0.5, 0.95]))
    return {"name": task["metric"], "p05": low, "p50": middle, "p95": high}
