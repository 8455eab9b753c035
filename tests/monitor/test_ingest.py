"""What is accepted: once, by the newest attempt, whole, on disk. Held against a reference model of a few lines."""

import math
import os
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from monitor import schema
from monitor.judging.feeding import rows_of
from monitor.store.ingest import Ingest, Refused, Taken
from monitor.store.intervals import Intervals
from monitor.store.reading import samples
from monitor.store.store import Store
from monitor.wire import parse

RUNS = ("a", "b")


def sample(run: str, attempt: int, seq: int, step: int, loss: float = 2.0, **more: Any) -> bytes:
    return schema.encode_event(
        schema.sample(run, attempt, seq, step=step, loss=loss, time=1e9 + step, **more)
    )


def send(ingest: Ingest, *lines: bytes, **how: Any) -> Taken:
    return ingest.submit(parse(b"".join(lines)), **how).result(10)


@pytest.fixture
def ingest(tmp_path: Path) -> Any:
    made = Ingest(Store(tmp_path / "store"))
    made.start()
    yield made
    made.stop()
    made.store.close()


def stored(ingest: Ingest, run: str) -> list[tuple[int, int, float]]:
    facts = ingest.runs[run]
    return [
        (attempt, int(row[1]), row[2])
        for attempt, columns in samples(ingest.store, facts, {})
        for row in rows_of(columns)
    ]


def test_a_repeated_key_is_passed_over_whatever_it_holds(ingest: Ingest) -> None:
    assert send(ingest, sample("a", 1, 0, 1), sample("a", 1, 1, 2)).accepted == 2
    again = send(ingest, sample("a", 1, 1, 99, 7.0), sample("a", 1, 2, 3), sample("a", 1, 2, 3))
    assert (again.accepted, again.duplicates) == (1, 2)
    assert stored(ingest, "a") == [(1, 1, 2.0), (1, 2, 2.0), (1, 3, 2.0)]


def test_an_older_attempt_is_refused_and_nothing_of_its_request_is_kept(ingest: Ingest) -> None:
    send(ingest, sample("a", 3, 0, 1))
    with pytest.raises(Refused) as caught:
        send(ingest, sample("b", 1, 0, 1), sample("a", 2, 0, 5))
    assert caught.value.status == 409 and caught.value.detail["attempt"] == 3
    assert "b" not in ingest.runs


def test_an_event_sent_twice_is_taken_once(ingest: Ingest) -> None:
    event = schema.encode_event(schema.event("restart", "a", 1, time=5.0, cause="killed"))
    assert send(ingest, event).accepted == 1
    assert send(ingest, event, event).duplicates == 2
    assert ingest.runs["a"].restarts == {"killed": 1}


def test_a_full_disk_takes_nothing_and_then_goes_on_without_a_restart(ingest: Ingest) -> None:
    send(ingest, sample("a", 1, 0, 1))
    db = ingest.store._db
    pages = db.execute("PRAGMA page_count").fetchone()[0]
    db.execute(f"PRAGMA max_page_count={pages}")  # SQLite then says what it says of a full disk
    big = [sample("a", 1, seq, seq + 1, note="x" * 3000) for seq in range(1, 60)]
    with pytest.raises(Refused) as caught:
        send(ingest, *big)
    assert caught.value.status == 507 and ingest.failing
    assert len(stored(ingest, "a")) == 1 and ingest.runs["a"].samples == 1
    with pytest.raises(Refused):
        send(ingest, sample("new", 1, 0, 1), *big)
    assert "new" not in ingest.runs
    db.execute("PRAGMA max_page_count=1000000")
    assert send(ingest, *big).accepted == 59
    assert ingest.failing is None and len(stored(ingest, "a")) == 60


