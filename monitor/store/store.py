"""The store: one SQLite file, one writer, every row sealed with a CRC.

What is accepted gets an ordinal; chunks of samples and events share one sequence of them, which is the order in which
the judge sees a run, live and when it replays after a restart. Everything is committed with synchronous=FULL, so a
commit that returned is on disk.

One connection writes and checkpoints (SQLite before 3.51.3 can corrupt a WAL database that two connections write);
readers are read-only connections, one a thread, short transactions, no mmap.
"""

import fcntl
import json
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from monitor.errors import Failed
from monitor.store.columns import Damaged
from monitor.store.facts import RunFacts, from_bytes, seal, to_bytes

SCHEMA_VERSION = 1
FILE = "losscast.db"

_SCHEMA = """
CREATE TABLE runs (run_id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, facts BLOB NOT NULL, crc INTEGER NOT NULL);
CREATE TABLE chunks (ord INTEGER PRIMARY KEY, run_id INTEGER NOT NULL, attempt INTEGER NOT NULL,
    n INTEGER NOT NULL, before INTEGER NOT NULL, first_seq INTEGER NOT NULL, last_seq INTEGER NOT NULL,
    first_step INTEGER NOT NULL, last_step INTEGER NOT NULL, received REAL NOT NULL,
    head INTEGER NOT NULL, body BLOB NOT NULL, crc INTEGER NOT NULL);
CREATE INDEX chunks_of_run ON chunks (run_id, attempt, ord);
CREATE TABLE events (ord INTEGER PRIMARY KEY, run_id INTEGER NOT NULL, attempt INTEGER NOT NULL, kind TEXT NOT NULL,
    digest BLOB NOT NULL, received REAL NOT NULL, body TEXT NOT NULL, crc INTEGER NOT NULL);
CREATE UNIQUE INDEX events_once ON events (run_id, attempt, digest);
CREATE TABLE judged (run_id INTEGER PRIMARY KEY, cursor INTEGER NOT NULL, state BLOB NOT NULL, last TEXT NOT NULL,
    crc INTEGER NOT NULL);
CREATE TABLE bands (run_id INTEGER NOT NULL, attempt INTEGER NOT NULL, ord INTEGER NOT NULL, part INTEGER NOT NULL,
    body BLOB NOT NULL, crc INTEGER NOT NULL, PRIMARY KEY (run_id, attempt, ord, part)) WITHOUT ROWID;
CREATE TABLE alerts (run_id INTEGER NOT NULL, attempt INTEGER NOT NULL, alert TEXT NOT NULL, severity TEXT NOT NULL,
    step INTEGER NOT NULL, since_step INTEGER NOT NULL, value REAL, expected REAL, special TEXT,
    opened_received REAL NOT NULL, resolved_step INTEGER, closed_received REAL,
    PRIMARY KEY (run_id, attempt, alert, severity, step)) WITHOUT ROWID;
CREATE TABLE verdicts (run_id INTEGER NOT NULL, attempt INTEGER NOT NULL, step INTEGER NOT NULL, ord INTEGER NOT NULL,
    received REAL NOT NULL, body TEXT NOT NULL, PRIMARY KEY (run_id, ord, attempt, step)) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class ChunkRow:
    """Samples of one attempt that were committed together."""

    ord: int
    run_id: int
    attempt: int
    n: int
    before: int
    """Samples of this attempt that came before: a chunk that is missing leaves a hole that shows."""
    first_seq: int
    last_seq: int
    first_step: int
    last_step: int
    received: float
    body: bytes

    def row(self) -> tuple[Any, ...]:
        """As the table holds it: `head` seals what a query chooses rows by, `crc` all of it."""
        cells = (self.ord, self.run_id, self.attempt, self.n, self.before, self.first_seq, self.last_seq,
                 self.first_step, self.last_step, self.received)  # fmt: skip
        whole = (*cells, seal(*cells), self.body)
        return (*whole, seal(*whole))

    @classmethod
    def of(cls, cells: list[Any]) -> "ChunkRow":
        """Back from the table's cells, without the `crc`."""
        return cls(*(cells[:10] + cells[11:]))


