"""The judges at work: one `Run` each, fed what was committed, in the order of its ordinals.

A judge sees exactly what is in the store and nothing else: it is told only that there is more, and reads the store. So
it does not matter in which process it works (`monitor.judging.apart` gives it its own), nor when that one ends: a run goes on
from its persisted state, with whatever has a later ordinal, to the same verdicts.

One thread. Runs take turns, so that one that sends what it spooled for hours keeps no other's page waiting. With many
runs each is told of, advised and written less often; a verdict that changes is told and written at once.
"""

import contextlib
import sqlite3
import sys
import threading
import time
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from monitor.judge import Settings
from monitor.judging.feeding import Runs
from monitor.judging.run import Court, Run, fresh, restored
from monitor.store.columns import Damaged
from monitor.store.ingest import Refused, Taken
from monitor.store.store import Store
from monitor.store.tables import ChunkRow, EventRow, Judged

PERSIST_S = 15.0
"""A run whose verdict does not change is written this often; with more than 1,500 runs, 100 of them a second."""
PERSISTED_A_S = 100
PERSIST_SAMPLES = 20_000
ADVISE_S = 1.0
ADVISED_A_S = 500
TELL_S = 0.2
TOLD_A_S = 2000
SWEPT_A_S = 40_000
"""Runs a second that are asked whether they are due to be told of; one whose verdict changed does not wait for that."""
HELD_SAMPLES = 400_000
"""Samples that may wait in memory, packed; beyond, what waits is read from the store when its run's turn comes."""
TAIL_ROWS, TAIL_SAMPLES = 2000, 50_000
TURN_SAMPLES = 1000
"""Samples of one run that are judged before the next run has its turn."""
LOOK_S = 0.05
STOP_S = 5.0
"""What is not judged so long after it was told to end is judged by the next process."""
IDLE_S = 600.0
"""A judge that heard nothing for so long is put away."""
RETRY_S = 5.0
"""A run whose judge could not go on (a read that failed) is tried again so long after, though nothing new comes."""


@dataclass(slots=True)
class Later:
    """Whatever the store has of a run after its cursor."""

    received: float