def test_steps_that_are_done_again_are_no_way_out_of_a_restart_loop(ingest: Ingest) -> None:
    def steps(attempt: int, first: int, last: int) -> None:
        for step in range(first, last + 1, 5):  # a few at a time, as they are reported
            send(ingest, *[sample("a", attempt, s, s) for s in range(step, min(step + 5, last + 1))])

    steps(1, 1, 60)
    for attempt in (2, 3, 4):
        steps(attempt, 41, 60)  # from the checkpoint on to where it crashes, again
        assert ingest.runs["a"].restarts_since_step == attempt - 1
    assert (ingest.runs["a"].step, ingest.runs["a"].furthest_step) == (60, 60)
    ingest.runs["a"].furthest_step = None  # as a store of before has it
    steps(5, 41, 60)
    assert ingest.runs["a"].restarts_since_step == 4
    steps(5, 61, 61)
    assert ingest.runs["a"].restarts_since_step == 0
    steps(6, 41, 43)
    assert (ingest.runs["a"].step, ingest.runs["a"].restarts_since_step) == (43, 1)


def test_a_token_has_its_own_runs_and_no_more_than_its_quota(ingest: Ingest) -> None:
    send(ingest, sample("a", 1, 0, 1), owner="t", quota=2)
    send(ingest, sample("b", 1, 0, 1), owner="t", quota=2)
    with pytest.raises(Refused) as caught:
        send(ingest, sample("c", 1, 0, 1), owner="t", quota=2)
    assert caught.value.status == 429
    send(ingest, sample("a", 1, 1, 2), owner="t", quota=2)
    with pytest.raises(Refused) as caught:
        send(ingest, sample("b", 1, 1, 2), may=lambda run: run == "a")
    assert caught.value.status == 403


def test_extra_fields_of_samples_are_kept(ingest: Ingest) -> None:
    send(ingest, sample("a", 1, 0, 1, moe_balance=0.5))
    [(_, columns)] = samples(ingest.store, ingest.runs["a"], {})
    assert columns.extra == {0: {"moe_balance": 0.5}}


def test_after_stop_nothing_is_taken_and_what_was_queued_is_on_disk(tmp_path: Path) -> None:
    made = Ingest(Store(tmp_path / "store"))
    made.start()
    waiting = [made.submit(parse(sample("a", 1, seq, seq))) for seq in range(50)]
    made.stop()
    assert all(w.result(0).accepted == 1 for w in waiting)
    with pytest.raises(Refused) as caught:
        made.submit(parse(sample("a", 1, 99, 99)))
    assert caught.value.status == 503
    made.store.close()


def test_intervals_are_a_set() -> None:
    r = random.Random(4)
    for _round in range(200):
        have, model = Intervals(), set()
        for _step in range(30):
            first = r.randrange(40)
            last = first + r.choice((0, 0, 1, 5))
            have.add(first, last)
            model |= set(range(first, last + 1))
            assert len(have) == len(model) and all((n in have) == (n in model) for n in range(50))
            assert all(b + 1 < a for (_, b), (a, _) in zip(have.pairs(), have.pairs()[1:], strict=False))


class Model:
    """All that a store must hold, the plain way."""

    def __init__(self) -> None:
        self.newest: dict[str, int] = {}
        self.kept: dict[tuple[str, int], dict[int, tuple[int, float]]] = {}
        self.resumed: dict[tuple[str, int], int] = {}

    def truth(self, run: str) -> dict[int, tuple[int, float]]:
        """step to (attempt, loss): a newer attempt supersedes all that comes after its resume step."""
        out: dict[int, tuple[int, float]] = {}
        for attempt in sorted(a for r, a in {*self.kept, *self.resumed} if r == run):
            if (run, attempt) not in self.resumed:
                continue
            resume = self.resumed[run, attempt] or -1
            out = {s: v for s, v in out.items() if s <= resume}
            for step, loss in self.kept.get((run, attempt), {}).values():
                if step > resume:
                    out[step] = (attempt, loss)
        return out


losses = st.sampled_from([2.0, 2.5, math.nan, math.inf, -math.inf])
lines = st.lists(st.tuples(st.integers(0, 25), losses), min_size=1, max_size=8)


