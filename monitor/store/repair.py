"""A damaged store made whole again, as far as it goes.

A repair never edits a damaged file. It writes a new one from every row whose seal holds, says by name what is missing,
and keeps the damaged file beside it. What was judged from missing rows is judged again.
"""

import itertools
import shutil
import sqlite3
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from monitor.errors import Failed, WrongInput
from monitor.store.check import DAMAGE, check, readable, whole, words
from monitor.store.columns import Damaged, missing, unpack
from monitor.store.facts import RunFacts, from_bytes
from monitor.store.known_schema import readable_schema, with_known_schema
from monitor.store.noting import note_attempt, note_event, note_samples
from monitor.store.query import quoted
from monitor.store.store import FILE, Store
from monitor.store.tables import OF_A_RUN, ChunkRow, EventRow, ledger_row, run_row
from monitor.wire import Event, SampleLine


def repair(folder: Path) -> list[str]:
    """Write a new store from what is whole. What is missing, in words; empty when nothing was wrong."""
    path = folder / FILE
    if not path.exists():
        raise WrongInput(f"{folder}: holds no store ({FILE} is missing)")
    holder = Store.lock(folder)
    try:
        said = list(check(path))
        if not said:
            return []
        fresh = folder / "repaired"
        shutil.rmtree(fresh, ignore_errors=True)
        source = path
        if not readable_schema(path):
            (fresh / "known").mkdir(parents=True)
            source = with_known_schema(path, fresh / "known")
            said.append(
                "the page that says where the tables are was damaged; a new store's was read in its place"
            )
        store = Store(fresh)
        try:
            said += _rescue(source, store)
        finally:
            store.close()
            shutil.rmtree(fresh / "known", ignore_errors=True)
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        for suffix in ("", "-wal", "-shm"):
            damaged = folder / (FILE + suffix)
            if damaged.exists():
                damaged.rename(folder / f"{FILE}{suffix}.damaged-{stamp}")
        (fresh / FILE).rename(path)
        shutil.rmtree(fresh)
        return said
    except (OSError, *DAMAGE) as error:
        raise Failed(f"{folder}: {words(error)}") from error
    finally:
        holder.close()


def _rescue(path: Path, store: Store) -> list[str]:
    """Copy every whole row; make up the facts of runs from their samples and events where need be."""
    old = sqlite3.connect(f"file:{quoted(path)}?mode=ro", uri=True)
    old.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")
    said: list[str] = []
    hurt: set[int] = set()
    db = store.connection
    db.execute("BEGIN IMMEDIATE")
    try:
        for table in ("chunks", "events"):
            for row in readable(old, table):
                if row is None or not whole(row):
                    said.append(
                        f"{table}: left out {'rows that could not be read' if row is None else f'row {row[0]}'}"
                    )
                    if row is not None and isinstance(row[1], int):
                        hurt.add(row[1])
                    else:
                        hurt.add(-1)
                    continue
                db.execute(f"INSERT OR IGNORE INTO {table} VALUES ({','.join('?' * len(row))})", row)
        known: dict[int, RunFacts] = {}
        for row in readable(old, "runs"):
            if row is not None and whole(row):
                known[row[0]] = from_bytes(row[2])
        ids = {
            id for (id,) in db.execute("SELECT DISTINCT run_id FROM chunks UNION SELECT run_id FROM events")
        }
        holes = _holes(db)
        hurt |= {run_id for run_id, _ in holes} | _chained(db)
        for (run_id, attempt), count in sorted(holes.items()):
            name = known[run_id].run if run_id in known else f"run id {run_id}"
            said.append(f"{name}, attempt {attempt}: {count} samples are lost")
        names = {facts.run for facts in known.values()}
        for run_id in sorted(ids | set(known)):
            facts = known.get(run_id)
            if facts is None:
                facts = RunFacts(run_id, next(f"recovered-{i}" for i in itertools.count(run_id) if f"recovered-{i}" not in names))  # fmt: skip
                names.add(facts.run)
                said.append(f"run id {run_id}: its name is lost; it is now {facts.run}")
                hurt.add(run_id)
            again = _again(db, facts)
            if run_id in hurt or -1 in hurt or _counts(again) != _counts(facts):
                facts = again
                hurt.add(run_id)
            db.execute("INSERT INTO runs VALUES (?,?,?,?)", run_row(facts))
        db.execute("UPDATE ledger SET runs=?2, crc=?3 WHERE one=?1", ledger_row(len(ids | set(known))))
        if -1 not in hurt:
            for run_id in sorted((ids | set(known)) - hurt):  # the others are judged again from the start
                _copy_judged(old, db, run_id)
        db.execute("COMMIT")
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")
        old.close()
    return said


def _counts(facts: RunFacts) -> tuple[Any, ...]:
    """What must agree with the rows that are there."""
    return facts.event_ord, facts.last_ord, facts.samples


