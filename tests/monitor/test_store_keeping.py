"""Looking after a store: a backup is whole, a repair loses only what was damaged and says so, an export reads back."""

import csv
import io
import itertools
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

from monitor.errors import Failed, WrongInput
from monitor.replay import read_samples
from monitor.schema import encode_event, event
from monitor.store.backup import backup, restore
from monitor.store.check import check
from monitor.store.columns import Damaged, unpack
from monitor.store.export import export
from monitor.store.facts import seal, to_bytes
from monitor.store.ingest import Ingest
from monitor.store.repair import repair
from monitor.store.store import FILE, Store
from tests.monitor.test_ingest import sample, send
from tests.monitor.test_service import Open, curve, lines, story, told
from tests.monitor.test_store import filled


def test_a_backup_beside_a_live_service_opens_to_the_same_verdicts(tmp_path: Path) -> None:
    opened = Open(tmp_path / "store")
    events = story()
    for start in range(0, len(events), 200):
        opened.send(*events[start : start + 200])
    want = told(opened)
    assert backup(tmp_path / "store", tmp_path / "copy.db") > 10_000
    assert (tmp_path / "copy.db").stat().st_mode & 0o077 == 0
    opened.close()
    with pytest.raises(WrongInput, match="exists"):
        backup(tmp_path / "store", tmp_path / "copy.db")
    with pytest.raises(WrongInput, match="holds a store"):
        restore(tmp_path / "copy.db", tmp_path / "store")
    restore(tmp_path / "copy.db", tmp_path / "other")
    again = Open(tmp_path / "other")
    assert told(again) == want
    again.close()


