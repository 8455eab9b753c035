"""P2: bytes cut, flipped and blanked in the store. Whatever is read is what was sent, or the damage is named; a log that
was cut short may lose its newest commits, whole ones, and never one from the middle."""

import os
import random
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from monitor.errors import Failed
from monitor.store.columns import Damaged
from monitor.store.ingest import Ingest
from monitor.store.keeping import repair
from monitor.store.reading import rows, samples
from monitor.store.store import FILE, Store
from monitor.wire import parse
from tests.monitor.test_ingest import sample

LONG = os.environ.get("LOSSCAST_FAULTS") == "long"
DAMAGES = 4000 if LONG else 400
RUNS, COMMITS, EACH = 3, 30, 8

pytestmark = pytest.mark.faults


def loss(run: int, seq: int) -> float:
    return 2.0 + run + seq / 1000


def fill(folder: Path) -> None:
    store = Store(folder)
    ingest = Ingest(store)
    ingest.start()
    for commit in range(COMMITS):
        body = b"".join(
            sample(f"r{run}", 1, s, s + 1, loss(run, s))
            for run in range(RUNS)
            for s in range(commit * EACH, (commit + 1) * EACH)
        )
        ingest.submit(parse(body)).result(10)
    ingest.stop()
    # as a kill leaves it: with the log beside it
    shutil.copytree(folder, folder.with_name("good"), ignore=shutil.ignore_patterns("lock", "*-shm"))
    store.close()
    shutil.copytree(folder, folder.with_name("closed"), ignore=shutil.ignore_patterns("lock", "*-shm"))


def read(folder: Path) -> list[list[Any]]:
    """What each run shows, as the API gives it. Raises what the API turns into a 503."""
    store = Store(folder)
    try:
        found = {facts.run: facts for facts in store.runs()}
        out = []
        for run in range(RUNS):
            facts = found.get(f"r{run}")
            table = [] if facts is None else [r for block in rows(samples(store, facts, [])) for r in block]
            assert facts is None or facts.samples == len(table), (
                "the run's own count and its samples disagree"
            )
            out.append([(r["step"], r["loss"]) for r in table])
        return out
    finally:
        store.close()


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


def test_damage_is_loud_or_harmless_never_a_silent_hole(tmp_path: Path) -> None:
    fill(tmp_path / "live")
    whole = [[(s + 1, loss(run, s)) for s in range(COMMITS * EACH)] for run in range(RUNS)]
    assert read(tmp_path / "good") == whole and read(tmp_path / "closed") == whole
    shutil.rmtree(tmp_path / "good")
    shutil.rmtree(tmp_path / "closed")
    shutil.rmtree(tmp_path / "live")
    fill(tmp_path / "live")
    rng = random.Random(2)  # what is hit differs all the same: the rows hold times
    named = harmless = shorter = 0
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
            else:
                assert path.name.endswith("-wal"), (
                    f"{i}: {what}: something else was shown, and nobody was told"
                )
                kept = len(got[0])
                assert kept % EACH == 0 and got == [run[:kept] for run in whole], f"{i}: {what}"
                shorter += 1
        shutil.rmtree(folder)
    print(
        f"{DAMAGES} damages: {named} named, {harmless} harmless, {shorter} back at an earlier commit, 0 silent"
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
                        assert any(value == loss(run, int(step) - 1) for run in range(RUNS)), what
        finally:
            store.close()
        repaired += bool(said)
        shutil.rmtree(folder)
    assert repaired > 5
