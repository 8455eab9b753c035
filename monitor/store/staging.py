"""One commit in the making: what is accepted, and the rows it becomes.

The one place that decides that. Key of a sample is (run, attempt, seq): a repeated one is counted and passed over. The
newest attempt of a run is the one that is listened to; an older one is refused. A request is taken whole or not at all.
"""

import json
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from operator import attrgetter, eq
from typing import Any

from monitor.store.columns import Damaged, pack_lines
from monitor.store.facts import AttemptFacts, RunFacts
from monitor.store.known import Known
from monitor.store.noting import note_attempt, note_event, note_samples
from monitor.store.tables import ChunkRow, EventRow, Judged
from monitor.wire import Event, Request, SampleLine, Samples

_seq, _step = attrgetter("seq"), attrgetter("step")


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
class Ask:
    """A request, what a judge said, or runs to remove; and what became of it so far."""

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


class Group:
    """One commit in the making."""

    def __init__(self, known: Known, now: float, max_runs: int):
        self.known, self.now, self.max_runs = known, now, max_runs
        self.chunks: list[ChunkRow] = []
        self.events: list[EventRow] = []
        self.judged: list[Judged] = []
        self.remove: list[str] = []
        self.touched: dict[str, RunFacts] = {}
        self.added = 0
        self.open: dict[str, _Open] = {}
        self.digests: set[tuple[int, int, bytes]] = set()
        self.ord = known.next_ord

    def add(self, ask: Ask) -> None:
        """Stage what is asked for. Raises Refused, and nothing has changed; after anything else `forget` is due."""
        if ask.request is not None:
            ask.accepted = ask.duplicates = 0
            self.check(ask)
            self.take(ask)
        self.judged.extend(ask.judged)
        self.remove.extend(ask.remove)

    def check(self, ask: Ask) -> None:
        """Raise Refused when any part of the request can't be taken; changes nothing."""
        known = self.known
        newest: dict[str, int] = {}
        assert ask.request is not None
        for part in ask.request.parts:
            run = part.run
            if ask.may is not None and not ask.may(run):
                raise Refused(403, "scope", f"this token may not write to run {run}", run=run)
            if run not in newest:
                facts = known.runs.get(run)
                if facts is None:
                    fresh = len(newest.keys() - known.runs.keys()) + 1
                    if len(known.runs) + fresh > self.max_runs or (
                        ask.quota is not None and known.owned.get(ask.owner, 0) + fresh > ask.quota
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
            facts = known.runs.get(run)
            if facts is not None:
                try:
                    if isinstance(part, Samples) or part.seq is not None:
                        known.seen(facts, part.attempt)
                    elif part.kind != "heartbeat":
                        known.store.has_event(facts.run_id, part.attempt, part.digest)
                except Damaged as error:  # of this run alone: the others' are taken
                    raise Refused(503, "store", f"run {run}: {error}", run=run, retry_after=60) from None

    def take(self, ask: Ask) -> None:
        """Stage the request's parts."""
        assert ask.request is not None
        for part in ask.request.parts:
            facts = self._facts(part.run, ask.owner)
            attempt = note_attempt(facts, part.attempt, self.now)
            if isinstance(part, Samples):
                self._samples(facts, attempt, part, ask)
            else:
                self._event(facts, attempt, part, ask)

    def _facts(self, run: str, owner: str) -> RunFacts:
        facts = self.touched.get(run)
        if facts is None:
            known = self.known
            facts = known.runs.get(run)
            if facts is None:
                facts = RunFacts(known.next_run_id, run, owner, created_received=self.now)
                known.next_run_id += 1
                self.added += 1
                known.owned[owner] = known.owned.get(owner, 0) + 1
                known.runs[run] = facts
            self.touched[run] = facts
        facts.last_received = self.now
        return facts

    def _samples(self, facts: RunFacts, attempt: AttemptFacts, part: Samples, ask: Ask) -> None:
        seen = self.known.seen(facts, attempt.attempt)
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

    def _event(self, facts: RunFacts, attempt: AttemptFacts, part: Event, ask: Ask) -> None:
        key = facts.run_id, attempt.attempt, part.digest
        if part.seq is not None:
            seen = self.known.seen(facts, attempt.attempt)
            repeated = part.seq in seen
        else:
            repeated = part.kind != "heartbeat" and (
                key in self.digests or self.known.store.has_event(facts.run_id, attempt.attempt, part.digest)
            )
        if repeated:
            ask.duplicates += 1
            return
        ask.accepted += 1
        if part.seq is not None:
            self.known.seen(facts, attempt.attempt).add(part.seq, part.seq)
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
        """Write all of it, or raise what `Store.write` raises."""
        for run in list(self.open):
            self._flush(run)
        known = self.known
        gone = [known.runs[name] for name in self.remove if name in known.runs and name not in self.touched]
        ids = {facts.run_id for facts in gone}
        judged = [found for found in self.judged if found.run_id not in known.gone | ids]
        if self.touched or judged or ids:
            known.store.write(
                self.chunks, self.events, list(self.touched.values()), judged, sorted(ids), self.added
            )
        known.drop(gone)
        known.next_ord = self.ord

    def forget(self) -> bool:
        """The commit failed: memory goes back to what is on disk. False where that can't be read."""
        return self.known.reload(set(self.touched), {facts.run_id for facts in self.touched.values()})


def _in_order(lines: list[SampleLine]) -> bool:
    first = lines[0].seq
    return all(map(eq, map(_seq, lines), range(first, first + len(lines))))
