"""A table from a CSV or Parquet file, with the place of every value, so that an error can point at it.

Columns are found by name, in any order, whatever their case; a unit after a name multiplies the values
(`monitor.forecast.columns`). CSV may use commas, semicolons, tabs or bars, be UTF-8 with or without a byte-order mark, end its
lines as it likes, and begin with lines of comment (`#`).
"""

import csv
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from monitor.errors import Failed, WrongInput, absent, some
from monitor.forecast.columns import scale_of

FloatArray = NDArray[np.float64]

_NON_FINITE = {"": math.nan, "nan": math.nan, "na": math.nan, "null": math.nan, "none": math.nan}
_NOT_TABLES = (
    (b"PK\x03\x04", "a zip archive, as spreadsheets are", "save it as CSV"),
    (b"\x1f\x8b", "compressed with gzip", "unpack it first"),
    (b"\xff\xfe", "UTF-16 text", "save it as UTF-8 CSV, or as Parquet"),
    (b"\xfe\xff", "UTF-16 text", "save it as UTF-8 CSV, or as Parquet"),
)
_WIDEST = 60
_SHOWN = 6  # problems told at once; the rest are counted


@dataclass(frozen=True)
class Table:
    """Cells as text (CSV) or as they were stored (Parquet), column by column, and the line each row came from."""

    path: str
    columns: dict[str, list[object]]
    """By the name written in the file."""
    lines: list[int]
    """(rows,) line of each row in the file, the header being line 1; row number + 1 for Parquet."""

    def __len__(self) -> int:
        return len(self.lines)

    def find(self, names: Sequence[str]) -> str | None:
        """The file's own name of the first of `names` it has, exact spelling first; None when it has none."""
        for name in names:
            if name in self.columns:
                return name
        plain: dict[str, str] = {}
        for own in self.columns:
            plain.setdefault(scale_of(own)[0], own)
        for name in names:
            own = plain.get(scale_of(name)[0])
            if own is not None:
                return own
        return None

    def where(self, row: int, own: str) -> str:
        """`file:line:col` of a cell; the column counts characters from 1, as editors do."""
        before = list(self.columns)[: list(self.columns).index(own)]
        cells = [str(self.columns[name][row]) for name in before]
        return f"{self.path}:{self.lines[row]}:{sum(len(cell) + 1 for cell in cells) + 1}"

    def texts(self, own: str) -> list[str]:
        """A column as text, blanks around it removed."""
        return ["" if cell is None else str(cell).strip() for cell in self.columns[own]]

    def numbers(self, own: str, *, low: float, may_equal: bool = False, may_lack: bool = False) -> FloatArray:
        """A column as finite numbers above `low` (or equal to it, with `may_equal`), its unit applied.

        With `may_lack`, an empty cell, NaN or an infinity comes back as it is (an empty one as NaN), and is the
        caller's to judge. Raises WrongInput naming the first cells that are anything else.
        """
        scale = scale_of(own)[1]
        values = np.empty(len(self), dtype=np.float64)
        problems: list[str] = []
        for row, cell in enumerate(self.columns[own]):
            value, problem = _number(cell)
            if problem is None and not math.isfinite(value):
                problem = None if may_lack else "is empty or not finite; give a number or take the row out"
            elif problem is None and not (value > low or (may_equal and value == low)):
                sign = ">=" if may_equal else ">"
                problem = f"is out of range: need a number {sign} {low:g}"
            if problem is not None:
                text = str(cell).strip()
                shown = repr(text if len(text) <= _WIDEST else text[:_WIDEST] + "…")
                problems.append(f"{self.where(row, own)} {own}: {shown} {problem}")
            values[row] = value * scale
        refuse(problems)
        return values


def refuse(problems: Sequence[str]) -> None:
    """Raise WrongInput with the first few problems, one a line, and the count of the others."""
    if problems:
        more = len(problems) - _SHOWN
        tail = [f"... and {more} more like these"] if more > 0 else []
        raise WrongInput("\n".join([*problems[:_SHOWN], *tail]))


def _number(cell: object) -> tuple[float, str | None]:
    """The number in a cell, or NaN and what is wrong with it."""
    if isinstance(cell, bool):
        return math.nan, "is no number"
    if isinstance(cell, (int, float, np.integer, np.floating)):
        return float(cell), None
    text = "" if cell is None else str(cell).strip()
    if text.lower() in _NON_FINITE:
        return math.nan, None
    try:
        value = float(text)
    except ValueError:
        hint = (
            " (write 1234.5: a point for decimals, no separators or units)"
            if re.match(r"[-+]?\d", text)
            else ""
        )
        return math.nan, f"is no number{hint}"
    if "_" in text:
        return math.nan, "is no number (write it without underscores)"
    return value, None


