"""Asking the store: read-only connections, one a thread for as long as the thread lives, short transactions, no mmap.

Nothing is passed over in silence: a row whose seal is broken, and one that should be there and is not, raise Damaged.
"""

import contextlib
import json
import sqlite3
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from monitor.store.columns import Damaged
from monitor.store.facts import RunFacts, seal
from monitor.store.tables import HEAD, BandRow, ChunkRow, EventRow, run_of

MOST = 2**62


class _Held:
    """A connection, closed when neither its thread nor a query that is not read to its end holds it any more.

    By itself it is part of a cycle (its cache of statements refers to it), and would be closed at some time or other.
    """

    __slots__ = ("__weakref__", "db")

    def __init__(self, path: Path):
        self.db = sqlite3.connect(f"file:{quoted(path)}?mode=ro", uri=True, isolation_level=None,
                                  check_same_thread=False)  # fmt: skip

    def __del__(self) -> None:
        if hasattr(self, "db"):
            self.db.close()


class Reader:
    """What can be asked of a store. Any thread."""

    def __init__(self, path: Path):
        self.path = path
        self._local = threading.local()
        self._gate = threading.Lock()
        self._held: weakref.WeakSet[_Held] = weakref.WeakSet()
        """For `close`. Held by their threads alone: a pool's threads come and go for weeks."""

    def reader(self) -> sqlite3.Connection:
        """This thread's read-only connection."""
        return self._hold().db

    def _hold(self) -> _Held:
        found: _Held | None = getattr(self._local, "held", None)
        if found is None:
            found = _Held(self.path)
            found.db.execute("PRAGMA query_only=ON")
            found.db.execute("PRAGMA mmap_size=0")
            self._local.held = found
            with self._gate:
                self._held.add(found)
        return found

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """What is asked within is answered as of one moment."""
        db = self.reader()
        if db.in_transaction:
            yield
            return
        db.execute("BEGIN")
        try:
            yield
        finally:
            db.execute("COMMIT")

    def _read(self, sql: str, cells: Sequence[Any] = ()) -> Iterator[Any]:
        """Rows of a query. Raises Damaged where the file is, sqlite3.OperationalError where it can't be read just now."""
        try:
            held = self._hold()  # by this frame, so for as long as rows are left to read
            yield from held.db.execute(sql, cells)
        except UnicodeDecodeError as error:  # an error text that quotes damaged bytes
            raise self._damaged("it holds bytes that are no text") from error
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            raise self._damaged(str(error)) from error

    def _damaged(self, what: str) -> Damaged:
        return Damaged(f"{self.path}: {what}; see `losscast monitor repair`")

    def runs(self) -> list[RunFacts]:
        """Every run. Raises Damaged where one is damaged or gone."""
        out = []
        with self.at_once():
            ledger = next(self._read("SELECT one, runs, crc FROM ledger"), None)
            if ledger is None or seal(*ledger[:2]) != ledger[2]:
                raise self._damaged("the count of its runs is damaged")
            for row in self._read("SELECT run_id, name, facts, crc FROM runs"):
                facts = run_of(row)
                if facts is None:
                    raise self._damaged(f"the row of run {row[1]!r} is damaged")
                out.append(facts)
        if len(out) != ledger[1]:
            raise self._damaged(f"{ledger[1] - len(out)} of its {ledger[1]} runs can't be found")
        return out

    def run(self, name: str) -> RunFacts | None:
        """One run by name."""
        return self._run("name", name)

    def run_by_id(self, run_id: int) -> RunFacts | None:
        """One run by its id."""
        return self._run("run_id", run_id)

    def _run(self, column: str, value: str | int) -> RunFacts | None:
        row = next(self._read(f"SELECT run_id, name, facts, crc FROM runs WHERE {column}=?", (value,)), None)
        if row is None:
            return None
        facts = run_of(row)
        if facts is None:
            raise self._damaged(f"the row of run {row[1]!r} is damaged")
        return facts

    def chunks(
        self, run_id: int, attempt: int | None = None, *, after: int = 0, first: int = 0, last: int = 2**53
    ) -> Iterator[ChunkRow]:
        """Chunks in the order of their ordinals that hold steps of first..last; who wants few takes few. Raises Damaged.

        One attempt after the other: an older one takes nothing more once a newer one was heard of, and so each is read by the
        index from the ordinal on, however much is behind it and however much before.
        """
        for number in self._attempts(run_id) if attempt is None else (attempt,):
            where, cells = "run_id=? AND attempt=? AND ord>?", [run_id, number, after]
            if first > 0 or last < 2**53:  # not for all of them: a damaged step would be passed over unseen
                where, cells = f"{where} AND last_step>=? AND first_step<=?", [*cells, first, last]
            for *row, crc in self._read(f"SELECT * FROM chunks WHERE {where} ORDER BY ord", cells):
                if seal(*row) != crc:
                    raise self._damaged(f"chunk {row[0]} of run id {run_id} is damaged")
                yield ChunkRow.of(row)

    def _attempts(self, run_id: int) -> list[int]:
        """The run's attempts that have chunks, oldest first, found without going over the chunks. Raises Damaged."""
        out, newest = [], -1
        while True:
            (found,) = next(
                self._read("SELECT min(attempt) FROM chunks WHERE run_id=? AND attempt>?", (run_id, newest))
            )
            if found is None:
                return out
            if not isinstance(found, int) or found <= newest:
                raise self._damaged(f"the order of run id {run_id}'s chunks is damaged")
            out.append(found)
            newest = found

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
        have = 0
        for ord, _, _, n, before, _, first, last, *_ in self._chunk_heads(run_id, attempt):
            if before != have:
                raise self._damaged(
                    f"{before - have} samples of run id {run_id} are missing before chunk {ord}"
                )
            have += n
            yield ord, n, first, last

    def count_between(self, run_id: int, attempt: int, after: int, before: int) -> int:
        """Samples of the attempt in chunks strictly between two ordinals.

        Raises Damaged where a chunk's head is: a query that chose by steps may have passed over it wrongly.
        """
        return sum(cells[3] for cells in self._chunk_heads(run_id, attempt, after, before))

    def _chunk_heads(
        self, run_id: int, attempt: int, after: int = 0, before: int = MOST
    ) -> Iterator[list[Any]]:
        """What chunks of an attempt hold before their bodies, in order. Raises Damaged."""
        for *cells, head in self._read(
            f"SELECT {HEAD} FROM chunks WHERE run_id=? AND attempt=? AND ord>? AND ord<? ORDER BY ord",
            (run_id, attempt, after, before),
        ):
            if seal(*cells) != head:
                raise self._damaged(f"chunk {cells[0]} of run id {run_id} is damaged")
            yield cells

    def small_chunks(self, run_id: int, after: int, upto: int, most: int, limit: int) -> list[ChunkRow]:
        """The run's first `limit` chunks of fewer than `most` samples between two ordinals, in order. Raises Damaged."""
        out: list[ChunkRow] = []
        for attempt in self._attempts(run_id):
            for *row, crc in self._read(
                "SELECT * FROM chunks WHERE run_id=? AND attempt=? AND ord>? AND ord<=? AND n<? ORDER BY ord LIMIT ?",
                (run_id, attempt, after, upto, most, limit - len(out)),
            ):
                if seal(*row) != crc:
                    raise self._damaged(f"chunk {row[0]} of run id {run_id} is damaged")
                out.append(ChunkRow.of(row))
        return out

    def small_bands(self, run_id: int, after: int, upto: int, most_bytes: int, limit: int) -> list[BandRow]:
        """The run's bands of fewer bytes between two ordinals, in order. Raises Damaged."""
        out = []
        for *row, crc in self._read(
            "SELECT * FROM bands WHERE run_id=? AND ord>? AND ord<=? AND length(body)<? ORDER BY ord LIMIT ?",
            (run_id, after, upto, most_bytes, limit),
        ):
            if seal(*row) != crc:
                raise self._damaged(f"band {row[1]} of run id {run_id} is damaged")
            out.append(BandRow(*row))
        return out

    def chunk(self, ord: int) -> ChunkRow:
        """One chunk. Raises Damaged."""
        row = next(self._read("SELECT * FROM chunks WHERE ord=?", (ord,)), None)
        if row is None or seal(*row[:-1]) != row[-1]:
            raise self._damaged(f"chunk {ord} is damaged")
        return ChunkRow.of(list(row[:-1]))

    def events(self, run_id: int, *, after: int = 0, last: int = MOST, limit: int = -1) -> list[EventRow]:
        """Events after an ordinal, in order. Raises Damaged where one is damaged or gone."""
        out = []
        with self.at_once():
            for *row, crc in self._read(
                "SELECT * FROM events WHERE run_id=? AND ord>? AND ord<=? ORDER BY ord LIMIT ?",
                (run_id, after, last, limit),
            ):
                if seal(*row) != crc:
                    raise self._damaged(f"event {row[0]} of run id {run_id} is damaged")
                event = EventRow(*row)
                if event.prev != out[-1].ord if out else event.prev > after:
                    raise self._damaged(f"an event of run id {run_id} is missing before event {event.ord}")
                out.append(event)
            if len(out) == limit:
                return out
            newest = out[-1].ord if out else after
            following = next(
                self._read(
                    "SELECT prev FROM events WHERE run_id=? AND ord>? ORDER BY ord LIMIT 1", (run_id, last)
                ),
                None,
            )
            if following is None:
                facts = self.run_by_id(run_id)
                following = (0 if facts is None else facts.event_ord,)
            if not isinstance(following[0], int) or following[0] > newest:
                raise self._damaged(f"event {following[0]} of run id {run_id} can't be found")
        return out

    def has_event(self, run_id: int, attempt: int, digest: bytes) -> bool:
        """True when this very event was taken before."""
        found = self._read(
            "SELECT 1 FROM events WHERE run_id=? AND attempt=? AND digest=?", (run_id, attempt, digest)
        )
        return next(found, None) is not None

    def lasts(self) -> dict[int, tuple[int, dict[str, Any]]]:
        """The judge's cursor and newest verdict, by run id. A run whose row is damaged is not in it: it is judged again."""
        rows = self._read("SELECT run_id, cursor, alerts, verdicts, band, last, head FROM judged")
        return {row[0]: (row[1], json.loads(row[5])) for *row, head in rows if seal(*row) == head}

    def judged(self, run_id: int) -> tuple[int, bytes] | None:
        """The judge's cursor and state. Raises Damaged."""
        row = next(self._read("SELECT * FROM judged WHERE run_id=?", (run_id,)), None)
        if row is None:
            return None
        if seal(*row[:-1]) != row[-1]:
            raise self._damaged(f"the judge's state of run id {run_id} is damaged")
        return row[1], row[7]

    def judged_to(self, run_id: int) -> int:
        """The ordinal up to which the run was judged; 0 where that can't be said."""
        return self._counted(run_id, wrong=False)[0]

    def _counted(self, run_id: int, wrong: bool = True) -> tuple[int, int, int, int]:
        """(cursor, alerts, verdicts, newest band) as the judge's row has them; zeros before anything was judged."""
        row = next(
            self._read(
                "SELECT run_id, cursor, alerts, verdicts, band, last, head FROM judged WHERE run_id=?",
                (run_id,),
            ),
            None,
        )
        if row is None:
            return 0, 0, 0, 0
        if seal(*row[:-1]) != row[-1]:
            if wrong:
                raise self._damaged(f"the judge's word on run id {run_id} is damaged")
            return 0, 0, 0, 0
        return row[1:5]

    def bands(self, run_id: int, attempt: int, first: int = 1, last: int = MOST) -> list[bytes]:
        """Packed columns of what was expected of the chunks with these ordinals, in order. Raises Damaged.

        A row is for the chunks up to its ordinal, from the row before on.
        """
        out, newest = [], None
        with self.at_once():
            for *row, crc in self._read(
                "SELECT * FROM bands WHERE run_id=? AND ord>=? ORDER BY ord", (run_id, first)
            ):
                _, ord, prev, of, body = row
                if seal(*row) != crc:
                    raise self._damaged(f"band {ord} of run id {run_id} is damaged")
                if prev >= first if newest is None else prev != newest:
                    raise self._damaged(f"a band of run id {run_id} is missing before band {ord}")
                newest = ord
                if of == attempt:
                    out.append(body)
                if ord >= last:
                    return out
            end = self._counted(run_id)[3]
            if end >= first and end != newest:
                raise self._damaged(f"band {end} of run id {run_id} can't be found")
        return out

    def alerts(self, run_id: int, *, open_only: bool = False) -> list[dict[str, Any]]:
        """Alerts as they were called, oldest first. Raises Damaged."""
        names = ("attempt", "alert", "severity", "step", "since_step", "value", "expected", "special",
                 "opened_received", "resolved_step", "closed_received")  # fmt: skip
        out = []
        for row in self._judged_rows("alerts", run_id, 1):
            alert = dict[str, Any](zip(names, row[2:], strict=True))
            if open_only and alert["resolved_step"] is not None:
                continue
            special = alert.pop("special")
            if special:
                alert["value"] = special
            alert["opened_time"] = alert.pop("opened_received")
            alert["closed_time"] = alert.pop("closed_received")
            out.append(alert)
        return sorted(out, key=lambda alert: (alert["opened_time"], alert["step"]))

    def verdicts(self, run_id: int) -> list[dict[str, Any]]:
        """Changes of state, oldest first. Raises Damaged."""
        return [
            {**json.loads(body), "attempt": attempt, "time": received}
            for _, _, attempt, _, received, body in self._judged_rows("verdicts", run_id, 2)
        ]

    def _judged_rows(self, table: str, run_id: int, count: int) -> list[list[Any]]:
        """All rows of a run that the judge's row counts (in its column `count`), without their seals. Raises Damaged."""
        out = []
        with self.at_once():
            for *row, crc in self._read(f"SELECT * FROM {table} WHERE run_id=? ORDER BY ord", (run_id,)):
                if seal(*row) != crc:
                    raise self._damaged(f"a row of {table} of run id {run_id} is damaged")
                out.append(row)
            wanted = self._counted(run_id)[count]
        if len(out) != wanted:
            raise self._damaged(f"run id {run_id} has {len(out)} of its {wanted} {table}")
        return out

    def close(self) -> None:
        """Let go of the connections."""
        with self._gate:
            all_held = list(self._held)
            self._held.clear()
        for held in all_held:
            held.db.close()


def _ord(row: ChunkRow | EventRow) -> int:
    return row.ord


def quoted(path: Path) -> str:
    """A path as it stands in SQLite's `file:` address."""
    from urllib.parse import quote

    return quote(str(path))