def test_a_backup_beside_a_service_that_commits_all_the_time_ends(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    ingest = Ingest(store)
    ingest.start()
    send(ingest, *[sample("a", 1, s, s, note="x" * 2000) for s in range(6000)])  # 3,000 pages and more
    store.connection.execute("PRAGMA synchronous=OFF")  # as many commits as can be
    place, copy = str(tmp_path / "store"), str(tmp_path / "copy.db")
    command = [sys.executable, "-m", "launcher.cli", "monitor", "backup", "--store", place, copy]
    backing = subprocess.Popen(command)
    try:
        until = time.monotonic() + 30
        for n in itertools.count():
            if backing.poll() is not None:
                break
            assert time.monotonic() < until, f"{n} commits, and the backup has not ended"
            send(ingest, sample("b", 1, n, n))
    finally:
        backing.kill()
        backing.wait()
        ingest.stop()
        store.close()
    assert backing.returncode == 0
    restore(tmp_path / "copy.db", tmp_path / "other")
    again = Store(tmp_path / "other")
    assert {facts.run: facts.samples for facts in again.runs()}["a"] == 6000
    again.close()


def test_a_whole_store_needs_no_repair_and_a_live_one_gets_none(tmp_path: Path) -> None:
    store = filled(tmp_path)
    with pytest.raises(Failed, match="in use"):
        repair(tmp_path)
    store.close()
    assert repair(tmp_path) == []


@pytest.mark.parametrize("left", [FILE, FILE + "-wal", FILE + "-shm", FILE + "-journal"])
def test_nothing_is_restored_beside_what_is_left_of_a_store(tmp_path: Path, left: str) -> None:
    filled(tmp_path / "good").close()
    backup(tmp_path / "good", tmp_path / "copy.db")
    folder = tmp_path / "other"
    folder.mkdir()
    for aside in (f"{FILE}.damaged-1", f"{FILE}-wal.damaged-1", f"{FILE}.partial"):
        (folder / aside).write_bytes(b"x")
    (folder / left).write_bytes(b"x")
    with pytest.raises(WrongInput, match=rf"what is left of one \({left}\); move {FILE}\* away"):
        restore(tmp_path / "copy.db", folder)
    (folder / left).unlink()
    restore(tmp_path / "copy.db", folder)
    again = Store(folder)
    assert [facts.samples for facts in again.runs()] == [400]
    again.close()


def test_what_a_flipped_byte_took_is_named_and_can_be_sent_again(tmp_path: Path) -> None:
    store = filled(tmp_path / "good")
    body = list(store.chunks(1))[4].body
    store.close()
    folder = tmp_path / "bad"
    shutil.copytree(tmp_path / "good", folder)
    content = bytearray((folder / FILE).read_bytes())
    at = content.index(body[40:400])
    content[at + 100] ^= 0x55
    (folder / FILE).write_bytes(content)
    assert list(check(folder / FILE))
    said = repair(folder)
    assert any("a, attempt 1: 40 samples are lost" in line for line in said), said
    assert list(folder.glob(f"{FILE}.damaged-*"))
    assert list(check(folder / FILE)) == [] and repair(folder) == []
    ingest = Ingest(Store(folder))
    assert ingest.runs["a"].samples == 360 and ingest.runs["a"].step == 400
    ingest.start()
    again = send(ingest, *[sample("a", 1, seq, seq + 1, 2.0 + seq) for seq in range(400)])
    assert (again.accepted, again.duplicates) == (40, 360)
    ingest.stop()
    losses = sorted(v for c in ingest.store.chunks(1) for v in unpack(c.body).get("loss").tolist())
    assert losses == [2.0 + seq for seq in range(400)]
    ingest.store.close()


def test_what_a_repair_makes_up_of_a_run_from_its_rows_is_what_was_known_of_it(tmp_path: Path) -> None:
    """A run that ended and goes on since is running, however it is learned."""
    clock = itertools.count(1000)
    store = Store(tmp_path)
    ingest = Ingest(store, clock=lambda: float(next(clock)))
    ingest.start()
    for attempt in (1, 2):
        for seq in range(0, 30, 10):
            send(
                ingest,
                *[
                    sample("a", attempt, s, 20 * attempt + s, tokens=512.0 * s, tokens_per_s=99.0, mfu=0.4)
                    for s in range(seq, seq + 10)
                ],
                *[sample("bare", attempt, s, 20 * attempt + s, 2.5) for s in range(seq, seq + 10)],
            )
        send(ingest, encode_event(event("checkpoint", "a", attempt, time=7.0, step=9)))
        if attempt == 1:
            send(
                ingest,
                *[
                    encode_event(event("run_ended", run, 1, time=8.0, reason="failed"))
                    for run in ("a", "bare")
                ],
            )
    send(ingest, encode_event(event("heartbeat", "a", 2, time=9.0)))
    ingest.stop()
    known = {name: ingest.runs[name] for name in ("a", "bare")}
    assert all(facts.phase == "running" for facts in known.values()) and known["a"].tokens == 512.0 * 29
    for facts in known.values():  # what is known no longer fits the rows: it is made up anew
        blob = to_bytes(msgspec.structs.replace(facts, samples=facts.samples + 1))
        store.connection.execute(
            "UPDATE runs SET facts=?, crc=? WHERE run_id=?",
            (blob, seal(facts.run_id, facts.run, blob), facts.run_id),
        )
    store.connection.execute("UPDATE ledger SET crc=crc+1")
    store.close()
    assert repair(tmp_path)
    again = Store(tmp_path)
    for facts in again.runs():
        assert facts == known[facts.run]
    again.close()


def test_a_repaired_store_holds_nothing_that_was_not_sent(tmp_path: Path) -> None:
    store = filled(tmp_path / "good")
    store.close()
    good = (tmp_path / "good" / FILE).read_bytes()
    rng = np.random.default_rng(3)
    lost = 0
    for at in rng.integers(100, len(good), 40).tolist():
        folder = tmp_path / "bad"
        folder.mkdir()
        (folder / FILE).write_bytes(good[:at] + bytes([good[at] ^ 0x55]) + good[at + 1 :])
        said = repair(folder)
        fixed = Store(folder)
        found = [v for c in fixed.chunks(1) for v in unpack(c.body).get("loss").tolist()]
        assert set(found) <= {2.0 + seq for seq in range(400)} and len(set(found)) == len(found)
        if len(found) < 400:
            assert said
            lost += 1
        facts = fixed.runs()
        assert not found or facts[0].samples == len(found)
        fixed.close()
        shutil.rmtree(folder)
    assert lost > 0


def test_a_damaged_store_has_no_backup(tmp_path: Path) -> None:
    store = filled(tmp_path)
    body = next(iter(store.chunks(1))).body
    store.close()
    content = bytearray((tmp_path / FILE).read_bytes())
    content[content.index(body[40:400]) + 5] ^= 1
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises((Failed, Damaged), match="damaged"):
        backup(tmp_path, tmp_path / "copy.db")
    assert not list(tmp_path.glob("copy*"))


def test_an_export_is_a_curves_file(tmp_path: Path) -> None:
    opened = Open(tmp_path / "store")
    opened.send(*lines("a", [*curve(30), math.nan, 2.0]))
    opened.judged()
    out = io.StringIO()
    assert export(tmp_path / "store", "a", None, out) == 32
    (tmp_path / "a.csv").write_text(out.getvalue())
    rows = list(csv.DictReader(io.StringIO(out.getvalue())))
    assert rows[0]["run"] == "a" and rows[30]["loss"] == "NaN" and rows[0]["expected"] != ""
    back = read_samples(tmp_path / "a.csv")["a"]
    assert [s.step for s in back] == list(range(1, 33)) and math.isnan(back[30].loss)
    pq = pytest.importorskip("pyarrow.parquet")
    assert export(tmp_path / "store", "a", tmp_path / "a.parquet", out) == 32
    table = pq.read_table(tmp_path / "a.parquet").to_pydict()
    assert table["step"] == list(range(1, 33)) and math.isnan(table["loss"][30])
    with pytest.raises(WrongInput, match="has no run"):
        export(tmp_path / "store", "b", None, out)
    opened.close()


def test_damage_that_sqlite_itself_cannot_put_in_words_is_said_and_repaired(tmp_path: Path) -> None:
    """Of a broken schema its error quotes a name that is no text any more, and Python can't read the error."""
    opened = Open(tmp_path / "store")
    opened.send(*lines("a", curve(30)))
    opened.close()
    path = tmp_path / "store" / FILE
    body = path.read_bytes()
    broken = body.replace(b"INDEX chunks_of_run", b"INDEX chunksXof_run").replace(
        b"chunks_of_runchunks", b"\xe5hunks_of_runchunks"
    )
    path.write_bytes(broken)
    assert list(check(path)) == ["SQLite: it holds bytes that are no text"]
    with pytest.raises(Failed, match="damaged: SQLite: it holds bytes that are no text"):
        restore(path, tmp_path / "elsewhere")
    with pytest.raises(Failed):
        backup(tmp_path / "store", tmp_path / "copy.db")
    said = repair(tmp_path / "store")
    assert "SQLite: it holds bytes that are no text" in said
    assert any("was read in its place" in line for line in said)
    assert next(iter(path.parent.glob(f"{FILE}.damaged-*"))).read_bytes() == broken
    assert list(check(path)) == []
    again = Store(tmp_path / "store")
    assert again.runs()[0].samples == sum(c.n for c in again.chunks(1)) == 30
    again.close()
