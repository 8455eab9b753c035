"""The store's tables, and what a row of each holds.

Every row's last column seals the others (`crc`); `head` seals what a query may choose rows by, where a body follows it.
A seal shows that a row was changed, not that it is gone, so every row can be missed as well: a chunk says how many samples of
its attempt came before it, an event and a band name the one before them, the run's row names its newest event and counts its
samples, the judge's row counts alerts and verdicts and names the newest band, and the ledger counts the runs.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from monitor.store.facts import RunFacts, from_bytes, seal, to_bytes, two_seals

SCHEMA_VERSION = 1

SCHEMA = """
CREATE TABLE ledger (one INTEGER PRIMARY KEY, runs INTEGER NOT NULL, crc INTEGER NOT NULL);
CREATE TABLE runs (run_id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, facts BLOB NOT NULL, crc INTEGER NOT NULL);
CREATE TABLE chunks (ord INTEGER PRIMARY KEY, run_id INTEGER NOT NULL, attempt INTEGER NOT NULL,
    n INTEGER NOT NULL, before INTEGER NOT NULL, first_ord INTEGER NOT NULL, first_seq INTEGER NOT NULL,
    last_seq INTEGER NOT NULL, first_step INTEGER NOT NULL, last_step INTEGER NOT NULL, received REAL NOT NULL,
    head INTEGER NOT NULL, body BLOB NOT NULL, crc INTEGER NOT NULL);
CREATE INDEX chunks_of_run ON chunks (run_id, attempt, ord);
CREATE TABLE events (ord INTEGER PRIMARY KEY, run_id INTEGER NOT NULL, attempt INTEGER NOT NULL, prev INTEGER NOT NULL,
    kind TEXT NOT NULL, digest BLOB NOT NULL, received REAL NOT NULL, body TEXT NOT NULL, crc INTEGER NOT NULL);
CREATE INDEX events_of_run ON events (run_id);
CREATE UNIQUE INDEX events_once ON events (run_id, attempt, digest);
CREATE TABLE judged (run_id INTEGER PRIMARY KEY, cursor INTEGER NOT NULL, alerts INTEGER NOT NULL,
    verdicts INTEGER NOT NULL, band INTEGER NOT NULL, last TEXT NOT NULL, head INTEGER NOT NULL, state BLOB NOT NULL,
    crc INTEGER NOT NULL);
CREATE TABLE bands (run_id INTEGER NOT NULL, ord INTEGER NOT NULL, prev INTEGER NOT NULL, attempt INTEGER NOT NULL,
    body BLOB NOT NULL, crc INTEGER NOT NULL, PRIMARY KEY (run_id, ord)) WITHOUT ROWID;
CREATE TABLE alerts (run_id INTEGER NOT NULL, ord INTEGER NOT NULL, attempt INTEGER NOT NULL, alert TEXT NOT NULL,
    severity TEXT NOT NULL, step INTEGER NOT NULL, since_step INTEGER NOT NULL, value REAL, expected REAL, special TEXT,
    opened_received REAL NOT NULL, resolved_step INTEGER, closed_received REAL, crc INTEGER NOT NULL,
    PRIMARY KEY (run_id, ord, attempt, alert, severity, step)) WITHOUT ROWID;
CREATE TABLE verdicts (run_id INTEGER NOT NULL, ord INTEGER NOT NULL, attempt INTEGER NOT NULL, step INTEGER NOT NULL,
    received REAL NOT NULL, body TEXT NOT NULL, crc INTEGER NOT NULL, PRIMARY KEY (run_id, ord, attempt, step)) WITHOUT ROWID;
"""
TABLES = ("ledger", "runs", "chunks", "events", "judged", "bands", "alerts", "verdicts")
OF_A_RUN = TABLES[2:]
"""Those whose rows belong to a run and have its id in `run_id`."""


class ChunkRow(NamedTuple):
    """Samples of one attempt that were committed together, or were put together since. There are many of these rows: a tuple is
    made in a third of a dataclass's time."""

    ord: int
    run_id: int
    attempt: int
    n: int
    before: int
    """Samples of this attempt that came before."""
    first_ord: int
    """Ordinal of the first of the chunks that were put together; its own where it is as it came."""
    first_seq: int
    last_seq: int
    first_step: int
    last_step: int
    received: float
    body: bytes

    def row(self) -> tuple[Any, ...]:
        """As the table holds it."""
        cells = self[:11]
        head, crc = two_seals(cells, self.body)
        return (*cells, head, self.body, crc)

    @classmethod
    def of(cls, cells: list[Any]) -> "ChunkRow":
        """Back from the table's cells, without the `crc`."""
        return cls._make((*cells[:11], cells[12]))


