"""The writer: takes requests off a bounded queue, commits many at a time, and answers each when its samples are on disk.

The one place that decides what is accepted. Key of a sample is (run, attempt, seq): a repeated one is counted and
passed over. The newest attempt of a run is the one that is listened to; an older one is refused. A request is taken whole
or not at all. When a commit fails (disk full, I/O error) every request in it is refused, what was staged in memory is
dropped, and the next commit starts from what is on disk.
"""

import contextlib
import json
import math
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import islice
from operator import attrgetter, eq, lt
from typing import Any

from monitor.schema import MAX_COUNT, unspell
from monitor.store.columns import Damaged, pack_lines, unpack
from monitor.store.facts import AttemptFacts, RunFacts
from monitor.store.intervals import Intervals
from monitor.store.store import Store
from monitor.store.tables import ChunkRow, EventRow, Judged, Merge
from monitor.wire import Event, Request, SampleLine, Samples

GROUP_SAMPLES = 20_000
"""Samples after which a group is committed though more requests wait."""
GROUP_REQUESTS = 512
QUEUE_SAMPLES = 200_000
"""Samples that may wait for the writer; a request beyond is told to come back (429)."""
QUEUE_REQUESTS = 4096

_seq, _step, _loss = attrgetter("seq"), attrgetter("step"), attrgetter("loss")


class Refused(Exception):
    """A request that was not taken. `status` is HTTP's, `reason` one of a fixed set."""

    def __init__(self, status: int, reason: str, message: str, **detail: Any):
        super().__init__(message)
        self.status, self.reason, self.detail = status, reason, detail


@dataclass(frozen=True, slots=True)
class Taken:
    """What became of a request that was accepted."""

    accepted: int
    duplicates: int
    unknown: int


@dataclass(slots=True)
class _Ask:
    request: Request | None
    owner: str
    may: Callable[[str], bool] | None
    quota: int | None
    done: Future[Taken] | None
    judged: list[Judged] = field(default_factory=list)
    remove: list[str] = field(default_factory=list)
    accepted: int = 0
    duplicates: int = 0


