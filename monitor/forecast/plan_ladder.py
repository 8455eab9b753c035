"""Ladder planning: which small runs to make, for a share of the target's compute, to foretell the target best.

A candidate ladder is a geometric row of sizes at the target's tokens per parameter (and, where more than five
runs fit, one run at half and one at four times that ratio, which tell size from data). Its worth is the width of
the interval at the target that runs made from an assumed law, with the noise assumed between runs, would lead to:
found by making such runs up, fitting them with `monitor.forecast.fit` as any others, and reading the width off, several
times over. The assumed law is a given one, or a middling Chinchilla law whose loss scale does not matter here.

params, tokens (counts);  budget as a share of the target's 6 N D
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from monitor.errors import WrongInput
from monitor.forecast.fit import fit
from monitor.forecast.law import Law
from monitor.forecast.points import Points

SPANS = (10.0, 30.0, 100.0)
COUNTS = (4, 6, 8)


@dataclass(frozen=True)
class Rung:
    """One run to make."""

    params: float
    tokens: float

    @property
    def flops(self) -> float:
        """6 N D."""
        return 6.0 * self.params * self.tokens


@dataclass(frozen=True)
class Ladder:
    """Runs to make and what they would be worth."""

    rungs: tuple[Rung, ...]
    width: float
    """Median over simulations of (p95 - p05) / p50 at the target."""
    error: float
    """Root mean square of p50 over the truth, minus 1."""
    hold: float
    """Share of simulations whose interval held the truth."""
    share: float
    """Compute of all the rungs over the target's."""
    simulations: int = 0
    """How many times the ladder was made up."""

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "runs": [
                {"params": round(r.params), "tokens": round(r.tokens), "flops": r.flops} for r in self.rungs
            ],
            "expected_width": self.width,
            "expected_error": self.error,
            "holds": self.hold,
            "simulations": self.simulations,
            "share_of_target": self.share,
        }


def parse_target(text: str) -> tuple[float, float]:
    """`params=1e9,tokens=2e10` as two numbers. Raises WrongInput for anything else."""
    values: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            values[name.strip()] = float(value)
        except ValueError:
            raise WrongInput(
                f"--target {text}: {part!r} is no NAME=NUMBER; say params=1e9,tokens=2e10"
            ) from None
    if set(values) != {"params", "tokens"} or not all(v > 0 and math.isfinite(v) for v in values.values()):
        raise WrongInput(f"--target {text}: need params and tokens, each above 0; say params=1e9,tokens=2e10")
    return values["params"], values["tokens"]


def plan_ladder(
    params: float,
    tokens: float,
    budget: float = 0.01,
    *,
    law: Law | None = None,
    noise: float = 0.004,
    smallest: float = 0.0,
    simulations: int = 3,
    seed: int = 0,
) -> list[Ladder]:
    """Ladders that cost at most `budget` of the target, the one with the narrowest expected interval first.

    noise      spread between runs of one setting, ln loss; a law's own where one is given
    smallest   parameters below which no run is worth making

    Raises WrongInput when no ladder fits the budget.
    """
    if not 0 < budget < 1:
        raise WrongInput(f"--budget {budget:g}: is a share of the target's compute, above 0 and below 1")
    truth = _truth(params, tokens, law)
    noise = law.noise_sd if law is not None else noise
    found = []
    for count in COUNTS:
        for span in SPANS:
            rungs = candidate(params, tokens, budget, count, span)
            if min(r.params for r in rungs) >= max(smallest, 1.0):
                found.append(judge_ladder(rungs, params, tokens, truth, noise, simulations, seed))
    if not found:
        raise WrongInput(
            f"--budget {budget:g}: leaves no run of at least {smallest:g} parameters; give a larger share"
        )
    return sorted(found, key=lambda ladder: ladder.width)


def candidate(params: float, tokens: float, budget: float, count: int, span: float) -> tuple[Rung, ...]:
    """`count` runs whose sizes span `span` times, that together cost `budget` of the target."""
    ratio = tokens / params
    share = np.geomspace(1.0 / span, 1.0, count)
    ratios = np.full(count, ratio)
    if count > 5:
        ratios[1], ratios[-2] = 4 * ratio, 0.5 * ratio
    cost = float(np.sum(share**2 * ratios / ratio))
    largest = math.sqrt(budget / cost) * params
    return tuple(Rung(float(largest * s), float(largest * s * r)) for s, r in zip(share, ratios, strict=True))


def judge_ladder(
    rungs: tuple[Rung, ...],
    params: float,
    tokens: float,
    truth: Callable[[np.ndarray, np.ndarray], np.ndarray],
    noise: float,
    simulations: int,
    seed: int,
) -> Ladder:
    """What a ladder would tell of a target, by making it up `simulations` times."""
    n, d = np.array([r.params for r in rungs]), np.array([r.tokens for r in rungs])
    exact = float(truth(np.array([params]), np.array([tokens]))[0])
    widths, errors, holds = [], [], []
    for k in range(simulations):
        loss = truth(n, d) * np.exp(noise * np.random.default_rng([seed, k]).standard_normal(n.size))
        q = fit(Points(tuple(map(str, range(n.size))), n, d, loss, 6 * n * d), seed=k, effort=20).predict(
            params, tokens
        )
        widths.append((q.p95 - q.p05) / q.p50)
        errors.append(q.p50 / exact - 1)
        holds.append(q.p05 <= exact <= q.p95)
    share = sum(r.flops for r in rungs) / (6 * params * tokens)
    rms = float(np.sqrt(np.mean(np.square(errors))))
    return Ladder(rungs, float(np.median(widths)), rms, float(np.mean(holds)), share, simulations)


def _truth(params: float, tokens: float, law: Law | None) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Loss of a run under a law, or under a middling one: two thirds irreducible at the target, exponents 0.34."""
    if law is not None:
        return lambda n, d: np.array([law.predict(float(a), float(b)).p50 for a, b in zip(n, d, strict=True)])
    return lambda n, d: 2.0 + 0.5 * (n / params) ** -0.34 + 0.5 * (d / tokens) ** -0.34
