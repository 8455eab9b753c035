"""Points and curves as people bring them: finished runs to fit a law to, and losses along a run.

params    parameters (count); whether embeddings are counted is the law's `conventions` to say
tokens    training tokens seen (count)
flops     training compute; 6 * params * tokens where the file has none (Kaplan et al. 2020, arXiv:2001.08361)
loss      nats per token, unless the reader says otherwise

A file with a `step` column holds curves. Columns come in any order and under the usual other names; `run` is
free text. In points a loss that is empty or not finite excludes its row, with the reason; in curves one that is not finite
(`nan`, `inf`) is a sample, kept for the judge, and a row whose cell is empty has no loss: it is passed over and counted.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from monitor.errors import WrongInput, some
from monitor.forecast.attempts import attempts_seen, superseded
from monitor.forecast.columns import ALMOST, FINAL_LOSS, NAMES
from monitor.forecast.table import FloatArray, Table, need, read_table, refuse, renamed


@dataclass(frozen=True)
class Exclusion:
    """A run that was left out, and why."""

    run: str
    reason: str
    flops: float | None = None
    loss: float | None = None


@dataclass(frozen=True)
class Points:
    """Finished runs, one an index. Arrays are (n,); params and tokens are NaN where the file has only flops."""

    run: tuple[str, ...]
    params: FloatArray
    tokens: FloatArray
    loss: FloatArray
    flops: FloatArray
    excluded: tuple[Exclusion, ...] = ()
    """Rows the file had and that are no points, with the reason."""
    extra: dict[str, list[object]] = field(default_factory=dict)
    """The file's other columns, as text or as stored, one value a run."""
    path: str = ""

    def __len__(self) -> int:
        return len(self.run)

    def keep(self, mask: NDArray[np.bool_], reasons: Mapping[int, str] | None = None) -> "Points":
        """The runs where `mask` (n,) is true; `reasons` says why for those of the others that should be listed."""

        def given(values: FloatArray, i: int) -> float | None:
            return float(values[i]) if np.isfinite(values[i]) else None

        gone = tuple(
            Exclusion(self.run[i], why, given(self.flops, i), given(self.loss, i))
            for i, why in sorted((reasons or {}).items())
            if not mask[i]
        )
        at = np.flatnonzero(mask)
        return Points(
            tuple(self.run[i] for i in at),
            self.params[at],
            self.tokens[at],
            self.loss[at],
            self.flops[at],
            self.excluded + gone,
            {name: [values[i] for i in at] for name, values in self.extra.items()},
            self.path,
        )


@dataclass(frozen=True)
class Curve:
    """One run's losses along its way, in order of step, or of attempt and step. Arrays are (n,); an optional one is None
    without its column."""

    run: str
    step: NDArray[np.int64]
    loss: FloatArray
    """NaN or infinite where the run reported no finite one."""
    tokens: FloatArray | None = None
    lr: FloatArray | None = None
    val_loss: FloatArray | None = None
    """NaN at steps without a validation."""
    grad_norm: FloatArray | None = None
    params: float | None = None
    attempt: NDArray[np.int64] | None = None
    """From 1; None where the reader left out what newer attempts superseded, and so in a run that never resumed."""
    without_loss: int = 0
    """Rows of it that had neither a loss nor a validation loss, and were passed over."""

    def __len__(self) -> int:
        return len(self.step)


@dataclass(frozen=True)
class Curves:
    """Every run of a curves file, in order of appearance."""

    runs: tuple[Curve, ...]
    path: str = ""
    without_loss: int = 0
    """Rows of the file that had neither a loss nor a validation loss, those of runs that have no other among them."""

    def __len__(self) -> int:
        return len(self.runs)

    def __getitem__(self, run: str) -> Curve:
        for curve in self.runs:
            if curve.run == run:
                return curve
        raise KeyError(run)


def is_curves(path: str | Path) -> bool:
    """True when the file has a `step` column, and so holds curves."""
    return read_table(path).find(NAMES["step"]) is not None


def read_points(
    path: str | Path, columns: Mapping[str, str] | None = None, where: Mapping[str, str] | None = None
) -> Points:
    """The finished runs in a file. `columns` maps our names to the file's; `where` keeps rows by a column's value.

    Raises WrongInput with file:line:col for a missing column, text, and numbers that can't be.
    """
    return points_of(read_table(path), columns, where)