@dataclass(slots=True)
class _Open:
    """Samples of one attempt gathered in this group, not yet a row."""

    facts: RunFacts
    attempt: AttemptFacts
    before: int
    lines: list[SampleLine] = field(default_factory=list)
    extra: dict[int, dict[str, Any]] = field(default_factory=dict)


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
        self.runs: dict[str, RunFacts] = {facts.run: facts for facts in store.runs()}
        self.next_ord = store.last_ord() + 1
        self.next_run_id = max((f.run_id for f in self.runs.values()), default=0) + 1
        self.owned: dict[str, int] = {}
        for facts in self.runs.values():
            self.owned[facts.owner] = self.owned.get(facts.owner, 0) + 1
        self.failing: str | None = None
        """Why the last commit failed; None once one has gone through."""
        self._gone: set[int] = set()
        """Ids of removed runs: what a judge still has to say of them is not kept."""
        self._seen: dict[tuple[int, int], Intervals] = {}
        self._queue: queue.SimpleQueue[_Ask | tuple[Merge, Future[bool]] | None] = queue.SimpleQueue()
        self._waiting = [0, 0]
        self._gate = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="losscast-writer", daemon=True)
        self._stopped = False

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
            self._queue.put(_Ask(request, owner, may, quota, done))
        return done

    def submit_judged(self, judged: list[Judged]) -> Future[Taken]:
        """Queue what the judge made of runs; committed together with whatever else is being written."""
        done: Future[Taken] = Future()
        self._queue.put(_Ask(None, "", None, None, done, judged))
        return done

    def remove(self, names: list[str]) -> Future[Taken]:
        """Queue the removal of runs with all that is kept of them. Those being written to stay."""
        done: Future[Taken] = Future()
        self._queue.put(_Ask(None, "", None, None, done, remove=names))
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
            done.set_result(self.store.merge(merge))
        except Exception as error:  # nothing is lost by it: the rows stay as small as they are
            done.set_exception(error)

    def _take(self, group: list[_Ask]) -> None:
        started = time.perf_counter()
        staged = _Group(self, self.clock())
        taken: list[_Ask] = []
        for ask in group:
            if ask.request is not None:
                with self._gate:
                    self._waiting[0] -= ask.request.samples + len(ask.request.parts)
                    self._waiting[1] -= 1
            try:
                if ask.request is not None:
                    staged.check(ask)
                    staged.take(ask)
                else:
                    staged.judged.extend(ask.judged)
                    staged.remove.extend(ask.remove)
                taken.append(ask)
            except Refused as refused:
                if ask.done:
                    ask.done.set_exception(refused)
            except Exception as error:  # the writer must outlive whatever a request does to it
                staged.forget()
                self._fail([*taken, ask], error)
                return
        try:
            staged.commit()
        except Exception as error:
            staged.forget()
            self._fail(taken, error)
            return
        self.failing = None
        for ask in taken:
            if ask.done:
                ask.done.set_result(
                    Taken(ask.accepted, ask.duplicates, ask.request.unknown if ask.request else 0)
                )
        if staged.chunks or staged.events:
            self.committed(staged.ord - 1)
            self.observe(time.perf_counter() - started, sum(ask.accepted for ask in taken))

    def _fail(self, asks: list[_Ask], error: Exception) -> None:
        text = str(error)
        full = "full" in text or getattr(error, "errno", None) == 28
        self.failing = text
        status, reason = (507, "disk_full") if full else (503, "store")
        for ask in asks:
            if ask.done and not ask.done.done():
                ask.done.set_exception(Refused(status, reason, f"nothing was stored: {text}", retry_after=5))

    def seen(self, facts: RunFacts, attempt: int) -> Intervals:
        """Sequence numbers of the attempt that were taken; read from the store the first time."""
        key = facts.run_id, attempt
        found = self._seen.get(key)
        if found is None:
            found, have = Intervals(), 0
            for ord, n, first, last in self.store.seqs(facts.run_id, attempt):
                have += n
                if last - first + 1 == n:
                    found.add(first, last)
                else:
                    for seq in unpack(self.store.chunk(ord).body, want=frozenset({"seq"})).of["seq"]:
                        found.add(int(seq), int(seq))
            committed = self.store.run(facts.run)
            known = None if committed is None else committed.attempt_facts(attempt)
            if (
                known is not None and have != known.samples
            ):  # what can't be found would be taken a second time
                raise Damaged(
                    f"{known.samples - have} samples of run {facts.run}, attempt {attempt}, can't be found; "
                    f"see `losscast monitor repair`"
                )
            for event in self.store.events(facts.run_id):
                if event.attempt == attempt and event.fields.get("seq") is not None:
                    found.add(event.fields["seq"], event.fields["seq"])
            self._seen[key] = found
        return found

    def forget_seen(self, run_ids: set[int]) -> None:
        """Which sequence numbers these runs have is read from the store when it is asked for again."""
        if run_ids:
            for key in [key for key in self._seen if key[0] in run_ids]:
                del self._seen[key]

    def reload(self, names: set[str], run_ids: set[int]) -> None:
        """Forget what memory holds of these runs and read it from the store again."""
        self.forget_seen(run_ids)
        for name in names:
            facts = self.store.run(name)
            if facts is None:
                gone = self.runs.pop(name, None)
                if gone is not None:
                    self.owned[gone.owner] -= 1
            else:
                self.runs[name] = facts


