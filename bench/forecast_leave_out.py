"""Do the priors carry over? Chosen on some families of runs, judged on another: `python bench/forecast_leave_out.py`.

Protocol
--------
The windows of `forecast.py` (targets and, below 1/100 or 1/300 of their compute, the runs to fit). Each variant of
the priors of the eased forms is fitted to every window; its error is that of the mean of the two forms' best fits, in |ln|, and
a family's score is its mean over windows. For each family in turn, the variant with the least mean score over the
*other* families is chosen, and judged on that family, beside the one that is shipped and the plain frontier without easing.
Families with fewer than 3 windows are not judged, but have a say.
"""

import sys
from collections.abc import Iterator

import numpy as np
from forecast import windows
from forecast_sources import family, sources

from monitor.forecast import fit_members
from monitor.forecast.fit_clean import clean
from monitor.forecast.fit_members import Runs, fit_mode

SHIPPED = "as shipped"
Prior = tuple[float, float]
VARIANTS: dict[str, dict[int, Prior]] = {
    SHIPPED: {},
    "looser line": {1: (0, 0.7), 2: (np.log(0.13), 0.4)},
    "tighter line": {1: (0, 0.3), 2: (np.log(0.13), 0.15)},
    "flatter": {2: (np.log(0.11), 0.2)},
    "steeper": {2: (np.log(0.15), 0.2)},
    "more held back": {-2: (np.log(0.06), 1.5)},
}
"""Name of a variant, and the priors it changes: position among an eased form's, mean and sd."""


def cases() -> Iterator[tuple[str, Runs, Runs]]:
    """Family, runs to fit and targets, window by window."""
    for name, points in sources():
        for ratio in (100, 300):
            for targets in windows(points):
                small = points.flops <= points.flops[targets].min() / ratio * 1.001
                if small.sum() >= 8 and len(set(np.log(points.flops[small]).round(1))) >= 4:
                    yield family(name), Runs.of(clean(points.keep(small))), Runs.of(points).take(targets)


def error(names: tuple[str, ...], runs: Runs, targets: Runs) -> float:
    """Median |ln| error of the mean of some forms."""
    foretold = np.mean([fit_mode(name, runs).log_loss(targets) for name in names], axis=0)
    return float(np.median(np.abs(foretold - targets.ln_loss)))


def main() -> int:
    """Fit, choose, judge, print."""
    shipped = {name: list(fit_members._PRIORS[name]) for name in ("eased", "eased_valley")}
    scores: dict[str, dict[str, list[float]]] = {}
    for where, runs, targets in cases():
        for variant, changes in VARIANTS.items():
            for form, priors in shipped.items():
                changed = list(priors)
                for at, prior in changes.items():
                    changed[at] = prior
                fit_members._PRIORS[form] = changed
            scores.setdefault(variant, {}).setdefault(where, []).append(error(tuple(shipped), runs, targets))
        fit_members._PRIORS |= shipped
        scores.setdefault("no easing", {}).setdefault(where, []).append(error(("frontier",), runs, targets))
    families = list(scores[SHIPPED])
    for variant, by in scores.items():
        print(f"{variant:>15}: " + ", ".join(f"{f} {np.mean(by[f]):.2%} of {len(by[f])}" for f in families))
    means = {v: {f: float(np.mean(x)) for f, x in by.items()} for v, by in scores.items() if v in VARIANTS}
    for out in families:
        if len(scores[SHIPPED][out]) < 3:
            continue
        chosen = min(means, key=lambda v: np.mean([means[v][f] for f in families if f != out]))
        print(f"left out {out:>10}: the others choose {chosen!r}: {means[chosen][out]:.2%}; "
              f"shipped {means[SHIPPED][out]:.2%}, without easing {np.mean(scores['no easing'][out]):.2%}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
