"""One form fitted to runs with its uncertainty: a posterior under weak priors that know no unit.

Every form is written about the runs' centre, its parts there as shares of the loss, so that neither the unit of
N, D, C or the loss nor its scale matters. Residuals of ln loss are Student t with 4 degrees of freedom, their
scale fitted with the rest; a run off the frontier counts less, since every form is wrongest there, and so does a
run far below the largest, since it is the line's end that is extrapolated. Priors
(normal, on the logarithm where it says ln; those of a line's share and exponent with the tails of a Student t, so that
runs of another kind than text are heard):

    ln exponent of N or D    ln 0.35, sd 0.4    exponents published for language models lie in 0.2 to 0.7
    ln exponent of C         ln 0.13, sd 0.2    alpha beta / (alpha + beta) of those; sd 0.4 for the plain frontier
    ln share ratios          0, sd 1 or 0.4     any split between irreducible, size and data parts
    bend per e-fold of C     0, sd 0.05         relative change of the local exponent; E alone makes about +0.1
    valley: ln bend          ln 0.03, sd 0.7    a run at e times the best D / N is some 1 to 3% worse
    ln late, ln pace         ln 0.03, sd 1.5    what holds small runs back: a fall steeper than the exponents above
                             ln 0.4, sd 0.5     allow is taken for that, and dies out
    ln residual scale        ln 0.005, sd 1.2
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from monitor.forecast.law import log_loss
from monitor.forecast.points import Points
from monitor.forecast.posterior import sample
from monitor.forecast.table import FloatArray

_DF = 4.0
OFF = {"chinchilla": 0.01, "frontier": 0.01, "bent": 0.01, "eased": 0.01, "eased_valley": 0.015}
"""Excess over the frontier, ln loss, at which a run counts half; a frontier form leaves out what is beyond it."""
RECENT = 4.0
"""Folds of e in compute below the largest run over which a run's count falls by e."""


@dataclass(frozen=True)
class Runs:
    """What a form is fitted to: natural logarithms, (n,) each."""

    ln_params: FloatArray
    ln_tokens: FloatArray
    ln_flops: FloatArray
    ln_loss: FloatArray

    @classmethod
    def of(cls, points: Points) -> "Runs":
        """From points whose loss is finite and positive."""
        return cls(np.log(points.params), np.log(points.tokens), np.log(points.flops), np.log(points.loss))

    def take(self, at: NDArray[Any]) -> "Runs":
        """The runs at the given indices or mask."""
        return Runs(self.ln_params[at], self.ln_tokens[at], self.ln_flops[at], self.ln_loss[at])

    def __len__(self) -> int:
        return self.ln_loss.size

    def excess(self) -> FloatArray:
        """ln loss (n,) above the best run of at most 1.05 times the compute; 0 on the frontier."""
        order = np.argsort(self.ln_flops)
        best = np.minimum.accumulate(self.ln_loss[order])
        last = np.searchsorted(self.ln_flops[order], self.ln_flops + 0.05, side="right") - 1
        return self.ln_loss - best[last]


_LINE = [(0, 0.3), (0, 0.4), (np.log(0.13), 0.2)]
_ACROSS = [(0, 3.0), (0, 0.15), (np.log(0.03), 0.7), (-0.05, 0.07), (0, 0.2)]
_HELD = [(np.log(0.03), 1.5), (np.log(0.4), 0.5)]
_PRIORS: dict[str, list[tuple[float, float]]] = {
    "chinchilla": [(0, 0.3), (0, 1.0), (0, 1.0), (np.log(0.35), 0.4), (np.log(0.35), 0.4)],
    "frontier": [(0, 0.3), (0, 0.7), (np.log(0.13), 0.4)],
    "eased": [*_LINE, *_HELD],
    "eased_valley": [*_LINE, *_ACROSS, *_HELD],
    "bent": [(0, 0.3), (np.log(0.07), 0.7), (0, 0.05)],
}
_NOISE = (float(np.log(0.005)), 1.2)
_STARTS: dict[str, list[tuple[float, ...]]] = {
    "chinchilla": [(0, 0, 0, 0, 0), (0, 1, 0, 0.3, -0.3), (0, -1, 0, -0.3, 0.3)],
    "frontier": [(0, 0, 0), (0, 1, 0.3)],
    "eased": [(0, s, b, late, 0) for late in (0, 1.5) for s, b in ((0, 0), (1, 0.3), (-1, -0.3))],
    "eased_valley": [
        (0, s, b, 0, 0, 0, 0, 0, late, 0) for late in (0, 1.5) for s, b in ((0, 0), (1, 0.3), (-1, -0.3))
    ],
    "bent": [(0, 0, 0)],
}


