"""The loss partway through a schedule: curves borrowed from the fitted runs.

At an equal fraction x of their schedules, runs of one recipe (tokens in proportion to parameters, one shape of
learning rate) show losses that follow one power law in compute, as their final losses do: divided by the final
loss, the curves fall nearly onto one another (Qiu et al. 2025, arXiv:2507.02119). So the curve of a run of compute C is

    ln l(x; C) = ln L(C) + offset + g0(x) + g1(x) (ln C - x0),      measured from the runs' last tenths

L(C)     final validation loss, from the law
offset   ln of training loss in the last tenth over final validation loss (Qiu et al. shift by such a constant, too)
g0, g1   shared shape and its trend with compute, from the runs' smoothed training losses; g1 is shrunk to 0 by
         how badly the runs determine it

The trend is that of small runs towards a shape they share when they are large: it dies out. Beyond the largest run, x0,
between none and all of it is expected, half in the middle, and the band reaches from the one to the other.

Holds for a schedule of the same shape, counted in fractions of the whole, and batches of about the same size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import t as student

from monitor.forecast.points import Curve
from monitor.forecast.table import FloatArray

GRID = np.unique(np.concatenate([np.geomspace(1e-5, 0.05, 60), np.linspace(0.05, 1.0, 96)]))
"""Fractions of a schedule at which shapes are kept."""


SLACK = 0.006
"""sd of ln loss that no curve is known better than: batches come easier and harder for hundreds of steps."""


@dataclass(frozen=True)
class Smooth:
    """One run's curve on GRID: ln of the smoothed loss, the steps it has, and the spread of one step about it."""

    run: str
    flops: float
    final: float
    """ln of the run's final loss as the law uses it."""
    log_loss: FloatArray
    steps: int
    batch_tokens: float
    late: float
    """ln of the mean loss over the last tenth of the run: a steadier mark than the very end."""
    late_se: float
    se: FloatArray
    """Standard error of `log_loss` that the batches' noise leaves."""
    step_sd: float
    """sd of one step's loss about the smoothed one, nats per token, over the later half."""


