"""The store: one SQLite file, one writer, every row sealed with a CRC.

What is accepted gets an ordinal; chunks of samples and events share one sequence of them, which is the order in which
the judge sees a run, live and when it replays after a restart. Everything is committed with synchronous=FULL, so a
commit that returned is on disk.

One connection writes and checkpoints (SQLite before 3.51.3 can corrupt a WAL database that two connections write);
readers (`monitor.store.query`) are read-only connections.
"""

import fcntl
import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from monitor.errors import GIVE_A_STORE, Failed, unwritable
from monitor.store.facts import RunFacts, seal
from monitor.store.query import Reader
from monitor.store.tables import (
    OF_A_RUN,
    SCHEMA,
    SCHEMA_VERSION,
    BandRow,
    ChunkRow,
    EventRow,
    Judged,
    Merge,
    judged_row,
    ledger_row,
    run_row,
)

FILE = "losscast.db"


class Store(Reader):
    """Opened by one process at a time. `write` is called from one thread only; the readers from any."""

    def __init__(self, folder: Path, *, read_only: bool = False):
        super().__init__(folder / FILE)
        self.folder = folder
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
        except OSError as error:
            self.close()
            raise unwritable(folder, error, GIVE_A_STORE) from error
        # UnicodeDecodeError is what sqlite3 makes of an error text that quotes damaged bytes
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
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
            first = "INSERT INTO ledger VALUES ({}, {}, {});".format(*ledger_row(0))
            db.executescript(f"BEGIN;{SCHEMA}{first}PRAGMA user_version={SCHEMA_VERSION};COMMIT;")

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
        added: int = 0,
    ) -> None:
        """Commit all of it, or raise sqlite3.Error and leave the store as it was.

        added    how many of `runs` are new
        removed  ids of runs that are to go, with all that is kept of them
        """
        db = self._db
        db.execute("BEGIN IMMEDIATE")
        try:
            if runs:
                db.executemany(
                    "INSERT INTO runs VALUES (?,?,?,?) ON CONFLICT (run_id) DO UPDATE SET facts=excluded.facts, "
                    "crc=excluded.crc",
                    map(run_row, runs),
                )
            if chunks:
                db.executemany(f"INSERT INTO chunks VALUES ({','.join('?' * 14)})", [c.row() for c in chunks])
            if events:
                db.executemany("INSERT INTO events VALUES (?,?,?,?,?,?,?,?,?)", [e.row() for e in events])
            for found in judged:
                self._write_judged(db, found)
            for run_id in removed:
                for table in (*OF_A_RUN, "runs"):
                    db.execute(f"DELETE FROM {table} WHERE run_id=?", (run_id,))
            if added or removed:
                _, count, crc = db.execute("SELECT one, runs, crc FROM ledger").fetchone() or (1, 0, None)
                if seal(1, count) == crc:  # a damaged one stays so, and is seen
                    db.execute(
                        "UPDATE ledger SET runs=?2, crc=?3 WHERE one=?1",
                        ledger_row(count + added - len(removed)),
                    )
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise

    def merge(self, merge: Merge) -> bool:
        """Put rows in the place of others; False, and all as it was, when those others are not there any more."""
        db = self._db
        db.execute("BEGIN IMMEDIATE")
        try:
            gone = [(merge.run_id, c.ord, c.n, c.before) for c in merge.old_chunks]
            found = db.executemany(
                "DELETE FROM chunks WHERE run_id=? AND ord=? AND n=? AND before=?", gone
            ).rowcount
            bands = [band.row() for band in merge.old_bands]
            found += db.executemany(
                "DELETE FROM bands WHERE run_id=? AND ord=? AND crc=?",
                [(row[0], row[1], row[-1]) for row in bands],
            ).rowcount
            if found != len(gone) + len(bands):
                db.execute("ROLLBACK")
                return False
            db.executemany(
                f"INSERT INTO chunks VALUES ({','.join('?' * 14)})", [c.row() for c in merge.chunks]
            )
            db.executemany("INSERT INTO bands VALUES (?,?,?,?,?,?)", [band.row() for band in merge.bands])
            db.execute("COMMIT")
            return True
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise

    def _write_judged(self, db: sqlite3.Connection, j: Judged) -> None:
        cursor, alerts, verdicts, band = db.execute(
            "SELECT cursor, alerts, verdicts, band FROM judged WHERE run_id=?", (j.run_id,)
        ).fetchone() or (-1, 0, 0, 0)
        if cursor != j.since:
            for table in ("bands", "alerts", "verdicts"):
                gone = db.execute(
                    f"DELETE FROM {table} WHERE run_id=? AND ord>?", (j.run_id, j.since)
                ).rowcount
                alerts -= gone if table == "alerts" else 0
                verdicts -= gone if table == "verdicts" else 0
            band = db.execute(
                "SELECT coalesce(max(ord), 0) FROM bands WHERE run_id=? AND ord<=?", (j.run_id, j.since)
            ).fetchone()[0]
            if j.since == 0:
                alerts = verdicts = 0
        rows = []
        for attempt, ord, body in j.bands:
            rows.append(BandRow(j.run_id, ord, band, attempt, body).row())
            band = ord
        db.executemany("INSERT INTO bands VALUES (?,?,?,?,?,?)", rows)
        alerts += max(0, db.executemany(
            "INSERT OR IGNORE INTO alerts VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
            [_sealed((j.run_id, *_alert(*row), None, None)) for row in j.opened],
        ).rowcount)  # fmt: skip
        for attempt, step, at, alert in j.closed:
            _close(db, j.run_id, alert, attempt, int(step), float(at))
        changes = {row[:3]: row for row in j.verdicts}
        db.executemany(
            "INSERT INTO verdicts VALUES (?,?,?,?,?,?,?)",
            [_sealed((j.run_id, *row)) for row in changes.values()],
        )
        row = judged_row(j.run_id, j.cursor, alerts, verdicts + len(changes), band, j.last, j.state)
        db.execute("INSERT OR REPLACE INTO judged VALUES (?,?,?,?,?,?,?,?,?)", row)

    def size_bytes(self) -> int:
        """The store's files together."""
        return sum(p.stat().st_size for p in self.folder.glob(f"{FILE}*") if p.exists())

    def free_bytes(self) -> int:
        """Room left where the store lies."""
        room = os.statvfs(self.folder)
        return room.f_bavail * room.f_frsize

    def close(self) -> None:
        """Let go of the files and the lock."""
        super().close()
        if getattr(self, "_db", None) is not None:
            self._db.close()
        if self._lock_file is not None:
            self._lock_file.close()


