"""Runs that were trained elsewhere, as events of wire v1: TensorBoard event files, CSV as `losscast replay` reads it, JSON
lines.

A file's columns are known by their usual names (`NAMES`), or by what the caller says. What counts is a step and a loss. A row
that has a validation loss and no training loss is put to the last step before it, as those loggers write them; a row
that has neither, an empty cell, is passed over and counted, as everywhere in losscast; `nan` and `inf` are losses that are not
finite. Loss in nats per token, time in seconds since the epoch.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monitor.errors import Failed, WrongInput, absent, some
from monitor.forecast.table import read_table
from monitor.schema import MAX_COUNT, SPELLED

NAMES: dict[str, tuple[str, ...]] = {
    "step": ("step", "_step", "global_step", "iteration", "iter", "trainer/global_step", "steps"),
    "loss": ("loss", "train_loss", "train/loss", "training_loss", "loss/train", "train/lm_loss", "lm loss", "lm-loss-training/lm loss",
             "train/ce_loss", "train/crossentropyloss", "metrics/train/loss"),
    "tokens": ("tokens", "train/tokens", "num_tokens", "total_tokens", "consumed_tokens", "tokens_seen", "throughput/total_tokens"),
    "val_loss": ("val_loss", "eval_loss", "valid_loss", "validation_loss", "eval/loss", "val/loss", "validation/loss", "loss/val", "loss/valid"),
    "lr": ("lr", "learning_rate", "train/lr", "train/learning_rate", "learning-rate", "optim/lr"),
    "grad_norm": ("grad_norm", "grad-norm", "gradient_norm", "train/grad_norm", "optim/total_grad_norm"),
    "tokens_per_s": ("tokens_per_s", "tokens_per_second", "tokens/s", "throughput/tokens_per_sec"),
    "time": ("time", "_timestamp", "wall_time", "timestamp"),
}  # fmt: skip
"""Of each field, the names it goes by, in small letters, the likeliest first."""


@dataclass(slots=True)
class Read:
    """What a file holds."""

    samples: list[dict[str, float]]
    """step and loss, and what else there is, in order of step."""
    columns: dict[str, str]
    """Field to the name it has in the file."""
    unused: list[str] = field(default_factory=list)
    without_loss: int = 0
    repeated: int = 0


def read(path: Path, chosen: Mapping[str, str], run: str | None = None) -> Read:
    """The samples of one run. `chosen` names columns that go by another name; `run` picks one of a file's `run` column.

    Raises WrongInput, with the line where there is one.
    """
    for name in chosen:
        if name not in NAMES:
            raise WrongInput(f"--map {name}: not a field; there are {', '.join(NAMES)}")
    if not path.exists():
        raise WrongInput(absent(path))
    if path.is_dir() or "tfevents" in path.name:
        rows = _tensorboard(path, chosen)
    elif path.suffix in (".jsonl", ".ndjson", ".json"):
        rows = _json_lines(path)
    elif path.suffix in (".csv", ".tsv"):
        rows = _csv(path)
    else:
        raise WrongInput(
            f"{path}: need a .csv, .tsv or .jsonl, a TensorBoard event file, or a folder of them"
        )
    return _samples(path, list(rows), chosen, run)


Row = tuple[int, dict[str, Any]]
"""Line, and what it holds."""


def _csv(path: Path) -> Iterator[Row]:
    """As `losscast replay` and `fit` read a table."""
    table = read_table(path)
    for line, cells in zip(table.lines, zip(*table.columns.values(), strict=True), strict=True):
        yield line, dict(zip(table.columns, cells, strict=True))


def _json_lines(path: Path) -> Iterator[Row]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, text in enumerate(file, 1):
                if not text.strip():
                    continue
                try:
                    found = json.loads(text)
                except (ValueError, RecursionError) as error:
                    raise WrongInput(
                        f"{path}:{number}: not JSON: {str(error)[:100]}; need one object a line"
                    ) from None
                if not isinstance(found, dict):
                    raise WrongInput(
                        f"{path}:{number}: need an object, one a line; got {type(found).__name__}"
                    )
                yield number, found
    except UnicodeDecodeError as error:
        at = f"byte {error.object[error.start]:#04x}"
        raise WrongInput(f"{path}: not UTF-8 text ({at}); save it as UTF-8, one JSON object a line") from None
    except OSError as error:
        raise WrongInput(f"{path}: can't be read: {error.strerror or error}") from None


def _tensorboard(path: Path, chosen: Mapping[str, str]) -> Iterator[Row]:
    """One row for each step of any scalar that is known or chosen."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from tensorboard.util.tensor_util import make_ndarray
    except ImportError:
        raise Failed(
            "TensorBoard's event files need it: pip install 'losscast[tensorboard]', or export to .csv"
        ) from None
    if path.is_dir() and not any(path.glob("*tfevents*")):
        raise WrongInput(f"{path}: holds no event file (*tfevents*); give the folder of one run")
    everything = EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 0})
    try:
        everything.Reload()
        found = everything.Tags()
        steps: dict[int, dict[str, Any]] = {}
        for tag in [*found["scalars"], *found["tensors"]]:
            scalar = tag in found["scalars"]
            for event in everything.Scalars(tag) if scalar else everything.Tensors(tag):
                value = event.value if scalar else make_ndarray(event.tensor_proto)
                if not scalar and getattr(value, "size", 0) != 1:
                    break  # a histogram or an image
                row = steps.setdefault(
                    int(event.step), {"step": int(event.step), "wall_time": event.wall_time}
                )
                row[tag] = float(value if scalar else value.reshape(()).item())
    except (WrongInput, Failed):
        raise
    except Exception as error:  # a damaged file: whatever its reader makes of it
        raise WrongInput(f"{path}: can't be read as TensorBoard's: {error}") from error
    for step in sorted(steps):
        yield step, steps[step]