def read_table(path: str | Path) -> Table:
    """The table in a CSV or Parquet file (told apart by content, not by name).

    Raises WrongInput when the file is missing, empty, has no header or no rows, repeats a column, or has a row
    of another length than its header.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise WrongInput(absent(path)) from None
    except IsADirectoryError:
        raise WrongInput(f"{path}: is a folder; give a CSV or Parquet file") from None
    except OSError as error:
        raise WrongInput(f"{path}: can't be read: {error.strerror}") from None
    if raw[:4] == b"PAR1":
        return _parquet(path)
    if not raw.strip():
        raise WrongInput(f"{path}:1:1: the file is empty; give a header line and a row for each run or step")
    for magic, kind, instead in _NOT_TABLES:
        if raw.startswith(magic):
            raise WrongInput(f"{path}: is {kind}; {instead}")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise WrongInput(
            f"{path}:{line}: not UTF-8 text (byte {raw[error.start]:#04x}); save it as UTF-8 CSV, or as Parquet"
        ) from None
    if "\0" in text:
        raise WrongInput(
            f"{path}:{text[: text.index(chr(0))].count(chr(10)) + 1}: holds a zero byte; give CSV or Parquet"
        )
    return _csv(str(path), text)


def _csv(path: str, text: str) -> Table:
    if text.lstrip()[:1] in ("{", "["):
        raise WrongInput(
            f"{path}:1:1: is JSON; give CSV (a header line, then a row for each run or step) or Parquet"
        )
    lines = [line for line in text.splitlines() if line.strip()]
    head = next((line for line in lines if not line.lstrip().startswith("#")), lines[0])
    delimiter = max(",;\t|", key=head.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    header: list[str] | None = None
    rows: list[list[str]] = []
    places: list[int] = []
    problems: list[str] = []
    start = 1
    try:
        for cells in reader:
            line, start = start, reader.line_num + 1
            if (
                not cells
                or (len(cells) == 1 and not cells[0].strip())
                or not any(cell.strip() for cell in cells)
            ):
                continue
            if header is None:
                if not cells[0].lstrip().startswith("#") or len(cells) == 1 + head.count(delimiter) > 1:
                    header = [cell.strip() for cell in [cells[0].lstrip("# "), *cells[1:]]]
                continue
            if len(cells) > len(header) and not any(cell.strip() for cell in cells[len(header) :]):
                cells = cells[: len(header)]  # a delimiter at the end of the line
            if len(cells) != len(header):
                problems.append(
                    f"{path}:{line}:1: {len(cells)} values under {len(header)} columns ({some(header)})"
                )
                continue
            rows.append(cells)
            places.append(line)
    except csv.Error as error:
        raise WrongInput(f"{path}:{reader.line_num}: not CSV: {error}") from None
    if header is None:
        raise WrongInput(
            f"{path}:1:1: holds nothing but comments; give a header line and a row for each run or step"
        )
    repeated = sorted({name for name in header if name and header.count(name) > 1})
    if repeated:
        raise WrongInput(f"{path}:1: the column {repeated[0]!r} is there twice; name each column once")
    refuse(problems)
    if not rows:
        raise WrongInput(f"{path}:2:1: no rows under the header ({some(header)}); give at least one")
    names = [name or f"column {i + 1}" for i, name in enumerate(header)]
    return Table(path, {name: [row[i] for row in rows] for i, name in enumerate(names)}, places)


def _parquet(path: Path) -> Table:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise Failed(f"{path}: reading Parquet needs pyarrow: pip install 'losscast[parquet]'") from None
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise WrongInput(f"{path}: a damaged Parquet file: {str(error).splitlines()[0]}") from None
    if table.num_rows == 0:
        raise WrongInput(f"{path}: no rows; give at least one")
    columns = {name: table.column(i).to_pylist() for i, name in enumerate(table.column_names)}
    if len(columns) != table.num_columns:
        raise WrongInput(f"{path}: two columns have one name; name each column once")
    return Table(str(path), columns, list(range(2, table.num_rows + 2)))


def need(table: Table, names: Sequence[str], what: str, also: Iterable[str] = ()) -> str:
    """The file's name of a column that has to be there. Raises WrongInput that lists what the file has."""
    own = table.find(names)
    if own is None:
        has = some(table.columns, 10)
        others = "".join(f" {text}" for text in also)
        if len(table.columns) == 1:
            others += " A line's values are told apart by commas, semicolons, tabs or bars."
        if all(_number(name)[1] is None for name in table.columns):
            others += " Its first line holds numbers: is the header line missing?"
        raise WrongInput(
            f"{table.path}:1:1: no column {names[0]!r} ({what}); the file has {has}. Rename one, or say --columns {names[0]}=NAME.{others}"
        )
    return own


def renamed(table: Table, columns: Mapping[str, str]) -> Table:
    """The table with the columns the caller named (ours -> the file's) under our names."""
    out = dict(table.columns)
    for ours, own in columns.items():
        found = table.find([own])
        if found is None:
            raise WrongInput(f"{table.path}:1:1: no column {own!r}; the file has {some(table.columns, 10)}")
        scale = scale_of(found)[1]
        values = out.pop(found)
        out[ours if scale == 1.0 else f"{ours} ({scale!r})"] = values
    return Table(table.path, out, table.lines)
