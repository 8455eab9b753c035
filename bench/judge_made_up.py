"""The judge on made-up runs of known noise and shape: false alarms of healthy ones, and how soon a fault shows.

A library of `bench/judge.py`. Shapes and noises are those that logs have and the recorded curves have not: running means,
noise that remembers, epochs, a late start, a learning rate that rises again. Every draw has its own fixed seed; no height
was set on these.
"""

import zlib
from collections.abc import Iterator
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monitor.replay import Watch
from monitor.verdict import Sample

Array = NDArray[np.float64]
NOISES = (
    "independent",
    "skewed",
    "remembers 0.5",
    "remembers 0.8",
    "remembers 0.95",
    "mean of 10",
    "running mean 0.9",
)
SHAPES = ("power law", "flat", "cosine", "epochs", "late start", "rate cut", "rate rises again")
SIZES = ((300, 4), (1000, 2), (4000, 1), (12000, 1))
"""(samples, runs) for each spread."""
SPREADS = (0.003, 0.01, 0.04, 0.2)


def drawn(*key: object) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


def remembering(own: Array, keep: float) -> Array:
    """Running mean of `own`, begun in its stationary state."""
    out, mean = np.empty(own.size), float(own[0]) * ((1 - keep) / (1 + keep)) ** 0.5
    for i, x in enumerate(own.tolist()):
        mean = keep * mean + (1 - keep) * x
        out[i] = mean
    return out


def noise(kind: str, n: int, sd: float, rng: np.random.Generator) -> Array:
    """(n,) nats per token, as they are logged; of a spread `sd`, for a running mean before it is taken."""
    if kind == "skewed":
        return sd * (0.8 * rng.standard_normal(n) + 0.6 * (rng.exponential(1, n) - 1))
    if kind == "mean of 10":
        return sd * np.convolve(rng.standard_normal(n + 9), np.ones(10), "valid") / 10**0.5
    own = sd * rng.standard_normal(n)
    if kind == "running mean 0.9":
        return remembering(own, 0.9)
    if kind.startswith("remembers"):
        keep = float(kind.split()[1])
        return remembering(own, keep) * ((1 + keep) / (1 - keep)) ** 0.5
    return own


def shape(kind: str, n: int) -> tuple[Array, Array | None]:
    """(n,) expected loss, nats per token, and learning rate where it is logged."""
    t, done = np.arange(n) * 3000 / max(n, 3000), np.arange(n) / n
    fall = 2.2 + 6 * (t + 10) ** -0.35
    if kind == "flat":
        return np.full(n, 2.5), None
    if kind == "cosine":
        return fall + 0.06 * (1 + np.cos(np.pi * done)), None
    if kind == "epochs":
        return fall - 0.06 * np.floor(4 * done), None
    if kind == "late start":
        return 2.2 + 6 * (np.maximum(0, t - 0.08 * t[-1]) + 10) ** -0.35, None
    if kind == "rate cut":
        return fall - 0.2 * (1 - np.exp(-60 * np.maximum(0, done - 0.5))), None
    if kind == "rate rises again":
        part = 2 * done % 1
        lr = 0.1 + 0.45 * (1 + np.cos(np.pi * part))
        lr = np.where(done >= 0.5, 0.1 + (lr - 0.1) * np.minimum(1, part / 0.02), lr)
        return fall + 0.12 * lr, lr
    return fall, None


def judged(losses: Array, lr: Array | None) -> Iterator[tuple[int, str]]:
    """(index, severity) of every alert."""
    watch = Watch()
    for i, x in enumerate(losses.tolist()):
        for alert in watch.observe(Sample(i, x, lr=None if lr is None else float(lr[i]))).opened:
            yield i, alert.severity


def false_alarms() -> list[dict[str, Any]]:
    """Warnings in 100,000 samples and pages of healthy runs: each noise on a power law and a flat loss, each shape with
    independent noise."""
    pairs = [(s, k) for k in NOISES for s in ("power law", "flat")]
    rows = []
    for kind, of in [*pairs, *((s, "independent") for s in SHAPES[2:])]:
        middle_of = {n: shape(kind, n) for n, _ in SIZES}
        samples = runs = warnings = pages = 0
        for n, repeats in SIZES:
            middle, lr = middle_of[n]
            for sd in SPREADS:
                for repeat in range(repeats):
                    rng = drawn(kind, of, n, sd, repeat)
                    found = [severity for _, severity in judged(middle + noise(of, n, sd, rng), lr)]
                    samples, runs = samples + n, runs + 1
                    warnings, pages = warnings + found.count("warning"), pages + found.count("critical")
        rows.append(
            {
                "shape": kind,
                "noise": of,
                "runs": runs,
                "samples": samples,
                "warnings": warnings,
                "pages": pages,
            }
        )
    return rows


def smoothed_delays(n: int = 2000, trials: int = 10) -> list[dict[str, Any]]:
    """Samples from a fault to its first warning, within 300, in running means of noise of 0.05 a step."""
    faults = {"+0.05": lambda d: 0.05, "+0.2": lambda d: 0.2, "ramp 2e-3": lambda d: 0.002 * d}
    rows = []
    for keep in (0.0, 0.5, 0.9):
        for name, fault in faults.items():
            found = []
            for trial in range(trials):
                rng, at = drawn(keep, name, trial), 1200 + 37 * trial
                own = shape("power law", n)[0] + noise("skewed", n, 0.05, rng)
                own += np.array([fault(i - at) if i >= at else 0.0 for i in range(n)])
                calls = judged(remembering(own, keep) if keep else own, None)
                first = next((i - at for i, severity in calls if i >= at and severity != "info"), 300)
                found += [first] if first < 300 else []
            rows.append(
                {
                    "running mean": keep,
                    "fault": name,
                    "found": len(found) / trials,
                    "median": median(found) if found else None,
                }
            )
    return rows