@dataclass(frozen=True, slots=True)
class EventRow:
    """Any other event, its body as JSON."""

    ord: int
    run_id: int
    attempt: int
    kind: str
    digest: bytes
    received: float
    body: str

    def row(self) -> tuple[Any, ...]:
        cells = (self.ord, self.run_id, self.attempt, self.kind, self.digest, self.received, self.body)
        return (*cells, seal(*cells))

    @property
    def fields(self) -> dict[str, Any]:
        return json.loads(self.body)


@dataclass(slots=True)
class Judged:
    """What the judge made of a run up to `cursor`: goes to disk in one transaction, or not at all."""

    run_id: int
    cursor: int
    state: bytes
    last: str
    """The newest verdict, its open alerts and advice, as JSON."""
    bands: list[tuple[int, int, int, bytes]] = field(default_factory=list)
    """attempt, ord, part, packed columns"""
    opened: list[tuple[Any, ...]] = field(default_factory=list)
    """attempt, alert, severity, step, since_step, value, expected, special, received"""
    closed: list[tuple[Any, ...]] = field(default_factory=list)
    """resolved_step, received, alert"""
    verdicts: list[tuple[int, int, int, float, str]] = field(default_factory=list)
    """attempt, step, ord, received, JSON"""


class Store:
    """Opened by one process at a time. `write` is called from one thread only; the readers from any."""

    def __init__(self, folder: Path, *, read_only: bool = False):
        self.folder = folder
        self.path = folder / FILE
        self._local = threading.local()
        self._readers: list[sqlite3.Connection] = []
        self._lock_file: IO[str] | None = None
        if read_only:
            if not self.path.exists():
                raise Failed(f"no store in {folder}: {FILE} is missing")
            self._version(self.reader())
            return
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock_file = self.lock(folder)
            self._db = sqlite3.connect(
                self.path, isolation_level=None, check_same_thread=False, cached_statements=64
            )
            os.chmod(self.path, 0o600)
            self._prepare()
        # UnicodeDecodeError is what sqlite3 makes of an error text that quotes damaged bytes
        except (OSError, sqlite3.DatabaseError, UnicodeDecodeError) as error:
            self.close()
            raise Failed(
                f"can't open the store {self.path}: {error}; see `losscast monitor repair`"
            ) from error
        except BaseException:
            self.close()
            raise

    @staticmethod
    def lock(folder: Path) -> IO[str]:
        """Hold the store for this process, until the file is closed. Raises Failed when another one does."""
        held = open(folder / "lock", "a+")  # noqa: SIM115 - held for the process's life
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            held.seek(0)
            holder = held.read(20).strip()
            held.close()
            raise Failed(
                f"the store {folder} is in use by another monitor (pid {holder or 'unknown'}); stop it first"
            ) from None
        held.truncate(0)
        held.write(f"{os.getpid()}\n")
        held.flush()
        return held

    @property
    def connection(self) -> sqlite3.Connection:
        """The one that writes. Its thread's own."""
        return self._db

    def _prepare(self) -> None:
        db = self._db
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        db.execute("PRAGMA mmap_size=0")
        db.execute("PRAGMA cache_size=-32768")
        db.execute("PRAGMA wal_autocheckpoint=4000")
        db.execute("PRAGMA cell_size_check=ON")
        if not self._version(db):
            db.executescript(f"BEGIN;{_SCHEMA}PRAGMA user_version={SCHEMA_VERSION};COMMIT;")

    def _version(self, db: sqlite3.Connection) -> int:
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise Failed(
                f"the store {self.path} has version {version}, newer than this losscast knows ({SCHEMA_VERSION}); "
                f"run the losscast that wrote it"
            )
        return version

    # the writer

    def last_ord(self) -> int:
        """The newest ordinal in use; 0 for an empty store."""
        return max(
            self._db.execute(f"SELECT coalesce(max(ord), 0) FROM {table}").fetchone()[0]
            for table in ("chunks", "events")
        )

    def write(
        self,
        chunks: list[ChunkRow],
        events: list[EventRow],
        runs: list[RunFacts],
        judged: list[Judged],
        removed: Sequence[int] = (),
    ) -> None:
        """Commit all of it, or raise sqlite3.Error and leave the store as it was."""
        db = self._db
        db.execute("BEGIN IMMEDIATE")
        try:
            if runs:
                sealed = []
                for facts in runs:
                    blob = to_bytes(facts)
                    sealed.append((facts.run_id, facts.run, blob, seal(facts.run_id, facts.run, blob)))
                db.executemany(
                    "INSERT INTO runs VALUES (?,?,?,?) ON CONFLICT (run_id) DO UPDATE SET facts=excluded.facts, "
                    "crc=excluded.crc",
                    sealed,
                )
            if chunks:
                db.executemany(
                    "INSERT INTO chunks VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?)", [c.row() for c in chunks]
                )
            if events:
                db.executemany("INSERT INTO events VALUES (?,?,?,?,?,?,?,?)", [e.row() for e in events])
            for found in judged:
                self._write_judged(db, found)
            for run_id in removed:
                for table in ("chunks", "events", "judged", "bands", "alerts", "verdicts", "runs"):
                    db.execute(f"DELETE FROM {table} WHERE run_id=?", (run_id,))
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise

    def _write_judged(self, db: sqlite3.Connection, j: Judged) -> None:
        db.execute(
            "INSERT OR REPLACE INTO judged VALUES (?,?,?,?,?)",
            (j.run_id, j.cursor, j.state, j.last, seal(j.run_id, j.cursor, j.state, j.last)),
        )
        db.executemany(
            "INSERT OR REPLACE INTO bands VALUES (?,?,?,?,?,?)",
            [(j.run_id, a, o, p, body, seal(j.run_id, a, o, p, body)) for a, o, p, body in j.bands],
        )
        db.executemany(
            "INSERT OR IGNORE INTO alerts VALUES (?,?,?,?,?,?,?,?,?,?,NULL,NULL)",
            [(j.run_id, *row) for row in j.opened],
        )
        db.executemany(
            "UPDATE alerts SET resolved_step=?, closed_received=? WHERE run_id=? AND alert=? AND step<=? AND resolved_step IS NULL",
            [(step, at, j.run_id, alert, step) for step, at, alert in j.closed],
        )
        db.executemany(
            "INSERT OR REPLACE INTO verdicts VALUES (?,?,?,?,?,?)", [(j.run_id, *v) for v in j.verdicts]
        )

    # the readers

    def reader(self) -> sqlite3.Connection:
        """This thread's read-only connection."""
        found = getattr(self._local, "db", None)
        if found is None:
            found = sqlite3.connect(f"file:{_quoted(self.path)}?mode=ro", uri=True, isolation_level=None,
                                    check_same_thread=False)  # fmt: skip
            found.execute("PRAGMA query_only=ON")
            found.execute("PRAGMA mmap_size=0")
            self._local.db = found
            self._readers.append(found)
        return found

    def _read(self, sql: str, cells: Sequence[Any] = ()) -> Iterator[Any]:
        """Rows of a query. Raises Damaged where the file is, sqlite3.OperationalError where it can't be read just now."""
        try:
            yield from self.reader().execute(sql, cells)
        except UnicodeDecodeError as error:  # an error text that quotes damaged bytes
            raise self._damaged("it holds bytes that are no text") from error
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            raise self._damaged(str(error)) from error

    def _damaged(self, what: str) -> Damaged:
        return Damaged(f"{self.path}: {what}; see `losscast monitor repair`")

    def runs(self) -> list[RunFacts]:
        """Every run. Raises Damaged where a row's seal is broken."""
        out = []
        for run_id, name, blob, crc in self._read("SELECT run_id, name, facts, crc FROM runs"):
            if seal(run_id, name, blob) != crc:
                raise self._damaged(f"the row of run {name!r} is damaged")
            out.append(from_bytes(blob))
        return out

    def run(self, name: str) -> RunFacts | None:
        """One run by name."""
        row = next(self._read("SELECT run_id, name, facts, crc FROM runs WHERE name=?", (name,)), None)
        if row is None:
            return None
        if seal(*row[:3]) != row[3]:
            raise self._damaged(f"the row of run {name!r} is damaged")
        return from_bytes(row[2])

    def chunks(
        self, run_id: int, attempt: int | None = None, *, after: int = 0, first: int = 0, last: int = 2**53,
        limit: int = -1
    ) -> Iterator[ChunkRow]:  # fmt: skip
        """Chunks in the order of their ordinals that hold steps of first..last. Raises Damaged."""
        where, cells = "run_id=? AND ord>?", [run_id, after]
        if attempt is not None:
            where, cells = f"{where} AND attempt=?", [*cells, attempt]
        if first > 0 or last < 2**53:  # not for all of them: a damaged step would be passed over unseen
            where, cells = f"{where} AND last_step>=? AND first_step<=?", [*cells, first, last]
        for *row, crc in self._read(
            f"SELECT * FROM chunks WHERE {where} ORDER BY ord LIMIT ?", (*cells, limit)
        ):
            if seal(*row) != crc:
                raise self._damaged(f"chunk {row[0]} of run id {run_id} is damaged")
            yield ChunkRow.of(row)

    def tail(self, after: int, rows: int, samples: int) -> list[ChunkRow | EventRow]:
        """What was committed after an ordinal, of all runs, in order: at most `rows` chunks, about `samples` in them.

        Raises Damaged.
        """
        found: list[ChunkRow | EventRow] = []
        most = 2**62
        for *row, crc in self._read("SELECT * FROM chunks WHERE ord>? ORDER BY ord", (after,)):
            if seal(*row) != crc:
                raise self._damaged(f"chunk {row[0]} of run id {row[1]} is damaged")
            found.append(ChunkRow.of(row))
            samples -= row[3]
            if samples <= 0 or len(found) >= rows:
                most = row[0]
                break
        chunks = len(found)
        for *row, crc in self._read(
            "SELECT * FROM events WHERE ord>? AND ord<=? ORDER BY ord LIMIT ?", (after, most, 5 * rows)
        ):
            if seal(*row) != crc:
                raise self._damaged(f"event {row[0]} of run id {row[1]} is damaged")
            found.append(EventRow(*row))
        if len(found) - chunks == 5 * rows:  # so many that they were cut: nothing past the last of them
            most = found[-1].ord
            found = [row for row in found if row.ord <= most]
        found.sort(key=_ord)
        return found

    def heads(self, after: int, limit: int) -> list[tuple[int, int, float]]:
        """(ord, run_id, received) of what was committed after an ordinal, of all runs, in order."""
        return list(self._read(
            "SELECT ord, run_id, received FROM chunks WHERE ord>?1 UNION ALL SELECT ord, run_id, received FROM events "
            "WHERE ord>?1 ORDER BY ord LIMIT ?2", (after, limit),
        ))  # fmt: skip

    def newest_ord(self) -> int:
        """The newest ordinal that can be read."""
        return max(
            next(self._read(f"SELECT coalesce(max(ord), 0) FROM {table}"))[0]
            for table in ("chunks", "events")
        )

    def seqs(self, run_id: int, attempt: int) -> Iterator[tuple[int, int, int, int]]:
        """(ord, n, first_seq, last_seq) of the attempt's chunks. Raises Damaged."""
        return (
            (ord, n, first, last) for ord, _, _, n, _, first, last, *_ in self._chunk_heads(run_id, attempt)
        )

    def count_between(self, run_id: int, attempt: int, after: int, before: int) -> int:
        """Samples of the attempt in chunks strictly between two ordinals.

        Raises Damaged where a chunk's head is: a query that chose by steps may have passed over it wrongly.
        """
        return sum(cells[3] for cells in self._chunk_heads(run_id, attempt, after, before))

    def _chunk_heads(
        self, run_id: int, attempt: int, after: int = 0, before: int = 2**62
    ) -> Iterator[list[Any]]:
        """What chunks of an attempt hold before their bodies, in order. Raises Damaged."""
        for *cells, head in self._read(
            "SELECT ord, run_id, attempt, n, before, first_seq, last_seq, first_step, last_step, received, head "
            "FROM chunks WHERE run_id=? AND attempt=? AND ord>? AND ord<? ORDER BY ord",
            (run_id, attempt, after, before),
        ):
            if seal(*cells) != head:
                raise self._damaged(f"chunk {cells[0]} of run id {run_id} is damaged")
            yield cells

    def chunk(self, ord: int) -> ChunkRow:
        """One chunk. Raises Damaged."""
        row = next(self._read("SELECT * FROM chunks WHERE ord=?", (ord,)), None)
        if row is None or seal(*row[:-1]) != row[-1]:
            raise self._damaged(f"chunk {ord} is damaged")
        return ChunkRow.of(list(row[:-1]))

    def events(self, run_id: int, *, after: int = 0, last: int = 2**62, limit: int = -1) -> list[EventRow]:
        """Events after an ordinal, in order. Raises Damaged."""
        out = []
        for *row, crc in self._read(
            "SELECT * FROM events WHERE run_id=? AND ord>? AND ord<=? ORDER BY ord LIMIT ?",
            (run_id, after, last, limit),
        ):
            if seal(*row) != crc:
                raise self._damaged(f"event {row[0]} of run id {run_id} is damaged")
            out.append(EventRow(*row))
        return out

    def has_event(self, run_id: int, attempt: int, digest: bytes) -> bool:
        """True when this very event was taken before."""
        found = self._read(
            "SELECT 1 FROM events WHERE run_id=? AND attempt=? AND digest=?", (run_id, attempt, digest)
        )
        return next(found, None) is not None

    def lasts(self) -> dict[int, tuple[int, dict[str, Any]]]:
        """The judge's cursor and newest verdict, by run id."""
        rows = self._read("SELECT run_id, cursor, last FROM judged")
        return {run_id: (cursor, json.loads(last)) for run_id, cursor, last in rows}

    def judged(self, run_id: int) -> tuple[int, bytes] | None:
        """The judge's cursor and state. Raises Damaged."""
        row = next(
            self._read("SELECT run_id, cursor, state, last, crc FROM judged WHERE run_id=?", (run_id,)), None
        )
        if row is None:
            return None
        if seal(*row[:4]) != row[4]:
            raise self._damaged(f"the judge's state of run id {run_id} is damaged")
        return row[1], row[2]

    def bands(self, run_id: int, attempt: int, first: int = 0, last: int = 2**62) -> list[bytes]:
        """Packed columns of what was expected of the chunks with these ordinals, in order. Raises Damaged.

        A row is for the chunks up to its ordinal, from the row before on.
        """
        out = []
        for *row, crc in self._read(
            "SELECT * FROM bands WHERE run_id=?1 AND attempt=?2 AND ord>=?3 AND ord<=coalesce("
            "(SELECT min(ord) FROM bands WHERE run_id=?1 AND attempt=?2 AND ord>=?4), ?4) ORDER BY ord, part",
            (run_id, attempt, first, last),
        ):
            if seal(*row) != crc:
                raise self._damaged(f"band {row[2]} of run id {run_id} is damaged")
            out.append(row[4])
        return out

    def alerts(self, run_id: int, *, open_only: bool = False) -> list[dict[str, Any]]:
        """Alerts as they were called, oldest first."""
        names = ("attempt", "alert", "severity", "step", "since_step", "value", "expected", "special",
                 "opened_received", "resolved_step", "closed_received")  # fmt: skip
        out = []
        for row in self._read(
            f"SELECT {', '.join(names)} FROM alerts WHERE run_id=? {'AND resolved_step IS NULL' if open_only else ''} "
            "ORDER BY opened_received, step",
            (run_id,),
        ):
            alert = dict[str, Any](zip(names, row, strict=True))
            special = alert.pop("special")
            if special:
                alert["value"] = special
            alert["opened_time"] = alert.pop("opened_received")
            alert["closed_time"] = alert.pop("closed_received")
            out.append(alert)
        return out

    def verdicts(self, run_id: int) -> list[dict[str, Any]]:
        """Changes of state, oldest first."""
        return [
            {**json.loads(body), "attempt": attempt, "time": received}
            for attempt, received, body in self._read(
                "SELECT attempt, received, body FROM verdicts WHERE run_id=? ORDER BY ord, attempt, step",
                (run_id,),
            )
        ]

    def size_bytes(self) -> int:
        """The store's files together."""
        return sum(p.stat().st_size for p in self.folder.glob(f"{FILE}*") if p.exists())

    def free_bytes(self) -> int:
        """Room left where the store lies."""
        room = os.statvfs(self.folder)
        return room.f_bavail * room.f_frsize

    def close(self) -> None:
        """Let go of the files and the lock."""
        for db in self._readers:
            db.close()
        self._readers.clear()
        if getattr(self, "_db", None) is not None:
            self._db.close()
        if self._lock_file is not None:
            self._lock_file.close()


def _ord(row: ChunkRow | EventRow) -> int:
    return row.ord


def _quoted(path: Path) -> str:
    from urllib.parse import quote

    return quote(str(path))
