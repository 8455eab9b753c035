"""What the forecast is worth on public runs: `python bench/forecast.py [--only fit|final|curves|tasks] [--json OUT]`.

Protocol
--------
fit      the plain Chinchilla fit of the 240 runs of Epoch's replication: objective, seconds (median of 9), and 4,000
         bootstrap refits, on one core.
final    For each training recipe (`forecast_sources`), runs are put in windows of compute, a factor of 1.4 each.
         The targets are the runs of a window within 3% of its best loss (at most 8); the law is fitted
         only to the runs of at most 1/100 (1/300, 1/1,000, 1/8,000) of the least target's compute, provided that leaves 6 runs of
         4 different computes. A window is one fit; predictions of one fit share its law and are not independent, so
         both counts are printed. "largest" keeps each recipe's first window: its largest runs.
widths   Left out across families: to judge a family's intervals, all widths are multiplied by the factor that makes those of
         the other families (each counting the same) hold 90%; the family's own runs have no say in it. Their pooled share, printed
         last, is the headline; what the shipped widths hold is flattered, since they were chosen on these same runs.
curves   the published split of the schedules set: fit cosine_24000, constant_24000 and wsdcon_9 of one size, predict the
         loss at every logged step of the other six schedules from their learning rates alone; and from cosine_24000 alone.
         Constant-rate runs of chess models from a ladder of eight sizes that all went down in a line. The curve law's priors are
         from models of pixels, which are in neither.
tasks    bits-per-byte of each task at the end of the 1B runs, from the runs of at most 370M parameters.

What was seen while forms and priors were chosen, and what was not, is printed apart. How the choice of priors itself
carries over from family to family is what `forecast_leave_out.py` measures.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from forecast_sources import family, folder, sources, tuned_on

from monitor.forecast.anneal import Schedule
from monitor.forecast.fit import fit
from monitor.forecast.fit_chinchilla import bootstrap_plain, fit_plain
from monitor.forecast.points import Curves, Points, read_curves, read_points
from monitor.forecast.prediction import WIDE, predict
from monitor.forecast.table import read_table
from monitor.forecast.task import fit_link


def bench_fit() -> dict:
    """Objective and timings of the plain fit."""
    points = read_points(folder() / "points/chinchilla_epoch.csv", where={"excluded_in_paper": "0"})
    data = (points.params, points.tokens, points.loss)
    fit_plain(*data)
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        z, value = fit_plain(*data)
        seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
    draws = bootstrap_plain(*data, z, 4000)
    took = time.perf_counter() - start
    errors = dict(
        zip(
            ("E", "alpha", "beta"),
            (np.exp(draws[:, 0]).std(), draws[:, 3].std(), draws[:, 4].std()),
            strict=True,
        )
    )
    answer = {
        "objective": value,
        "ms": 1e3 * statistics.median(seconds),
        "bootstrap_4000_s": took,
        "standard_errors": {k: float(v) for k, v in errors.items()},
    }
    print(f"chinchilla 240 runs: objective {value:.13g}, {answer['ms']:.1f} ms; 4,000 bootstrap refits {took:.1f} s; standard errors "
          + ", ".join(f"{k} {v:.3f}" for k, v in errors.items()))  # fmt: skip
    return answer


def windows(points: Points) -> Iterator[np.ndarray]:
    """Targets window by window, largest compute first."""
    edge = float(points.flops.max()) * 1.001
    while edge > points.flops.min():
        inside = (points.flops <= edge) & (points.flops > edge / 1.4)
        if inside.any():
            yield np.flatnonzero(inside & (points.loss <= points.loss[inside].min() * 1.03))[:8]
        edge /= 1.4


def bench_final(ratios: tuple[int, ...] = (100, 300, 1000, 8000)) -> list[dict]:
    """Predictions of larger runs from smaller ones."""
    rows = []
    for name, points in sources():
        for ratio in ratios:
            for window, targets in enumerate(windows(points)):
                small = points.flops <= points.flops[targets].min() / ratio * 1.001
                if small.sum() < 6 or len(set(np.log(points.flops[small]).round(1))) < 4:
                    continue
                law = fit(points.keep(small))
                for i in targets:
                    q = law.predict(points.params[i], points.tokens[i], points.flops[i])
                    loss = float(points.loss[i])
                    arm = np.log(q.p95 / q.p50) if loss > q.p50 else np.log(q.p50 / q.p05)
                    rows.append({"source": name, "family": family(name), "ratio": ratio, "window": window, "seen": tuned_on(name),
                                 "loss": loss, "error": q.p50 / loss - 1, "inside": q.p05 <= loss <= q.p95,
                                 "arms": abs(float(np.log(q.p50 / loss))) / float(arm),
                                 "width": (q.p95 - q.p05) / loss, "identifiable": law.identifiable and (q.p95 - q.p05) / q.p50 <= WIDE})  # fmt: skip
        print(f"  {name}", file=sys.stderr, flush=True)
    for ratio in ratios:
        for label, some in (
            ("all", rows),
            ("identifiable", [r for r in rows if r["identifiable"]]),
            ("not seen", [r for r in rows if not r["seen"]]),
        ):
            here = [r for r in some if r["ratio"] == ratio]
            if here:
                print(f"1/{ratio:,} {label:>12}: {summary(here)}")
    print(
        "1/100, largest runs, recipe by recipe: " + "; ".join(recipes([r for r in rows if r["ratio"] == 100]))
    )
    for label, some in (
        ("all", rows),
        ("called identifiable", [r for r in rows if r["identifiable"]]),
        ("not seen", [r for r in rows if not r["seen"]]),
    ):
        if some:
            fits = {(r["source"], r["ratio"], r["window"]) for r in some}
            inside = np.mean([r["inside"] for r in some])
            print(f"90% intervals as shipped (widths chosen on these same runs), {label}: hold {inside:.1%} of {len(some)} predictions, {len(fits)} fits, {len({r['source'] for r in some})} recipes; "
                  f"median width {np.median([r['width'] for r in some]):.1%}")  # fmt: skip
    left_out(rows)
    return rows


def left_out(rows: list[dict]) -> None:
    """What intervals hold in each family, as they are, and with the width that the other families ask for."""
    families = sorted({r["family"] for r in rows})
    held: list[bool] = []
    for one in families:
        own = [r for r in rows if r["family"] == one]
        others = [r for r in rows if r["family"] != one]
        count = {name: sum(r["family"] == name for r in others) for name in families}
        order = np.argsort([r["arms"] for r in others])
        mass = np.cumsum([1 / count[others[i]["family"]] for i in order])
        factor = others[int(order[np.searchsorted(mass, 0.9 * mass[-1])])]["arms"]
        held += [r["arms"] <= factor for r in own]
        print(f"widths, {one:>10}: hold {np.mean([r['inside'] for r in own]):.0%} of {len(own)}, median width {np.median([r['width'] for r in own]):.1%}; "
              f"with the others' factor {factor:.2f}: hold {np.mean([r['arms'] <= factor for r in own]):.0%}")  # fmt: skip
    fits = len({(r["source"], r["ratio"], r["window"]) for r in rows})
    print(
        f"90% intervals out of family, widths set on the other families alone: hold {np.mean(held):.1%} of {len(held)} predictions, "
        f"{fits} fits, {len(families)} families"
    )


def recipes(rows: list[dict]) -> list[str]:
    """Each recipe's error at its largest runs, and the interval's width there."""
    out = []
    for source in dict.fromkeys(r["source"] for r in rows):
        own = [r for r in rows if r["source"] == source]
        top = [r for r in own if r["window"] == min(o["window"] for o in own)]
        error, width = (float(np.median([r[k] for r in top])) for k in ("error", "width"))
        out.append(f"{source} {error:+.1%} (width {width:.0%})")
    return out


def summary(rows: list[dict]) -> str:
    """One line on some predictions."""
    largest: dict[str, list[dict]] = {}
    for r in rows:
        if r["window"] == min(o["window"] for o in rows if o["source"] == r["source"]):
            largest.setdefault(r["source"], []).append(r)
    tops = [float(np.median([abs(r["error"]) for r in some])) for some in largest.values()]
    every = np.abs([r["error"] for r in rows])
    inside, width = np.mean([r["inside"] for r in rows]), np.median([r["width"] for r in rows])
    return (f"largest runs of {len(tops)} recipes: median {np.median(tops):.2%}, worst {max(tops):.2%} off; "
            f"{len(rows)} predictions: median {np.median(every):.2%}, 9 in 10 within {np.quantile(every, 0.9):.1%}; hold {inside:.0%}, width {width:.1%}")  # fmt: skip


def bench_curves() -> dict:
    """Mean absolute error of curves under schedules that were not fitted, nats per token."""
    curves = read_curves(folder() / "curves/schedules_25m_100m.csv")
    published = ("cosine_24000", "constant_24000", "wsdcon_9")
    answer = {}
    for size in ("25M", "100M"):
        for label, seen in (("three runs", published), ("one cosine run", published[:1])):
            law = fit(Curves(tuple(curves[f"{size}-{name}"] for name in seen)), "curve")
            errors, inside = {}, []
            for run in curves.runs:
                if not run.run.startswith(f"{size}-") or run.run.split("-")[1] in published or run.lr is None:
                    continue
                total = int(run.step[-1])
                plan = Schedule("file", rows=tuple(zip(run.step.tolist(), run.lr.tolist(), strict=True)))
                line = predict(
                    law, params=run.params, tokens=float(total), batch_tokens=1.0, schedule=plan
                ).curve
                assert line is not None
                low, middle, high = (
                    np.interp(run.step, line["step"], line[k]) for k in ("p05", "p50", "p95")
                )
                errors[run.run] = float(np.abs(middle - run.loss).mean())
                inside.append(float(np.mean((low <= run.loss) & (run.loss <= high))))
            mean = float(np.mean(list(errors.values())))
            answer[f"{size} {label}"] = {"mae": mean, "by_run": errors, "held": float(np.mean(inside))}
            worst = max(errors, key=lambda k: errors[k])
            print(
                f"curves {size}, {label}: MAE {mean:.4f} (worst {worst} {errors[worst]:.4f}); band holds {np.mean(inside):.0%}"
            )
    return answer | bench_one_shape()


def bench_one_shape() -> dict:
    """Constant-rate curves of chess models, nats per move, from a ladder whose runs all went down in a line to zero."""
    ladder, other = (
        {run.params: run for run in reversed(read_curves(folder() / f"curves/{name}.csv").runs)}
        for name in ("collapse_chess", "collapse_chess_const")
    )
    law = fit(Curves(tuple(ladder.values())), "curve")
    errors, inside = [], []
    for params, run in other.items():
        total = int(ladder[params].step[-1])  # as long as the ladder's own run of that size
        seen = (run.step <= total) & (run.step > 0.02 * total)  # warm-up left out
        assert run.lr is not None
        plan = Schedule("file", rows=tuple(zip(run.step.tolist(), run.lr.tolist(), strict=True)))
        line = predict(law, params=params, tokens=float(total), batch_tokens=1.0, schedule=plan).curve
        assert line is not None
        low, middle, high = (np.interp(run.step[seen], line["step"], line[k]) for k in ("p05", "p50", "p95"))
        errors.append(float(np.abs(middle / run.loss[seen] - 1).mean()))
        inside.append(float(np.mean((low <= run.loss[seen]) & (run.loss[seen] <= high))))
    print(f"curves chess, constant rate from a ladder of linear ones: off by {np.mean(errors):.2%} of the loss "
          f"(worst size {max(errors):.2%}); band holds {np.mean(inside):.0%}")  # fmt: skip
    return {"chess": {"mean": float(np.mean(errors)), "worst": max(errors), "held": float(np.mean(inside))}}


def bench_tasks() -> dict:
    """Bits-per-byte of the 1B runs from those of at most 370M parameters, in two steps."""
    data = folder()
    table = read_table(data / "curves/olmo_ladder_to_1b.csv")
    last = {run: row for row, run in enumerate(table.texts("run"))}
    points = read_points(data / "points/olmo_ladder_to_1b.csv")
    small, large = points.params < 5e8, points.params > 1e9
    law = fit(points.keep(small))
    errors, inside = [], []
    tasks = [name for name in table.columns if "downstream_bpb" in name]
    for name in tasks:
        values = np.array([float(str(table.columns[name][last[run]])) for run in points.run])
        whole = replace(law, task=fit_link(points.loss[small], values[small], "bpb"))
        for i in np.flatnonzero(large):
            metric = predict(whole, params=points.params[i], tokens=points.tokens[i]).body["metric"]
            errors.append(abs(metric["p50"] / values[i] - 1))
            inside.append(metric["p05"] <= values[i] <= metric["p95"])
    print(f"bits-per-byte of {len(tasks)} tasks at 1B from <= 370M: mean {np.mean(errors):.2%}, median {np.median(errors):.2%}, "
          f"worst {max(errors):.1%} off; intervals hold {np.mean(inside):.0%} of {len(inside)}")  # fmt: skip
    return {
        "mean": float(np.mean(errors)),
        "median": float(np.median(errors)),
        "worst": float(max(errors)),
        "held": float(np.mean(inside)),
    }


def main() -> int:
    """Run the parts asked for and print them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("fit", "final", "curves", "tasks"))
    parser.add_argument("--json", type=Path, metavar="OUT")
    args = parser.parse_args()
    parts = {"fit": bench_fit, "curves": bench_curves, "tasks": bench_tasks, "final": bench_final}
    answers = {name: part() for name, part in parts.items() if args.only in (None, name)}
    if args.json:
        args.json.write_text(json.dumps(answers, default=float))
    return 0


if __name__ == "__main__":
    sys.exit(main())
