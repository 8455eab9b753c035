"""The multi-power law fitted to curves: robust least squares on ln loss, in units of the runs, under weak priors.

Every parameter is positive and is fitted as its logarithm, B over A. Rates are counted in the runs' peak, sums of
rates in the largest one, the loss in the smallest one seen, so no unit matters, and what remains is much alike from
text to pixels. Priors (normal on the logarithm) hold what a single run can't tell; their middles are those of models of
pixels (collapse_c5m), counted in an annealed run. The law's misfit goes along a run, so that neighbouring losses of
runs of one shape count as one in ten; other shapes are other evidence.
"""

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from monitor.forecast.anneal import NAMES, LrPath, loss_at
from monitor.forecast.points import Curve
from monitor.forecast.table import FloatArray

_MEANS = np.log([0.9, 0.07, 0.41, 0.56, 120.0, 1.1, 0.67, 1.0, 0.3, 0.3])
_SDS = np.array([0.12, 1.2, 0.2, 0.3, 0.7, 0.4, 0.35, 0.25, 1.0, 0.5])
_DELTA = 1e-3
EVIDENCE = 0.1
"""What a loss counts for, times the number of shapes of schedule there are; at most 1."""
MOST = 12
"""Curves fitted; of more, this many spread over the sizes."""
PIECES = 160
"""Straight pieces a schedule is cut into."""


def fit_curves(curves: Sequence[Curve], seed: int = 0) -> dict[str, Any] | None:
    """What the curves of runs with learning rates teach, as plain data for law.json; None when none can be used."""
    curves = sorted(curves, key=lambda c: (c.params or 0.0, len(c)))
    if len(curves) > MOST:
        curves = [curves[i] for i in np.unique(np.linspace(0, len(curves) - 1, MOST).round().astype(int))]
    used = [
        c
        for c in curves
        if c.lr is not None and np.isfinite(c.lr).all() and np.isfinite(c.loss).sum() >= 12 and c.lr.max() > 0
    ]
    if not used:
        return None
    peaks = _peaks(used)
    peak = max(peaks.values()) if len({round(math.log(p), 2) for p in peaks.values()}) == 1 else None
    sizes = sorted({c.params for c in used if c.params is not None})
    several = len(sizes) > 1 and all(c.params is not None for c in used)
    centre = math.exp(float(np.mean(np.log(sizes)))) if sizes else None
    unit = max(
        float(LrPath.of(c.step.astype(float), c.lr / peaks[c.params]).area[-1])
        for c in used
        if c.lr is not None
    )
    shapes = len({_kind_of(c) for c in used})
    problem = _Problem(
        [_thin(c, peaks[c.params], unit, centre if several else None) for c in used], several, shapes
    )
    start = time.perf_counter()
    best = problem.solve()
    seconds = time.perf_counter() - start
    draws = problem.theta(problem.draws(best, 48, seed))
    best = problem.theta(best)
    residual = np.concatenate(problem.residuals(np.exp(best)))
    spread = 1.4826 * float(np.median(np.abs(residual)))
    theta, shift = best.copy(), math.log(problem.level)
    for i in (0, 1, 3, 8):
        theta[i] += shift
        draws[:, i] += shift
    return {
        "kind": "anneal",
        "theta": [float(f"{v:.8g}") for v in theta],
        "names": list(NAMES),
        "draws": [[float(f"{v:.6g}") for v in row] for row in draws],
        "peak": peak,
        "shape": _shape(used[-1]),
        "shapes": shapes,
        "area": unit,
        "params": centre,
        "sizes": len(sizes),
        "size_span": math.log(sizes[-1] / sizes[0]) / 2 if sizes else 0.0,
        "rmse": spread * problem.level,
        "seconds": seconds,
        "objective": problem.cost,
        "runs": [c.run for c in used],
        "steps": max(int(c.step[-1]) for c in used),
        "start": _start(used),
    }


def _start(curves: Sequence[Curve]) -> float | None:
    """Median loss of an untrained model, nats per token; None where no curve begins in its first half percent."""
    firsts = [
        float(c.loss[good][0])
        for c in curves
        if (good := np.isfinite(c.loss)).any() and c.step[good][0] <= 0.005 * c.step[-1]
    ]
    return float(np.median(firsts)) if firsts else None


def _peaks(curves: Sequence[Curve]) -> dict[float | None, float]:
    """The largest learning rate of the runs of each size: recipes scale it with the size, and what counts is the share of it."""
    peaks: dict[float | None, float] = {}
    for c in curves:
        assert c.lr is not None
        peaks[c.params] = max(peaks.get(c.params, 0.0), float(c.lr.max()))
    return peaks


