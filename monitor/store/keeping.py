"""Looking after a store: backup beside a live service, restore, check, repair, removal of old runs, export.

A repair never edits a damaged file. It writes a new one from every row whose seal holds, says by name what is missing,
and keeps the damaged file beside it. What was judged from missing rows is judged again.
"""

import csv
import itertools
import os
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from monitor.errors import Failed, WrongInput
from monitor.mirroring import TensorBoard, values_of
from monitor.schema import is_run_id
from monitor.store.columns import Damaged, unpack
from monitor.store.facts import AttemptFacts, RunFacts, from_bytes, seal
from monitor.store.noting import note_event, note_samples
from monitor.store.reading import FIELDS, rows, samples
from monitor.store.store import FILE, Store
from monitor.store.tables import OF_A_RUN, TABLES, ChunkRow, EventRow, ledger_row, run_row
from monitor.wire import Event, SampleLine

KEY = {"bands": 2, "alerts": 6, "verdicts": 4}
"""How many of a row's first columns name it, where that is not its first one."""


def backup(folder: Path, target: Path) -> int:
    """Copy the store as of one moment, checked, to a file that is put in place whole. Its size in bytes."""
    if target.exists():
        raise WrongInput(f"{target}: exists; give a new name")
    store = Store(folder, read_only=True)
    partial = target.with_name(target.name + ".partial")
    try:
        partial.unlink(missing_ok=True)
        partial.touch(mode=0o600)  # as the store itself: nobody else's to read
        copy = sqlite3.connect(partial)
        store.reader().backup(copy, pages=1000, sleep=0.0)
        copy.execute("PRAGMA journal_mode=DELETE")  # one file, without a log beside it
        copy.close()
        trouble = list(itertools.islice(check(partial), 3))
        if trouble:
            raise Failed(f"{folder}: the store is damaged, and so would be its backup: {'; '.join(trouble)}")
        _sync(partial)
        partial.rename(target)
    except (OSError, sqlite3.Error) as error:
        raise Failed(f"{target}: {error}") from error
    finally:
        store.close()
        partial.unlink(missing_ok=True)
    return target.stat().st_size


def restore(source: Path, folder: Path) -> None:
    """Put a backup where there is no store yet."""
    if not source.is_file():
        raise WrongInput(f"{source}: no such backup")
    if (folder / FILE).exists():
        raise WrongInput(f"{folder}: holds a store already; move {FILE}* away first, or give another folder")
    trouble = list(itertools.islice(check(source), 3))
    if trouble:
        raise Failed(f"{source}: damaged: {'; '.join(trouble)}")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        partial = folder / (FILE + ".partial")
        partial.write_bytes(source.read_bytes())
        partial.chmod(0o600)
        _sync(partial)
        partial.rename(folder / FILE)
    except OSError as error:
        raise Failed(f"{folder}: {error.strerror or error}") from error


def check(path: Path) -> Iterator[str]:
    """Everything wrong with a store's file, in words."""
    db = sqlite3.connect(f"file:{_quoted(path)}?mode=ro", uri=True)
    db.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")
    try:
        for (line,) in db.execute("PRAGMA integrity_check(20)"):
            if line != "ok":
                yield f"SQLite: {line}"
        for table in TABLES:
            for row in _readable(db, table):
                if row is None:
                    yield f"{table}: rows that can't be read"
                elif not _whole(row):
                    yield f"{table} row {row[0]}: its seal is broken"
        yield from _missing(db)
    except sqlite3.Error as error:
        yield f"SQLite: {error}"
    finally:
        db.close()


