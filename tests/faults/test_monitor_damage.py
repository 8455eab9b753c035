"""P2: bytes cut, flipped and blanked in the store. Whatever is read is what was sent and what was judged, or the damage is
named; a log that was cut short may lose its newest commits, whole ones, and never one from the middle. What was judged may
be gone where the next start judges it again.
"""

import itertools
import math
import os
import random
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from monitor.errors import Failed
from monitor.judge import Settings
from monitor.judging.feeding import Runs
from monitor.judging.run import Court, fresh
from monitor.schema import encode_event, event
from monitor.store.check import check
from monitor.store.columns import Damaged
from monitor.store.ingest import Ingest
from monitor.store.reading import rows, samples
from monitor.store.repair import repair
from monitor.store.store import FILE, Store
from monitor.wire import parse
from tests.monitor.test_ingest import sample

LONG = os.environ.get("LOSSCAST_FAULTS") == "long"
DAMAGES = 4000 if LONG else 400
SEEDS = range(2, 22) if LONG else (2,)
RUNS, COMMITS, EACH = 3, 30, 8
NONE: dict[str, list[Any]] = {
    "samples": [],
    "expected": [],
    "events": [],
    "alerts": [],
    "verdicts": [],
    "last": [],
}

pytestmark = pytest.mark.faults


def loss(run: int, seq: int) -> float:
    return math.nan if (run, seq) in ((1, 60), (2, 150), (2, 200)) else 2.0 + run + seq / 1000


def fill(folder: Path) -> list[list[dict[str, list[Any]]]]:
    """A store beside a live one, `good` with its log as a kill leaves it, and `closed`. What each run shows after each commit."""
    store = Store(folder)
    ticks = itertools.count(1_700_000_000)
    ingest = Ingest(store, clock=lambda: float(next(ticks)))  # the same bytes every time
    ingest.start()
    court = Court(store, Settings(), Runs(store))
    judges = {run + 1: fresh(court, run + 1) for run in range(RUNS)}
    told = []
    for commit in range(COMMITS):
        body = b"".join(
            sample(f"r{run}", 1, s, s + 1, loss(run, s))
            for run in range(RUNS)
            for s in range(commit * EACH, (commit + 1) * EACH)
        )
        if commit % 4 == 1:
            body += b"".join(
                encode_event(event("checkpoint", f"r{run}", 1, time=1.0, step=commit * EACH))
                for run in range(RUNS)
            )
        ingest.submit(parse(body)).result(60)
        told.append(_shown(store))
        if commit % 5 == 4:
            for run_id, run in judges.items():
                rest = [*store.chunks(run_id, after=run.cursor), *store.events(run_id, after=run.cursor)]
                for row in sorted(rest, key=lambda row: row.ord):
                    run.feed(court, row)
                run.tell()
            ingest.submit_judged([run.to_write() for run in judges.values()]).result(60)
            for run in judges.values():
                run.written(0.0)
            told.append(_shown(store))
    ingest.stop()
    # as a kill leaves it: with the log beside it
    shutil.copytree(folder, folder.with_name("good"), ignore=shutil.ignore_patterns("lock", "*-shm"))
    store.close()
    shutil.copytree(folder, folder.with_name("closed"), ignore=shutil.ignore_patterns("lock", "*-shm"))
    assert not list(check(folder / FILE))
    return told


def read(folder: Path) -> list[dict[str, list[Any]]]:
    """What each run shows, as the API gives it. Raises what the API turns into a 503."""
    store = Store(folder)
    try:
        return _shown(store)
    finally:
        store.close()


