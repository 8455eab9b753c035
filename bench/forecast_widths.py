"""Do the intervals' widths carry over? Chosen on some families of runs, judged on another: `python bench/forecast_widths.py`.

Protocol
--------
The fits and predictions of `forecast.py --only final`. What makes an interval's width is varied: STRETCH (and in proportion
STRETCH_FEW), DRIFT, and how many cuts STRETCH counts for. For each family in turn the three are chosen on the *other* families,
each counting the same: those whose intervals, all multiplied by the factor that makes them hold 90% there, have the least interval
score (Gneiting & Raftery 2007: width, plus 20 times what lies outside), in ln loss. Then the family's own runs are judged with those
three and that factor, in which it had no say. The forms, their priors and their weights are as shipped, and were chosen with
most of these families in sight.
"""

import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from forecast import windows
from forecast_sources import family, sources

from monitor.forecast import fit_weights
from monitor.forecast.fit import fit
from monitor.forecast.fit_clean import clean
from monitor.forecast.fit_members import Runs
from monitor.forecast.fit_weights import Trial, choose, sizes_near
from monitor.forecast.law import Law
from monitor.forecast.table import FloatArray

RATIOS = (100, 300, 1000, 8000)
STRETCHES, DRIFTS, PRIOR_CUTS = (0.2, 0.3, 0.4, 0.5, 0.7), (0.125, 0.25, 0.35, 0.5, 0.7), (1.0, 2.0, 3.0, 5.0)
SHIPPED = (fit_weights.STRETCH, fit_weights.DRIFT, fit_weights.PRIOR_CUTS)
Width = tuple[float, float, float]


@dataclass(frozen=True)
class Fit:
    """One window's law, what decides its stretch, its targets' (params, tokens, flops, loss), and how many sizes."""

    family: str
    law: Law
    trials: list[Trial]
    weights: FloatArray
    targets: FloatArray
    sizes: int


def fits() -> Iterator[Fit]:
    """As in `forecast.py`."""
    for name, points in sources():
        for ratio, targets in itertools.product(RATIOS, list(windows(points))):
            small = points.flops <= points.flops[targets].min() / ratio * 1.001
            if small.sum() < 6 or len(set(np.log(points.flops[small]).round(1))) < 4:
                continue
            runs = Runs.of(clean(points.keep(small)))
            _, trials, weights = choose(runs, "auto", True)
            aim = np.array([points.params, points.tokens, points.flops, points.loss])[:, targets]
            yield Fit(family(name), fit(points.keep(small)), trials, weights, aim, sizes_near(runs))
        print(f"  {name}", file=sys.stderr, flush=True)


def judged(some: Fit, width: Width) -> Iterator[tuple[float, float]]:
    """Of each target: its error over the interval's arm on that side, and the interval's width, ln loss."""
    fit_weights.STRETCH, fit_weights.DRIFT, fit_weights.PRIOR_CUTS = width
    fit_weights.STRETCH_FEW = 1.5 * width[0]
    wider, drift = fit_weights.spreads(some.trials, some.weights, len(some.law.runs["run"]), some.sizes)
    law = replace(some.law, stretch=wider, drift=drift)
    for params, tokens, flops, loss in some.targets.T:
        q = law.predict(params, tokens, flops)
        arm = math.log(q.p95 / q.p50) if loss > q.p50 else math.log(q.p50 / q.p05)
        yield abs(math.log(q.p50 / loss)) / arm, math.log(q.p95 / q.p05)


def factor_for(arms: FloatArray, mass: FloatArray) -> float:
    """What all widths are to be multiplied by for 90% of the mass to be held."""
    order = np.argsort(arms)
    below = np.cumsum(mass[order])
    return float(arms[order[np.searchsorted(below, 0.9 * below[-1])]])


def score(arms: FloatArray, widths: FloatArray, factor: float, mass: FloatArray) -> float:
    """Mean interval score at 90% with widths times `factor`, arms taken as half of a width."""
    outside = np.maximum(arms - factor, 0.0) * widths / 2
    return float(mass @ (factor * widths + 20 * outside)) / float(mass.sum())


def main() -> int:
    """Fit, choose, judge, print."""
    every = list(fits())
    whose = np.array([f.family for f in every for _ in f.targets.T])
    grid = [*itertools.product(STRETCHES, DRIFTS, PRIOR_CUTS)]
    found = {w: np.array([row for f in every for row in judged(f, w)]).T for w in {*grid, SHIPPED}}
    mass = np.array([1 / np.sum(whose == one) for one in whose])
    held, wide = np.zeros(whose.size, bool), np.zeros(whose.size)
    for one in sorted(set(whose)):
        own, others = whose == one, whose != one
        factors = {w: factor_for(found[w][0][others], mass[others]) for w in grid}
        best = min(
            grid, key=lambda w: score(found[w][0][others], found[w][1][others], factors[w], mass[others])
        )
        held[own] = found[best][0][own] <= factors[best]
        wide[own] = found[best][1][own] * factors[best]
        print(f"left out {one:>10}: the others choose stretch {best[0]:g}, drift {best[1]:g}, {best[2]:g} cuts, factor {factors[best]:.2f}: "
              f"hold {held[own].mean():.0%} of {own.sum()}, median width {np.median(wide[own]):.1%}; shipped {np.mean(found[SHIPPED][0][own] <= 1):.0%}, {np.median(found[SHIPPED][1][own]):.1%}")  # fmt: skip
    print(f"widths chosen on the other families alone: hold {held.mean():.1%} of {held.size} predictions, {len(every)} fits, {len(set(whose))} families, "
          f"median width {np.median(wide):.1%}; shipped {np.mean(found[SHIPPED][0] <= 1):.1%}, {np.median(found[SHIPPED][1]):.1%}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
