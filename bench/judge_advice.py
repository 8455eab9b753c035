"""How good the advice is: final loss, chance of missing the target and slow drift, on runs in groups of one recipe.

A library of `bench/judge.py`, whose protocol says what is compared with what.
"""

import math
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from msgspec.structs import replace

from monitor.forecast.points import read_curves
from monitor.replay import Watch, read_samples, replay, samples_of
from monitor.verdict import Sample

Runs = dict[str, list[Sample]]


def prediction_of(steps: Sequence[int], middle: Sequence[float], sd: Sequence[float]) -> dict[str, Any]:
    """The dict of `predict --json` for a known middle and spread."""
    low = [m - 1.645 * s for m, s in zip(middle, sd, strict=True)]
    high = [m + 1.645 * s for m, s in zip(middle, sd, strict=True)]
    final = {"p05": low[-1], "p50": middle[-1], "p95": high[-1]}
    return {"final_loss": final, "curve": {"step": list(steps), "p05": low, "p50": list(middle), "p95": high}}


def recipes(runs: Runs, least: int = 5) -> list[tuple[list[int], list[list[Sample]]]]:
    """Validation curves in groups of one recipe: the same record or setting, validated at the same steps."""
    groups: dict[Any, list[list[Sample]]] = defaultdict(list)
    for name, samples in runs.items():
        if all(math.isfinite(s.loss) for s in samples):
            parts = name.split("/")
            recipe = "-".join(parts[-1].split("-")[:4]) if "results" in name else "/".join(parts[:2])
            groups[recipe, tuple(s.step for s in samples)].append(samples)
    return [(list(key[1]), held) for key, held in groups.items() if len(held) >= least and len(key[1]) >= 7]


T95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812, 1.796, 1.782, 1.771, 1.761)
"""95% quantiles of Student's t with 1, 2, ... degrees of freedom."""


def student(df: float) -> float:
    """How much wider a 90% band is whose spread was learnt from df + 1 runs, and whose middle from as many."""
    t = T95[min(len(T95), max(1, round(df))) - 1] if df < 15 else 1.645 + 1.6 / df
    return t / 1.645 * math.sqrt(1.0 + 1.0 / (df + 1.0))


def others(held: Sequence[Sequence[Sample]], i: int) -> tuple[list[float], list[float]]:
    """Mean of the other runs of the group at each step, and the spread that a 90% band of so few runs stands for."""
    middle, spread = [], []
    for j in range(len(held[i])):
        rest = [run[j].loss for k, run in enumerate(held) if k != i]
        middle.append(fmean(rest))
        spread.append(max(stdev(rest), 5e-4) * student(len(rest) - 1))
    return middle, spread


def golf(runs: Runs) -> list[tuple[list[int], list[list[Sample]], list[list[float]]]]:
    """Recipes of parameter_golf with three runs and more: steps, runs, and each run's band from the other recipes.

    Their runs are cut off by the clock at a few steps more or less; the last validation is put at the same step.
    """
    groups: dict[str, list[list[Sample]]] = defaultdict(list)
    for name, samples in runs.items():
        if len(samples) >= 8 and all(math.isfinite(s.loss) for s in samples):
            groups["/".join(name.split("/")[:2])].append(samples)
    kept = []
    for held in groups.values():
        shared = set.intersection(*({s.step for s in run[:-1]} for run in held))
        ends = [run[-1].step for run in held]
        if len(held) < 3 or max(ends) > 1.02 * min(ends) or len(shared) < 6:
            continue
        same = [
            [*(s for s in run[:-1] if s.step in shared), replace(run[-1], step=max(ends))] for run in held
        ]
        kept.append(([s.step for s in same[0]], same))

    def relative(steps: Sequence[int], held: Sequence[Sequence[Sample]], share: float) -> float:
        j = min(range(len(steps)), key=lambda j: abs(steps[j] / steps[-1] - share))
        at = [run[j].loss for run in held]
        return max(stdev(at), 5e-4) / median(at)

    out = []
    for g, (steps, held) in enumerate(kept):
        rest = [other for k, other in enumerate(kept) if k != g]
        bands = []
        for i in range(len(held)):
            band = []
            for j, step in enumerate(steps):
                typical = median(relative(other[0], other[1], step / steps[-1]) for other in rest)
                k = len(held) - 1
                band.append(typical * held[i][j].loss * math.sqrt(1.0 + 1.0 / k) * 1.25)
            bands.append(band)
        out.append((steps, held, bands))
    return out


