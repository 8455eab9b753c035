"""Which forms to fit, how much each counts, and how far a law strays: by extrapolation inside the runs.

Each form is fitted to the smaller runs and scored on the larger ones near the frontier, at a few cuts of the
compute they span. Its weight falls with its error there. Whether those errors are larger or smaller than the fits
below the cuts said they would be, sets how far the law's own uncertainty is stretched or drawn in.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from monitor.forecast.fit_members import Runs, fit_mode
from monitor.forecast.table import FloatArray

CUTS = (0.35, 0.5, 0.7)
"""Where the span of ln compute is cut; a form sees what is below, and is scored above."""
NEAR = 0.03
"""Excess over the frontier, ln loss, up to which a run is scored."""
FLOOR, POWER = 0.003, 1.5
"""Error, ln loss, below which forms count as equally good; and with which power of it they count less."""
JOINS, FLOOR_JOINED, POWER_JOINED = 0.8, 0.0003, 3.0
"""The Chinchilla form counts among the others where its error inside is under this share of theirs: on runs that
follow it. Forms then count by finer differences."""
MANY, FLOOR_FEW = 8, 0.03
"""Below so many runs, errors inside are mostly the runs' own noise, and forms count nearly the same."""
DRIFT = 0.5
"""sd of the true line about the law, as a share of the fall in ln loss that is foretold, before it is stretched."""
SIZES = 3
"""Sizes near the frontier from which on the runs tell how the loss hangs on size."""
STRETCH, STRETCH_FEW = 0.2, 0.3
"""What the forms' uncertainty and the drift are multiplied by before anything is known; the latter below MANY runs. Far out the
error is a share of the fall, whatever a fit says of itself."""
BARE = 5
"""Runs below which the forms' uncertainty is that of their priors, and is left as it is; so it is with runs of one size."""
STRETCH_MOST = 3.0
"""And by at most: errors inside that are larger still say that the forms are wrong, not by how much."""
PRIOR_CUTS = 3.0
"""How many cuts STRETCH is worth."""


@dataclass(frozen=True)
class Cut:
    """One cut of the runs: fitted minus observed ln loss (n,) of the runs above it, what sd the fit said, the runs'
    noise, and how far (n,) below the best run under the cut the fit puts them."""

    wrong: FloatArray
    sd: FloatArray
    noise: float
    fall: FloatArray


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


def sizes_near(runs: Runs) -> int:
    """How many sizes, a tenth or more apart, have a run near the frontier."""
    near = np.sort(runs.ln_params[runs.excess() < NEAR])
    return 1 + int(np.sum(np.diff(near) > 0.1))


def forms_for(runs: Runs, form: str, sized: bool) -> list[str]:
    """The forms that the runs can bear. Runs of one size leave all to what is known of size in general."""
    if form == "power":
        return ["bent"]
    if form == "frontier" or not sized:
        return ["frontier", "eased"]
    if sizes_near(runs) == 1:
        return ["chinchilla"]
    if sizes_near(runs) < SIZES or len(runs) < MANY:
        return ["chinchilla", "eased", "bent"]
    return ["eased_valley", "eased"]


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
        fitted, larger = fit_mode(name, runs.take(below), turns=2), runs.take(above)
        foretold, sd = fitted.foretold(larger)
        fall = np.maximum(float(runs.ln_loss[below].min()) - foretold, 0.0)
        cuts.append(Cut(foretold - larger.ln_loss, sd, float(np.exp(fitted.z[-1])), fall))
    return Trial(tuple(cuts))


def choose(runs: Runs, form: str, sized: bool) -> tuple[list[str], list[Trial], FloatArray]:
    """The forms that count, how each did inside the runs, and their weights (m,), which sum to 1."""
    names = forms_for(runs, form, sized)
    trials = [try_inside(name, runs) for name in names]
    if "chinchilla" not in names and "eased_valley" in names:
        plain = try_inside("chinchilla", runs)
        if plain.cuts and plain.error() < JOINS * min(t.error() for t in trials):
            trials = [plain, *trials]
            return ["chinchilla", *names], trials, weigh(trials, FLOOR_JOINED, POWER_JOINED)
    return names, trials, weigh(trials, FLOOR if len(runs) >= MANY else FLOOR_FEW, POWER)


def weigh(trials: Sequence[Trial], floor: float, power: float) -> FloatArray:
    """Weights (m,), summing to 1, that fall with a power of the forms' errors inside the runs."""
    weights = np.array([(t.error() ** 2 + floor**2) ** (-power / 2) for t in trials])
    return weights / weights.sum()


def noise_near(runs: Runs, fitted: FloatArray, scale: float) -> float:
    """Spread between runs of one setting, ln loss: that of runs near the frontier about the fitted ln loss (n,).

    At least `scale`, that of the forms' residuals, which count runs off the frontier and small ones for less and so are
    smaller than a run's own. A fit of few runs leaves less than there is: five degrees of freedom are taken for fitted, half at most.
    """
    rest = (runs.ln_loss - fitted)[runs.excess() < NEAR]
    return max(scale, math.sqrt(float(np.sum(rest**2)) / max(rest.size - 5, rest.size / 2)))


def spreads(trials: Sequence[Trial], weights: FloatArray, count: int, sizes: int) -> tuple[float, float]:
    """What the forms' joint uncertainty is to be multiplied by, and the drift as a share of the fall, from `count` runs of `sizes`."""
    wider = stretch(trials, weights, count)
    return (1.0 if count < BARE or sizes == 1 else wider), wider * DRIFT


def stretch(trials: Sequence[Trial], weights: FloatArray, count: int) -> float:
    """What uncertainty and drift are to be multiplied by, from what they were worth at the cuts."""
    prior, cuts = STRETCH if count >= MANY else STRETCH_FEW, len(trials[0].cuts)
    ratios = 0.0
    for k in range(cuts):
        here = [(w, t.cuts[k]) for w, t in zip(weights, trials, strict=True)]
        wrong = sum(w * c.wrong for w, c in here)
        apart = sum(w * (c.sd**2 + (c.wrong - wrong) ** 2) for w, c in here)
        fall = sum(w * c.fall for w, c in here)
        noise = math.exp(2 * sum(w * math.log(c.noise) for w, c in here))
        ratios += max(float(np.mean(wrong**2)) - noise, 0.0) / float(np.mean(apart + (DRIFT * fall) ** 2))
    return min(STRETCH_MOST, math.sqrt((PRIOR_CUTS * prior**2 + ratios) / (PRIOR_CUTS + cuts)))
