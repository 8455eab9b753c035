"""The plain Chinchilla fit: summed Huber loss on ln loss, no priors, nothing excluded. Batched and in closed form.

    minimise  sum_i huber_delta( LSE(a - alpha ln N_i, b - beta ln D_i, e) - ln L_i )      delta = 1e-3

over (e, a, b, alpha, beta), e = ln E and so on: Hoffmann et al. 2022, arXiv:2203.15556, section D.2; the same
objective as Besiroglu et al. 2024, arXiv:2404.10102. The exponents' starting grid takes the coefficients by
linear least squares (variable projection: at given exponents the law is linear in E, A, B), then damped Newton
steps with the exact Hessian, the Huber width shrinking tenfold at a time to its end. All problems of a batch
(starts, bootstrap resamples) move at once.
"""

import itertools

import numpy as np

from monitor.forecast.table import FloatArray

DELTA = 1e-3
_LOWEST_E = -30.0  # ln of E relative to the typical loss: as good as no E


def objective(
    z: FloatArray, features: FloatArray, ln_loss: FloatArray, weights: FloatArray, delta: float = DELTA
) -> FloatArray:
    """Summed Huber loss (k,) at parameters z (k, 5); features (2, n) are ln N, ln D; weights (k, n) or (1, n)."""
    residual = _residual(z, features, ln_loss)[0]
    size = np.abs(residual)
    return (weights * np.where(size <= delta, 0.5 * residual**2, delta * (size - 0.5 * delta))).sum(axis=1)