HEAD = (
    "ord, run_id, attempt, n, before, first_ord, first_seq, last_seq, first_step, last_step, received, head"
)
"""Columns of a chunk before its body."""


@dataclass(frozen=True, slots=True)
class EventRow:
    """Any other event, its body as JSON."""

    ord: int
    run_id: int
    attempt: int
    prev: int
    """Ordinal of the run's event before this one; 0 for its first."""
    kind: str
    digest: bytes
    received: float
    body: str

    def row(self) -> tuple[Any, ...]:
        """As the table holds it."""
        cells = (
            self.ord,
            self.run_id,
            self.attempt,
            self.prev,
            self.kind,
            self.digest,
            self.received,
            self.body,
        )
        return (*cells, seal(*cells))

    @property
    def fields(self) -> dict[str, Any]:
        """The event's fields."""
        import json

        return json.loads(self.body)


@dataclass(frozen=True, slots=True)
class BandRow:
    """What the judge expected of samples, of the chunks from the row before (`prev`) on up to `ord`."""

    run_id: int
    ord: int
    prev: int
    attempt: int
    body: bytes

    def row(self) -> tuple[Any, ...]:
        """As the table holds it."""
        cells = (self.run_id, self.ord, self.prev, self.attempt, self.body)
        return (*cells, seal(*cells))


@dataclass(slots=True)
class Merge:
    """Rows of one run that take the place of others with the same samples."""

    run_id: int
    chunks: list[ChunkRow] = field(default_factory=list)
    bands: list[BandRow] = field(default_factory=list)
    old_chunks: list[ChunkRow] = field(default_factory=list)
    old_bands: list[BandRow] = field(default_factory=list)


@dataclass(slots=True)
class Judged:
    """What the judge made of a run from `since` up to `cursor`: goes to disk in one transaction, or not at all.

    Whatever the store has of it after `since` is replaced, so that to write the same again, or to judge a run again
    from its first sample (since 0), changes nothing that was true.
    """

    run_id: int
    since: int
    cursor: int
    state: bytes
    last: str
    """The newest verdict, its open alerts and advice, as JSON."""
    bands: list[tuple[int, int, bytes]] = field(default_factory=list)
    """attempt, ord, packed columns; a row is for the chunks from the row before on up to its ordinal"""
    opened: list[tuple[Any, ...]] = field(default_factory=list)
    """ord, attempt, alert, severity, step, since_step, value, expected, special, received"""
    closed: list[tuple[Any, ...]] = field(default_factory=list)
    """attempt in which it ended, resolved_step, received, alert"""
    verdicts: list[tuple[int, int, int, float, str]] = field(default_factory=list)
    """ord, attempt, step, received, JSON"""


def judged_row(
    run_id: int, cursor: int, alerts: int, verdicts: int, band: int, last: str, state: bytes
) -> tuple[Any, ...]:
    """The judge's row of a run as the table holds it."""
    cells = (run_id, cursor, alerts, verdicts, band, last)
    head, crc = two_seals(cells, state)
    return (*cells, head, state, crc)


def run_row(facts: RunFacts) -> tuple[Any, ...]:
    """A run as the table holds it."""
    blob = to_bytes(facts)
    return facts.run_id, facts.run, blob, seal(facts.run_id, facts.run, blob)


def run_of(row: tuple[Any, ...]) -> RunFacts | None:
    """Back from the table; None where its seal is broken."""
    return from_bytes(row[2]) if seal(*row[:3]) == row[3] else None


def ledger_row(runs: int) -> tuple[int, int, int]:
    """The ledger as the table holds it."""
    return 1, runs, seal(1, runs)