def points_of(
    source: Table, columns: Mapping[str, str] | None = None, where: Mapping[str, str] | None = None
) -> Points:
    """`read_points` on a table already read."""
    table = select(renamed(source, columns or {}), where or {})
    if table.find(NAMES["step"]) is not None:
        raise WrongInput(
            f"{table.path}:1:1: has a column {table.find(NAMES['step'])!r}, so it holds curves (a row a step), not points (a row a finished run)"
        )
    hints = [hint for name, hint in ALMOST.items() if table.find([name])][:1]
    own_loss = need(table, FINAL_LOSS, "final loss, nats per token", hints)
    names = {key: table.find(NAMES[key]) for key in ("run", "params", "tokens", "flops")}
    for key, what in (("params", "parameters"), ("tokens", "training tokens")):
        if names[key] is None and names["flops"] is None:
            need(table, NAMES[key], what, ["Or give a column 'flops' and fit --form frontier."])
    count = len(table)
    loss = table.numbers(own_loss, low=0.0, may_lack=True)
    other = names["flops"] is not None  # with flops a run is of use without its size
    params = (
        table.numbers(names["params"], low=0.0, may_lack=other) if names["params"] else np.full(count, np.nan)
    )
    tokens = (
        table.numbers(names["tokens"], low=0.0, may_lack=other) if names["tokens"] else np.full(count, np.nan)
    )
    with np.errstate(over="ignore", under="ignore"):
        flops = 6.0 * params * tokens
    if names["flops"]:
        given = table.numbers(names["flops"], low=0.0, may_lack=True)
        flops = np.where(np.isfinite(given), given, flops)
    run = table.texts(names["run"]) if names["run"] else [str(line - 1) for line in table.lines]
    run = [text or f"line {line}" for text, line in zip(run, table.lines, strict=True)]
    used = {own_loss, *(own for own in names.values() if own)}
    points = Points(
        tuple(run), params, tokens, loss, flops,
        extra={name: values for name, values in table.columns.items() if name not in used},
        path=table.path,
    )  # fmt: skip
    good = np.isfinite(loss)
    lost = {int(i): f"line {table.lines[i]}: the loss is empty or not finite" for i in np.flatnonzero(~good)}
    nowhere = good & ~(np.isfinite(flops) & (flops > 0))
    lost |= {
        int(i): f"line {table.lines[i]}: params times tokens is no finite number"
        if np.isfinite(params[i] + tokens[i])
        else f"line {table.lines[i]}: no compute, and no params and tokens to work it out"
        for i in np.flatnonzero(nowhere)
    }
    return points.keep(good & ~nowhere, lost)


def read_curves(
    path: str | Path,
    columns: Mapping[str, str] | None = None,
    where: Mapping[str, str] | None = None,
    batch_tokens: float | None = None,
    attempts: bool = False,
) -> Curves:
    """Every run in a curves file, steps in order. Without a tokens column, `batch_tokens` makes it, if given.

    A resumed run is what its newest attempts say, or with `attempts` all that each of them said.

    Raises WrongInput with file:line:col for a missing column, text, and numbers that can't be.
    """
    return curves_of_table(
        select(renamed(read_table(path), columns or {}), where or {}), Path(path).stem, batch_tokens, attempts
    )


def curves_of_table(
    table: Table, name: str, batch_tokens: float | None = None, attempts: bool = False
) -> Curves:
    """`read_curves` on a table already read; `name` is the run's where there is no run column."""
    own_step = need(table, NAMES["step"], "optimizer updates so far")
    own_loss = table.find([*NAMES["loss"], *NAMES["val_loss"]])
    if own_loss is None:
        need(table, NAMES["loss"], "loss at that step, nats per token")
    assert own_loss is not None
    table, without = _with_loss(table, own_loss)
    step = table.numbers(own_step, low=0.0, may_equal=True)
    whole = step == np.floor(step)
    refuse(
        [
            f"{table.where(int(i), own_step)} {own_step}: {step[i]:g} is no whole number of steps"
            for i in np.flatnonzero(~whole)
        ]
    )
    loss = table.numbers(own_loss, low=-np.inf, may_equal=True, may_lack=True)
    optional: dict[str, FloatArray] = {}
    for key, low in (
        ("tokens", 0.0),
        ("lr", -np.inf),
        ("val_loss", -np.inf),
        ("grad_norm", 0.0),
        ("params", -np.inf),
        ("attempt", 0.0),
    ):
        own = table.find([name for name in NAMES[key] if len(name) > 1])  # a curve's D may as well be a width
        if own is not None and own != own_loss:
            lack = key not in ("tokens", "attempt")
            optional[key] = table.numbers(own, low=low, may_equal=True, may_lack=lack)
    if "lr" in optional:
        optional["lr"] = _rates(table, optional["lr"])
    if "params" in optional:
        optional["params"] = _sizes(table, optional["params"])
    if "tokens" not in optional and batch_tokens is not None:
        optional["tokens"] = step * batch_tokens
    blank = np.array([text == "" for text in table.texts(own_loss)]) if "val_loss" in optional else None
    own_run = table.find(NAMES["run"])
    names = table.texts(own_run) if own_run else [name] * len(table)
    rows: dict[str, list[int]] = {}
    for row, run in enumerate(names):
        rows.setdefault(run or f"line {table.lines[row]}", []).append(row)
    runs = []
    for run, held in rows.items():
        at = np.asarray(held)
        if "attempt" in optional:
            attempt = np.unique(optional["attempt"][at], return_inverse=True)[1] + 1
        else:
            attempt = attempts_seen(step[at], loss[at])
        if attempt.max() > 1 and not attempts:
            stays = ~superseded(attempt, step[at])
            at, attempt = at[stays], np.ones(int(stays.sum()), dtype=np.int64)
        order = np.lexsort((step[at], attempt))
        at, attempt = at[order], attempt[order]
        if "val_loss" in optional:
            stays = _validations(loss, optional["val_loss"], blank, at, attempt, step)
            at, attempt = at[stays], attempt[stays]
        sizes = optional["params"][at] if "params" in optional else np.empty(0)
        sizes = np.unique(sizes[np.isfinite(sizes)])
        if sizes.size > 1:
            raise WrongInput(
                f"{table.path}:{table.lines[int(at[0])]}: run {run!r} has {sizes.size} values of params ({sizes[0]:g}, {sizes[1]:g} ...); a run has one"
            )
        series = {key: values[at] for key, values in optional.items() if key not in ("params", "attempt")}
        runs.append(
            Curve(
                run,
                step[at].astype(np.int64),
                loss[at],
                params=float(sizes[0]) if sizes.size else None,
                attempt=attempt if attempt[-1] > 1 else None,
                without_loss=without.get(names[int(at[0])] if own_run else "", 0),
                **series,
            )
        )
    return Curves(tuple(runs), table.path, sum(without.values()))