def _samples(path: Path, rows: list[Row], chosen: Mapping[str, str], run: str | None) -> Read:
    if not rows:
        raise WrongInput(f"{path}: has no row")
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    runs = list(dict.fromkeys(str(row["run"]) for _, row in rows if row.get("run") not in (None, "")))
    if run is None and len(runs) > 1:
        raise WrongInput(f"{path}: holds {len(runs)} runs; choose one with --only: {some(runs)}")
    if run is not None:
        if run not in runs:
            raise WrongInput(f"{path}: has no run {run!r}; it has {some(runs) or 'no column run'}")
        rows = [(line, row) for line, row in rows if str(row.get("run")) == run]
    columns = _columns(path, names, chosen)
    read = Read([], columns, [n for n in names if n not in columns.values() and n != "run"])
    by_step: dict[int, dict[str, float]] = {}
    waiting: list[tuple[int, float]] = []
    for line, row in rows:
        step = _number(path, line, columns["step"], row.get(columns["step"]))
        if step is None:
            read.without_loss += 1
            continue
        if not (step.is_integer() and 0 <= step < MAX_COUNT):
            raise WrongInput(f"{path}:{line}: {columns['step']}: need a whole number from 0; got {step:g}")
        values = {
            name: _number(path, line, column, row.get(column))
            for name, column in columns.items()
            if name != "step"
        }
        loss = values.pop("loss")
        rest = {name: v for name, v in values.items() if v is not None}
        if loss is None:
            if "val_loss" in rest:
                waiting.append((int(step), rest["val_loss"]))
                continue
            read.without_loss += 1
            continue
        read.repeated += int(step) in by_step
        by_step[int(step)] = {"step": int(step), "loss": loss, **rest}
    steps = sorted(by_step)
    if not steps:
        raise WrongInput(f"{path}: has no row with a step and a loss ({columns['step']}, {columns['loss']})")
    at = 0
    for step, value in sorted(waiting):
        while at + 1 < len(steps) and steps[at + 1] <= step:
            at += 1
        by_step[steps[at]]["val_loss"] = value
    read.samples = [by_step[step] for step in steps]
    return read


def _columns(path: Path, names: list[str], chosen: Mapping[str, str]) -> dict[str, str]:
    out: dict[str, str] = {}
    low = {name.lower(): name for name in reversed(names)}
    for wanted, known in NAMES.items():
        if wanted in chosen:
            if chosen[wanted] not in names:
                raise WrongInput(f"{path}: has no column {chosen[wanted]!r}; it has {some(names, 20)}")
            out[wanted] = chosen[wanted]
            continue
        found = next((low[name] for name in known if name in low), None)
        if found is not None:
            out[wanted] = found
    for needed in ("step", "loss"):
        if needed not in out:
            raise WrongInput(
                f"{path}: which column is the {needed}? Say --map {needed}=NAME; there are {some(names, 20) or 'none'}"
            )
    return out


def _number(path: Path, line: int, name: str, value: Any) -> float | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, str) and value.strip() in SPELLED:
        return SPELLED[value.strip()]
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise WrongInput(f"{path}:{line}: {name}: {str(value)[:40]!r} is no number") from None


def run_id(name: str) -> str:
    """A run's name made of a file's or another tracker's: small letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:63].strip("-") or "imported"
