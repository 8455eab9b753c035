"""How much of a slow drift can be seen by half of it at all: the best linear test that knows what healthy runs do.

A library of `bench/judge.py`. The drift is a known ramp m over windows of the gap; healthy gaps have mean nothing and
covariance S. The most powerful test of given false alarms is w'x with w = S^-1 m (Neyman and Pearson), its shift in
standard deviations d = sqrt(m' S^-1 m), its power Phi(d - z). S is taken from all other runs, the run itself left out.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from monitor.verdict import Sample

Array = NDArray[np.float64]
FALSE = 1e-3
"""False alarms a run that the test may cost."""
BEGIN, HALF = 0.2, 0.6
"""Shares of the run at which the drift begins and has accrued half its excess."""


def beside_controls(runs: dict[str, list[Sample]], windows: int = 6) -> dict[str, Any]:
    """Per-step runs of one record: share of drifts found by half, each run beside one other, and beside all others."""
    held = np.array([[s.loss for s in run] for run in runs.values() if len(run) == 1530])
    n, steps = held.shape
    rise = 0.005 * float(held[:, -50:].mean())
    ramp = rise * np.clip((np.arange(steps) / steps - BEGIN) / (1 - BEGIN), 0, 1)
    edges = np.linspace(0.1 * steps, HALF * steps, windows + 1).astype(int)

    def means(gap: Array) -> Array:
        return np.array([gap[a:b].mean() for a, b in pairwise(edges)])

    def all_but(*left_out: int) -> list[int]:
        return [j for j in range(n) if j not in left_out]

    answer: dict[str, Any] = {"windows": windows, "false alarms a run": FALSE}
    for name in ("one control", "the mean of all others"):
        found = []
        for i in range(n):
            twin = (i + 1) % n
            if name == "one control":
                rest = all_but(i, twin)
                healthy = [means(held[a] - held[b]) for a in rest for b in rest if a != b]
                gap = means(held[i] - held[twin])
            else:
                rest = all_but(i)
                healthy = [means(held[a] - held[all_but(i, a)].mean(axis=0)) for a in rest]
                gap = means(held[i] - held[rest].mean(axis=0))
            spread = np.cov(np.array(healthy).T)
            weight = np.linalg.solve(spread, means(ramp))
            sd = math.sqrt(weight @ spread @ weight * (1 + 1 / len(rest)))
            limit = stats.t.isf(FALSE, len(rest) - 1 - windows)
            found.append(weight @ (gap + means(ramp) - np.mean(healthy, axis=0)) / sd > limit)
        answer[f"found by half, beside {name}"] = float(np.mean(found))
    return answer


def by_validations(groups: Sequence[tuple[Sequence[int], Sequence[Sequence[Sample]]]]) -> dict[str, Any]:
    """The last validation by half of the drift against the other runs of its recipe, one look, Student's t."""
    healthy: list[float] = []
    drifting: list[float] = []
    power: list[float] = []
    apart: list[float] = []
    for steps, held in groups:
        loss = np.array([[s.loss for s in run] for run in held])
        n, last = len(held), max(i for i, step in enumerate(steps) if step <= HALF * steps[-1])
        share = (steps[last] / steps[-1] - BEGIN) / (1 - BEGIN)
        rise = 0.005 * float(np.median(loss[:, -1])) * max(0.0, share)
        for i in range(n):
            rest = np.delete(loss[:, last], i)
            sd = max(float(rest.std(ddof=1)), 5e-4) * math.sqrt(1 + 1 / (n - 1))
            t = float((loss[i, last] - rest.mean()) / sd)
            healthy.append(float(stats.t.sf(t, n - 2)))
            drifting.append(float(stats.t.sf(t + rise / sd, n - 2)))
            apart.append(rise / sd)
            power.append(float(stats.nct.sf(stats.t.isf(FALSE, n - 2), n - 2, rise / sd)))
    return {
        "runs": len(healthy), "false alarms a run": FALSE,
        "excess there in standard deviations, median": float(np.median(apart)),
        "expected to be found": float(np.nanmean(power)),
        "found": float(np.mean(np.array(drifting) < FALSE)),
        "healthy runs called": int(np.sum(np.array(healthy) < FALSE)),
    }  # fmt: skip