def told(
    groups: Sequence[tuple[Sequence[int], Sequence[Sequence[Sample]], Sequence[Sequence[float]] | None]],
) -> dict[str, Any]:
    """Final loss at 25, 50, 75%; P(miss) at half against the group's median; false drift alarms."""
    errors: dict[float, list[float]] = defaultdict(list)
    inside: dict[float, int] = Counter()
    chances: list[tuple[float, bool, int]] = []
    nearest: list[tuple[float, bool, int]] = []
    stopped = top = samples_seen = 0
    false: Counter[str] = Counter()
    drift: list[float | None] = []
    telling: list[float] = []
    for steps, held, bands in groups:
        there = min(range(len(steps)), key=lambda j: abs(steps[j] - 0.6 * steps[-1]))
        at = [run[there].loss for run in held]
        telling.append(0.0025 * median(at) / max(stdev(at), 1e-6))
        finals = sorted(run[-1].loss for run in held)
        close = min(range(len(steps)), key=lambda j: abs(steps[j] - 0.5 * steps[-1]))
        for i, run in enumerate(held):
            if bands is None:
                middle, spread = others(held, i)
            else:
                middle = [
                    fmean(other[j].loss for k, other in enumerate(held) if k != i) for j in range(len(steps))
                ]
                spread = list(bands[i])
            prediction = prediction_of(steps, middle, spread)
            target = median(other[-1].loss for k, other in enumerate(held) if k != i)
            watch = Watch(prediction=prediction, target_loss=target)
            marks = [0.25, 0.5, 0.75]
            missed = run[-1].loss > target
            for j, sample in enumerate(run):
                false.update(a.alert for a in watch.observe(sample).opened)
                samples_seen += 1
                if j == close and (said := watch.advice()).p_miss is not None:
                    nearest.append((said.p_miss, missed, len(held)))
                while marks and (j + 1 == len(run) or run[j + 1].step > marks[0] * steps[-1]):
                    at = marks.pop(0)
                    said = watch.advice()
                    if said.final_loss and sample.step:
                        errors[at].append(abs(said.final_loss["p50"] - run[-1].loss))
                        inside[at] += said.final_loss["p05"] <= run[-1].loss <= said.final_loss["p95"]
                    if at == 0.5 and said.p_miss is not None:
                        chances.append((said.p_miss, missed, len(held)))
                        if run[-1].loss <= finals[len(finals) // 10]:
                            top += 1
                            stopped += said.action == "stop"
            if i % 5 == 0:
                begin, end = 0.2 * steps[-1], steps[-1]
                rise = 0.005 * middle[-1]
                bad = [
                    replace(s, loss=s.loss + rise * max(0.0, (s.step - begin) / (end - begin))) for s in run
                ]
                calls = replay(bad, prediction=prediction)["alerts"]
                first = next((a["step"] for a in calls if a["alert"] == "LossAbovePrediction"), None)
                drift.append(None if first is None else (first - begin) / (end - begin))
    error, allowed = calibration([p for p, _, _ in chances], [m for _, m, _ in chances])
    large = [c for c in chances if c[2] >= 20]
    return {
        "runs": len(chances),
        "recipes": len(groups),
        **{f"MAE at {int(100 * at)}%": fmean(e) for at, e in sorted(errors.items())},
        **{
            f"90% interval holds at {int(100 * at)}%": inside[at] / len(e) for at, e in sorted(errors.items())
        },
        "Brier skill": skill(chances),
        "Brier skill, recipes of 20 runs and more": skill(large) if large else None,
        "Brier skill at the validation nearest to half": skill(nearest),
        "the same, recipes of 20 runs and more": skill([c for c in nearest if c[2] >= 20]) if large else None,
        "calibration error": error,
        "calibration error of a calibrated forecaster, 97.5%": allowed,
        "eventual top decile": top,
        "of them told to stop": stopped,
        "healthy samples": samples_seen,
        "false alerts": dict(false),
        "drift: half its excess, in standard deviations between healthy runs there": median(telling),
        "drift: called": fmean(d is not None for d in drift),
        "drift: called by half its excess": fmean(d is not None and d <= 0.5 for d in drift),
        "drift: median share of the excess at the call": median(d for d in drift if d is not None),
    }


def skill(chances: Sequence[tuple[float, bool, int]]) -> float:
    """Brier skill against the base rate."""
    rate = fmean(missed for _, missed, _ in chances)
    return 1.0 - fmean((p - missed) ** 2 for p, missed, _ in chances) / (rate * (1 - rate))


def advice(data: Path) -> list[dict[str, Any]]:
    """The advice on both sets of validation curves."""
    speedrun = [(steps, held, None) for steps, held in recipes(read_samples(data / "speedrun_val.csv"))]
    curves = read_curves(data / "parameter_golf.csv", where={"kind": "val_loss"}).runs
    small = golf({curve.run: list(samples_of(curve)) for curve in curves})
    return [
        {"set": "speedrun_val", **told(speedrun)},
        {"set": "parameter_golf", **told(small)},
        {"set": "perstep_seeds", **every_step(read_samples(data / "perstep_seeds.csv"))},
    ]


def every_step(runs: Runs) -> dict[str, Any]:
    """Final loss of runs logged at every step, each against the smoothed others of its record; the end is the mean of
    the last 60 samples."""
    held = [run for run in runs.values() if len(run) == 1530]
    sums = [[0.0, *accumulate(s.loss for s in run)] for run in held]
    at = [*range(30, 1500, 10), 1500]

    def mean(run: int, i: int) -> float:
        return (sums[run][min(1530, i + 30)] - sums[run][i - 30]) / (min(1530, i + 30) - i + 30)

    errors: dict[float, list[float]] = defaultdict(list)
    inside: dict[float, int] = Counter()
    false: Counter[str] = Counter()
    for k, run in enumerate(held):
        rest = [j for j in range(len(held)) if j != k]
        middle = [median(mean(j, i) for j in rest) for i in at]
        spread = [stdev(mean(j, i) for j in rest) * student(len(rest) - 1) for i in at]
        steps = [*(run[i].step for i in at[:-1]), run[-1].step]
        watch, marks, end = (
            Watch(prediction=prediction_of(steps, middle, spread)),
            [0.25, 0.5, 0.75],
            mean(k, 1500),
        )
        for n, sample in enumerate(run, 1):
            false.update(a.alert for a in watch.observe(sample).opened)
            if marks and n >= marks[0] * len(run) and (said := watch.advice().final_loss):
                mark = marks.pop(0)
                errors[mark].append(abs(said["p50"] - end))
                inside[mark] += said["p05"] <= end <= said["p95"]
    return {
        "runs": len(held),
        **{f"MAE at {int(100 * m)}%": fmean(e) for m, e in errors.items()},
        **{f"90% interval holds at {int(100 * m)}%": inside[m] / len(e) for m, e in errors.items()},
        "false alerts": dict(false),
    }


def drift_beside_control(runs: Runs) -> dict[str, Any]:
    """A drift to 0.5% too high beside a control of the same recipe and data order."""
    names = [n for n in runs if len(runs[n]) == 1530]
    found: list[float | None] = []
    moved: list[float] = []
    false: Counter[str] = Counter()
    rise = 0.0
    for k, mine in enumerate(names):
        other = runs[names[(k + 1) % len(names)]]
        apart = [a.loss - b.loss for a, b in zip(runs[mine], other, strict=True)]
        moved.append(
            fmean(apart[826:918]) - fmean(apart[153:382])
        )  # at 60%, less its own offset of 10 to 25%
        end = len(runs[mine])
        rise = 0.005 * fmean(s.loss for s in runs[mine][-50:])
        begin = 0.2 * end
        bad = [
            replace(s, loss=s.loss + rise * max(0.0, (s.step - begin) / (end - begin))) for s in runs[mine]
        ]
        false.update(a["alert"] for a in replay(runs[mine], control=other)["alerts"])
        calls = replay(bad, control=other)["alerts"]
        first = next((a["step"] for a in calls if a["alert"] == "LossAbovePrediction"), None)
        found.append(None if first is None else (first - begin) / (end - begin))
    hit = [f for f in found if f is not None]
    return {
        "trials": len(found), "half its excess, in standard deviations between healthy pairs there": 0.5 * rise / stdev(moved),
        "called": len(hit) / len(found),
        "called by half its excess": fmean(f is not None and f <= 0.5 for f in found),
        "median share of the excess at the call": median(hit) if hit else None, "healthy pairs called": dict(false),
    }  # fmt: skip


def calibration(said: Sequence[float], was: Sequence[bool]) -> tuple[float, float]:
    """Expected calibration error over ten bins, and the 97.5% quantile of it for a calibrated forecaster."""

    def error(outcome: Sequence[bool]) -> float:
        bins: dict[int, list[tuple[float, bool]]] = defaultdict(list)
        for p, o in zip(said, outcome, strict=True):
            bins[min(9, int(10 * p))].append((p, o))
        return sum(abs(sum(p - o for p, o in held)) for held in bins.values()) / len(said)

    rng = random.Random(0)
    drawn = sorted(error([rng.random() < p for p in said]) for _ in range(200))
    return error(was), drawn[194]
