"""The writer: takes requests off a bounded queue, commits many at a time, and answers each when its samples are on disk.

What is accepted `monitor.store.staging` decides. When a commit fails (disk full, I/O error) every request in it is refused,
what was staged in memory is dropped, and the next commit starts from what is on disk. A request that breaks the staging
itself is answered alone, and the others are staged anew without it. Nobody who asked is left without an answer.
"""

import contextlib
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import TypeVar

from monitor.store.columns import Damaged
from monitor.store.facts import RunFacts
from monitor.store.known import Known
from monitor.store.staging import Ask, Group, Refused, Taken
from monitor.store.store import Store
from monitor.store.tables import Judged, Merge
from monitor.wire import Request

__all__ = ["Ingest", "Refused", "Taken"]

GROUP_SAMPLES = 20_000
"""Samples after which a group is committed though more requests wait."""
GROUP_REQUESTS = 512
QUEUE_SAMPLES = 200_000
"""Samples that may wait for the writer; a request beyond is told to come back (429)."""
QUEUE_REQUESTS = 4096
MOST_BROKEN = 8
"""Requests of a group that may break its staging, each at the price of staging the rest anew; then the rest is to come back."""

T = TypeVar("T")


class Ingest:
    """Start it with `start`, hand it requests with `submit`, end it with `stop`: what was accepted is then on disk.

    committed  called after each commit that took something, in the writer's thread, with the newest ordinal on disk
    clock      seconds since the epoch
    """

    def __init__(
        self,
        store: Store,
        *,
        committed: Callable[[int], None] = lambda ord: None,
        observe: Callable[[float, int], None] = lambda seconds, samples: None,
        clock: Callable[[], float] = time.time,
        max_runs: int = 100_000,
    ):
        self.store = store
        self.committed = committed
        self.observe = observe
        self.clock = clock
        self.max_runs = max_runs
        self.known = Known(store)
        self.failing: str | None = None
        """Why the last commit failed; None once one has gone through."""
        self._queue: queue.SimpleQueue[Ask | tuple[Merge, Future[bool]] | None] = queue.SimpleQueue()
        self._waiting = [0, 0]
        self._gate = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="losscast-writer", daemon=True)
        self._stopped = False

    @property
    def runs(self) -> dict[str, RunFacts]:
        """The store's runs by name. The writer changes them; others look."""
        return self.known.runs

    def start(self) -> None:
        """Begin to take requests."""
        self._thread.start()

    def stop(self) -> None:
        """Commit what waits, then end."""
        with self._gate:
            self._stopped = True
        self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def submit(
        self,
        request: Request,
        owner: str = "",
        may: Callable[[str], bool] | None = None,
        quota: int | None = None,
    ) -> Future[Taken]:
        """Queue a request. The future holds what became of it, or Refused.

        owner, quota  the token it came with, and how many runs that token may register
        may           whether it may write to a run
        """
        done: Future[Taken] = Future()
        with self._gate:
            if self._stopped:
                raise Refused(503, "stopping", "the monitor is stopping; send it again")
            if self._waiting[0] and (
                self._waiting[0] + request.samples > QUEUE_SAMPLES or self._waiting[1] >= QUEUE_REQUESTS
            ):
                raise Refused(
                    429, "busy", "too much is waiting to be written; send it again later", retry_after=1
                )
            self._waiting[0] += request.samples + len(request.parts)
            self._waiting[1] += 1
            self._queue.put(Ask(request, owner, may, quota, done))
        return done

    def submit_judged(self, judged: list[Judged]) -> Future[Taken]:
        """Queue what the judge made of runs; committed together with whatever else is being written."""
        done: Future[Taken] = Future()
        self._queue.put(Ask(None, "", None, None, done, judged))
        return done

    def remove(self, names: list[str]) -> Future[Taken]:
        """Queue the removal of runs with all that is kept of them. Those being written to stay."""
        done: Future[Taken] = Future()
        self._queue.put(Ask(None, "", None, None, done, remove=names))
        return done

    def merge(self, merge: Merge) -> Future[bool]:
        """Queue a merge, which changes nothing that can be asked for. False when what it is for has changed."""
        done: Future[bool] = Future()
        self._queue.put((merge, done))
        return done

    # the writer's thread

    def _work(self) -> None:
        while True:
            first = self._queue.get()
            if first is None:
                return
            if isinstance(first, tuple):
                self._merge(*first)
                continue
            merges: list[tuple[Merge, Future[bool]]] = []
            group, samples, last = [first], first.request.samples if first.request else 0, False
            while samples < GROUP_SAMPLES and len(group) < GROUP_REQUESTS:
                try:
                    ask = self._queue.get_nowait()
                except queue.Empty:
                    break
                if ask is None:
                    last = True
                    break
                if isinstance(ask, tuple):
                    merges.append(ask)
                    continue
                group.append(ask)
                samples += ask.request.samples if ask.request else 0
            self._take(group)
            for merge in merges:
                self._merge(*merge)
            if last:
                return

    def _merge(self, merge: Merge, done: Future[bool]) -> None:
        try:
            found = self.store.merge(merge)
        except Exception as error:  # nothing is lost by it: the rows stay as small as they are
            _refuse(done, error)
        else:
            _answer(done, found)

    def _take(self, group: list[Ask]) -> None:
        started = time.perf_counter()
        with self._gate:  # all of them wait no longer, whatever becomes of each
            for ask in group:
                if ask.request is not None:
                    self._waiting[0] -= ask.request.samples + len(ask.request.parts)
                    self._waiting[1] -= 1
        staged, taken = self._stage(group)
        try:
            staged.commit()
        except Exception as error:
            staged.forget()
            self._fail(taken, error)
            return
        if taken:
            self.failing = None
        for ask in taken:
            _answer(ask.done, Taken(ask.accepted, ask.duplicates, ask.request.unknown if ask.request else 0))
        if staged.chunks or staged.events:
            self.committed(staged.ord - 1)
            self.observe(time.perf_counter() - started, sum(ask.accepted for ask in taken))

    def _stage(self, group: list[Ask]) -> tuple[Group, list[Ask]]:
        """What can be committed of a group, and whose it is. All others are answered."""
        left, trouble = group, Exception()
        for _ in range(MOST_BROKEN):
            staged = Group(self.known, self.clock(), self.max_runs)
            taken: list[Ask] = []
            for at, ask in enumerate(left):
                try:
                    staged.add(ask)
                except Refused as refused:
                    _refuse(ask.done, refused)
                except Exception as error:  # the writer must outlive whatever a request does to it
                    left = [*taken, *left[at + 1 :]]
                    trouble = error
                    break
                else:
                    taken.append(ask)
            else:
                return staged, taken
            # half of the request may be staged: it goes back, and with it what the others had staged
            whole = staged.forget()
            if isinstance(trouble, (sqlite3.Error, Damaged, OSError, MemoryError)):
                self._fail([ask], trouble)
            else:  # it would break the next one as well: it is not to come back
                kind = type(trouble).__name__
                _refuse(ask.done, Refused(422, "invalid", f"it can't be taken: {kind}: {str(trouble)[:200]}"))
            if not whole:
                break
        self._fail(left, trouble)
        return Group(self.known, self.clock(), self.max_runs), []

    def _fail(self, asks: list[Ask], error: Exception) -> None:
        text = str(error)
        full = "full" in text or getattr(error, "errno", None) == 28
        self.failing = text
        status, reason = (507, "disk_full") if full else (503, "store")
        for ask in asks:
            _refuse(ask.done, Refused(status, reason, f"nothing was stored: {text}", retry_after=5))


def _answer(done: Future[T] | None, found: T) -> None:
    """Say what became of it to whoever still waits: a sender that hung up has cancelled its future."""
    if done is not None:
        with contextlib.suppress(InvalidStateError):
            done.set_result(found)


def _refuse(done: Future[T] | None, error: Exception) -> None:
    if done is not None:
        with contextlib.suppress(InvalidStateError):
            done.set_exception(error)
