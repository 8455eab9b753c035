"""Small chunks put together: a run that reports every second is read in some hundred pieces, not in a million.

Only what the judge is done with is touched, and only neighbours of one attempt with no event of the run between them, so
that a run judged again from its first sample sees the same samples and events in the same order. The new row has the
ordinal of the last it stands for and keeps that of the first; what was expected of the samples is put together the same way.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from itertools import chain
from typing import TypeVar, cast

from monitor.store.columns import BAND, join_packed
from monitor.store.facts import RunFacts
from monitor.store.store import Store
from monitor.store.tables import BandRow, ChunkRow, Merge

MOST, LEAST = 4096, 1024
"""Samples of a row that was put together; fewer than LEAST are left waiting for more, but where nothing can follow."""
ROWS = 20_000
"""Rows looked at in one go."""
PORTION_BYTES = 2 << 20
"""Of what is put together in one commit: every sender waits for it."""
Row = TypeVar("Row")


class Merger:
    """Goes over the runs now and then. One thread; `write` hands a merge to the writer."""

    def __init__(self, store: Store, write: Callable[[Merge], "Future[bool]"]):
        self._store, self._write = store, write
        self._looked: dict[int, tuple[int, int]] = {}
        """Of each run: its newest ordinal and its samples when it was last looked at."""
        self._upto: dict[int, int] = {}
        """How far it was judged then: what was judged since may be judged again by a process that is started anew."""
        self._after: dict[int, tuple[int, int]] = {}
        """Ordinals up to which nothing more can be done to its chunks and bands."""

    def run(self, facts: RunFacts) -> bool:
        """Put together what can be. Whether there is more to do at once. Raises Damaged, Refused, sqlite3.Error, OSError."""
        id, ended = facts.run_id, facts.phase == "ended"
        seen = self._looked.get(id, (0, -LEAST))
        if facts.samples - seen[1] < LEAST and not (ended and facts.last_ord > seen[0]):
            return False
        upto, self._upto[id] = self._upto.get(id, 0), self._store.judged_to(id)
        if not upto:
            return False
        last_ord, samples = facts.last_ord, facts.samples
        after = self._after.get(id, (0, 0))
        with self._store.at_once():
            chunks = self._store.small_chunks(id, after[0], upto, LEAST, ROWS)
            events = [event.ord for event in self._store.events(id)] if chunks else []
            bands = self._store.small_bands(id, after[1], upto, LEAST * 8 * len(BAND), ROWS)
        whole = ended and upto >= last_ord

        def one_attempt(a: ChunkRow, b: ChunkRow) -> bool:
            neighbours = a.attempt == b.attempt and a.before + a.n == b.before
            return neighbours and bisect_left(events, a.ord) == bisect_left(events, b.ord)

        chunk_groups = closed(chunks, one_attempt, lambda c: c.n, whole)
        band_groups = closed(
            bands, lambda a, b: a.attempt == b.attempt and b.prev == a.ord, _band_size, whole
        )
        for merge in _portions(id, chunk_groups, band_groups):
            self._write(merge).result(60)
        self._after[id] = (
            chunk_groups[-1][-1].ord if chunk_groups else after[0],
            band_groups[-1][-1].ord if band_groups else after[1],
        )
        if len(chunks) == ROWS or len(bands) == ROWS:
            self._upto[id] = upto
            return True
        if whole or not ended:
            self._looked[id] = last_ord, samples
        return False

    def forget(self, run_ids: Iterable[int]) -> None:
        """These runs are no more."""
        for run_id in run_ids:
            self._looked.pop(run_id, None)
            self._upto.pop(run_id, None)
            self._after.pop(run_id, None)


def closed(
    rows: list[Row], follows: Callable[[Row, Row], bool], size: Callable[[Row], int], whole: bool
) -> list[list[Row]]:
    """Neighbours in groups of about LEAST to MOST samples; the last group only if no more can come, or it is large enough."""
    groups: list[list[Row]] = []
    current: list[Row] = []
    total = 0
    for row in rows:
        if current and (total + size(row) > MOST or not follows(current[-1], row)):
            groups.append(current)
            current, total = [], 0
        current.append(row)
        total += size(row)
    if current and (whole or total >= LEAST):
        groups.append(current)
    return groups


def _portions(id: int, chunks: list[list[ChunkRow]], bands: list[list[BandRow]]) -> Iterator[Merge]:
    """Merges of the groups that have more than one row, each small enough that what is sent meanwhile does not wait long."""
    merge, size = Merge(id), 0
    for group in chain(chunks, bands):
        if len(group) > 1:
            size += _put(merge, group)
        if size >= PORTION_BYTES:
            yield merge
            merge, size = Merge(id), 0
    if merge.chunks or merge.bands:
        yield merge


def _put(merge: Merge, group: list[ChunkRow] | list[BandRow]) -> int:
    """Have a merge put this group together. Bytes of what that makes."""
    if isinstance(group[0], ChunkRow):
        chunks = cast(list[ChunkRow], group)
        merge.old_chunks += chunks
        merge.chunks.append(_chunk(chunks))
        return len(merge.chunks[-1].body)
    bands = cast(list[BandRow], group)
    merge.old_bands += bands
    merge.bands.append(_band(bands))
    return len(merge.bands[-1].body)


def _band_size(band: BandRow) -> int:
    return len(band.body) // (8 * len(BAND))


def _chunk(group: list[ChunkRow]) -> ChunkRow:
    first, last = group[0], group[-1]
    return ChunkRow(
        last.ord, last.run_id, last.attempt, sum(c.n for c in group), first.before, first.first_ord,
        min(c.first_seq for c in group), max(c.last_seq for c in group),
        min(c.first_step for c in group), max(c.last_step for c in group), last.received,
        join_packed([c.body for c in group]),
    )  # fmt: skip


def _band(group: list[BandRow]) -> BandRow:
    body = join_packed([band.body for band in group], BAND)
    return replace(group[-1], prev=group[0].prev, body=body)