def _kind_of(c: Curve) -> tuple[float, float]:
    """What tells one shape of schedule from another: mean and last rate over the peak, to a tenth."""
    assert c.lr is not None
    top = float(c.lr.max())
    mean = float(np.sum(np.diff(c.step) * 0.5 * (c.lr[1:] + c.lr[:-1]))) / (
        top * max(float(c.step[-1] - c.step[0]), 1.0)
    )
    return round(mean, 1), round(float(c.lr[-1]) / top, 1)


def _shape(c: Curve) -> list[list[float]]:
    """The largest run's schedule as (fraction of its steps, rate over its peak)."""
    assert c.lr is not None
    at = np.unique(np.linspace(0, len(c) - 1, 200).round().astype(int))
    total, top = float(c.step[-1]), float(c.lr.max())
    return [[float(f"{c.step[i] / total:.8g}"), float(f"{c.lr[i] / top:.6g}")] for i in at]


def _thin(
    c: Curve, peak: float, unit: float, centre: float | None, count: int = 80
) -> tuple[LrPath, FloatArray, FloatArray, float]:
    """A run's path, up to `count` steps and ln losses (means of neighbours), and ln(N / N0)."""
    assert c.lr is not None
    path = LrPath.of(c.step.astype(float), c.lr / peak, unit, PIECES)
    good = np.isfinite(c.loss) & (c.loss > 0) & (c.step > 0)
    step, loss = c.step[good].astype(float), np.log(c.loss[good])
    early = step >= 0.02 * step[-1]
    step, loss = step[early], loss[early]
    if step.size > 2 * count:
        groups = np.array_split(np.arange(step.size), count)
        step = np.array([float(step[g].mean()) for g in groups], np.float64)
        loss = np.array([float(loss[g].mean()) for g in groups], np.float64)
    elif step.size > count:
        take = np.linspace(0, step.size - 1, count).astype(int)
        step, loss = step[take], loss[take]
    size = math.log(c.params / centre) if centre and c.params else 0.0
    return path, np.asarray(step, np.float64), np.asarray(loss, np.float64), size


class _Problem:
    """Residuals of ln loss of every run, and the fit of ln parameters to them."""

    def __init__(
        self, runs: list[tuple[LrPath, FloatArray, FloatArray, float]], several: bool, shapes: int
    ) -> None:
        self.runs, self.several = runs, several
        self.evidence = min(1.0, EVIDENCE * shapes)
        self.level = math.exp(min(float(r[2].min()) for r in runs))
        self.count = len(NAMES) if several else len(NAMES) - 2
        self.cost = 0.0

    @staticmethod
    def theta(z: FloatArray) -> FloatArray:
        """ln parameters in the order of NAMES from coordinates (..., 10), in which B stands over A."""
        out = z.copy()
        out[..., 3] += out[..., 1]
        return out

    def residuals(self, theta: FloatArray) -> list[FloatArray]:
        """Fitted minus observed ln loss a run, for parameters (10,) in units of `level`."""
        theta = theta.copy()
        if not self.several:
            theta[8] = 0.0
        with np.errstate(all="ignore"):
            return [
                np.log(np.maximum(loss_at(theta, path, step, size), 1e-3)) + math.log(self.level) - loss
                for path, step, loss, size in self.runs
            ]

    def _all(self, z: FloatArray, scale: float) -> FloatArray:
        full = _MEANS.copy()
        full[: self.count] = z
        r = np.concatenate(self.residuals(np.exp(self.theta(full)))) / scale
        return np.clip(np.nan_to_num(r, nan=1e3), -1e3, 1e3)

    def solve(self) -> FloatArray:
        """Coordinates (10,) at the best: wide Huber first, then the narrow one."""
        prior = lambda z: (z - _MEANS[: self.count]) / _SDS[: self.count] / math.sqrt(self.evidence)  # noqa: E731

        def target(z: FloatArray, scale: float) -> FloatArray:
            r = self._all(z, scale)
            size = np.abs(r)
            huber = np.sign(r) * np.sqrt(np.where(size <= 1, r * r, 2 * size - 1))
            return np.concatenate([huber, prior(z)])

        coarse = least_squares(target, _MEANS[: self.count], args=(10 * _DELTA,), max_nfev=25)
        best = least_squares(target, coarse.x, args=(_DELTA,), max_nfev=30)
        self.jacobian, self.cost = best.jac, float(best.cost)
        full = _MEANS.copy()
        full[: self.count] = best.x
        return full

    def draws(self, best: FloatArray, count: int, seed: int) -> FloatArray:
        """Normal draws (count, 10) about the best, from the curvature there."""
        precision = self.jacobian.T @ self.jacobian * self.evidence
        root = np.linalg.cholesky(np.linalg.inv(precision + 1e-9 * np.eye(self.count)))
        out = np.repeat(best[None], count, axis=0)
        out[:, : self.count] += np.random.default_rng(seed).standard_normal((count, self.count)) @ root.T
        return out
