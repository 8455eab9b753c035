"""The store: what was written is read back, damage is loud, and one process has it at a time."""

import itertools
import math
import os
import shutil
import sqlite3
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitor import schema
from monitor.errors import Failed
from monitor.store.columns import (
    COLUMNS,
    MISSING,
    Columns,
    Damaged,
    Pieces,
    join,
    missing,
    pack,
    pack_lines,
    unpack,
)
from monitor.store.facts import AttemptFacts
from monitor.store.ingest import Ingest
from monitor.store.reading import Found, buckets, spans, thin
from monitor.store.store import FILE, Store
from monitor.wire import SampleLine, parse
from tests.monitor.test_ingest import sample
from tests.monitor.test_service import Open

number = st.none() | st.floats()


@given(st.lists(st.tuples(st.integers(0, 2**53 - 1), st.floats(), number, number), min_size=1, max_size=20))
@settings(max_examples=60, deadline=None)
def test_samples_come_back_as_they_were_missing_and_nan_kept_apart(
    rows: list[tuple[int, float, float | None, float | None]],
) -> None:
    lines = [
        SampleLine("a", 1, i, step, loss, val_loss=val, lr=lr) for i, (step, loss, val, lr) in enumerate(rows)
    ]
    back = unpack(pack_lines(lines, {0: {"x": [1]}}))
    assert back.get("step").tolist() == [row[0] for row in rows]
    assert repr(back.get("loss").tolist()) == repr([row[1] for row in rows])
    for name, at in (("val_loss", 2), ("lr", 3), ("mfu", None)):
        want = [None if at is None else row[at] for row in rows]
        assert missing(back.get(name)).tolist() == [v is None for v in want]
    assert back.extra == {0: {"x": [1]}}
    assert pack(back) == pack_lines(lines, {0: {"x": [1]}})


@given(st.binary(max_size=80) | st.integers(0, 200).map(lambda n: pack(Columns(3, {"loss": np.ones(3)}))[:n]))
@settings(max_examples=60, deadline=None)
def test_a_cut_chunk_is_damaged_or_whole(blob: bytes) -> None:
    try:
        found = unpack(blob)
    except (Damaged, ValueError):
        return
    assert all(len(c) == found.n for c in found.of.values())


def test_joined_chunks_say_what_is_missing() -> None:
    one, two = Columns(1, {"step": np.ones(1)}), Columns(1, {"step": np.ones(1), "lr": np.ones(1)})
    both = join([one, two])
    assert both.n == 2 and missing(both.get("lr")).tolist() == [True, False]
    assert math.isnan(MISSING) and "seq" in COLUMNS


def test_a_second_service_on_the_same_store_is_refused(tmp_path: Path) -> None:
    first = Store(tmp_path)
    with pytest.raises(Failed, match="in use"):
        Store(tmp_path)
    first.close()
    Store(tmp_path).close()


