"""Draws from a posterior by an affine-invariant ensemble of walkers, and its mode.

Source: Goodman & Weare 2010, Comm. App. Math. Comp. Sci. 5, 65: the stretch move, scale a = 2. No tuning, no
gradients; meant for at most about eight parameters with a proper prior. Deterministic: the seed is an argument.
"""

from collections.abc import Callable

import numpy as np
from scipy.optimize import minimize

from monitor.forecast.table import FloatArray

LogDensity = Callable[[FloatArray], FloatArray]
"""(k, p) points -> (k,) log density up to a constant; -inf or NaN where it is zero."""


def mode(density: LogDensity, starts: FloatArray) -> FloatArray:
    """The best of the points reached from `starts` (k, p) by BFGS, (p,)."""

    def down(z: FloatArray) -> tuple[float, FloatArray]:
        steps = 1e-5 * np.eye(z.size)
        values = density(np.concatenate([z[None], z + steps, z - steps]))
        if not np.all(np.isfinite(values)):
            return 1e30, np.zeros_like(z)
        return -float(values[0]), -(values[1 : 1 + z.size] - values[1 + z.size :]) / 2e-5

    heights = density(starts)
    best = starts[np.argsort(-np.nan_to_num(heights, nan=-np.inf))[:3]]
    found = [minimize(down, start, jac=True, method="BFGS", options={"maxiter": 200}) for start in best]
    return min(found, key=lambda r: r.fun).x


def sample(
    density: LogDensity,
    centre: FloatArray,
    *,
    scale: FloatArray,
    seed: int,
    walkers: int = 64,
    burn: int = 250,
    keep: int = 250,
    draws: int = 256,
) -> FloatArray:
    """(draws, p) nearly independent points, from walkers started about `centre` (p,) with spread `scale` (p,)."""
    rng = np.random.default_rng(seed)
    p = centre.size
    at = centre + scale * rng.standard_normal((walkers, p))
    height = np.nan_to_num(density(at), nan=-np.inf)
    at[~np.isfinite(height)] = centre
    height = np.nan_to_num(density(at), nan=-np.inf)
    half = walkers // 2
    kept = []
    for turn in range(burn + keep):
        for mine, other in ((slice(0, half), slice(half, None)), (slice(half, None), slice(0, half))):
            stretch = (1.0 + rng.random(half)) ** 2 / 2.0
            partner = at[other][rng.integers(half, size=half)]
            proposal = partner + stretch[:, None] * (at[mine] - partner)
            new = np.nan_to_num(density(proposal), nan=-np.inf)
            take = np.log(rng.random(half)) < (p - 1) * np.log(stretch) + new - height[mine]
            at[mine] = np.where(take[:, None], proposal, at[mine])
            height[mine] = np.where(take, new, height[mine])
        if turn >= burn:
            kept.append(at.copy())
    chain = np.concatenate(kept)
    return chain[np.linspace(0, len(chain) - 1, draws).astype(int)]