def _missing(db: sqlite3.Connection) -> Iterator[str]:
    """Rows that others speak of and that are not there. What is no number has a broken seal, and was named for it."""
    counts: dict[tuple[int, int], int] = {}
    for ord, run_id, attempt, n, before in db.execute(
        "SELECT ord, run_id, attempt, n, before FROM chunks ORDER BY ord"
    ):
        if _whole_numbers(run_id, attempt, n, before):
            have = counts.get((run_id, attempt), 0)
            if before != have:
                yield f"run id {run_id}, attempt {attempt}: {before - have} samples are missing before chunk {ord}"
            counts[run_id, attempt] = before + n
    for table in ("events", "bands"):
        newest: dict[int, int] = {}
        for ord, run_id, prev in db.execute(f"SELECT ord, run_id, prev FROM {table} ORDER BY run_id, ord"):
            if _whole_numbers(ord, run_id, prev):
                if prev != newest.get(run_id, 0):
                    yield f"run id {run_id}: a row of {table} is missing before {ord}"
                newest[run_id] = ord
        if table == "events":
            ends = {
                row[0]: from_bytes(row[2]).event_ord
                for row in db.execute("SELECT * FROM runs")
                if _whole(row)
            }
        else:
            ends = dict(db.execute("SELECT run_id, band FROM judged"))
        for run_id, end in ends.items():
            if newest.get(run_id, 0) != end:
                yield f"run id {run_id}: its newest row of {table}, {end}, is missing"
    for row in db.execute("SELECT * FROM runs").fetchall():
        if _whole(row):
            facts = from_bytes(row[2])
            for attempt in facts.attempts:
                lost = attempt.samples - counts.get((facts.run_id, attempt.attempt), 0)
                if lost:
                    yield f"{facts.run}, attempt {attempt.attempt}: {lost} samples are missing at its end"
    for table in ("alerts", "verdicts"):
        have = dict(db.execute(f"SELECT run_id, count(*) FROM {table} GROUP BY run_id"))
        wanted = dict(db.execute(f"SELECT run_id, {table} FROM judged"))
        for run_id in sorted({*have, *wanted}):
            if have.get(run_id, 0) != wanted.get(run_id, 0):
                yield f"run id {run_id}: has {have.get(run_id, 0)} of its {wanted.get(run_id, 0)} {table}"
    ledger = db.execute("SELECT runs FROM ledger").fetchone()
    runs = db.execute("SELECT count(*) FROM runs").fetchone()
    if ledger != runs:
        yield f"runs: there are {runs[0]}, and the ledger says {'nothing' if ledger is None else ledger[0]}"


def _whole_numbers(*cells: Any) -> bool:
    return all(type(cell) is int for cell in cells)


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
        for old in fresh.glob("*"):
            old.unlink()
        store = Store(fresh)
        try:
            said += _rescue(path, store)
        finally:
            store.close()
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        for suffix in ("", "-wal", "-shm"):
            damaged = folder / (FILE + suffix)
            if damaged.exists():
                damaged.rename(folder / f"{FILE}{suffix}.damaged-{stamp}")
        (fresh / FILE).rename(path)
        for old in fresh.glob("*"):
            old.unlink()
        fresh.rmdir()
        return said
    except (OSError, sqlite3.Error) as error:
        raise Failed(f"{folder}: {error}") from error
    finally:
        holder.close()


def _rescue(path: Path, store: Store) -> list[str]:
    """Copy every whole row; make up the facts of runs from their samples and events where need be."""
    old = sqlite3.connect(f"file:{_quoted(path)}?mode=ro", uri=True)
    old.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")
    said: list[str] = []
    hurt: set[int] = set()
    db = store.connection
    db.execute("BEGIN IMMEDIATE")
    try:
        for table in ("chunks", "events"):
            for row in _readable(old, table):
                if row is None or not _whole(row):
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
        for row in _readable(old, "runs"):
            if row is not None and _whole(row):
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
                if not _whole(row):
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
    except (Damaged, sqlite3.DatabaseError):
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
            cells = replace(ChunkRow.of(list(row[:-1])), before=have).row()
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
        attempt = facts.attempt_facts(part.attempt)
        if attempt is None:
            attempt = AttemptFacts(part.attempt)
            facts.attempts = [*facts.attempts, attempt]
        if isinstance(part, EventRow):
            note_event(
                facts,
                attempt,
                Event(facts.run, part.attempt, part.kind, part.fields, part.digest, None),
                part,
            )
        else:
            columns = unpack(part.body)
            lines = [
                SampleLine(facts.run, part.attempt, int(s), int(t), x)
                for s, t, x in zip(
                    columns.get("seq"), columns.get("step"), columns.get("loss").tolist(), strict=True
                )
            ]
            attempt.samples += len(lines)
            note_samples(facts, attempt, lines, part.received)
        facts.last_ord, facts.last_received = part.ord, part.received
        if isinstance(part, EventRow):
            facts.event_ord = part.ord
    return facts


