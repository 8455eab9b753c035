"""Samples as columns of float64 in one blob, the form in which the store keeps them.

A chunk is the samples of one attempt that were committed together, each column
present or absent as a whole. A value missing within a present column is MISSING, a NaN with a payload of its own, so that
"no validation this step" and "the validation loss was NaN" stay two things. Counts are exact below 2**53.

Layout, little-endian: version u8, spare u8, columns u16 (bit i: COLUMNS[i] is present), n u32, extra_bytes u32,
then each present column's n float64, then the fields unknown to v1 as JSON [[seq, {...}], ...].
"""

import json
import struct
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

VERSION = 1
COLUMNS = (
    "seq", "step", "time", "loss", "tokens", "val_loss", "lr", "grad_norm", "tokens_per_s", "mfu", "spread",
)  # fmt: skip
BAND = ("seq", "step", "expected", "lower", "upper", "gap_sigma")
"""Columns of what the judge expected at each sample, kept in the same layout."""
HEAD = struct.Struct("<BxHII")
MISSING_BITS = 0x7FF8_0000_4C6F_7373
MISSING: float = struct.unpack("<d", struct.pack("<Q", MISSING_BITS))[0]


class Damaged(ValueError):
    """The bytes are not what was written."""


@dataclass(slots=True)
class Columns:
    """n samples. `of[name]` is (n,) float64; a name that is absent was never given."""

    n: int
    of: dict[str, Floats]
    extra: dict[int, dict[str, Any]] = field(default_factory=dict)

    def get(self, name: str) -> Floats:
        """The column, or one that is MISSING throughout."""
        found = self.of.get(name)
        return np.full(self.n, MISSING) if found is None else found

    def take(self, index: Any) -> "Columns":
        """The samples at `index` (a boolean mask, a slice or positions)."""
        of = {name: column[index] for name, column in self.of.items()}
        n = len(next(iter(of.values()))) if of else 0
        return Columns(n, of, self.extra)


def missing(column: Floats) -> NDArray[np.bool_]:
    """Where a column holds no value."""
    return np.ascontiguousarray(column).view(np.uint64) == np.uint64(MISSING_BITS)


_GETTERS = tuple(attrgetter(name) for name in COLUMNS)
_all_of = attrgetter(*COLUMNS)
_of_one = tuple(struct.Struct(f"<{n}d").pack for n in range(len(COLUMNS) + 1))


def pack_lines(lines: list[Any], extra: dict[int, dict[str, Any]] | None = None) -> bytes:
    """Chunk of records that have an attribute (float, int or None) for each of COLUMNS."""
    bits, body = 0, []
    if len(lines) == 1:  # most chunks of runs that report every second
        there = []
        for i, value in enumerate(_all_of(lines[0])):
            if value is not None:
                bits |= 1 << i
                there.append(value)
        return _finish(bits, 1, [_of_one[len(there)](*there)], extra or {})
    for i, of in enumerate(_GETTERS):
        values = list(map(of, lines))
        try:
            column = array("d", values)
        except TypeError:  # some are missing
            if values.count(None) == len(values):
                continue
            column = array("d", [MISSING if v is None else v for v in values])
        bits |= 1 << i
        body.append(column.tobytes())
    return _finish(bits, len(lines), body, extra or {})


def pack(columns: Columns, names: tuple[str, ...] = COLUMNS) -> bytes:
    """Chunk of columns, in the layout of `names`."""
    bits, body = 0, []
    for i, name in enumerate(names):
        column = columns.of.get(name)
        if column is not None:
            bits |= 1 << i
            body.append(np.ascontiguousarray(column, dtype="<f8").tobytes())
    return _finish(bits, columns.n, body, columns.extra)


def pack_rows(rows: list[tuple[float | None, ...]], names: tuple[str, ...]) -> bytes:
    """Chunk of rows that have a value or None for each of `names`."""
    body = [
        array("d", [MISSING if v is None else v for v in column]).tobytes()
        for column in zip(*rows, strict=True)
    ]
    return _finish((1 << len(names)) - 1, len(rows), body, {})