def _tails(z: FloatArray) -> FloatArray:
    """Minus twice the log density of a Student t: z**2 where small, and far out next to nothing for each step on."""
    return (_DF + 1) * np.log1p(z**2 / _DF)


@dataclass(frozen=True)
class Form:
    """A form with its priors and the runs it is to fit. Coordinates z are (k, p), the last one ln residual scale."""

    name: str
    runs: Runs
    weights: FloatArray
    """(n,) what a run's residual is multiplied by, 0 to 1."""
    centre: tuple[float, float, float, float]
    """ln params, tokens, flops, loss of the weighted runs' centre."""

    @classmethod
    def of(cls, name: str, runs: Runs) -> "Form":
        """The form about the centre of the runs; a frontier form keeps only runs near the frontier."""
        excess = runs.excess()
        if name in ("frontier", "bent", "eased"):
            near = excess <= max(OFF[name], float(np.sort(excess)[min(3, excess.size - 1)]))
            runs, excess = runs.take(near), np.zeros(int(near.sum()))
        behind = runs.ln_flops.max() - runs.ln_flops
        weights = np.exp(-0.5 * behind / RECENT) / np.sqrt(1.0 + (excess / OFF[name]) ** 2)
        share = weights**2 / (weights**2).sum()
        n0, d0, c0, l0 = (
            float(v @ share) for v in (runs.ln_params, runs.ln_tokens, runs.ln_flops, runs.ln_loss)
        )
        return cls(name, runs, weights, (n0, d0, c0, l0))

    @property
    def prior(self) -> tuple[FloatArray, FloatArray]:
        """Means and sds (p,), the residual scale's at the end."""
        means, sds = np.array([*_PRIORS[self.name], _NOISE], float).T
        return means, sds

    @property
    def tailed(self) -> NDArray[np.bool_]:
        """(p - 1,) true where the prior has the tails of a Student t: share and exponent of the line."""
        at = np.arange(len(_PRIORS[self.name]))
        return (at > 0) & (at < 3) & (self.name not in ("chinchilla", "bent"))

    def natural(self, z: FloatArray) -> FloatArray:
        """The form's own parameters (k, q), as in `monitor.forecast.law`, at coordinates (k, p)."""
        n0, d0, c0, l0 = self.centre
        level = np.exp(l0 + z[:, 0])
        if self.name == "chinchilla":
            parts = np.exp(np.column_stack([z[:, 1], z[:, 2], np.zeros(len(z))]))
            parts *= (level / parts.sum(axis=1))[:, None]
            alpha, beta = np.exp(z[:, 3]), np.exp(z[:, 4])
            return np.column_stack(
                [parts[:, 0], parts[:, 1] * np.exp(alpha * n0), parts[:, 2] * np.exp(beta * d0), alpha, beta]
            )
        x = np.full(len(z), c0)
        if self.name == "bent":
            b = np.exp(z[:, 1])
            return np.column_stack([l0 + z[:, 0], b, 0.5 * b * z[:, 2], x])
        share = 1.0 / (1.0 + np.exp(-z[:, 1]))
        b = np.exp(z[:, 2])
        if self.name == "frontier":
            return np.column_stack([share * level, (1 - share) * level * np.exp(b * c0), b])
        at = 3 if self.name == "eased" else 8
        late, pace = np.exp(z[:, at]), np.exp(z[:, at + 1])
        top = np.full(len(z), self.runs.ln_flops.max())
        level = level * np.exp(-late * np.exp(-pace * (c0 - top)))
        line = [share * level, (1 - share) * level * np.exp(b * c0), b]
        if self.name == "eased":
            return np.column_stack([*line, late, pace, top])
        across = [d0 - n0 + z[:, 3], z[:, 4], np.exp(z[:, 5]), z[:, 6], z[:, 7], x]
        return np.column_stack([*line, *across, late, pace, top])

    def residual(self, z: FloatArray) -> FloatArray:
        """Weighted fitted minus observed ln loss (k, n)."""
        runs = self.runs
        fitted = log_loss(
            self.name, self.natural(z), np.exp(runs.ln_params), np.exp(runs.ln_tokens), np.exp(runs.ln_flops)
        )
        return self.weights * (fitted - runs.ln_loss)

    def density(self, z: FloatArray) -> FloatArray:
        """Log posterior (k,) up to a constant at coordinates (k, p)."""
        means, sds = self.prior
        with np.errstate(all="ignore"):
            scale = np.exp(z[:, -1:])
            likelihood = -0.5 * (_DF + 1) * np.log1p((self.residual(z) / scale) ** 2 / _DF) - z[:, -1:]
            prior = (z - means) / sds
            tailed = np.append(self.tailed, False)
            return likelihood.sum(axis=1) - 0.5 * np.where(tailed, _tails(prior), prior**2).sum(axis=1)


