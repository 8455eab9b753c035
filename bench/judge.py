"""How good the judge is, beside the peers' rules, on the same curves: `python bench/judge.py [--surrogate-steps N]`.

Protocol
  data        LOSSCAST_DATA/curves (see its README). Nothing here is shown to the judge but the samples.
  healthy     every curve of the healthy sets, one run at a time, no prediction: any warning or page is false.
  surrogate   residuals of per-step runs about their running median, drawn in blocks of 50 around a power law, in runs
              of a million steps. Heights were set on the noise of runs 0, 2, 15, 23 and 27 with other seeds; the
              table is of other runs and of run 0, the only 0.5M-token batch there is.
  faults      put into healthy runs from a step on, at starts spread over the run after its first tenth; the delay is
              from the fault's first step to the first warning, found means within 300 steps, and an alert before the
              fault counts as a false one, not as found. As large: a shift of as many sigmas in all other runs.
  control     runs of one record share their data order: one is the run, the next the control.
  drift       from 20% of the run the loss rises linearly to 0.5% above its end, against a control or a prediction of the
              same recipe; the figure is the share of the final excess that had accrued at the call.
  old runs    the same against all other runs of the recipe, as `replay --control` takes them; see `judge_bend`.
  advice      validation curves in groups of one recipe; each run against the mean of the others of its group and the
              90% band that so few runs leave (Student's t), the target their median. parameter_golf has three or four runs a recipe, too few for
              a spread: theirs is that of the other recipes at the same share of the run. advice.KEEPS and core.NEWEST
              were set once for all groups of speedrun_val; nothing was set on parameter_golf.
  made up     healthy runs of known noise and shape, and faults in running means; see `judge_made_up`.
  cost        processor time of the whole of observe().

Prints one table; `--json` for a document. Random draws have fixed seeds.
"""

import argparse
import json
import math
import os
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from msgspec.structs import replace

sys.path.insert(0, str(Path(__file__).parent))

from judge_advice import advice, drift_beside_control, recipes
from judge_bend import beside_old, one_recipe, simulated
from judge_drift import beside_controls, by_validations
from judge_made_up import false_alarms, smoothed_delays
from judge_peers import rules

from monitor.forecast.points import read_curves
from monitor.judge import Settings
from monitor.replay import Watch, read_samples, replay, samples_of
from monitor.verdict import Sample

HEALTHY = (
    "perstep_single", "perstep_seeds", "schedules_25m_100m", "collapse_c5m", "collapse_c5m_schedules",
    "collapse_chess", "collapse_chess_const", "gemstones_to_100b", "olmo_ladder_to_1b", "speedrun_val",
)  # fmt: skip
CALIBRATED_ON = ("0", "2", "15", "23", "27")
FAULTS: dict[str, Callable[[int], float]] = {
    "+0.05": lambda d: 0.05,
    "ramp 2e-3": lambda d: 0.002 * d,
    "+0.2": lambda d: 0.2,
    "spike of 1 (5 steps)": lambda d: 1.0 if d < 5 else 0.0,
    "spike of 1, decays": lambda d: math.exp(-d / 10),
    "NaN": lambda d: math.nan if d == 0 else 0.0,
}
Runs = dict[str, list[Sample]]


def ours(samples: Sequence[Sample]) -> Iterator[tuple[int, str, str]]:
    """(step, alert, severity) of every alert."""
    watch = Watch()
    for sample in samples:
        for alert in watch.observe(sample).opened:
            yield sample.step, alert.alert, alert.severity


