"""A run's samples out of the store: as the CSV or Parquet that `losscast replay` and `fit` read, or for TensorBoard."""

import csv
import itertools
from pathlib import Path
from typing import Any

from monitor.errors import Failed, WrongInput, some
from monitor.mirroring import TensorBoard, values_of
from monitor.schema import is_run_id
from monitor.store.columns import Damaged
from monitor.store.reading import FIELDS, rows, samples
from monitor.store.store import Store


def export(folder: Path, run: str, target: Path | None, out: Any) -> int:
    """A run's samples as a curves file (CSV or, by its name, Parquet) that `losscast replay` and `fit` read. Their number.

    A `target` without a suffix is a folder for TensorBoard. Raises OSError of what can't be written.
    """
    if not is_run_id(run):
        raise WrongInput(f"{run!r} is no run's name")
    store = Store(folder, read_only=True)
    try:
        facts = store.run(run)
        if facts is None:
            raise WrongInput(
                f"{folder}: has no run {run}; it has {some(f.run for f in store.runs()) or 'none'}"
            )
        names = ("run", "attempt", *FIELDS)
        table = itertools.chain.from_iterable(rows(samples(store, facts, [])))
        if target is not None and target.suffix == "":
            return _tensorboard(target, run, list(table))
        if target is not None and target.suffix == ".parquet":
            return _parquet(target, run, names, list(table))
        count = 0
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(names)
        for row in table:
            row["run"] = run
            writer.writerow(["" if row.get(name) is None else row[name] for name in names])
            count += 1
        return count
    except Damaged as error:
        raise Failed(f"{error}") from error
    finally:
        store.close()


def _parquet(target: Path, run: str, names: tuple[str, ...], table: list[dict[str, Any]]) -> int:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise Failed("Parquet needs pyarrow: pip install 'losscast[parquet]', or export to .csv") from None
    columns: dict[str, Any] = {"run": [run] * len(table)}
    for name in names[1:]:
        values = [row.get(name) for row in table]
        if name in ("step", "attempt"):
            columns[name] = pa.array(values, pa.int64())
        elif any(v is not None for v in values):
            columns[name] = pa.array([None if v is None else float(v) for v in values], pa.float64())
    partial = target.with_name(target.name + ".partial")
    pq.write_table(pa.table(columns), partial)
    partial.rename(target)
    return len(table)


def _tensorboard(folder: Path, run: str, table: list[dict[str, Any]]) -> int:
    """An event file of every number there is, under FOLDER/RUN, with what was expected beside what was."""
    sink = TensorBoard(run, folder)
    for row in table:
        time_s = row.get("time")
        at = time_s if isinstance(time_s, float) else 0.0
        sink.tell(int(row["step"]), at, values_of({name: row.get(name) for name in FIELDS}))
    sink.close()
    return len(table)
