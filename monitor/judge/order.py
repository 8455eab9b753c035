"""Rows that arrive out of order, put back into order before they are judged, without delaying those that are not.

A row is a tuple that begins (seq, step, loss); the rest is the caller's. `seq` counts an attempt's samples from 0, so the
next one is known and handed on at once. One that comes too early waits for those between, for as many arrivals as
`patience` says; waiting in vain halves the patience, since a spool that was thinned has nothing to wait for, and one
that comes late after all restores it. A non-finite loss waits for nothing: it is to be called at its own arrival. A
new attempt ends the waiting for the old one's.
"""

import math
from collections.abc import Sequence
from typing import Any

from monitor.schema import SPELLED, spell

WINDOW = 16
"""Arrivals that a row out of order waits at most."""

Row = tuple[Any, ...]


class Order:
    """Bounded memory: at most WINDOW rows wait."""

    def __init__(self) -> None:
        self.waiting: list[tuple[int, Row]] = []
        """(arrival at which it came, row), in order of seq."""
        self.last = -1
        self.attempt = 0
        self.patience = WINDOW
        self.arrivals = 0

    def ready(self, attempt: int, rows: Sequence[Row]) -> Sequence[Row]:
        """The rows that can be judged now, in order; a late or repeated one among them is the judge's to ignore."""
        if attempt < self.attempt or not rows:
            return rows
        if attempt > self.attempt:
            self.attempt, self.last, self.waiting = attempt, -1, []
        if not self.waiting and rows[0][0] == self.last + 1:
            first = rows[0][0]
            if all(row[0] == first + i for i, row in enumerate(rows)):
                self.last = first + len(rows) - 1
                return rows
        out: list[Row] = []
        for row in rows:
            self._arrive(row, out)
        return out

    def flush(self) -> list[Row]:
        """What waits, in order: the run has ended and nothing will come between."""
        out = [row for _, row in self.waiting]
        self.waiting = []
        self.last = max([self.last, *(row[0] for row in out)])
        return out

    def _arrive(self, row: Row, out: list[Row]) -> None:
        seq: int = row[0]
        self.arrivals += 1
        if seq <= self.last:
            self.patience = WINDOW
            out.append(row)
            return
        if seq == self.last + 1 or not math.isfinite(row[2]):
            self._pass(seq - 1, out)
            self.waiting = [entry for entry in self.waiting if entry[1][0] > seq]
            self.last = seq
            out.append(row)
        elif all(seq != held[0] for _, held in self.waiting):
            self.waiting.append((self.arrivals, row))
            self.waiting.sort(key=lambda entry: entry[1][0])
        while self.waiting:
            came, oldest = min(self.waiting, key=lambda entry: entry[0])
            if self.waiting[0][1][0] == self.last + 1:
                self._pass(self.last + 1, out)
            elif self.arrivals - came >= self.patience:
                self.patience //= 2
                self._pass(oldest[0], out)
            else:
                break

    def _pass(self, seq: int, out: list[Row]) -> None:
        """Hand on what waits up to and with `seq`."""
        while self.waiting and self.waiting[0][1][0] <= seq:
            _, row = self.waiting.pop(0)
            self.last = row[0]
            out.append(row)

    def state(self) -> list[Any]:
        numbers = [self.last, self.attempt, self.patience, self.arrivals]
        return [numbers, [[came, spell(list(row))] for came, row in self.waiting]]

    def load(self, state: Sequence[Any]) -> None:
        self.last, self.attempt, self.patience, self.arrivals = (int(value) for value in state[0])
        self.waiting = [
            (int(came), tuple(SPELLED.get(v, v) if isinstance(v, str) else v for v in row))
            for came, row in state[1]
        ]