def _residual(
    z: FloatArray, features: FloatArray, ln_loss: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Residuals (k, n) and the shares (k, n) of the loss that the size part and the data part make up."""
    u = z[:, 1:2] - z[:, 3:4] * features[0]
    v = z[:, 2:3] - z[:, 4:5] * features[1]
    e = np.broadcast_to(z[:, 0:1], u.shape)
    top = np.maximum(np.maximum(u, v), e)
    eu, ev = np.exp(u - top), np.exp(v - top)
    total = eu + ev + np.exp(e - top)
    return top + np.log(total) - ln_loss, eu / total, ev / total


def newton(
    z: FloatArray,
    features: FloatArray,
    ln_loss: FloatArray,
    weights: FloatArray,
    delta: float,
    turns: int,
    tolerance: float = 1e-12,
) -> tuple[FloatArray, FloatArray]:
    """Damped Newton on every problem of a batch at once: z (k, 5) -> (z (k, 5), objective (k,)). Never goes up."""
    k = len(z)
    z = z.copy()
    damping = np.full(k, 1e-3)
    value = objective(z, features, ln_loss, weights, delta)
    alive = np.arange(k)
    for _ in range(turns):
        w = weights if len(weights) == 1 else weights[alive]
        gradient, hessian = _derivatives(z[alive], features, ln_loss, w, delta)
        diagonal = np.einsum("kii->ki", hessian)
        ridge = damping[alive, None] * (np.abs(diagonal) + 1e-12)
        step = _solve(hessian, ridge, gradient)
        new = z[alive] - np.clip(step, -2.0, 2.0)
        new[:, 0] = np.maximum(new[:, 0], _LOWEST_E)
        height = objective(new, features, ln_loss, w, delta)
        better = height < value[alive]
        gain = np.where(better, value[alive] - height, 0.0)
        z[alive] = np.where(better[:, None], new, z[alive])
        done = (better & (gain <= tolerance * value[alive])) | (~better & (damping[alive] > 1e6))
        value[alive] = np.where(better, height, value[alive])
        damping[alive] = np.where(better, np.maximum(damping[alive] * 0.2, 1e-9), damping[alive] * 8.0)
        alive = alive[~done]
        if alive.size == 0:
            break
    return z, value


def _solve(hessian: FloatArray, ridge: FloatArray, gradient: FloatArray) -> FloatArray:
    """Newton steps with |eigenvalues|, so that each goes down whatever the curvature."""
    scale = 1.0 / np.sqrt(np.abs(np.einsum("kii->ki", hessian)) + 1e-12)
    values, vectors = np.linalg.eigh(hessian * scale[:, :, None] * scale[:, None, :])
    damp = ridge.mean(axis=1, keepdims=True) * 0 + (ridge * scale**2).mean(axis=1, keepdims=True)
    along = np.einsum("kji,kj->ki", vectors, gradient * scale) / (np.maximum(np.abs(values), 1e-9) + damp)
    return scale * np.einsum("kij,kj->ki", vectors, along)


def _derivatives(
    z: FloatArray, features: FloatArray, ln_loss: FloatArray, weights: FloatArray, delta: float
) -> tuple[FloatArray, FloatArray]:
    """Gradient (k, 5) and Hessian (k, 5, 5) of the objective."""
    residual, pu, pv = _residual(z, features, ln_loss)
    x, y = np.broadcast_to(features[0], pu.shape), np.broadcast_to(features[1], pv.shape)
    slope = weights * np.clip(residual, -delta, delta)
    curved = weights * (np.abs(residual) <= delta)
    jac = np.stack([1.0 - pu - pv, pu, pv, -pu * x, -pv * y], axis=1)  # (k, 5, n)
    gradient = np.einsum("kin,kn->ki", jac, slope)
    hessian = np.matmul(jac * curved[:, None, :], jac.transpose(0, 2, 1)) - np.matmul(
        jac * slope[:, None, :], jac.transpose(0, 2, 1)
    )
    su, sv, se = (np.matmul((slope * part)[:, None, :], stack)[:, 0] for part, stack in (
        (pu, np.stack([np.ones_like(x), x, x * x], axis=2)), (pv, np.stack([np.ones_like(y), y, y * y], axis=2)),
        (1.0 - pu - pv, np.ones((len(z), x.shape[1], 1))),
    ))  # fmt: skip
    hessian[:, 0, 0] += se[:, 0]
    for row, (parts, i, j) in enumerate(((su, 1, 3), (sv, 2, 4))):
        del row
        hessian[:, i, i] += parts[:, 0]
        hessian[:, i, j] -= parts[:, 1]
        hessian[:, j, i] -= parts[:, 1]
        hessian[:, j, j] += parts[:, 2]
    return gradient, hessian


def starts(
    features: FloatArray, ln_loss: FloatArray, exponents: tuple[float, ...] = (0.15, 0.35, 0.6)
) -> FloatArray:
    """Starting points (k, 5) about centred features: least-squares coefficients at a grid of exponents."""
    out = []
    for alpha, beta in itertools.product(exponents, exponents):
        basis = np.column_stack(
            [np.ones(ln_loss.size), np.exp(-alpha * features[0]), np.exp(-beta * features[1])]
        )
        target = np.exp(-ln_loss)[:, None]
        found = np.linalg.lstsq(basis * target, np.ones(ln_loss.size), rcond=None)[0]
        floor = 0.02 * np.exp(ln_loss.mean())
        out.append([*np.log(np.maximum(found, floor)), alpha, beta])
    return np.array(out)


def fit_plain(
    params: FloatArray, tokens: FloatArray, loss: FloatArray, delta: float = DELTA
) -> tuple[FloatArray, float]:
    """(e, a, b, alpha, beta) and the objective at the best minimum found. Arrays (n,), n >= 1, positive."""
    features, ln_loss, centre = _centred(params, tokens, loss)
    weights = np.ones((1, ln_loss.size))
    z = starts(features, ln_loss)
    width = 0.1
    while width > delta:
        z, value = newton(z, features, ln_loss, weights, width, 12, 1e-4)
        z = z[np.argsort(value)[: max(2, len(z) // 2)]]
        width *= 0.1
    z, value = newton(z, features, ln_loss, weights, delta, 100)
    best = int(np.argmin(value))
    return _natural(z[best : best + 1], centre)[0], float(value[best])


def bootstrap_plain(
    params: FloatArray,
    tokens: FloatArray,
    loss: FloatArray,
    point: FloatArray,
    count: int,
    seed: int = 0,
    delta: float = DELTA,
) -> FloatArray:
    """(count, 5) refits to resampled runs, each started at `point` (5,) with the wide Huber loss first.

    The runs are put in order of size first, so that a shuffled file leads to the same resamples.
    """
    order = np.lexsort((loss, tokens, params))
    params, tokens, loss = params[order], tokens[order], loss[order]
    features, ln_loss, centre = _centred(params, tokens, loss)
    rng = np.random.default_rng(seed)
    n = ln_loss.size
    start = point.copy()
    start[:3] += [0.0, -point[3] * centre[0], -point[4] * centre[1]]
    start[:3] -= centre[2]
    out = []
    for low in range(0, count, 250):
        size = min(250, count - low)
        counts = rng.multinomial(n, np.full(n, 1.0 / n), size=size).astype(float)
        z = np.repeat(start[None], size, axis=0)
        for width, turns, tolerance in ((1e-2, 8, 1e-4), (delta, 40, 1e-9)):
            z, _ = newton(z, features, ln_loss, counts, max(width, delta), turns, tolerance)
        out.append(_natural(z, centre))
    return np.concatenate(out)


def _centred(
    params: FloatArray, tokens: FloatArray, loss: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    raw = np.log(np.array([params, tokens, loss]))
    centre = raw.mean(axis=1)
    centred = raw - centre[:, None]
    return centred[:2], centred[2], centre


def _natural(z: FloatArray, centre: FloatArray) -> FloatArray:
    out = z.copy()
    out[:, :3] += centre[2]
    out[:, 1] += z[:, 3] * centre[0]
    out[:, 2] += z[:, 4] * centre[1]
    return out