class Judging:
    """Start it with `start`, say that more was committed with `notice`, end it with `stop`, before the writer ends."""

    def __init__(
        self,
        store: Store,
        write: Callable[[list[Judged]], "Future[Taken]"],
        *,
        settings: Settings | None = None,
        clock: Callable[[], float] = time.time,
        changed: Callable[[list[int]], None] = lambda run_ids: None,
    ):
        """
        write    commits what the judges say (`Ingest.submit_judged`)
        changed  called with the ids of runs that have a new verdict, which is in `last`
        """
        self.store = store
        self.last: dict[int, dict[str, Any]] = {}
        """The newest verdict of each run: replaced, never changed in place."""
        self._trouble: str | None = None
        self._broken: dict[int, str] = {}
        """Runs that can't be judged now, and why."""
        self._write, self._clock, self._changed = write, clock, changed
        self._court = Court(store, settings or Settings(), Runs(store))
        self._judges: dict[int, Run] = {}
        self._todo: OrderedDict[int, deque[ChunkRow | EventRow | Later]] = OrderedDict()
        """What waits of each run, in order; a plain dict is slow to say which is its first."""
        self._waiting = 0
        self._tailed = store.newest_ord()
        self._noticed = 0
        self._wake = threading.Event()
        self._ending_s: float | None = None
        self._swept_s = self._written_s = 0.0
        self._unsaid: set[int] = set()
        self._urgent: set[int] = set()
        self._fresh: list[int] = []
        self._gone: list[list[int]] = []
        self._again: dict[int, float] = {}
        """Runs whose judge failed, and when to try them again."""
        self._thread = threading.Thread(target=self._work, name="losscast-judge", daemon=True)
        cursors = store.lasts()
        for facts in store.runs():
            cursor, last = cursors.get(facts.run_id, (0, {}))
            if last:
                self.last[facts.run_id] = last
            self._court.runs.newest[facts.run_id] = facts.last_ord
            if facts.last_ord > cursor:
                self._todo[facts.run_id] = deque([Later(facts.last_received)])

    @property
    def failing(self) -> str | None:
        """Why something can't be judged or written; None while all is well."""
        return self._trouble or next(iter(self._broken.values()), None)

    def start(self) -> None:
        """Judge what the last process left unjudged, then what comes."""
        self._thread.start()

    def stop(self) -> None:
        """Judge what waits, for STOP_S at most, write everything, end."""
        self._ending_s = time.monotonic() + STOP_S
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def notice(self, ord: int) -> None:
        """Everything up to this ordinal is in the store. Never waits."""
        self._noticed = ord
        self._wake.set()

    def forget(self, run_ids: list[int]) -> None:
        """These runs are no more."""
        self._gone.append(run_ids)
        self._wake.set()

    def lag_s(self) -> float:
        """For how long the oldest sample that is not judged has been on disk. Any thread."""
        if self._noticed <= self._tailed and not self._todo:
            return 0.0
        with contextlib.suppress(
            RuntimeError, IndexError, ValueError
        ):  # they change while they are looked at
            oldest = min(waiting[0].received for waiting in list(self._todo.values()))
            return max(0.0, self._clock() - oldest)
        return 0.0

    def pending_bands(self, run_id: int) -> "list[tuple[int, array[float]]]":
        """Attempt and what was expected of samples whose bands are not in the store yet. Any thread."""
        run = self._judges.get(run_id)
        return [] if run is None else [(attempt, flat[:]) for attempt, _, flat in run.bands[:]]

    # the judge's thread

    def _work(self) -> None:
        while self._ending_s is None or (
            (self._todo or self._noticed > self._tailed) and time.monotonic() < self._ending_s
        ):
            self._collect()
            until = time.monotonic() + LOOK_S
            while self._todo and time.monotonic() < until:
                self._turn(next(iter(self._todo)))
            now = time.monotonic()
            for run_id, due_s in list(self._again.items()):
                if now >= due_s:
                    del self._again[run_id]
                    self._todo.setdefault(run_id, deque()).appendleft(Later(self._clock()))
            self._speak(now)
            self._persist(now)
        self._speak(time.monotonic(), every=True)
        self._persist(time.monotonic(), every=True)

    def _collect(self) -> None:
        """Sort what was committed by run. Waits for something when there is nothing to do."""
        if not self._todo and self._noticed <= self._tailed and self._ending_s is None:
            self._wake.wait(LOOK_S if self._unsaid or self._urgent or self._again else 0.5)
        self._wake.clear()
        while self._gone:
            self._drop(self._gone.pop())
        if self._noticed <= self._tailed:
            return
        try:
            rows: list[ChunkRow | EventRow | tuple[int, int, float]] = []
            if self._waiting <= HELD_SAMPLES:
                with contextlib.suppress(Damaged):  # the run it belongs to is told so when its turn comes
                    rows = list(self.store.tail(self._tailed, TAIL_ROWS, TAIL_SAMPLES))
            if not rows:
                rows = list(self.store.heads(self._tailed, 10 * TAIL_ROWS))
        except (Damaged, sqlite3.Error, OSError) as error:
            self._trouble = str(error)
            time.sleep(0.2)
            return
        newest = self._court.runs.newest
        for row in rows:
            if isinstance(row, (ChunkRow, EventRow)):
                ord, run_id = row.ord, row.run_id
                if run_id not in newest:  # its first row: nothing is there to catch up with
                    self._judges[run_id] = self._begun(fresh(self._court, run_id))
                self._todo.setdefault(run_id, deque()).append(row)
                if isinstance(row, ChunkRow):
                    self._waiting += row.n
            else:
                ord, run_id, received = row
                waiting = self._todo.setdefault(run_id, deque())
                if not waiting or not isinstance(waiting[-1], Later):
                    waiting.append(Later(received))
            newest[run_id] = ord
            self._tailed = ord
        if not rows:
            self._tailed = max(self._tailed, self._noticed)

    def _turn(self, run_id: int) -> None:
        """Judge some of what waits of a run, then put the run behind the others."""
        waiting, judged = self._todo[run_id], 0
        while waiting and judged < TURN_SAMPLES:
            row = waiting[0]
            if isinstance(row, Later):
                more, count = self._guarded(run_id, row)
                judged += count
                if more:
                    break
            else:
                self._guarded(run_id, row)
                if isinstance(row, ChunkRow):
                    judged += row.n
                    self._waiting -= row.n
            waiting.popleft()
        del self._todo[run_id]
        if waiting:
            self._todo[run_id] = waiting
        run = self._judges.get(run_id)
        if run is not None:
            run.told = False
            self._unsaid.add(run_id)
            if run.urgent:
                self._urgent.add(run_id)

    def _guarded(self, run_id: int, row: ChunkRow | EventRow | Later) -> tuple[bool, int]:
        """Judge one row: whether more of it is left, and how many samples were read back for it.

        What one run does to its judge must not silence the others.
        """
        try:
            run = self._judges.get(run_id)
            if run is None:
                run = self._judges[run_id] = self._load(run_id)
                if not isinstance(row, Later):
                    self._catch_up(run, row.ord)
            if isinstance(row, Later):
                answer = self._catch_up(run, None, TURN_SAMPLES, row)
            else:
                if row.ord > run.cursor:
                    run.feed(self._court, row)
                answer = False, 0
            self._again.pop(run_id, None)
            self._broken.pop(run_id, None)
            return answer
        except Exception as error:
            self._judges.pop(run_id, None)
            self._again[run_id] = time.monotonic() + RETRY_S
            self._broken[run_id] = f"run id {run_id}: {error!r}"[:300]
            self.last[run_id] = {**self.last.get(run_id, {}), "trouble": self._broken[run_id]}
            self._fresh.append(run_id)
            return False, 0

    def _load(self, run_id: int) -> Run:
        run = None
        try:
            found = self.store.judged(run_id)
            if found is not None:
                run = restored(self._court, run_id, *found, self.last.get(run_id, {}))
        except (Damaged, ValueError, KeyError, TypeError) as error:
            self._trouble = f"run id {run_id} is judged again from its first sample: {error}"
            print(f"losscast: {self._trouble}", file=sys.stderr, flush=True)
        return self._begun(run or fresh(self._court, run_id))

    def _begun(self, run: Run) -> Run:
        run.written_s = run.heard_s = time.monotonic()
        return run

    def _catch_up(
        self, run: Run, until: int | None, most: float = float("inf"), later: Later | None = None
    ) -> tuple[bool, int]:
        """Feed what is in the store after the cursor, up to and with `until`.

        Whether more is there, and how many samples were fed: about `most`, then it is somebody else's turn.
        """
        last, fed = 2**62 if until is None else until, 0
        while True:
            chunks, cut = self._next_chunks(run, TURN_SAMPLES)
            horizon = chunks[-1].ord if cut else last
            events = self.store.events(run.run_id, after=run.cursor, last=min(horizon, last))
            parts: list[ChunkRow | EventRow] = sorted([*chunks, *events], key=lambda part: part.ord)
            for part in parts:
                if part.ord > last:
                    return False, fed
                if fed >= most:
                    return True, fed
                run.feed(self._court, part)
                if later is not None:
                    later.received = part.received
                if isinstance(part, ChunkRow):
                    fed += part.n
                if run.pending >= PERSIST_SAMPLES:
                    self._tell(run, time.monotonic())
                    self._commit([run])
            if not cut:
                return False, fed

    def _next_chunks(self, run: Run, samples: int) -> tuple[list[ChunkRow], bool]:
        """Chunks after the cursor with about so many samples, and whether there may be more."""
        chunks: list[ChunkRow] = []
        for chunk in self.store.chunks(run.run_id, after=run.cursor):
            chunks.append(chunk)
            samples -= chunk.n
            if samples <= 0:
                return chunks, True
        return chunks, False

    def _drop(self, run_ids: list[int]) -> None:
        for run_id in run_ids:
            self._judges.pop(run_id, None)
            self._again.pop(run_id, None)
            self._broken.pop(run_id, None)
            self.last.pop(run_id, None)
            self._todo.pop(run_id, None)
        self._court.runs.forget(set(run_ids))

    # what was said

    def _speak(self, now: float, every: bool = False) -> None:
        """Make the newest verdicts known, those that changed at once."""
        for run_id in self._urgent:
            run = self._judges.get(run_id)
            if run is not None and run.urgent:
                self._tell(run, now)
        if every or now - self._swept_s >= len(self._judges) / SWEPT_A_S:
            self._swept_s = now
            tell_s = max(TELL_S, len(self._judges) / TOLD_A_S)
            advise_s = self._advise_s()
            for run_id in list(self._unsaid):
                run = self._judges.get(run_id)
                if run is None:
                    self._unsaid.discard(run_id)
                elif every or now - run.told_s >= (advise_s if run.told else tell_s):
                    self._tell(run, now)
        if self._fresh:
            told, self._fresh = list(dict.fromkeys(self._fresh)), []
            self._changed(told)

    def _tell(self, run: Run, now: float) -> None:
        run.heard_s = run.told_s = now
        if run.urgent or now - run.advised_s >= self._advise_s():
            run.advised_s = now
            run.advise()
            self._unsaid.discard(run.run_id)
        if run.unheard:
            run.hold(self._clock())
        self.last[run.run_id] = run.tell()
        run.told = True
        self._fresh.append(run.run_id)

    def _advise_s(self) -> float:
        return max(ADVISE_S, len(self._judges) / ADVISED_A_S)

    def _persist(self, now: float, every: bool = False) -> None:
        """Write what is due, many runs in one commit; what could not be written is kept and tried again."""
        due: list[Run] = []
        if every or now - self._written_s >= 0.5:
            self._written_s = now
            persist_s = max(PERSIST_S, len(self._judges) / PERSISTED_A_S)
            for run in self._judges.values():
                if run.dirty and (
                    every or run.urgent or now - run.written_s >= persist_s or run.pending >= PERSIST_SAMPLES
                ):
                    due.append(run)
        else:
            due = [run for id in self._urgent if (run := self._judges.get(id)) is not None and run.urgent]
        self._urgent.clear()
        for start in range(0, len(due), 500):
            self._commit(due[start : start + 500])
        if len(self._judges) > 64 and self._written_s == now:
            for run_id in [
                k for k, run in self._judges.items() if not run.dirty and now - run.heard_s > IDLE_S
            ]:
                del self._judges[run_id]

    def _commit(self, runs: list[Run]) -> None:
        try:
            self._write([run.to_write() for run in runs]).result()
        except (Refused, sqlite3.Error, OSError) as error:
            self._trouble = str(error)
            now = time.monotonic()
            for run in runs:
                run.written_s, run.urgent = now - PERSIST_S + 2.0, False
            return
        self._trouble = None
        now = time.monotonic()
        for run in runs:
            run.written(now)
