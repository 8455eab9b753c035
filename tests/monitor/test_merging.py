"""Chunks put together: nothing that can be asked for changes, and a run judged again comes to the same."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from monitor.judge import Settings
from monitor.judging.feeding import Runs
from monitor.judging.run import Court, Run, fresh
from monitor.schema import encode_event, event
from monitor.store import merging
from monitor.store.check import check
from monitor.store.columns import Damaged
from monitor.store.ingest import Ingest
from monitor.store.merging import LEAST, MOST, Merger
from monitor.store.reading import rows, samples
from monitor.store.store import Store
from monitor.store.tables import Merge
from monitor.wire import parse
from tests.monitor.test_ingest import sample

N = 2600


def judge(store: Store, run: Run) -> Run:
    court = Court(store, Settings(), Runs(store))
    rest = [*store.chunks(1, after=run.cursor), *store.events(1, after=run.cursor)]
    for row in sorted(rest, key=lambda row: row.ord):
        run.feed(court, row)
    run.tell()
    return run


def merge(merger: Merger, ingest: Ingest) -> None:
    """Look twice: what was judged before the first time is put together the second time."""
    merger.run(ingest.runs["r"])
    merger.run(ingest.runs["r"])


def shown(store: Store, **view: int) -> list[dict[str, Any]]:
    facts = store.run("r")
    assert facts is not None
    return [row for block in rows(samples(store, facts, [], **view)) for row in block]


@pytest.fixture
def live(tmp_path: Path) -> Any:
    """A run of one sample a commit, with checkpoints, a NaN, a resume and a field v1 does not know; judged and written."""
    store = Store(tmp_path / "store")
    store.connection.execute("PRAGMA synchronous=OFF")
    ticks = itertools.count(1_700_000_000)
    ingest = Ingest(store, clock=lambda: float(next(ticks)))
    ingest.start()
    for seq in range(N):
        attempt, step = (1, seq) if seq < 2000 else (2, seq - 100)
        body = sample(
            "r",
            attempt,
            seq if attempt == 1 else seq - 2000,
            step,
            float("nan") if seq == 300 else 3.0 + seq % 7 / 100,
        )
        if seq in (700, 701):
            body = body.replace(b'"loss"', b'"mine":7,"loss"')
        if seq in (1200, 1201):
            body += encode_event(event("checkpoint", "r", attempt, time=1.0, step=step))
        ingest.submit(parse(body)).result(60)
    run = fresh(Court(store, Settings(), Runs(store)), 1)
    while run.cursor < ingest.runs["r"].last_ord:
        court = Court(store, Settings(), Runs(store))
        rest = [*store.chunks(1, after=run.cursor), *store.events(1, after=run.cursor)]
        for row in sorted(rest, key=lambda row: row.ord)[:50]:
            run.feed(court, row)
        run.tell()
        ingest.submit_judged([run.to_write()]).result(60)
        run.written(0.0)
    yield store, ingest
    ingest.stop()
    store.close()


def test_what_is_put_together_reads_as_before(live: tuple[Store, Ingest]) -> None:
    store, ingest = live
    facts = ingest.runs["r"]
    views: list[dict[str, int]] = [
        {},
        {"first": 1150, "last": 1300},
        {"first": 1950},
        {"attempt": 1},
        {"last": 3},
    ]
    before = [shown(store, **view) for view in views]
    many = len(list(store.chunks(1)))
    merger = Merger(store, ingest.merge)
    assert not merger.run(facts), "what was judged only now may be judged again"
    assert len(list(store.chunks(1))) == many
    merger.run(facts)
    chunks = list(store.chunks(1))
    assert many == N
    assert [c.n for c in chunks if c.attempt == 1] == [1201, 1, 798], "cut where an event is"
    assert all(c.n <= MOST for c in chunks)
    assert len(store.bands(1, 1)) < 5
    assert [shown(store, **view) for view in views] == before
    assert not list(check(store.path))
    assert any(row.get("extra") == {"mine": 7} for row in before[0])


def test_no_event_is_passed(live: tuple[Store, Ingest]) -> None:
    store, ingest = live
    merger = Merger(store, ingest.merge)
    merge(merger, ingest)
    marks = [event.ord for event in store.events(1)]
    assert len(marks) == 2
    for chunk in store.chunks(1):
        assert not any(chunk.first_ord < mark < chunk.ord for mark in marks)


def test_a_run_judged_again_from_what_was_put_together_comes_to_the_same(live: tuple[Store, Ingest]) -> None:
    store, ingest = live

    def said() -> list[Any]:
        plain = [
            {k: v for k, v in one.items() if not k.endswith("time") and k != "time"}
            for one in store.verdicts(1)
        ]
        called = [{k: v for k, v in one.items() if not k.endswith("time")} for one in store.alerts(1)]
        return [plain, called, shown(store)]

    before = said()
    assert before[0] and before[1]
    merger = Merger(store, ingest.merge)
    merge(merger, ingest)
    ingest.submit_judged([judge(store, fresh(Court(store, Settings(), Runs(store)), 1)).to_write()]).result(
        60
    )
    assert said() == before


def test_what_changed_meanwhile_is_left_as_it_is(live: tuple[Store, Ingest]) -> None:
    """A run that was judged again, or removed, between the look and the write."""
    store, ingest = live
    held = []

    def late(merge: Any) -> Any:
        held.append(merge)
        ingest.submit_judged(
            [judge(store, fresh(Court(store, Settings(), Runs(store)), 1)).to_write()]
        ).result(60)
        return ingest.merge(merge)

    merger = Merger(store, late)
    merger.run(ingest.runs["r"])
    before = shown(store)
    merger.run(ingest.runs["r"])
    assert held and held[0].old_bands and not ingest.merge(held[0]).result(60)
    assert shown(store) == before and not list(check(store.path))


def test_a_chunk_lost_before_is_still_missed(live: tuple[Store, Ingest]) -> None:
    store, ingest = live
    merger = Merger(store, ingest.merge)
    merge(merger, ingest)
    middle = list(store.chunks(1))[1]
    store.connection.execute("DELETE FROM chunks WHERE ord=?", (middle.ord,))
    with pytest.raises(Damaged, match="missing before chunk"):
        shown(store)
    assert any("missing before chunk" in line for line in check(store.path))


def test_small_chunks_of_a_run_that_goes_on_are_left_until_there_are_enough(
    live: tuple[Store, Ingest],
) -> None:
    store, ingest = live
    merger = Merger(store, ingest.merge)
    merge(merger, ingest)
    chunks = list(store.chunks(1))
    tail = [c for c in chunks if c.attempt == 2]
    assert sum(c.n for c in tail) == 600 < LEAST
    assert len(tail) > 1, "the newest samples are not rewritten each time one more comes"


def test_a_large_merge_is_written_in_portions_and_comes_to_the_same(
    live: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every sender waits for a commit: ten minutes of a busy run put together in one stop them for a fifth of a second."""
    store, ingest = live
    before, written = shown(store), list[Merge]()

    def write(merge: Merge) -> Any:
        written.append(merge)
        return ingest.merge(merge)

    monkeypatch.setattr(merging, "PORTION_BYTES", 4000)
    small = len(list(store.chunks(1)))
    merge(Merger(store, write), ingest)
    assert len(written) >= 3 and all(len(m.chunks) + len(m.bands) == 1 for m in written)
    assert shown(store) == before and len(list(store.chunks(1))) < small / 2
    assert not list(check(store.path))