class _Group:
    """One commit in the making."""

    def __init__(self, ingest: Ingest, now: float):
        self.ingest = ingest
        self.now = now
        self.chunks: list[ChunkRow] = []
        self.events: list[EventRow] = []
        self.judged: list[Judged] = []
        self.remove: list[str] = []
        self.touched: dict[str, RunFacts] = {}
        self.added = 0
        self.open: dict[str, _Open] = {}
        self.digests: set[tuple[int, int, bytes]] = set()
        self.ord = ingest.next_ord

    def check(self, ask: _Ask) -> None:
        """Raise Refused when any part of the request can't be taken; changes nothing."""
        ingest = self.ingest
        newest: dict[str, int] = {}
        assert ask.request is not None
        for part in ask.request.parts:
            run = part.run
            if ask.may is not None and not ask.may(run):
                raise Refused(403, "scope", f"this token may not write to run {run}", run=run)
            if run not in newest:
                facts = ingest.runs.get(run)
                if facts is None:
                    fresh = len(newest.keys() - ingest.runs.keys()) + 1
                    if len(ingest.runs) + fresh > ingest.max_runs or (
                        ask.quota is not None and ingest.owned.get(ask.owner, 0) + fresh > ask.quota
                    ):
                        raise Refused(429, "quota", f"run {run}: too many runs registered with this token", run=run,
                                      retry_after=3600)  # fmt: skip
                newest[run] = -1 if facts is None or facts.attempt is None else facts.attempt
            if part.attempt < newest[run]:
                raise Refused(
                    409, "stale_attempt", f"run {run}: attempt {part.attempt} was superseded by attempt {newest[run]}",
                    run=run, attempt=newest[run],
                )  # fmt: skip
            newest[run] = part.attempt
            facts = ingest.runs.get(run)
            if facts is not None and isinstance(part, Samples):
                try:
                    ingest.seen(facts, part.attempt)
                except Damaged as error:  # of this run alone: the others' are taken
                    raise Refused(503, "store", f"run {run}: {error}", run=run, retry_after=60) from None

    def take(self, ask: _Ask) -> None:
        """Stage the request's parts."""
        assert ask.request is not None
        for part in ask.request.parts:
            facts = self._facts(part.run, ask.owner)
            attempt = facts.attempt_facts(part.attempt)
            if attempt is None:
                attempt = AttemptFacts(part.attempt)
                facts.attempts = [*facts.attempts[-999:], attempt]
                facts.ended_time = facts.ended_received = facts.end_reason = None
                if len(facts.attempts) > 1:
                    facts.restarts_since_step += 1
            if isinstance(part, Samples):
                self._samples(facts, attempt, part, ask)
            else:
                self._event(facts, attempt, part, ask)

    def _facts(self, run: str, owner: str) -> RunFacts:
        facts = self.touched.get(run)
        if facts is None:
            ingest = self.ingest
            facts = ingest.runs.get(run)
            if facts is None:
                facts = RunFacts(ingest.next_run_id, run, owner, created_received=self.now)
                ingest.next_run_id += 1
                self.added += 1
                ingest.owned[owner] = ingest.owned.get(owner, 0) + 1
                ingest.runs[run] = facts
            self.touched[run] = facts
        facts.last_received = self.now
        return facts

    def _samples(self, facts: RunFacts, attempt: AttemptFacts, part: Samples, ask: _Ask) -> None:
        seen = self.ingest.seen(facts, attempt.attempt)
        lines = part.lines
        first, count = lines[0].seq, len(lines)
        if first >= seen.next and lines[-1].seq - first + 1 == count and _in_order(lines):
            seen.add(first, first + count - 1)
        else:
            fresh = []
            for line in lines:
                if line.seq not in seen:
                    seen.add(line.seq, line.seq)
                    fresh.append(line)
            ask.duplicates += count - len(fresh)
            lines = fresh
            if not lines:
                return
        ask.accepted += len(lines)
        gathered = self.open.get(facts.run)
        if gathered is None or gathered.attempt is not attempt:
            self._flush(facts.run)
            gathered = self.open[facts.run] = _Open(facts, attempt, attempt.samples)
        gathered.lines.extend(lines)
        if part.extra:
            gathered.extra.update(part.extra)
        attempt.samples += len(lines)
        note_samples(facts, attempt, lines, self.now)

    def _event(self, facts: RunFacts, attempt: AttemptFacts, part: Event, ask: _Ask) -> None:
        key = facts.run_id, attempt.attempt, part.digest
        if part.seq is not None:
            seen = self.ingest.seen(facts, attempt.attempt)
            repeated = part.seq in seen
        else:
            repeated = part.kind != "heartbeat" and (
                key in self.digests or self.ingest.store.has_event(facts.run_id, attempt.attempt, part.digest)
            )
        if repeated:
            ask.duplicates += 1
            return
        ask.accepted += 1
        if part.seq is not None:
            self.ingest.seen(facts, attempt.attempt).add(part.seq, part.seq)
        if part.kind == "heartbeat" and part.seq is None:
            return
        self._flush(facts.run)
        self.digests.add(key)
        row = EventRow(
            self.ord, facts.run_id, attempt.attempt, facts.event_ord, part.kind, part.digest, self.now,
            json.dumps(part.body if part.kind != "heartbeat" else {"seq": part.seq}, separators=(",", ":")),
        )  # fmt: skip
        self.ord += 1
        self.events.append(row)
        facts.last_ord = facts.event_ord = row.ord
        note_event(facts, attempt, part, row)

    def _flush(self, run: str) -> None:
        """Make a row of the samples gathered for a run."""
        gathered = self.open.pop(run, None)
        if gathered is None:
            return
        lines = gathered.lines
        seqs, steps = list(map(_seq, lines)), list(map(_step, lines))
        row = ChunkRow(
            self.ord, gathered.facts.run_id, gathered.attempt.attempt, len(lines), gathered.before, self.ord,
            min(seqs), max(seqs), min(steps), max(steps), self.now, pack_lines(lines, gathered.extra),
        )  # fmt: skip
        self.ord += 1
        self.chunks.append(row)
        gathered.facts.last_ord = row.ord

    def commit(self) -> None:
        for run in list(self.open):
            self._flush(run)
        ingest = self.ingest
        gone = [ingest.runs[name] for name in self.remove if name in ingest.runs and name not in self.touched]
        ids = {facts.run_id for facts in gone}
        dead = ingest._gone | ids
        judged = [found for found in self.judged if found.run_id not in dead]
        if self.touched or judged or ids:
            ingest.store.write(
                self.chunks, self.events, list(self.touched.values()), judged, sorted(ids), self.added
            )
        ingest._gone = dead
        for facts in gone:
            del ingest.runs[facts.run]
            ingest.owned[facts.owner] -= 1
        ingest.forget_seen(ids)
        self.ingest.next_ord = self.ord

    def forget(self) -> None:
        """The commit failed: memory goes back to what is on disk."""
        # where not even reading works the counts stay as they are; the seqs were dropped and come from disk next time
        with contextlib.suppress(sqlite3.Error, Damaged, OSError, ValueError):
            self.ingest.reload(set(self.touched), {facts.run_id for facts in self.touched.values()})


