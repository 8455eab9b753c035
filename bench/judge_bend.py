"""How early a slow drift is called beside a recipe's old runs, and how often a healthy run is.

A library of `bench/judge.py`. Each run is held against all others of its recipe, the run itself left out, by the judge as
it is replayed; the drift is that of the bench's protocol. Nothing was set on these runs but `old_runs.WORTH`, by the
likelihood of the old runs and not by any call; heights come from the simulation here.
"""

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import fmean, median
from typing import Any

from msgspec.structs import replace

from monitor.judge.base import LIKE, NOTHING_KNOWN
from monitor.judge.bend import FIRST, PARTS, Bend, Shape, Window, cholesky
from monitor.judge.bending import HEIGHT, HEIGHT_PAIR
from monitor.judge.old_runs import old_runs
from monitor.replay import replay
from monitor.verdict import Sample

Run = Sequence[Sample]
BEGIN, RISE = 0.2, 0.005


def drifting(run: Run, end: float) -> list[Sample]:
    """The run with a loss that rises from a fifth of it on, to half a percent above `end`."""
    last = run[-1].step
    begin = BEGIN * last
    return [replace(s, loss=s.loss + RISE * end * max(0.0, (s.step - begin) / (last - begin))) for s in run]


def excess(alerts: Sequence[dict[str, Any]], last: int) -> float | None:
    """Share of the drift's excess that had accrued at the call; None where there was none."""
    step = next((a["step"] for a in alerts if a["alert"] == "LossAbovePrediction"), None)
    return None if step is None else (step - BEGIN * last) / (last - BEGIN * last)


def beside_old(recipes: Sequence[Sequence[Run]], each: int, ends: int) -> dict[str, Any]:
    """Every run beside the others of its recipe, healthy; every `each`th of them drifting as well. The end of a run is
    the mean of its last `ends` samples."""
    found: list[float | None] = []
    false: Counter[str] = Counter()
    runs = samples = 0
    for held in recipes:
        for i, run in enumerate(held):
            old = old_runs(other for k, other in enumerate(held) if k != i)
            runs, samples = runs + 1, samples + len(run)
            false.update({a["alert"] for a in replay(run, old=old)["alerts"]})
            if i % each == 0:
                end = median(fmean(s.loss for s in other[-ends:]) for other in held)
                found.append(excess(replay(drifting(run, end), old=old)["alerts"], run[-1].step))
    hit = [f for f in found if f is not None]
    return {
        "recipes": len(recipes), "healthy runs": runs, "samples": samples, "called of them": dict(false), "drifts": len(found),
        "called": len(hit) / len(found), "called by half its excess": fmean(f is not None and f <= 0.5 for f in found),
        "median share of the excess at the call": median(hit) if hit else None,
    }  # fmt: skip


def one_recipe(runs: dict[str, list[Sample]]) -> Iterator[list[list[Sample]]]:
    """Per-step runs of one record each: as many steps, one data order."""
    by_length: dict[int, list[list[Sample]]] = {}
    for run in runs.values():
        by_length.setdefault(len(run), []).append(run)
    yield from by_length.values()


def simulated(runs: int = 2000) -> list[dict[str, Any]]:
    """Healthy gaps of the very distribution that the test counts on: how many go past the height, up or down."""
    share = [(k + 0.5) / PARTS for k in range(FIRST, PARTS)]
    rows = []
    for name, like, df, height in (
        ("beside three old runs", LIKE, 10.0, HEIGHT),
        ("beside 20", Shape(False, -1.1, 1.0, 0.03), 27.0, HEIGHT),
        ("beside one control", LIKE, NOTHING_KNOWN, HEIGHT_PAIR),
    ):
        factor, rng, called = cholesky([[like.at(a, b) for b in share] for a in share]), random.Random(1), 0
        for _ in range(runs):
            own = [rng.gauss(0.0, 1.0) for _ in share]
            by = math.sqrt(df / rng.gammavariate(df / 2.0, 2.0)) if df > 1.0 else 1.0
            bend = Bend(lambda a, b, like=like: like.at(a.share, b.share), df)
            past = False
            for i, row in enumerate(factor):
                gap = by * sum(a * b for a, b in zip(row, own, strict=False))
                bend.add(Window(i, share[i], gap, 0.0))
                past |= bend.called(height) != 0
            called += past
        rows.append({"healthy runs": name, "simulated": runs, "called": called})
    return rows
