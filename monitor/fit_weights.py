"""Which forms to fit, how much each counts, and how far a law strays: by extrapolation inside the runs.

Each form is fitted to the smaller runs and scored on the larger ones near the frontier, at a few cuts of the
compute they span. Its weight falls with its error there. What errors remain, as a share of the fall in loss that
was extrapolated, set how fast an interval opens beyond the runs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from monitor.fit_members import Runs, fit_mode
from monitor.table import FloatArray

CUTS = (0.35, 0.5, 0.7)
"""Where the span of ln compute is cut; a form sees what is below, and is scored above."""
NEAR = 0.03
"""Excess over the frontier, ln loss, up to which a run is scored."""
FLOOR = 0.003
"""Error, ln loss, below which forms count as equally good."""
MANY, FLOOR_FEW = 8, 0.03
"""Below so many runs, errors inside are mostly the runs' own noise, and forms count nearly the same."""
DRIFT = 0.13
"""Prior of the drift, share of the fall in ln loss that is foretold, worth PRIOR_CUTS cuts."""
PRIOR_CUTS = 2.0
LEAST_FALL = 0.04
"""Fall, ln loss, that a cut's errors are at least measured against: over less of one noise rules."""


@dataclass(frozen=True)
class Cut:
    """One cut of the runs: fitted minus observed ln loss (n,) of the runs above it, and how far below the best run under it they lie."""

    wrong: FloatArray
    fall: float


@dataclass(frozen=True)
class Trial:
    """How one form did inside the runs, cut by cut."""

    cuts: tuple[Cut, ...]

    @property
    def errors(self) -> FloatArray:
        """Root mean square error of ln loss a cut."""
        return np.array([math.sqrt(float(np.mean(c.wrong**2))) for c in self.cuts])

    def error(self) -> float:
        """Root mean square over the cuts; 0.02 where no cut could be made."""
        return float(np.sqrt(np.mean(self.errors**2))) if self.cuts else 0.02


def forms_for(runs: Runs, form: str, sized: bool) -> list[str]:
    """The forms that the runs can bear. Off one line of tokens to parameters they can tell size from data."""
    if form == "power":
        return ["bent"]
    if form == "frontier" or not sized:
        return ["frontier", "bent"]
    across = runs.ln_tokens - runs.ln_params
    along = (
        np.polynomial.Polynomial.fit(runs.ln_flops, across, 1)(runs.ln_flops)
        if np.ptp(runs.ln_flops) > 0
        else across
    )
    if len(runs) < MANY or float(np.std(across - along)) < 0.15:
        return ["chinchilla", "bent"]
    return ["chinchilla", "valley", "frontier"]


def try_inside(name: str, runs: Runs) -> Trial:
    """Fit a form below each cut and score it above."""
    low, high = float(runs.ln_flops.min()), float(runs.ln_flops.max())
    excess = runs.excess()
    cuts: list[Cut] = []
    seen: set[int] = set()
    for cut in CUTS:
        edge = low + cut * (high - low) + 1e-6
        below = runs.ln_flops <= edge
        above = ~below & (excess < NEAR)
        if len(np.unique(runs.ln_flops[below].round(2))) < 3 or not above.any() or int(below.sum()) in seen:
            continue
        seen.add(int(below.sum()))
        wrong = fit_mode(name, runs.take(below), turns=2).log_loss(runs.take(above)) - runs.ln_loss[above]
        cuts.append(Cut(wrong, float(runs.ln_loss[below].min() - runs.ln_loss[above].mean())))
    return Trial(tuple(cuts))


def weigh(trials: Sequence[Trial], count: int) -> FloatArray:
    """Weights (m,), summing to 1: the forms' errors inside the runs to the power -3. `count` runs; few of them hardly tell."""
    floor = FLOOR if count >= MANY else FLOOR_FEW
    weights = np.array([(t.error() ** 2 + floor**2) ** -1.5 for t in trials])
    return weights / weights.sum()


def drift(trials: Sequence[Trial], weights: FloatArray) -> float:
    """sd of the true line about the law, as a share of the fall in ln loss foretold beyond the best run.

    From the combined forms' errors inside. A steep line has further to stray than a flat one, so it is the fall, and
    not the decades, that errors keep in proportion to.
    """
    count = len(trials[0].cuts)
    shares = 0.0
    for k in range(count):
        wrong = sum(w * t.cuts[k].wrong for w, t in zip(weights, trials, strict=True))
        shares += max(float(np.mean(wrong**2)) - FLOOR**2, 0.0) / max(trials[0].cuts[k].fall, LEAST_FALL) ** 2
    if count == 0:
        return 2 * DRIFT
    return math.sqrt((PRIOR_CUTS * DRIFT**2 + shares) / (PRIOR_CUTS + count))
