"""Intervals on laws that are known: `python bench/forecast_made_up.py [--laws N]`.

Protocol
--------
Each law is L = E + A / N^alpha + B / D^beta with alpha and beta drawn from 0.25 to 0.5, the split of the loss between its parts
from a Dirichlet (3, 1.5, 1.5), E of another scale from law to law, and noise of 0.2 to 2% on every run. Its runs are, in turn, a
ladder at 20 tokens a parameter, lines of equal compute, sizes over-trained up to 320 tokens a parameter, or scattered; 10 to
60 of them over 1.5 to 3.2 decades of compute. `fit --form auto` sees those alone. New runs at 20 tokens a parameter, with the
same noise, are then predicted inside the range, at its end and beyond. Seeds are fixed; nothing was chosen on these laws
but how the noise between runs is measured, which showed here to be half of what it is.
"""

import argparse
import math
import sys
from collections import defaultdict

import numpy as np

from monitor.forecast.fit import fit
from monitor.forecast.points import Points

FACTORS = (0.1, 1.0, 3.0, 10.0, 100.0)
"""Compute of the new runs over that of the largest fitted one."""
FRESH = 4
"""New runs of each; they share a law, so laws are counted beside them."""


def design(
    kind: int, count: int, span: float, top: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Compute and tokens per parameter of the runs: 0 ladder, 1 equal compute, 2 over-trained, 3 scattered."""
    if kind == 0:
        flops = top * 10 ** (-span * np.linspace(1, 0, max(6, count // 3)))
        return flops, np.full(flops.size, 20.0)
    if kind == 1:
        lines = top * 10 ** (-span * np.linspace(1, 0, max(4, count // 8)))
        flops = np.repeat(lines, max(5, count // lines.size))
        return flops, 20 * np.exp(rng.uniform(-2.3, 2.3, flops.size))
    if kind == 2:
        largest = math.sqrt(top / 120)
        sizes, ratios = np.meshgrid(
            np.geomspace(largest / 10 ** (span / 2), largest, max(3, count // 4)), np.geomspace(5, 320, 4)
        )
        return (6 * sizes**2 * ratios).ravel(), ratios.ravel()
    return top * 10 ** (-span * rng.uniform(0, 1, count)), 20 * np.exp(rng.normal(0, 1, count))


def one(seed: int) -> dict[float, list[tuple[bool, float, float]]]:
    """Whether the interval held, its width and the error against the law, a new run, by factor."""
    rng = np.random.default_rng([1, seed])
    alpha, beta = rng.uniform(0.25, 0.5, 2)
    noise = math.exp(rng.uniform(math.log(0.002), math.log(0.02)))
    count, span = int(math.exp(rng.uniform(math.log(10), math.log(60)))), rng.uniform(1.5, 3.2)
    top, share = 10 ** rng.uniform(17, 20), rng.dirichlet([3, 1.5, 1.5])
    middle, e = math.sqrt(top / 120), float(rng.choice([1.7, 0.5, 2.5, 0.03]))

    def law(n: np.ndarray, d: np.ndarray) -> np.ndarray:
        parts = share[1] * (n / middle) ** -alpha + share[2] * (d / (20 * middle)) ** -beta
        return e * (1 + parts / share[0])

    flops, ratio = design(seed % 4, count, span, top, rng)
    n = np.sqrt(flops / 6 / ratio)
    loss = law(n, ratio * n) * np.exp(noise * rng.standard_normal(n.size))
    fitted = fit(Points(tuple(map(str, range(n.size))), n, ratio * n, loss, flops))
    out = defaultdict(list)
    for factor in FACTORS:
        size = np.array([math.sqrt(flops.max() * factor / 120)])
        q, exact = fitted.predict(float(size[0]), float(20 * size[0])), float(law(size, 20 * size)[0])
        for fresh in exact * np.exp(noise * rng.standard_normal(FRESH)):
            out[factor].append((q.p05 <= fresh <= q.p95, (q.p95 - q.p05) / exact, q.p50 / exact - 1))
    return out


def main() -> int:
    """Make laws up, fit, count."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--laws", type=int, default=40)
    laws = parser.parse_args().laws
    every = defaultdict(list)
    for seed in range(laws):
        for factor, rows in one(seed).items():
            every[factor] += rows
    for factor, rows in every.items():
        held, width, error = np.array(rows, float).T
        print(f"{factor:>5g} x the largest run's compute: 90% intervals hold {held.mean():.0%} of {held.size} new runs of {laws} laws, median width {np.median(width):.1%}; "
              f"p50 off by {np.median(np.abs(error)):.2%} in the median, {error.mean():+.2%} on average")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