def smooth(curve: Curve, final: float, flops: float, tokens: float) -> Smooth | None:
    """A run's curve on GRID by local linear fits in ln step; None when it has under 20 finite losses.

    The window at fraction x takes in steps from x / 1.15 to x * 1.15 early and a narrower share later, at least 60
    steps past the first twentieth, cut off at the end of the run.
    """
    good = np.isfinite(curve.loss) & (curve.loss > 0) & (curve.step > 0)
    step, loss = curve.step[good].astype(float), curve.loss[good]
    if step.size < 20:
        return None
    total = float(step[-1])
    u, y = np.log(step / total), np.log(loss)
    out, factor = np.empty(GRID.size), np.empty(GRID.size)
    for i, x in enumerate(GRID):
        lx = math.log(x)
        width = 0.14 if x < 0.2 else max(0.14 * 0.2 / x, 0.02)
        least = min(60, u.size // 4) if x > 0.05 else 3
        low, high = (int(v) for v in np.searchsorted(u, [lx - width, lx + width]))
        if high - low < least:
            low, high = _nearest(u, lx, least)
        du, dy = u[low:high] - lx, y[low:high]
        spread = float(du @ du - du.sum() ** 2 / du.size)
        slope = float(du @ dy - du.sum() * dy.mean()) / spread if spread > 1e-12 else 0.0
        out[i] = dy.mean() - slope * du.mean() if u[0] <= lx else y[:3].mean()
        factor[i] = 1.0 / du.size + (du.mean() ** 2 / spread if spread > 1e-12 else 0.0)
    late = step > 0.5 * total
    fitted = np.exp(np.interp(step[late] / total, GRID, out))
    residual = loss[late] - fitted
    sd = 1.4826 * float(np.median(np.abs(residual - np.median(residual)))) if late.sum() >= 10 else 0.0
    se = sd / float(np.median(fitted)) * np.sqrt(factor) if late.any() else np.zeros(GRID.size)
    seen = float(curve.tokens[-1]) if curve.tokens is not None else tokens
    last = loss[step > 0.9 * total]
    mark, mark_se = math.log(float(last.mean())), sd / float(last.mean()) / math.sqrt(last.size)
    return Smooth(
        curve.run,
        flops,
        math.log(final),
        out,
        int(total),
        seen / float(curve.step[-1]),
        mark,
        mark_se,
        se,
        sd,
    )


def _nearest(u: FloatArray, at: float, count: int) -> tuple[int, int]:
    middle = int(np.searchsorted(u, at))
    low = max(0, min(middle - count // 2, u.size - count))
    return low, low + count


def learn(runs: Sequence[Smooth]) -> dict[str, Any] | None:
    """What the runs' curves share, as plain data for law.json; None without any run.

    `scatter` is how far, in ln loss, the runs' own curves are from the shared one at each fraction.
    """
    if not runs:
        return None
    end = np.array([r.late for r in runs])
    offsets = end - np.array([r.final for r in runs])
    shapes = np.array([r.log_loss for r in runs]) - end[:, None]
    lc = np.log([r.flops for r in runs])
    x0 = float(lc.max())
    # Early on, warm-up and the first drop do not scale as fractions do, so there the larger runs tell more of a still larger one.
    reach = np.interp(np.log(GRID), np.log([0.1, 0.4]), [1.2, 12.0])
    weights = np.exp((lc[:, None] - x0) / reach)
    weights /= weights.sum(axis=0)
    middle = (weights * lc[:, None]).sum(axis=0)
    away = lc[:, None] - middle
    mean = (weights * shapes).sum(axis=0)
    ss = (weights * away**2).sum(axis=0)
    g1 = np.zeros(GRID.size)
    scatter = np.full(GRID.size, 0.02)
    g1_sd = np.full(GRID.size, 0.005)
    if len(runs) >= 3 and float(np.ptp(lc)) > 0.7:
        slope = (weights * away * (shapes - mean)).sum(axis=0) / ss
        rest = shapes - mean - away * slope
        count = 1.0 / (weights**2).sum(axis=0)
        variance = (weights * rest**2).sum(axis=0) * count / np.maximum(count - 2, 1.0) + 1e-6
        g1 = slope * slope**2 / (slope**2 + variance / (ss * count))
        g1_sd = np.sqrt(variance / (ss * count))
        noise = np.mean([r.se**2 + r.late_se**2 for r in runs], axis=0)
        left = (weights * (shapes - mean - away * g1) ** 2).sum(axis=0)
        scatter = np.sqrt(np.maximum(left - noise, 0.1 * left) + left / len(runs))
    g0 = mean + g1 * (x0 - middle)
    offset_sd = 0.01
    if len(runs) > 1:
        left, noise = float(offsets.var(ddof=1)), float(np.mean([r.late_se**2 for r in runs]))
        offset_sd = math.sqrt(max(left - noise, 0.0) + left / len(runs))
    batch = np.array([r.batch_tokens for r in runs])
    sds = np.array([r.step_sd for r in runs])
    return {
        "kind": "borrowed",
        "x": [float(f"{v:.6g}") for v in GRID],
        "g0": [float(f"{v:.6g}") for v in g0],
        "g1": [float(f"{v:.6g}") for v in g1],
        "g1_sd": [float(f"{v:.6g}") for v in g1_sd],
        "scatter": [float(f"{v:.6g}") for v in scatter],
        "x0": x0,
        "offset": float(np.median(offsets)),
        "offset_sd": offset_sd,
        "t95": float(student.ppf(0.95, max(2, len(runs) - 2))),
        "start": float(np.median([r.log_loss[0] for r in runs])),
        "batch_tokens": float(np.median(batch)),
        "same_batch": bool(batch.max() <= 1.05 * batch.min()),
        "unit_sd": float(np.median(sds * np.sqrt(batch))),
        "runs": [r.run for r in runs],
    }


def curve_steps(total: int, count: int = 2000) -> FloatArray:
    """Whole steps from 1 to `total`: half spaced evenly in ln step, half evenly in step, at most `count`."""
    half = count // 2
    return np.unique(
        np.round(np.concatenate([np.geomspace(1, total, half), np.linspace(1, total, half)]))
    ).astype(float)


def borrowed(
    shape: dict[str, Any], fraction: FloatArray, flops: float, finals: tuple[float, float, float]
) -> dict[str, FloatArray]:
    """Quantiles p05, p50, p95 (n,) of the mean training loss at fractions (n,) of the schedule, nats per token.

    finals   p05, p50, p95 of the final loss; the curve's own uncertainty is added in quadrature, in ln loss
    """
    x = np.log(np.asarray(shape["x"]))
    at = np.log(np.clip(fraction, shape["x"][0], 1.0))
    g0, g1, g1_sd, scatter = (
        np.interp(at, x, np.asarray(shape[k])) for k in ("g0", "g1", "g1_sd", "scatter")
    )
    away = math.log(flops) - shape["x0"]
    low, middle, high = (math.log(v) for v in finals)
    trend = 0.5 * g1 * away if away > 0 else g1 * away
    centre = middle + shape["offset"] + g0 + trend
    # No run knows more before its first step than the untrained loss: a shape never starts above the runs' own start.
    start = shape["start"]
    centre = np.minimum(centre, np.maximum(start, middle + shape["offset"]))
    own = np.sqrt(scatter**2 + (g1_sd * away) ** 2 + shape["offset_sd"] ** 2 + SLACK**2) * shape["t95"]
    if away > 0:
        own = np.hypot(own, trend)  # half the trend to either side: none of it, or all
    # Early on the loss is nearer the untrained one than the final one, so the final's uncertainty matters less there.
    share = np.clip((start - centre) / max(start - middle, 1e-9), 0.0, 1.0)
    return {
        "p05": np.exp(centre - np.hypot(own, share * (middle - low))),
        "p50": np.exp(centre),
        "p95": np.exp(centre + np.hypot(own, share * (high - middle))),
    }
