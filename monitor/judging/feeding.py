"""From what the store keeps to what a judge takes: rows of a chunk, and the samples of a control run."""

import functools
import math
import operator
import struct
import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

from monitor.store.columns import COLUMNS, HEAD, MISSING_BITS, Columns, Damaged, missing, unpack
from monitor.store.store import Store
from monitor.verdict import Sample

Row = tuple[int, int, float, float | None, float | None, float | None, float | None, float | None, float | None,
            float | None]  # fmt: skip
"""seq, step, loss, tokens, time, val_loss, lr, grad_norm, tokens_per_s, spread"""

ORDER = ("seq", "step", "loss", "tokens", "time", "val_loss", "lr", "grad_norm", "tokens_per_s", "spread")
SMALL = 8
"""Samples up to which a chunk is read without numpy, whose calls cost more than the numbers."""
LOOK_AGAIN_S = 1.0

_PLACES = tuple(COLUMNS.index(name) for name in ORDER)


def rows_of_blob(blob: bytes) -> list[Row]:
    """The samples of a packed chunk as the judge takes them, missing values as None. Raises Damaged."""
    if len(blob) >= HEAD.size:
        _, bits, n, _ = HEAD.unpack_from(blob)
        if 0 < n <= SMALL and len(blob) >= HEAD.size + bits.bit_count() * 8 * n:
            return _few(blob, bits, n)
    return list(rows_of(unpack(blob)))


@functools.lru_cache(maxsize=256)
def _layout(bits: int, n: int) -> tuple[struct.Struct, struct.Struct, list["operator.itemgetter[Any]"]]:
    """How a chunk of these columns and so many rows is read: its numbers, their bits, and what takes each row out of the numbers
    with None behind them."""
    have = [i for i in range(len(COLUMNS)) if bits >> i & 1]
    starts = {i: n * k for k, i in enumerate(have)}
    none = len(have) * n
    rows = [operator.itemgetter(*(starts[i] + k if i in starts else none for i in _PLACES)) for k in range(n)]
    return struct.Struct(f"<{none}d"), struct.Struct(f"<{none}Q"), rows


def _few(blob: bytes, bits: int, n: int) -> list[Row]:
    numbers, as_bits, rows = _layout(bits, n)
    found: tuple[float, ...] = numbers.unpack_from(blob, HEAD.size)
    values: Sequence[float | None] = found
    if math.isnan(sum(found)):  # one of them is no number: missing, or reported so
        there = as_bits.unpack_from(blob, HEAD.size)
        values = [None if of == MISSING_BITS else v for v, of in zip(found, there, strict=True)]
    out: list[Row] = []
    for row in rows:
        seq, step, *rest = row((*values, None))
        out.append(cast(Row, (int(seq), int(step), *rest)))
    return out


def rows_of(columns: Columns) -> Iterator[Row]:
    """The samples of a chunk as the judge takes them, missing values as None."""

    def column(name: str) -> list[Any]:
        found = columns.of.get(name)
        if found is None:
            return [None] * columns.n
        values = found.tolist()
        absent = missing(found)
        if absent.any():
            return [None if gone else v for v, gone in zip(values, absent.tolist(), strict=True)]
        return values

    seqs, steps = columns.get("seq").astype("int64").tolist(), columns.get("step").astype("int64").tolist()
    yield from zip(seqs, steps, *(column(name) for name in ORDER[2:]), strict=True)


class Runs:
    """Runs by name as the store has them, and how far each has come, as the judge has seen it."""

    def __init__(self, store: Store):
        self.newest: dict[int, int] = {}
        """The newest ordinal of each run id."""
        self._store = store
        self._ids: dict[str, int] = {}
        self._asked: dict[str, float] = {}

    def id_of(self, name: str) -> int | None:
        """The run's id; one that is not there is looked for again after a second."""
        found = self._ids.get(name)
        if found is None:
            now = time.monotonic()
            if now - self._asked.get(name, -LOOK_AGAIN_S) >= LOOK_AGAIN_S:
                self._asked[name] = now
                facts = self._store.run(name)
                if facts is not None:
                    found = self._ids[name] = facts.run_id
        return found

    def forget(self, run_ids: set[int]) -> None:
        """These are no more."""
        for run_id in run_ids:
            self.newest.pop(run_id, None)
        self._ids = {name: run_id for name, run_id in self._ids.items() if run_id not in run_ids}


class ControlFeed:
    """The samples of another run on the same data order, handed out in step order as far as ours has come."""

    def __init__(self, store: Store, runs: Runs, name: str, at: list[int] | None):
        self.at = list(at) if at else [0, -1]
        """Ordinal of the chunk in hand, and the last step handed out."""
        self._store, self._runs, self._name = store, runs, name
        self._held: list[Sample] = []
        self._next_ord = max(self.at[0] - 1, 0)

    def until(self, step: int, tokens: float | None) -> Iterator[Sample]:
        """Samples up to our step, or up to our tokens where both carry them."""
        while True:
            if not self._held and not self._more():
                return
            other = self._held[0]
            by_tokens = tokens is not None and other.tokens is not None
            if (other.tokens > tokens) if by_tokens else (other.step > step):  # type: ignore[operator]
                return
            del self._held[0]
            self.at[1] = other.step
            yield other

    def _more(self) -> bool:
        while not self._held:
            run_id = self._runs.id_of(self._name)
            if run_id is None or self._runs.newest.get(run_id, 0) <= self._next_ord:
                return False
            try:
                chunk = next(self._store.chunks(run_id, after=self._next_ord), None)
            except Damaged:
                return False
            if chunk is None:
                self._next_ord = self._runs.newest[run_id]
                return False
            self._next_ord = self.at[0] = chunk.ord
            rows = sorted(rows_of_blob(chunk.body), key=_step)
            self._held = [
                Sample(row[1], row[2], tokens=row[3], time=row[4]) for row in rows if row[1] > self.at[1]
            ]
        return True


def _step(row: Row) -> int:
    return row[1]
