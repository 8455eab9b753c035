"""Thinned views of long runs, kept: a run of a million steps is read as a whole once, and then only what came since.

A kept view is a run's whole course up to a step by which all had been judged; what came after that step is read and put
behind it. It holds while the run has the same attempts and exactly as many samples more as were found after the step (a sample
that came late, or again, shows by the count), for KEPT_S at most: bytes that are damaged meanwhile are seen then.
"""

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from monitor.store.columns import Columns
from monitor.store.facts import RunFacts
from monitor.store.query import Reader
from monitor.store.reading import Found, find

KEPT_S = 300.0
MOST_VIEWS = 128
LEAST_SAMPLES = 20_000
"""A shorter run is read as quickly as it is looked up."""
LARGE_SAMPLES = 200_000
"""Runs longer than this are read one at a time: the samples of one are some 150 bytes each in memory while they are read."""

Parts = list[tuple[int, Columns]]


@dataclass(frozen=True, slots=True)
class View:
    """What was read of a run up to `upto`."""

    of: tuple[object, ...]
    """The run as it was: when it began, its attempts."""
    upto: int
    samples: int
    """Samples the run had, less those after `upto`."""
    total: int
    parts: Parts
    made_s: float


class Views:
    """Any thread."""

    def __init__(self, store: Reader, clock: Callable[[], float] = time.monotonic):
        self._store, self._clock = store, clock
        self._kept: OrderedDict[tuple[int, int], View] = OrderedDict()
        self._lock = threading.Lock()
        self._large = threading.Lock()

    def alone(self, facts: RunFacts) -> contextlib.AbstractContextManager[object]:
        """Held while a run's samples are read. A view that is kept needs none, and waits for nobody."""
        return self._large if facts.samples > LARGE_SAMPLES else contextlib.nullcontext()

    def whole(
        self, facts: RunFacts, pending: Sequence[tuple[int, Columns]], most: int
    ) -> tuple[int, bool, Parts]:
        """(samples there are, whether some are left out, about `most` of them) of a whole run. Raises Damaged."""
        key = facts.run_id, most
        with self._store.at_once():
            known = self._store.run(facts.run)
            view = None if known is None else self._fresh(key, known)
            if known is None or view is None or known.samples - view.samples > most // 4:
                return self._read(key, known or facts, pending, most)
            after = find(self._store, known, pending, first=view.upto + 1)
            count = sum(len(found.index) for found in after)
            if count != known.samples - view.samples:
                return self._read(key, known, pending, most)
        return view.total + count, True, view.parts + [(found.attempt, found.columns()) for found in after]

    def _fresh(self, key: tuple[int, int], facts: RunFacts) -> View | None:
        with self._lock:
            view = self._kept.get(key)
            if view is None or view.of != _of(facts) or self._clock() - view.made_s > KEPT_S:
                self._kept.pop(key, None)
                return None
            self._kept.move_to_end(key)
            return view

    def _read(
        self, key: tuple[int, int], facts: RunFacts, pending: Sequence[tuple[int, Columns]], most: int
    ) -> tuple[int, bool, Parts]:
        with self.alone(facts):
            total, fewer, parts = thinned(found := find(self._store, facts, pending), most)
            long = fewer and total >= LEAST_SAMPLES
            view = self._view(facts, found, total, parts) if long else None
        if view is not None:
            with self._lock:
                self._kept[key] = view
                while len(self._kept) > MOST_VIEWS:
                    self._kept.popitem(last=False)
        return total, fewer, parts

    def _view(self, facts: RunFacts, found: list[Found], total: int, parts: Parts) -> View | None:
        """What of it may be kept: up to the last sample that is shown and was judged."""
        number, last = parts[-1]
        judged = np.flatnonzero(np.isfinite(last.get("expected")))
        if not len(judged):
            return None
        step = last.get("step")
        upto = int(step[judged[-1]])
        steps = found[-1].pieces.column("step")[found[-1].index]
        after = int(np.count_nonzero(steps > upto))
        kept = [*parts[:-1], (number, last.take(slice(0, int(judged[-1]) + 1)))]
        return View(_of(facts), upto, facts.samples - after, total - after, kept, self._clock())


def thinned(found: list[Found], most: int) -> tuple[int, bool, Parts]:
    """(samples there are, whether some are left out, about `most` of them)."""
    total = sum(len(one.index) for one in found)
    if not 0 < most < total:
        return total, False, [(one.attempt, one.columns()) for one in found]
    return total, True, [(one.attempt, one.thinned(max(1, most * len(one.index) // total))) for one in found]


def _of(facts: RunFacts) -> tuple[object, ...]:
    return facts.created_received, *((a.attempt, a.resume_step) for a in facts.attempts)