def _in_order(lines: list[SampleLine]) -> bool:
    first = lines[0].seq
    return all(map(eq, map(_seq, lines), range(first, first + len(lines))))


def note_samples(facts: RunFacts, attempt: AttemptFacts, lines: list[SampleLine], now: float) -> None:
    """Bring what is known of a run up to date with samples that arrived at `now`."""
    if attempt.resume_step is None:
        attempt.resume_step = max(lines[0].step - 1, 0)
    facts.samples += len(lines)
    facts.last_step_received = now
    if not math.isfinite(sum(map(_loss, lines))):
        for line in lines:
            if math.isnan(line.loss):
                facts.nan_samples += 1
            elif math.isinf(line.loss):
                facts.inf_samples += 1
    last = lines[-1]
    if len(lines) > 1 and not all(map(lt, map(_step, lines), map(_step, islice(lines, 1, None)))):
        last = max(lines, key=_step)
    if attempt.last_step is None or last.step > attempt.last_step:
        attempt.last_step = last.step
    if facts.step is None or last.step > facts.step or attempt.samples == len(lines):
        if facts.step is None or last.step > facts.step:
            facts.restarts_since_step = 0
        facts.step = last.step
        facts.last_loss = last.loss
        finite = (
            last
            if math.isfinite(last.loss)
            else next((s for s in reversed(lines) if math.isfinite(s.loss)), None)
        )
        if finite is not None:
            facts.loss = finite.loss
        if last.tokens is not None:
            facts.tokens = last.tokens
        if last.tokens_per_s is not None:
            facts.tokens_per_s = last.tokens_per_s
        if last.mfu is not None:
            facts.mfu = last.mfu
    if last.time is not None and math.isfinite(last.time):
        facts.last_time = last.time
        facts.skew_s = last.time - now
    if facts.started_time is None:
        first = lines[0].time
        facts.started_time = first if first is not None and math.isfinite(first) else now
    if attempt.started_time is None:
        attempt.started_time = facts.last_time