@dataclass(frozen=True)
class Fitted:
    """A form at its mode, (p,) coordinates."""

    form: Form
    z: FloatArray

    def point(self) -> FloatArray:
        """(q,) natural parameters."""
        return self.form.natural(self.z[None])[0]

    def log_loss(self, runs: Runs) -> FloatArray:
        """ln loss (n,) that it gives other runs."""
        return self._at(self.point()[None], runs)[0]

    def foretold(self, runs: Runs) -> tuple[FloatArray, FloatArray]:
        """ln loss (n,) that it gives other runs, and the sd (n,) that the curvature at the mode leaves it."""
        form, z, step = self.form, self.z[:-1], 1e-4
        around = np.concatenate([z[None], z + step * np.eye(z.size), z - step * np.eye(z.size)])
        r = form.residual(around) / np.exp(self.z[-1])
        slopes = (r[1 : z.size + 1] - r[z.size + 1 :]) / (2 * step)
        means, sds = (v[:-1] for v in form.prior)
        pull = np.where(form.tailed, (_DF + 1) / (_DF + ((z - means) / sds) ** 2), 1.0) / sds**2
        precision = (slopes * (_DF + 1) / (_DF + r[0] ** 2)) @ slopes.T + np.diag(pull)
        values = self._at(form.natural(around), runs)
        moves = (values[1 : z.size + 1] - values[z.size + 1 :]) / (2 * step)
        variance = np.einsum("in,in->n", moves, np.linalg.solve(precision, moves))
        return values[0], np.sqrt(np.maximum(variance, 0.0))

    def _at(self, natural: FloatArray, runs: Runs) -> FloatArray:
        places = (np.exp(v) for v in (runs.ln_params, runs.ln_tokens, runs.ln_flops))
        return log_loss(self.form.name, natural, *places)


def fit_mode(name: str, runs: Runs, turns: int = 3) -> Fitted:
    """A form's mode: robust least squares, the residual scale re-estimated from the residuals each turn. n >= 1."""
    form = Form.of(name, runs)
    means, sds = (v[:-1] for v in form.prior)
    n, p = len(form.runs), means.size
    scale, best = 0.01, None

    def stretched(z: FloatArray) -> FloatArray:
        with np.errstate(all="ignore"):
            r = form.residual(z[None])[0] / scale
        r = np.sign(r) * np.sqrt(
            (_DF + 1) * np.log1p(np.minimum(np.nan_to_num(r * r, nan=1e12, posinf=1e12), 1e12) / _DF)
        )
        prior = (z - means) / sds
        return np.concatenate([r, np.where(form.tailed, np.sign(prior) * np.sqrt(_tails(prior)), prior)])

    for _ in range(turns):
        starts = [means + np.asarray(s) for s in _STARTS[name]] if best is None else [best]
        best = min((least_squares(stretched, z, max_nfev=60) for z in starts), key=lambda r: r.cost).x
        spread = 1.4826 * float(np.median(np.abs(form.residual(best[None])[0]))) * np.sqrt(n / max(1, n - p))
        scale = float(np.hypot(max(spread, 1e-4), 0.003 / np.sqrt(n)))
    assert best is not None
    return Fitted(form, np.append(best, np.log(scale)))


def draw(
    fitted: Fitted, *, seed: int = 0, draws: int = 200, effort: int = 150
) -> tuple[FloatArray, FloatArray]:
    """Draws (k, q) of a form's natural parameters, and the residual scale (k,) of each, ln loss."""
    form = fitted.form
    scale = 0.05 * np.minimum(form.prior[1], 1.0)
    scale[0] = 0.002
    found = sample(form.density, fitted.z, scale=scale, seed=seed, burn=effort, keep=effort, draws=draws)
    return form.natural(found), np.exp(found[:, -1])