def healthy(data: Path) -> list[dict[str, Any]]:
    """False alarms on every healthy set, ours and the peers'."""
    rows = []
    sets = {name: read_samples(data / f"{name}.csv") for name in HEALTHY}
    for kind in ("train_loss", "val_loss"):
        curves = read_curves(data / "parameter_golf.csv", where={"kind": kind}).runs
        sets[f"parameter_golf, {kind}"] = {curve.run: list(samples_of(curve)) for curve in curves}
    for name, held in sets.items():
        counts: Counter[str] = Counter()
        steps = 0
        for samples in held.values():
            steps += len(samples)
            for _, _, severity in ours(samples):
                counts["losscast " + severity] += 1
            for peer, rule in rules(len(samples)).items():
                counts[peer] += sum(map(rule, (s.loss for s in samples)))
        rows.append({"set": name, "steps": steps, **counts})
    return rows


def pool(samples: Sequence[Sample]) -> list[float]:
    """Residuals about a running median of 301, past the first tenth."""
    x = [s.loss for s in samples]
    half = 150
    out = []
    ordered: list[float] = []
    for i in range(max(800, len(x) // 10), len(x) - half, 1):
        if i % 25 == 0 or not ordered:
            ordered = sorted(x[i - half : i + half])
        out.append(x[i] - ordered[half])
    return out


def surrogate(residuals: Sequence[float], steps: int, seed: int, block: int = 50) -> Iterator[Sample]:
    """A healthy run of any length: a power law and blocks of real residuals."""
    rng = random.Random(seed)
    held: list[float] = []
    for step in range(1000, 1000 + steps):
        if not held:
            start = rng.randrange(len(residuals) - block)
            held = list(residuals[start : start + block])
        yield Sample(step, 1.7 + 6.0 * step**-0.15 + held.pop())


def budgets(runs: Runs, steps: int) -> list[dict[str, Any]]:
    """False warnings and pages on surrogates of the judged runs."""
    names = [name for name in runs if name not in CALIBRATED_ON and len(runs[name]) > 3000]
    chosen = ["0", *names[:: max(1, len(names) // 4)][:4]]
    rows = []
    for seed, name in enumerate(chosen):
        residuals = pool(runs[name])
        count: Counter[str] = Counter()
        each = steps // len(chosen)
        for start in range(0, each, 1_000_000):
            watch = Watch()
            for sample in surrogate(residuals, min(1_000_000, each - start), 1000 * seed + start):
                for alert in watch.observe(sample).opened:
                    count[alert.severity] += 1
        rows.append(
            {"noise of run": name, "steps": each, "warning": count["warning"], "critical": count["critical"]}
        )
    return rows


def young(runs: Runs) -> dict[str, Any]:
    """Runs of 300 steps that begin nearly flat, where level and spread are learnt from nothing."""
    count: Counter[str] = Counter()
    for name in ("0", "6", "19"):
        residuals = pool(runs[name])
        for seed in range(100):
            watch = Watch()
            for sample in surrogate(residuals, 300, 77_000 + seed):
                count.update(alert.severity for alert in watch.observe(sample).opened)
    return {"runs": 300, "steps each": 300, "warning": count["warning"], "critical": count["critical"]}


def delays(samples: Sequence[Sample], fault: Callable[[int], float], starts: Sequence[int]) -> dict[str, Any]:
    """Delay of the first warning, and what became of it."""
    watch, at, found, spikes, pages = Watch(), 0, [], 0, 0
    for start in starts:
        while samples[at].step < start:
            watch.observe(samples[at])
            at += 1
        if watch.open_alerts():
            continue
        state, first, paged = json.dumps(watch.state_dict()), None, False
        trial = Watch.from_state(Settings(), json.loads(state))
        for sample in samples[at : at + 300]:
            verdict = trial.observe(replace(sample, loss=sample.loss + fault(sample.step - start)))
            for alert in verdict.opened:
                if first is None and alert.severity != "info":
                    first = sample.step - start
                paged |= alert.severity == "critical"
                spikes += alert.alert == "LossSpike"
            if first is not None and sample.step - start > 150:
                break
        found.append(first)
        pages += paged
    hit = sorted(f for f in found if f is not None)
    return {
        "starts": len(found), "found": len(hit) / max(1, len(found)), "median": median(hit) if hit else None,
        "mean": fmean(hit) if hit else None, "worst": hit[-1] if hit else None, "spikes": spikes, "paged": pages,
    }  # fmt: skip


def as_large(single: Runs, every: int = 150) -> dict[str, Any]:
    """A shift as large in the noise of other runs as +0.05 is in that of the 0.5M-token run, which has few starts."""

    def noise(run: str) -> float:
        held = sorted(abs(r) for r in pool(single[run]))
        return 1.4826 * held[len(held) // 2]

    shift, trials, found, first = 0.05 / noise("0"), 0, 0.0, []
    for run in [name for name in single if name not in CALIBRATED_ON and len(single[name]) > 3000]:
        samples = single[run]
        own = shift * noise(run)
        row = delays(samples, lambda d, own=own: own, range(len(samples) // 10, len(samples) - 320, every))
        trials += row["starts"]
        found += row["found"] * row["starts"]
        first.append(row["median"])
    return {
        "sigmas": shift,
        "starts": trials,
        "found": found / trials,
        "median of the runs' medians": median(first),
    }


def stuck(single: Runs) -> dict[str, Any]:
    """Runs whose level falls no further from a third or a half of them on, with their own noise: when it is called."""
    trials, called = 0, []
    for samples in [held for name, held in single.items() if name not in CALIBRATED_ON and len(held) > 3000]:
        x = [s.loss for s in samples]
        for start in (len(x) // 3, len(x) // 2):
            floor = median(x[start - 150 : start + 150])
            now = floor
            run = list(samples[:start])
            for i in range(start, len(x) - 150):
                if (i - start) % 50 == 0:
                    now = median(x[i - 150 : i + 150])
                run.append(replace(samples[i], loss=x[i] - now + floor))
            found = [a["step"] for a in replay(run)["alerts"] if a["alert"] == "LossPlateau"]
            trials += 1
            called += [found[0] / samples[start].step] if found else []
    return {
        "trials": trials,
        "called": len(called) / trials,
        "median of step called / step stuck": median(called),
    }


def peers_delays(
    samples: Sequence[Sample], fault: Callable[[int], float], starts: Sequence[int]
) -> dict[str, tuple[float, float | None]]:
    """(share found, median delay) of each peer's rule, which starts afresh 600 samples before the fault."""
    out: dict[str, list[int | None]] = defaultdict(list)
    for start in starts:
        at = next(i for i, s in enumerate(samples) if s.step >= start)
        for name, rule in rules(len(samples)).items():
            first = None
            for i in range(max(0, at - 600), min(len(samples), at + 300)):
                d = samples[i].step - start
                called = rule(samples[i].loss + (fault(d) if d >= 0 else 0.0))
                if called and d >= 0:
                    first = d
                    break
            out[name].append(first)
    answer = {}
    for name, held in out.items():
        hit = [h for h in held if h is not None]
        answer[name] = (len(hit) / len(held), median(hit) if hit else None)
    return answer


def with_control(runs: Runs) -> dict[str, Any]:
    """+0.02 with a control of the same recipe and data order, and false alarms without it."""
    names = [n for n in runs if len(runs[n]) == 1530]
    steps, false, found = 0, Counter(), []
    for mine, other in zip(names[::2], names[1::2], strict=False):
        healthy_run = replay(runs[mine], control=runs[other])
        steps += healthy_run["samples"]
        false.update(a["alert"] for a in healthy_run["alerts"])
        for start in (500, 800, 1100, 1400):
            shifted = [
                s if s.step < start else replace(s, loss=s.loss + 0.02) for s in runs[mine][: start + 100]
            ]
            called = [
                a["step"] - start
                for a in replay(shifted, control=runs[other])["alerts"]
                if a["step"] >= start
            ]
            found.append(called[0] if called else None)
    hit = sorted(f for f in found if f is not None)
    return {
        "healthy steps": steps, "false": dict(false), "trials": len(found), "found": len(hit) / len(found),
        "median": median(hit), "worst": hit[-1],
    }  # fmt: skip


def blow_up(data: Path) -> dict[str, Any]:
    """The real one: its minimum, its first warning and its page, in log points after the minimum."""
    runs = read_samples(data / "blowups_350m.csv")
    name = next(n for n in runs if n.startswith("blowup-4-alibi-fp32"))
    samples = runs[name]
    lowest = min(range(len(samples)), key=lambda i: samples[i].loss)
    called = {severity: step for step, _, severity in reversed(list(ours(samples)))}
    at = {s.step: i for i, s in enumerate(samples)}
    return {"minimum at": samples[lowest].step, **{k: at[v] - lowest for k, v in called.items()}}


def cost(samples: Sequence[Sample]) -> dict[str, float]:
    """Microseconds a sample, and the state's size."""
    watch = Watch()
    started = time.process_time()
    for sample in samples:
        watch.observe(sample)
    spent = time.process_time() - started
    return {"us a sample": 1e6 * spent / len(samples), "state bytes": len(json.dumps(watch.state_dict()))}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--surrogate-steps", type=int, default=1_000_000)
    parser.add_argument(
        "--only",
        help="one of healthy, budgets, young, faults, as large, stuck, control, drift, old runs, drift bound, blowup, advice, made up, cost",
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    root = os.environ.get("LOSSCAST_DATA")
    if not root:
        print("judge bench skipped: set LOSSCAST_DATA to the folder with curves/", file=sys.stderr)
        return 0
    data = Path(root) / "curves"
    single = read_samples(data / "perstep_single.csv")

    def faults() -> list[dict[str, Any]]:
        rows = []
        for run, batch in (("0", "0.5M tokens"), ("2", "one rank"), ("23", "one rank")):
            samples = single[run]
            starts = range(len(samples) // 10, len(samples) - 320, 75 if run == "0" else 300)
            for name, fault in FAULTS.items():
                row = {"run": run, "batch": batch, "fault": name, "losscast": delays(samples, fault, starts)}
                if run == "0":
                    row["peers"] = peers_delays(samples, fault, starts[::6])
                rows.append(row)
        return rows

    parts: dict[str, Callable[[], Any]] = {
        "healthy": lambda: healthy(data),
        "budgets": lambda: budgets(single, args.surrogate_steps),
        "young": lambda: young(single),
        "faults": faults,
        "as large": lambda: as_large(single),
        "stuck": lambda: stuck(single),
        "control": lambda: with_control(read_samples(data / "perstep_seeds.csv")),
        "blowup": lambda: blow_up(data),
        "drift": lambda: drift_beside_control(read_samples(data / "perstep_seeds.csv")),
        "old runs": lambda: [
            *(
                {"set": f"perstep_seeds, {len(held)} runs", **beside_old([held], 1, 50)}
                for held in one_recipe(read_samples(data / "perstep_seeds.csv"))
            ),
            {
                "set": "speedrun_val",
                **beside_old([held for _, held in recipes(read_samples(data / "speedrun_val.csv"))], 5, 1),
            },
            *simulated(),
        ],
        "drift bound": lambda: [
            beside_controls(read_samples(data / "perstep_seeds.csv")),
            by_validations(recipes(read_samples(data / "speedrun_val.csv"))),
        ],
        "advice": lambda: advice(data),
        "made up": lambda: [*false_alarms(), *smoothed_delays()],
        "cost": lambda: cost(single["23"]),
    }
    answer = {}
    for name, part in parts.items():
        if args.only in (None, name):
            answer[name] = part()
            if not args.json:
                print(f"\n## {name}", flush=True)
                for row in answer[name] if isinstance(answer[name], list) else [answer[name]]:
                    print("  " + json.dumps(row, default=str), flush=True)
    if args.json:
        print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