def _sealed(cells: tuple[object, ...]) -> tuple[object, ...]:
    return (*cells, seal(*cells))


def _alert(
    ord: int, attempt: int, alert: str, severity: str, step: int, since_step: int, *rest: Any
) -> tuple[object, ...]:
    """An alert's cells, of the very types that the table gives back: the seal is over these."""
    value, expected, special, received = rest
    return (ord, attempt, alert, severity, int(step), int(since_step), _real(value), _real(expected), special,
            float(received))  # fmt: skip


def _real(value: float | None) -> float | None:
    """As SQLite keeps it: NaN is NULL there."""
    return None if value is None or value != value else float(value)


def _close(db: sqlite3.Connection, run_id: int, alert: str, attempt: int, step: int, at: float) -> None:
    """Note when an alert ended: one called before, in this attempt or an older one, which may have been further. A row whose
    seal is broken is left so."""
    for *cells, crc in db.execute(
        "SELECT * FROM alerts WHERE run_id=? AND alert=? AND (attempt<? OR step<=?) AND resolved_step IS NULL",
        (run_id, alert, attempt, step),
    ).fetchall():
        if seal(*cells) == crc:
            closed = (*cells[:11], step, at)
            db.execute(
                "UPDATE alerts SET resolved_step=?, closed_received=?, crc=? "
                "WHERE run_id=? AND ord=? AND attempt=? AND alert=? AND severity=? AND step=?",
                (step, at, seal(*closed), *cells[:6]),
            )
