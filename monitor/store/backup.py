"""A copy of the store beside a live service, and back. Both are checked: damage is not copied in silence."""

import itertools
import os
import sqlite3
from pathlib import Path

from monitor.errors import GIVE_A_STORE, Failed, WrongInput, unwritable
from monitor.store.check import DAMAGE, check, words
from monitor.store.store import FILE, Store

LOGS = ("-wal", "-shm", "-journal")
"""Ends of the names of what SQLite puts beside a file, and reads there."""


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
        # in one go, of one moment: between two portions a commit has it begin anew, and a busy service always commits
        store.reader().backup(copy, pages=-1)
        copy.execute("PRAGMA journal_mode=DELETE")  # one file, without a log beside it
        copy.close()
        trouble = list(itertools.islice(check(partial), 3))
        if trouble:
            raise Failed(f"{folder}: the store is damaged, and so would be its backup: {'; '.join(trouble)}")
        _sync(partial)
        partial.rename(target)
    except OSError as error:
        raise unwritable(
            target, error, "Give a file in a folder that is there and can be written."
        ) from error
    except DAMAGE as error:
        raise Failed(f"{target}: {words(error)}") from error
    finally:
        store.close()
        partial.unlink(missing_ok=True)
    return target.stat().st_size


def restore(source: Path, folder: Path) -> None:
    """Put a backup where there is no store yet."""
    if not source.is_file():
        raise WrongInput(f"{source}: no such backup")
    left = [FILE + suffix for suffix in ("", *LOGS) if (folder / (FILE + suffix)).exists()]
    if left:  # a log alone would be played into what is put beside it
        raise WrongInput(
            f"{folder}: holds a store already, or what is left of one ({', '.join(left)}); "
            f"move {FILE}* away first, or give another folder"
        )
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
        raise unwritable(folder, error, GIVE_A_STORE) from error


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