def _shown(store: Store) -> list[dict[str, list[Any]]]:
    found = {facts.run: facts for facts in store.runs()}
    lasts = store.lasts()
    out = []
    for run in range(RUNS):
        facts = found.get(f"r{run}")
        if facts is None:
            out.append(NONE)
            continue
        table = [r for block in rows(samples(store, facts, [])) for r in block]
        assert facts.samples == len(table), "the run's own count and its samples disagree"
        last = lasts.get(facts.run_id)
        out.append(
            {
                "samples": [(r["step"], r["loss"]) for r in table],
                "events": [(e.kind, e.fields) for e in store.events(facts.run_id)],
                "alerts": store.alerts(facts.run_id),
                "verdicts": store.verdicts(facts.run_id),
                "expected": [(r["expected"], r["upper"]) for r in table if r["upper"] is not None],
                "last": [] if last is None else [last],
            }
        )
    return out


def damage(rng: random.Random, path: Path) -> str:
    content = bytearray(path.read_bytes())
    kind = rng.choice(("flip", "flip", "burst", "cut", "blank"))
    at = rng.randrange(len(content))
    if kind == "flip":
        content[at] ^= 1 << rng.randrange(8)
    elif kind == "burst":
        for i in range(at, min(at + rng.randrange(2, 64), len(content))):
            content[i] = rng.randrange(256)
    elif kind == "cut":
        del content[at:]
    else:
        page = at // 4096 * 4096
        content[page : page + 4096] = bytes(len(content[page : page + 4096]))
    path.write_bytes(bytes(content))
    return f"{kind} at {at} of {path.name}"


@pytest.mark.parametrize("seed", SEEDS)
def test_damage_is_loud_or_harmless_never_a_silent_hole(tmp_path: Path, seed: int) -> None:
    told = fill(tmp_path / "live")
    whole = told[-1]
    assert all(run["events"] and run["verdicts"] and run["last"] and run["expected"] for run in whole)
    assert sum(len(run["alerts"]) for run in whole) >= 3
    for source in ("good", "closed"):  # a copy each: to open a store that has a log beside it changes it
        shutil.copytree(tmp_path / source, tmp_path / "read")
        assert read(tmp_path / "read") == whole
        shutil.rmtree(tmp_path / "read")
    rng = random.Random(seed)
    named = harmless = again = shorter = 0
    for i in range(DAMAGES):
        source = tmp_path / rng.choice(("good", "good", "closed"))
        folder = tmp_path / "bad"
        shutil.copytree(source, folder)
        files = [p for p in (folder / FILE, folder / f"{FILE}-wal") if p.exists() and p.stat().st_size]
        path = rng.choice(files)
        what = damage(rng, path)
        try:
            got = read(folder)
        except (Damaged, Failed, sqlite3.DatabaseError):
            named += 1
        else:
            if got == whole:
                harmless += 1
            elif [
                {**run, "last": run["last"] or kept["last"]} for run, kept in zip(got, whole, strict=True)
            ] == whole:
                again += 1  # the newest verdict alone is gone: a start without it judges the run again
            else:
                assert path.name.endswith("-wal"), (
                    f"{i}: {what}: something else was shown, and nobody was told"
                )
                assert got in told or got == [NONE] * RUNS, f"{i}: {what}"
                shorter += 1
        shutil.rmtree(folder)
    print(
        f"{DAMAGES} damages: {named} named, {harmless} harmless, {again} to be judged again, "
        f"{shorter} back at an earlier commit, 0 silent"
    )
    assert named > DAMAGES // 8 and shorter > DAMAGES // 20


def test_a_chunk_whose_steps_are_damaged_is_not_passed_over(tmp_path: Path) -> None:
    """A query that chooses by step would leave such a chunk out, and its seal would never be looked at."""
    fill(tmp_path / "live")
    db = sqlite3.connect(tmp_path / "closed" / FILE)
    db.execute("UPDATE chunks SET last_step=-39 WHERE ord=19")
    db.commit()
    db.close()
    store = Store(tmp_path / "closed")
    try:
        hurt = next(facts for facts in store.runs() if facts.run == "r0")
        for view in ({}, {"first": 100}, {"last": 10}, {"first": 60, "last": 90}):
            with pytest.raises(Damaged, match="chunk 19 of run id 1 is damaged"):
                samples(store, hurt, [], **view)
        with pytest.raises(Damaged):
            list(store.chunks(hurt.run_id, after=0))
        with pytest.raises(Damaged):
            list(store.seqs(hurt.run_id, 1))
    finally:
        store.close()


