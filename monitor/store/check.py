"""Everything that is wrong with a store's file, in words: rows whose seal is broken, and rows that others speak of and that
are not there."""

import contextlib
import sqlite3
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from monitor.store.facts import from_bytes, seal
from monitor.store.query import quoted
from monitor.store.tables import TABLES

NEAR = 4096
"""Rows that a damaged page can hide, about: so far each number is tried."""
LAST = 2**62
MOST_PLACES = 1000
"""Damaged places of a table after which nothing more is looked for in it."""
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
    """Every row that SQLite can still give, on both sides of each damaged place; None once where there is one."""
    if table in KEY:
        return _from_both_ends(db, table, KEY[table])
    return _around(db, table)


def _from_both_ends(db: sqlite3.Connection, table: str, key: int) -> Iterator[tuple[Any, ...] | None]:
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


def _around(db: sqlite3.Connection, table: str) -> Iterator[tuple[Any, ...] | None]:
    """Of a table whose rows have a number, their first column: where one can't be read, the next that can is looked for."""
    following = 0
    for places in range(MOST_PLACES):
        newest: deque[tuple[Any, ...]] = deque(maxlen=32)  # a number counts only where its row's seal holds
        try:
            for row in db.execute(f"SELECT * FROM {table} WHERE rowid>=? ORDER BY rowid", (following,)):
                yield row
                newest.append(row)
            return
        except DAMAGE:
            if places == 0:
                yield None
        following = max([following, *(row[0] + 1 for row in newest if whole(row))])
        # Python's cursor reads one row ahead, and gives the one before a damaged place to nobody
        with contextlib.suppress(*DAMAGE):
            last = _row_from(db, table, following)
            if last is not None and whole(last):
                yield last
                following = last[0] + 1
        beyond = _next_readable(db, table, following)
        if beyond is None:
            return
        following = beyond


def _row_from(db: sqlite3.Connection, table: str, number: int) -> tuple[Any, ...] | None:
    return db.execute(f"SELECT * FROM {table} WHERE rowid>=? ORDER BY rowid LIMIT 1", (number,)).fetchone()


def _next_readable(db: sqlite3.Connection, table: str, unread: int) -> int | None:
    """A number after `unread` from which rows can be read again: about the first; None where there is none."""

    def reads(number: int) -> bool | None:
        """None: there is nothing from this number on."""
        try:
            return None if _row_from(db, table, number) is None else True
        except DAMAGE:
            return False

    bad, good, said = unread, unread, False
    while said is False and good < LAST:
        far = good - unread
        bad, good = good, min(good + (1 if far < NEAR else far // 8), LAST)
        said = reads(good)  # what lies between two damaged places is not jumped over
    while good - bad > 1:
        middle = (bad + good) // 2
        found = reads(middle)
        if found is False:
            bad = middle
        else:
            good, said = middle, found
    return good if said else None


def whole(row: tuple[Any, ...]) -> bool:
    return seal(*row[:-1]) == row[-1]