def test_a_newer_store_is_left_alone(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store._db.execute("PRAGMA user_version=99")
    store.close()
    with pytest.raises(Failed, match="newer"):
        Store(tmp_path)


def filled(folder: Path) -> Store:
    store = Store(folder)
    ingest = Ingest(store)
    ingest.start()
    for start in range(0, 400, 40):
        body = b"".join(sample("a", 1, seq, seq + 1, 2.0 + seq) for seq in range(start, start + 40))
        ingest.submit(parse(body)).result(10)
    ingest.stop()
    return store


def test_a_flipped_byte_is_named_or_harmless_never_a_silent_change(tmp_path: Path) -> None:
    store = filled(tmp_path / "good")
    want = [c.get("loss").tolist() for c in (unpack(c.body) for c in store.chunks(1))]
    store.close()
    good = (tmp_path / "good" / FILE).read_bytes()
    assert len(good) > 20_000
    rng = np.random.default_rng(0)
    loud = 0
    for at in rng.integers(100, len(good), 60).tolist():
        folder = tmp_path / "bad"
        folder.mkdir()
        (folder / FILE).write_bytes(good[:at] + bytes([good[at] ^ 0x55]) + good[at + 1 :])
        try:
            bad = Store(folder)
            try:
                runs = bad.runs()
                got = [unpack(c.body).get("loss").tolist() for c in bad.chunks(1)]
                seen = 0
                for c in bad.chunks(1):
                    assert c.before == seen, "a hole"
                    seen += c.n
                assert got == want and runs[0].samples == seen
            finally:
                bad.close()
        except (Damaged, Failed, AssertionError) as error:
            assert not isinstance(error, AssertionError) or "hole" in str(error), error
            loud += 1
        except Exception as error:
            assert "sqlite3" in type(error).__module__, error
            loud += 1
        shutil.rmtree(folder)
    assert loud >= 8


def test_the_next_chunks_of_a_run_are_found_without_going_over_all_of_it(tmp_path: Path) -> None:
    """A judge that is behind asks for the next ones again and again."""
    store = Store(tmp_path)
    store.connection.execute("PRAGMA synchronous=OFF")
    ingest = Ingest(store)
    ingest.start()
    for attempt in (1, 2, 7):
        for seq in range(250):
            both = sample("a", attempt, seq, seq + 1) + sample("b", 1, 250 * attempt + seq, 1)
            ingest.submit(parse(both)).result(10)
    ingest.stop()
    chunks = list(store.chunks(1))
    assert [c.ord for c in chunks] == sorted(c.ord for c in chunks) and len({c.attempt for c in chunks}) == 3
    assert len(chunks) == 750
    worked = 0

    def count() -> int:
        nonlocal worked
        worked += 1
        return 0

    store.reader().set_progress_handler(count, 1)
    for k in (0, len(chunks) // 2, len(chunks) - 3):
        for read in (
            lambda after: next(store.chunks(1, after=after)),
            lambda after: store.small_chunks(1, after, 2**62, 1024, 1)[0],
        ):
            worked = 0
            assert read(chunks[k].ord).ord == chunks[k + 1].ord
            assert worked < 250, f"{worked} steps of SQLite's for one of {len(chunks)} chunks"
    store.reader().set_progress_handler(None, 0)
    store.close()


def test_a_thread_that_ends_lets_go_of_its_connection(tmp_path: Path) -> None:
    """Pools end idle threads and start others, for weeks."""
    store = filled(tmp_path)
    halfway = []

    def ask() -> None:
        assert len(store.runs()) == 1
        if not halfway:
            halfway.append(store.chunks(1))
            next(halfway[0])

    def open_files() -> int:
        return sum(FILE in os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd"))

    ask()
    had = open_files()
    for _ in range(20):
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
    assert (
        open_files() <= had + 3
    )  # one for the query that is not at its end, one file that SQLite keeps for the next
    halfway.clear()
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert len(list(halfway[0])) == 9, "a query outlives the thread that asked"
    store.close()


def test_a_torn_log_opens_to_the_last_commit(tmp_path: Path) -> None:
    store = filled(tmp_path / "good")
    wal = (tmp_path / "good" / (FILE + "-wal")).read_bytes()
    main = (tmp_path / "good" / FILE).read_bytes()
    store.close()
    seen = set()
    for cut in range(0, len(wal), max(1, len(wal) // 40)):
        folder = tmp_path / f"cut-{cut}"
        folder.mkdir()
        (folder / FILE).write_bytes(main)
        (folder / (FILE + "-wal")).write_bytes(wal[:cut])
        try:
            torn = Store(folder)
        except Failed:
            continue
        count = sum(c.n for c in torn.chunks(1))
        assert count % 40 == 0
        assert sum(f.samples for f in torn.runs()) == count
        seen.add(count)
        torn.close()
    assert len(seen) > 5


def test_the_newest_attempt_has_the_word_for_what_it_replays() -> None:
    def attempts(*pairs: tuple[int, int | None]) -> list[AttemptFacts]:
        return [AttemptFacts(a, resume_step=r) for a, r in pairs]

    assert spans(attempts((1, 0), (2, 100)))[0] == (1, 0, 100)
    assert [s[:2] for s in spans(attempts((1, 0), (2, 100), (3, 50)))] == [(1, 0), (3, 51)]
    assert [s[:2] for s in spans(attempts((1, 0), (2, 0)))] == [(2, 0)]
    assert [s[:2] for s in spans(attempts((1, 0), (2, None)))] == [(1, 0)]


@given(st.integers(1, 5000), st.integers(10, 500), st.integers(0, 4999))
@settings(max_examples=60, deadline=None)
def test_thinning_never_hides_a_spike_or_a_nan(n: int, most: int, at: int) -> None:
    loss = np.linspace(3, 2, n)
    spike, lost = at % n, (at * 7 + 3) % n
    loss[spike] = 9.0
    if lost != spike:
        loss[lost] = np.nan
    columns = Columns(n, {"step": np.arange(float(n)), "loss": loss})
    kept = thin(columns, most)
    assert len(kept) <= max(most, 6) or n <= most
    assert spike in kept and lost in kept and 0 in kept and n - 1 in kept
    assert (np.diff(kept) > 0).all()
    fewer = Found(1, Pieces([columns]), np.arange(columns.n), []).thinned(most)
    assert fewer.get("step").tolist() == kept.tolist()
    if fewer.n < n:
        step, mean, edges = fewer.get("step"), fewer.get("mean"), buckets(columns, most).tolist()
        assert edges[0] == 0 and edges[-1] == n and max(np.diff(edges)) <= 4 * n / (most - 4) + 2
        for low, high in itertools.pairwise(edges):
            inside = (step >= low) & (step < high)
            assert inside.any()
            want = loss[low:high][np.isfinite(loss[low:high])]
            assert np.allclose(mean[inside], want.mean() if len(want) else np.nan, equal_nan=True)


def test_thinning_keeps_the_rare_validation_losses_and_points_in_every_decade() -> None:
    n, rng = 200_000, np.random.default_rng(0)
    val = np.full(n, MISSING)
    val[499::500] = rng.normal(2, 0.01, n // 500)
    val[[99_999, 150_499]] = 5.0, np.nan
    columns = Columns(n, {"step": np.arange(1.0, n + 1), "loss": rng.normal(2, 0.01, n), "val_loss": val})
    kept = thin(columns, 3000)
    assert {99_999, 150_499} <= set(kept.tolist()) and len(kept) <= 3750
    assert 300 <= np.isin(kept, np.arange(499, n, 500)).sum() <= 750
    few = Columns(n, {**columns.of, "val_loss": np.where(np.arange(n) % 5000 == 4999, 2.0, MISSING)})
    assert set(range(4999, n, 5000)) <= set(thin(few, 3000).tolist())
    for low in (10, 100, 1000, 10_000):
        assert ((kept >= low) & (kept < 10 * low)).sum() >= min(60, 9 * low)


@pytest.mark.parametrize("table", ["runs", "chunks", "events", "judged"])
def test_a_row_that_was_changed_behind_its_seal_is_refused(tmp_path: Path, table: str) -> None:
    opened = Open(tmp_path)
    opened.send(schema.encode_event(schema.run_started("a", 1, time=1.0)), sample("a", 1, 0, 1))
    opened.judged()
    opened.close()
    db = sqlite3.connect(tmp_path / FILE)
    db.execute(f"UPDATE {table} SET crc=crc+1")
    db.commit()
    db.close()
    store = Store(tmp_path)
    reads = {
        "runs": [store.runs, lambda: store.run("a")],
        "chunks": [lambda: list(store.chunks(1)), lambda: store.chunk(2)],
        "events": [lambda: store.events(1)],
        "judged": [lambda: store.judged(1)],
    }
    for read in reads[table]:
        with pytest.raises(Damaged, match="repair"):
            read()
    store.close()
