"""The page that says where each table is, put back as every store has it.

Nothing that was recorded is on it, and a bit that flips there hides all that was: SQLite reads no table of a file whose
schema it can't parse. All stores are made by the same statements, so a new one has the very page.
"""

import shutil
import sqlite3
from pathlib import Path

from monitor.store.check import DAMAGE
from monitor.store.query import quoted
from monitor.store.store import FILE, Store
from monitor.store.tables import SCHEMA

ENTRIES = "SELECT type, name, tbl_name, rootpage, sql FROM sqlite_master"
CHANGES, PAGES, FREE, VALID_FOR = slice(24, 28), slice(28, 32), slice(32, 40), slice(92, 96)
"""In the file's header (https://sqlite.org/fileformat2.html): the change counter, the size in pages, the list of free pages, and
the counter that the size goes with."""


def readable_schema(path: Path) -> bool:
    """SQLite finds every table and index, and where a new store has it."""
    known = sqlite3.connect(":memory:")
    known.executescript(SCHEMA)
    db = sqlite3.connect(f"file:{quoted(path)}?mode=ro", uri=True)
    try:
        return set(known.execute(ENTRIES)) <= set(db.execute(ENTRIES))
    except DAMAGE:
        return False
    finally:
        db.close()
        known.close()


def with_known_schema(path: Path, folder: Path) -> Path:
    """A copy of the store's file in an empty folder, its first page a new store's. Raises OSError."""
    plain = folder / "plain"
    Store(plain).close()
    db = sqlite3.connect(plain / FILE)
    (size,) = db.execute("PRAGMA page_size").fetchone()
    (first_root,) = db.execute("SELECT min(rootpage) FROM sqlite_master").fetchone()
    db.close()
    page = bytearray((plain / FILE).read_bytes()[: size * (first_root - 1)])
    shutil.rmtree(plain)
    copy = folder / FILE
    for suffix in ("", "-wal"):
        source = path.with_name(path.name + suffix)
        if source.exists():
            shutil.copy(source, folder / (FILE + suffix))
    with copy.open("r+b") as file:
        page[PAGES] = (copy.stat().st_size // size).to_bytes(4, "big")
        page[FREE] = bytes(8)
        page[VALID_FOR] = page[CHANGES]
        file.write(page)
    return copy
