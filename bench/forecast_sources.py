"""The public runs that forecasts are measured on: one `Points` a training recipe, and which were used to tune.

Reads LOSSCAST_DATA. A family is one laboratory's runs: recipes of one family share what makes them hard, so a family is
what is left out together. Seen while forms, priors and widths were chosen: porian (rw and owt2, 5 recipes each),
chinchilla, rpj, gemstones, misfitting, olmo; and, once, c5m_const (pixels at a constant rate), which led to the tails of the
priors. Not seen: chess_const (chess moves at a constant rate).
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from monitor.forecast.points import Points, read_curves, read_points
from monitor.forecast.table import read_table

UNSEEN = ("chess_const",)


def folder() -> Path:
    """Where the public data are. Exits, saying so, when LOSSCAST_DATA does not name a folder."""
    path = Path(os.environ.get("LOSSCAST_DATA", ""))
    if not (path / "points").is_dir():
        print("skipped: set LOSSCAST_DATA to the folder that holds points/ and curves/", file=sys.stderr)
        sys.exit(0)
    return path


def tuned_on(name: str) -> bool:
    """Whether a source was looked at while forms, priors and widths were chosen."""
    return not name.startswith(UNSEEN)


def family(name: str) -> str:
    """Whose runs a recipe is."""
    return name.split("_")[0].split("/")[0]


def sources() -> Iterator[tuple[str, Points]]:
    """Name and runs of each recipe."""
    data = folder()
    for corpus in ("rw", "owt2"):
        points = read_points(data / f"points/porian_{corpus}.csv")
        keys = [
            "-".join(str(points.extra[k][i]) for k in ("hparams", "warmup", "decay", "param_count"))
            for i in range(len(points))
        ]
        for key in sorted(set(keys)):
            yield f"porian_{corpus}/{key}", points.keep(np.array([k == key for k in keys]))
    yield "chinchilla", read_points(data / "points/chinchilla_epoch.csv", where={"excluded_in_paper": "0"})
    yield "rpj", read_points(data / "points/overtraining_rpj.csv")
    yield "olmo", read_points(data / "points/olmo_ladder_to_1b.csv")
    yield "misfitting", read_points(data / "points/isoflop_misfitting__fineweb_c4__transformer.csv")
    yield "steplaw", best_of(read_points(data / "points/steplaw_dense.csv"))
    for name in ("collapse_c5m", "collapse_chess"):
        yield name, ends_by_compute(data / f"curves/{name}.csv")
    yield "gemstones", gemstones(data / "curves/gemstones_to_100b.csv")
    yield "chess_const", lengths(data / "curves/collapse_chess_const.csv")
    yield "c5m_const", lengths(data / "curves/collapse_c5m_schedules.csv", "const")


def best_of(points: Points) -> Points:
    """The best run of each size and data, over learning rate and batch."""
    best: dict[tuple[float, float], int] = {}
    for i in range(len(points)):
        key = (points.params[i], points.tokens[i])
        if key not in best or points.loss[i] < points.loss[best[key]]:
            best[key] = i
    mask = np.zeros(len(points), bool)
    mask[list(best.values())] = True
    return points.keep(mask)


def ends_by_compute(path: Path) -> Points:
    """The last point of each curve of a file that gives compute and not tokens; tokens are compute / params / 6."""
    table = read_table(path)
    compute = table.numbers("compute", low=0.0, may_equal=True)
    last: dict[str, float] = {}
    for run, value in zip(table.texts("run"), compute, strict=True):
        last[run] = max(last.get(run, 0.0), value)
    curves = read_curves(path)
    params = np.array([c.params for c in curves.runs], float)
    flops = np.array([last[c.run] for c in curves.runs])
    loss = np.array([c.loss[-3:].mean() for c in curves.runs])
    return Points(tuple(c.run for c in curves.runs), params, flops / params / 6, loss, flops, path=str(path))


def gemstones(path: Path) -> Points:
    """Six lengths of each constant-rate run, each of which counts as a run ended there."""
    rows = [
        (f"{c.run}@{k}", c.params, c.tokens[k], c.loss[k])
        for c in read_curves(path).runs
        for k in (1, 2, 4, 9, 19, 49)
        if c.tokens is not None and k < len(c)
    ]
    values = np.array([row[1:] for row in rows], float)
    return Points(
        tuple(row[0] for row in rows),
        values[:, 0],
        values[:, 1],
        values[:, 2],
        6 * values[:, 0] * values[:, 1],
        path=str(path),
    )


def lengths(path: Path, schedule: str | None = None) -> Points:
    """Eight lengths, each twice the one before, of the first constant-rate run of each size; each counts as a run ended there.

    A length's loss is the mean of three logged ones. The files give compute and not tokens: tokens are compute / params / 6.
    """
    table = read_table(path)
    columns = zip(table.texts("run"), table.texts("schedule"), table.texts("num_params"), strict=True)
    numbers = (table.numbers(k, low=0.0, may_equal=True) for k in ("step", "compute", "loss"))
    first: dict[str, str] = {}
    rows: dict[str, list[tuple[float, float, float]]] = {}
    for (run, kind, size), values in zip(columns, zip(*numbers, strict=True), strict=True):
        if schedule in (None, kind) and first.setdefault(size, run) == run:
            rows.setdefault(size, []).append(values)
    points = []
    for size, row in rows.items():
        step, compute, loss = np.array(sorted(row)).T
        for k in range(8):
            i = int(np.searchsorted(step, step[-1] / 2**k, side="right")) - 1
            if i >= 3:
                points.append((f"{size}/{2**k}", float(size), compute[i], loss[i - 2 : i + 1].mean()))
    params, flops, ends = np.array([p[1:] for p in points], float).T
    return Points(tuple(p[0] for p in points), params, flops / params / 6, ends, flops, path=str(path))