def test_what_a_repair_leaves_is_true_and_readable(tmp_path: Path) -> None:
    fill(tmp_path / "live")
    rng = random.Random(5)
    repaired = 0
    for _ in range(200 if LONG else 25):
        folder = tmp_path / "bad"
        shutil.copytree(tmp_path / "closed", folder)
        what = damage(rng, folder / FILE)
        try:
            said = repair(folder)
        except Failed:
            shutil.rmtree(folder)
            continue
        store = Store(folder)
        try:
            for facts in store.runs():
                for _, columns in samples(store, facts, []):
                    for step, value in zip(columns.get("step"), columns.get("loss"), strict=True):
                        assert any(
                            value == (wanted := loss(run, int(step) - 1))
                            or (value != value and wanted != wanted)
                            for run in range(RUNS)
                        ), what
        finally:
            store.close()
        repaired += bool(said)
        shutil.rmtree(folder)
    assert repaired > 5


@pytest.mark.parametrize("kind", ["flip", "burst", "blank"])
@pytest.mark.parametrize("source", ["closed", "good"])
def test_no_sample_is_lost_for_damage_to_the_page_that_lists_the_tables(
    tmp_path: Path, kind: str, source: str
) -> None:
    """Every row of the file is whole then, and SQLite by itself would show none of them."""
    whole = [run["samples"] for run in fill(tmp_path / "live")[-1]]
    rng, hidden = random.Random(7), 0
    for _ in range(200 if LONG else 12):
        folder = tmp_path / "bad"
        shutil.copytree(tmp_path / source, folder)
        content = bytearray((folder / FILE).read_bytes())
        if kind == "blank":
            content[:4096] = bytes(4096)
        for _ in range({"flip": 1, "burst": 40, "blank": 0}[kind]):
            content[rng.randrange(100, 4096)] ^= 1 << rng.randrange(8)
        (folder / FILE).write_bytes(bytes(content))
        said = repair(folder)
        hidden += any("page that says where" in line for line in said)
        assert [run["samples"] for run in read(folder)] == whole, said
        assert list(folder.glob("*.damaged-*")) if said else not list(folder.glob("*.damaged-*"))
        shutil.rmtree(folder)
    assert hidden > (0 if source == "closed" else -1)


def test_rows_between_two_damaged_places_are_kept(tmp_path: Path) -> None:
    """SQLite stops at the first from either end."""
    fill(tmp_path / "live")
    folder = tmp_path / "closed"
    db = sqlite3.connect(folder / FILE)
    ords = [ord for (ord,) in db.execute("SELECT ord FROM chunks ORDER BY ord")]
    bodies = {ord: body for ord, body in db.execute("SELECT ord, body FROM chunks")}
    db.close()
    content = bytearray((folder / FILE).read_bytes())
    hit = list[int]()
    for share in (0.25, 0.5, 0.75):  # the page that a row in the middle of each part lies on
        page = content.index(bodies[ords[int(share * len(ords))]]) // 4096 * 4096
        hit += [ord for ord in ords if page <= content.find(bodies[ord]) < page + 4096]
        content[page : page + 4096] = bytes(4096)
    (folder / FILE).write_bytes(bytes(content))
    said = repair(folder)
    db = sqlite3.connect(folder / FILE)
    kept = [ord for (ord,) in db.execute("SELECT ord FROM chunks ORDER BY ord")]
    db.close()
    assert len(hit) < len(ords) // 2 and set(kept) == set(ords) - set(hit), said
    assert any("samples are lost" in line for line in said)