def _with_loss(table: Table, own_loss: str) -> tuple[Table, dict[str, int]]:
    """The rows that have a loss or a validation loss, and how many of each run have neither: by its name in the file, or
    by the run's own where it has none. Raises WrongInput when no row has either."""
    own_val, own_run = table.find(NAMES["val_loss"]), table.find(NAMES["run"])
    empty = [text == "" for text in table.texts(own_loss)]
    if own_val is not None and own_val != own_loss:
        empty = [a and text == "" for a, text in zip(empty, table.texts(own_val), strict=True)]
    if not any(empty):
        return table, {}
    names = table.texts(own_run) if own_run else None
    without: dict[str, int] = {}
    for row, gone in enumerate(empty):
        if gone:
            run = names[row] if names else ""
            without[run] = without.get(run, 0) + 1
    rows = [row for row, gone in enumerate(empty) if not gone]
    if not rows:
        raise WrongInput(
            f"{table.path}: no row has a loss: the column {own_loss} is empty; say --columns loss=NAME"
        )
    columns = {name: [cells[row] for row in rows] for name, cells in table.columns.items()}
    return replace(table, columns=columns, lines=[table.lines[row] for row in rows]), without


def _validations(
    loss: FloatArray,
    val: FloatArray,
    blank: NDArray[np.bool_] | None,
    at: NDArray[np.int64],
    attempt: NDArray[np.int64],
    step: FloatArray,
) -> NDArray[np.bool_]:
    """Which of the rows `at` stay, once rows of a validation alone have gone into the row of their step, or the one before.

    Trackers write such rows: an empty loss beside a validation loss is no loss that was not finite. In a run of nothing
    but such rows the validation losses are the losses. Changes `loss` and `val` in place.
    """
    stays = np.ones(at.size, dtype=bool)
    alone = np.zeros(at.size, dtype=bool) if blank is None else blank[at] & np.isfinite(val[at])
    if not alone.any():
        return stays
    if np.all(blank[at]):  # type: ignore[index]
        loss[at] = val[at]
        return alone
    last = -1
    for i in np.lexsort((alone, step[at], attempt)).tolist():
        if not alone[i]:
            last = i
            continue
        stays[i] = False
        if last >= 0 and attempt[last] == attempt[i]:
            val[at[last]] = val[at[i]]
    return stays


def _rates(table: Table, lr: FloatArray) -> FloatArray:
    """Learning rates with a schedule's rounding below zero taken for zero. Raises WrongInput for a negative one."""
    largest = float(np.nanmax(lr, initial=0.0))
    own = table.find(NAMES["lr"]) or "lr"
    wrong = np.flatnonzero(lr < -1e-3 * largest) if largest > 0 else np.flatnonzero(lr < 0)
    refuse(
        [f"{table.where(int(i), own)} {own}: {lr[i]:g} is out of range: need a number >= 0" for i in wrong]
    )
    return np.maximum(lr, 0.0)


def _sizes(table: Table, params: FloatArray) -> FloatArray:
    """Parameters; where the first such column holds no counts, the next that does. Raises WrongInput when none does."""
    if np.any(params <= 0):
        own = str(table.find(NAMES["params"]))
        for name in NAMES["params"]:
            other = table.find([name]) if len(name) > 1 else None
            if other is not None and other != own:
                return table.numbers(other, low=0.0, may_lack=True)
        table.numbers(own, low=0.0, may_lack=True)
    return params


def select(table: Table, where: Mapping[str, str]) -> Table:
    """The rows whose columns hold the given texts. Raises WrongInput, naming the values there are, if none does."""
    for name, wanted in where.items():
        own = table.find([name])
        if own is None:
            raise WrongInput(f"{table.path}:1:1: no column {name!r}; the file has {some(table.columns, 10)}")
        values = table.texts(own)
        rows = [i for i, value in enumerate(values) if value == wanted]
        if not rows:
            has = some(sorted(set(values)))
            raise WrongInput(f"{table.path}: no row has {own} = {wanted!r}; there are {has}")
        columns = {key: [cells[i] for i in rows] for key, cells in table.columns.items()}
        table = replace(table, columns=columns, lines=[table.lines[i] for i in rows])
    return table
