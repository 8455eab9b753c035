"""Everything that is wrong with a store's file, in words: rows whose seal is broken, and rows that others speak of and that
are not there."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from monitor.store.facts import from_bytes, seal
from monitor.store.query import quoted
from monitor.store.tables import TABLES

KEY = {"bands": 2, "alerts": 6, "verdicts": 4}
"""How many of a row's first columns name it, where that is not its first one."""


DAMAGE = (sqlite3.Error, UnicodeDecodeError)
"""What sqlite3 raises for damage: the second where the text of its error quotes damaged bytes."""


def words(error: Exception) -> str:
    """What is wrong, also where sqlite3 could not say it."""
    return "it holds bytes that are no text" if isinstance(error, UnicodeDecodeError) else str(error)


def check(path: Path) -> Iterator[str]:
    """Everything wrong with a store's file, in words."""
    db = sqlite3.connect(f"file:{quoted(path)}?mode=ro", uri=True)
    db.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")
    try:
        for (line,) in db.execute("PRAGMA integrity_check(20)"):
            if line != "ok":
                yield f"SQLite: {line}"
        for table in TABLES:
            for row in readable(db, table):
                if row is None:
                    yield f"{table}: rows that can't be read"
                elif not whole(row):
                    yield f"{table} row {row[0]}: its seal is broken"
        yield from _missing(db)
    except DAMAGE as error:
        yield f"SQLite: {words(error)}"
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
                row[0]: from_bytes(row[2]).event_ord for row in db.execute("SELECT * FROM runs") if whole(row)
            }
        else:
            ends = dict(db.execute("SELECT run_id, band FROM judged"))
        for run_id, end in ends.items():
            if newest.get(run_id, 0) != end:
                yield f"run id {run_id}: its newest row of {table}, {end}, is missing"
    for row in db.execute("SELECT * FROM runs").fetchall():
        if whole(row):
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


def readable(db: sqlite3.Connection, table: str) -> Iterator[tuple[Any, ...] | None]:
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
        except DAMAGE:
            if direction == "ASC":
                yield None


def whole(row: tuple[Any, ...]) -> bool:
    return seal(*row[:-1]) == row[-1]