def _readable(db: sqlite3.Connection, table: str) -> Iterator[tuple[Any, ...] | None]:
    """Every row that SQLite can still give, from both ends of the table; None once where it could not go on."""
    key = KEY.get(table, 1)
    seen: set[Any] = set()
    for direction in ("ASC", "DESC"):
        order = ", ".join(f"{i} {direction}" for i in range(1, key + 1))
        try:
            for row in db.execute(f"SELECT * FROM {table} ORDER BY {order}"):
                if row[:key] not in seen:
                    seen.add(row[:key])
                    yield row
            return
        except sqlite3.DatabaseError:
            if direction == "ASC":
                yield None


def _whole(row: tuple[Any, ...]) -> bool:
    return seal(*row[:-1]) == row[-1]


def export(folder: Path, run: str, target: Path | None, out: Any) -> int:
    """A run's samples as a curves file (CSV or, by its name, Parquet) that `losscast replay` and `fit` read. Their number.

    A `target` without a suffix is a folder for TensorBoard.
    """
    if not is_run_id(run):
        raise WrongInput(f"{run!r} is no run's name")
    store = Store(folder, read_only=True)
    try:
        facts = store.run(run)
        if facts is None:
            raise WrongInput(
                f"{folder}: has no run {run}; it has {', '.join(f.run for f in store.runs()[:8]) or 'none'}"
            )
        names = ("run", "attempt", *FIELDS)
        table = itertools.chain.from_iterable(rows(samples(store, facts, [])))
        if target is not None and target.suffix == "":
            return _tensorboard(target, run, list(table))
        if target is not None and target.suffix == ".parquet":
            return _parquet(target, run, names, list(table))
        count = 0
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(names)
        for row in table:
            row["run"] = run
            writer.writerow(["" if row.get(name) is None else row[name] for name in names])
            count += 1
        return count
    except (Damaged, OSError) as error:
        raise Failed(f"{error}") from error
    finally:
        store.close()


def _parquet(target: Path, run: str, names: tuple[str, ...], table: list[dict[str, Any]]) -> int:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise Failed("Parquet needs pyarrow: pip install 'losscast[parquet]', or export to .csv") from None
    columns: dict[str, Any] = {"run": [run] * len(table)}
    for name in names[1:]:
        values = [row.get(name) for row in table]
        if name in ("step", "attempt"):
            columns[name] = pa.array(values, pa.int64())
        elif any(v is not None for v in values):
            columns[name] = pa.array([None if v is None else float(v) for v in values], pa.float64())
    partial = target.with_name(target.name + ".partial")
    pq.write_table(pa.table(columns), partial)
    partial.rename(target)
    return len(table)


def _tensorboard(folder: Path, run: str, table: list[dict[str, Any]]) -> int:
    """An event file of every number there is, under FOLDER/RUN, with what was expected beside what was."""
    sink = TensorBoard(run, folder)
    for row in table:
        time_s = row.get("time")
        at = time_s if isinstance(time_s, float) else 0.0
        sink.tell(int(row["step"]), at, values_of({name: row.get(name) for name in FIELDS}))
    sink.close()
    return len(table)


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _quoted(path: Path) -> str:
    from urllib.parse import quote

    return quote(str(path))