def note_event(facts: RunFacts, attempt: AttemptFacts, part: Event, row: EventRow) -> None:
    """Bring what is known of a run up to date with an event."""
    body = part.body
    at = unspell(body.get("time"))
    if at is not None:
        facts.last_time = at
    if part.kind in ("goodput", "restart"):
        _note_goodput(facts, body)
    if part.kind == "run_started":
        if body.get("resume_step") is not None:
            attempt.resume_step = body["resume_step"]
        attempt.started_time = at if at is not None else row.received
        if facts.started_time is None:
            facts.started_time = attempt.started_time
        if isinstance(body.get("team"), str):
            facts.team = body["team"][:64]
        for name in ("target_loss", "total_tokens", "price_per_hour"):
            if body.get(name) is not None:
                setattr(facts, name, unspell(body[name]))
        # a pacer is a control: what becomes of it is shown, and pages nobody either
        facts.imported = body.get("imported") is True or isinstance(body.get("paces"), str)
        if isinstance(body.get("control"), str):
            facts.control = body["control"][:63]
        if body.get("prediction") is not None:
            facts.prediction_ord = row.ord
            if facts.total_tokens is None and isinstance(body["prediction"].get("tokens"), (int, float)):
                facts.total_tokens = float(body["prediction"]["tokens"])
    elif part.kind == "run_ended":
        facts.ended_time = at if at is not None else row.received
        facts.ended_received = row.received
        facts.end_reason = str(body.get("reason", ""))[:64]
    elif part.kind == "restart":
        cause = str(body.get("cause", "unknown"))[:32]
        if cause not in facts.restarts and len(facts.restarts) >= 8:
            cause = "other"
        if cause == "lease_lost":
            facts.leases_lost += 1
            facts.lease_lost_received = row.received
        facts.restarts = {**facts.restarts, cause: facts.restarts.get(cause, 0) + 1}
    elif part.kind == "checkpoint":
        if body.get("ok") is False:
            facts.checkpoint_failures += 1
            facts.checkpoint_failed_received = row.received
        else:
            if facts.checkpoint_received is not None:
                facts.checkpoint_interval_s = max(
                    row.received - facts.checkpoint_received, (facts.checkpoint_interval_s or 0.0) * 0.9
                )
            facts.checkpoint_received = row.received
            if body.get("step") is not None:
                facts.checkpoint_step = body["step"]


def _note_goodput(facts: RunFacts, body: dict[str, Any]) -> None:
    """The books of the run's time; taken as a whole or not at all."""
    seconds = {name: _amount(body.get(f"gpu_seconds_{name}")) for name in ("useful", "lost", "idle")}
    if None in seconds.values():
        return
    facts.gpu_seconds = {name: value for name, value in seconds.items() if value is not None}
    dollars = {name: _amount(body.get(f"dollars_{name}")) for name in seconds}
    facts.gpu_dollars = {name: value for name, value in dollars.items() if value is not None}
    steps = body.get("steps_lost")
    facts.steps_lost = steps if type(steps) is int and 0 <= steps < MAX_COUNT else None


def _amount(value: object) -> float | None:
    """A finite number that is not negative, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e18:
        return None
    return float(value)