def _finish(bits: int, n: int, body: list[bytes], extra: dict[int, dict[str, Any]]) -> bytes:
    tail = json.dumps(list(extra.items()), separators=(",", ":")).encode() if extra else b""
    return b"".join((HEAD.pack(VERSION, bits, n, len(tail)), *body, tail))


def unpack(blob: bytes, names: tuple[str, ...] = COLUMNS, want: frozenset[str] | None = None) -> Columns:
    """The columns of a chunk (only those in `want`). Raises Damaged when its lengths don't fit."""
    if len(blob) < HEAD.size:
        raise Damaged(f"a chunk of {len(blob)} bytes is shorter than its head")
    version, bits, n, tail = HEAD.unpack_from(blob)
    if version != VERSION or bits >> len(names):
        raise Damaged(f"chunk version {version}, columns {bits:#x}: not known here")
    if len(blob) != HEAD.size + bits.bit_count() * 8 * n + tail:
        raise Damaged(f"a chunk of {n} samples has {len(blob)} bytes, not what its head says")
    of, at = {}, HEAD.size
    for i, name in enumerate(names):
        if bits >> i & 1:
            if want is None or name in want:
                of[name] = np.frombuffer(blob, "<f8", n, at)
            at += 8 * n
    return Columns(n, of, {int(seq): more for seq, more in json.loads(blob[at:])} if tail else {})


def join(parts: Iterable[Columns], names: tuple[str, ...] = COLUMNS) -> Columns:
    """One after the other; a column that some lack is MISSING there."""
    parts = list(parts)
    if len(parts) == 1:
        return parts[0]
    present = [name for name in names if any(name in part.of for part in parts)]
    extra: dict[int, dict[str, Any]] = {}
    for part in parts:
        extra.update(part.extra)
    n = sum(part.n for part in parts)
    return Columns(n, {name: np.concatenate([part.get(name) for part in parts]) for name in present}, extra)


class Pieces:
    """Chunks as if they lay one after the other; only the columns and samples that are asked for are put together."""

    def __init__(self, parts: list[Columns], names: tuple[str, ...] = COLUMNS):
        self.parts = parts
        self.names = [name for name in names if any(name in part.of for part in parts)]
        self.ends = np.cumsum([part.n for part in parts], dtype=np.int64)
        """Of each part: how many samples there are up to its end."""

    def column(self, name: str) -> Floats:
        """One column of all samples, MISSING where a part lacks it."""
        found = [part.get(name) for part in self.parts]
        return found[0] if len(found) == 1 else np.concatenate(found)

    def take(self, index: NDArray[np.intp]) -> Columns:
        """The samples at these positions, with all their columns. Extras are those of all the parts that were touched."""
        if 2 * len(index) > self.ends[-1]:  # most of them: column by column is quicker than part by part
            return join(self.parts, tuple(self.names)).take(index)
        part_of = np.searchsorted(self.ends, index, side="right")
        out = Columns(len(index), {name: np.empty(len(index)) for name in self.names})
        order = np.argsort(part_of, kind="stable")
        touched, starts = np.unique(part_of[order], return_index=True)
        for k, rows in zip(touched.tolist(), np.split(order, starts[1:]), strict=True):
            part = self.parts[k]
            at = index[rows] - (self.ends[k] - part.n)
            for name, column in out.of.items():
                found = part.of.get(name)
                column[rows] = MISSING if found is None else found[at]
            out.extra.update(part.extra)
        return out


def join_packed(blobs: list[bytes], names: tuple[str, ...] = COLUMNS) -> bytes:
    """Chunks one after the other, as one. Raises Damaged."""
    heads = {blob[: HEAD.size] for blob in blobs}
    if len(heads) == 1:
        version, bits, n, tail = HEAD.unpack(heads.pop())
        width = bits.bit_count()
        size = HEAD.size + 8 * width
        if version == VERSION and n == 1 and not tail and all(len(blob) == size for blob in blobs):
            # samples that came one by one: each is a row of the table whose columns are wanted
            table = np.frombuffer(b"".join([blob[HEAD.size :] for blob in blobs]), "<f8").reshape(-1, width)
            return _finish(bits, len(blobs), [np.ascontiguousarray(table.T).tobytes()], {})
    return pack(join([unpack(blob, names) for blob in blobs], names), names)