def _copy_judged(old: sqlite3.Connection, db: sqlite3.Connection, run_id: int) -> None:
    """What was judged of a run, if it is whole to the last row; nothing otherwise."""
    db.execute("SAVEPOINT judged")
    try:
        for table in OF_A_RUN[2:]:
            for row in old.execute(f"SELECT * FROM {table} WHERE run_id=?", (run_id,)):
                if not whole(row):
                    raise Damaged(table)
                db.execute(f"INSERT INTO {table} VALUES ({','.join('?' * len(row))})", row)
        _, _, alerts, verdicts, band, *_ = (
            db.execute("SELECT * FROM judged WHERE run_id=?", (run_id,)).fetchone() or (0,) * 5
        )
        newest = 0
        for ord, prev in db.execute("SELECT ord, prev FROM bands WHERE run_id=? ORDER BY ord", (run_id,)):
            if prev != newest:
                raise Damaged("bands")
            newest = ord
        counted = tuple(
            db.execute(f"SELECT count(*) FROM {table} WHERE run_id=?", (run_id,)).fetchone()[0]
            for table in ("alerts", "verdicts")
        )
        if (newest, *counted) != (band, alerts, verdicts):
            raise Damaged("judged")
    except (Damaged, *DAMAGE):
        db.execute("ROLLBACK TO judged")
    db.execute("RELEASE judged")


def _chained(db: sqlite3.Connection) -> set[int]:
    """Ids of runs that lost events; `prev` is put right, so that the rest is whole again."""
    newest: dict[int, int] = {}
    moved, hurt = [], set[int]()
    for *row, _ in db.execute("SELECT * FROM events ORDER BY ord").fetchall():
        event = EventRow(*row)
        if event.prev != newest.get(event.run_id, 0):
            hurt.add(event.run_id)
            event = replace(event, prev=newest.get(event.run_id, 0))
            moved.append((event.prev, event.row()[-1], event.ord))
        newest[event.run_id] = event.ord
    db.executemany("UPDATE events SET prev=?, crc=? WHERE ord=?", moved)
    return hurt


def _holes(db: sqlite3.Connection) -> dict[tuple[int, int], int]:
    """Samples missing, by run id and attempt; `before` is put right, so that the rest is whole again."""
    counts: dict[tuple[int, int], int] = {}
    holes: dict[tuple[int, int], int] = {}
    moved = []
    for row in db.execute("SELECT * FROM chunks ORDER BY ord").fetchall():
        key = row[1], row[2]
        have = counts.get(key, 0)
        if row[4] != have:
            holes[key] = row[4] - have  # all that is missing so far
            cells = ChunkRow.of(list(row[:-1]))._replace(before=have).row()
            moved.append((have, cells[11], cells[13], row[0]))
        counts[key] = have + row[3]
    db.executemany("UPDATE chunks SET before=?, head=?, crc=? WHERE ord=?", moved)
    return holes


def _again(db: sqlite3.Connection, old: RunFacts) -> RunFacts:
    """What is known of a run, from its samples and events alone."""
    facts = RunFacts(old.run_id, old.run, old.owner, created_received=old.created_received)
    parts: list[ChunkRow | EventRow] = [
        ChunkRow.of(list(row[:-1]))
        for row in db.execute("SELECT * FROM chunks WHERE run_id=?", (old.run_id,))
    ]
    parts += [EventRow(*row[:-1]) for row in db.execute("SELECT * FROM events WHERE run_id=?", (old.run_id,))]
    for part in sorted(parts, key=lambda part: part.ord):
        attempt = note_attempt(facts, part.attempt, part.received)
        if isinstance(part, EventRow):
            note_event(
                facts,
                attempt,
                Event(facts.run, part.attempt, part.kind, part.fields, part.digest, None),
                part,
            )
        else:
            lines = _lines(facts.run, part)
            attempt.samples += len(lines)
            note_samples(facts, attempt, lines, part.received)
        facts.last_ord, facts.last_received = part.ord, part.received
        if isinstance(part, EventRow):
            facts.event_ord = part.ord
    facts.last_received = max(facts.last_received, old.last_received)  # most heartbeats are in no row
    return facts


def _lines(run: str, chunk: ChunkRow) -> list[SampleLine]:
    """A chunk's samples, with those of their numbers that what is known of a run is made from. Raises Damaged."""
    columns = unpack(chunk.body)
    lines = [
        SampleLine(run, chunk.attempt, int(seq), int(step), loss)
        for seq, step, loss in zip(
            columns.get("seq"), columns.get("step"), columns.get("loss").tolist(), strict=True
        )
    ]
    for name in ("time", "tokens", "tokens_per_s", "mfu"):
        column = columns.of.get(name)
        if column is not None:
            for line, value, gone in zip(lines, column.tolist(), missing(column).tolist(), strict=True):
                if not gone:
                    setattr(line, name, value)
    return lines