class Monitored(RuleBasedStateMachine):
    """Senders with zombies among them, restarts of the service, full disks."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
        self.model = Model()
        self.full = False
        self.open()

    def open(self) -> None:
        self.ingest = Ingest(Store(Path(self.folder.name) / "store"))
        self.ingest.start()

    def teardown(self) -> None:
        self.ingest.stop()
        self.ingest.store.close()
        self.folder.cleanup()

    def _send(self, run: str, attempt: int, body: bytes) -> Taken | None:
        stale = attempt < self.model.newest.get(run, -1)
        try:
            taken = send(self.ingest, body)
        except Refused as refused:
            assert refused.status == (409 if stale else 507), refused
            assert stale or self.full
            return None
        assert not stale
        return taken

    @rule(run=st.sampled_from(RUNS), attempt=st.integers(0, 4), what=lines, base=st.integers(0, 20))
    def report(self, run: str, attempt: int, what: list[tuple[int, float]], base: int) -> None:
        """Samples in any order, some twice; a step follows from its seq and what the attempt resumed from."""
        model = self.model
        key = run, attempt
        resume = model.resumed.get(key, base)
        body = b"".join(sample(run, attempt, seq, resume + 1 + seq, loss) for seq, loss in what)
        taken = self._send(run, attempt, body)
        if taken is None:
            return
        model.newest[run] = attempt
        kept = model.kept.setdefault(key, {})
        fresh = 0
        for seq, loss in what:
            if seq not in kept:
                if not kept:
                    model.resumed.setdefault(key, max(resume + seq, 0))
                kept[seq] = (resume + 1 + seq, loss)
                fresh += 1
        assert (taken.accepted, taken.duplicates) == (fresh, len(what) - fresh)

    @rule(run=st.sampled_from(RUNS), attempt=st.integers(0, 4), resume=st.integers(0, 20))
    def begin(self, run: str, attempt: int, resume: int) -> None:
        model = self.model
        if (run, attempt) in model.resumed:
            return
        body = schema.encode_event(schema.run_started(run, attempt, time=1.0, resume_step=resume))
        if self._send(run, attempt, body) is not None:
            model.newest[run] = attempt
            model.resumed[run, attempt] = resume

    @rule()
    def restart(self) -> None:
        if self.full:
            return
        self.ingest.stop()
        self.ingest.store.close()
        self.open()

    @precondition(lambda self: not self.full)
    @rule()
    def fill(self) -> None:
        db = self.ingest.store._db
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        db.execute(f"PRAGMA max_page_count={db.execute('PRAGMA page_count').fetchone()[0]}")
        self.full = True

    @precondition(lambda self: self.full)
    @rule()
    def free(self) -> None:
        self.ingest.store._db.execute("PRAGMA max_page_count=1000000")
        self.full = False

    @invariant()
    def the_store_holds_what_was_acknowledged(self) -> None:
        for run in self.model.newest:
            facts = self.ingest.runs[run]
            assert facts.attempt == self.model.newest[run]
            assert facts.samples == sum(len(v) for (r, _), v in self.model.kept.items() if r == run)
            truth = {step: (attempt, loss) for attempt, step, loss in stored(self.ingest, run)}
            assert repr(sorted(truth.items())) == repr(sorted(self.model.truth(run).items()))
        assert set(self.ingest.runs) == set(self.model.newest)


class TestMonitored(Monitored.TestCase):  # type: ignore[name-defined]
    settings = settings(
        max_examples=12,
        stateful_step_count=20,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def test_no_word_that_a_sender_typed_becomes_a_label(ingest: Ingest) -> None:
    typed: list[Any] = ["killed", "host-17 <b>", "rank 3", None, 7, ["killed"], "preempted", "x" * 500]
    for k, cause in enumerate(typed):
        send(ingest, schema.encode_event(schema.event("restart", "a", 1, time=float(k), cause=cause)))
    assert ingest.runs["a"].restarts == {"killed": 1, "other": 6, "preempted": 1}
