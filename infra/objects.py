"""What an object store must do for a run's log and checkpoints, whichever it is: a few operations on keys."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

Progress = Callable[[int, int], None]
"""Told of a transfer: bytes done, bytes in all as far as known. From any thread."""


def quiet(done: int, total: int) -> None:
    """A `Progress` that says nothing."""


class Exists(Exception):
    """`put_new` found the key taken."""


class Missing(Exception):
    """There is no such key."""


@dataclass(frozen=True, slots=True)
class Item:
    """A key and its size in bytes."""

    key: str
    size: int


class Store(Protocol):
    """All a store must do. Keys are relative POSIX paths. I/O errors come out as OSError."""

    def put_new(self, key: str, data: bytes) -> None:
        """Create the key, whole and durable when it returns. Raises Exists.

        After an error that leaves the outcome open (a timeout) the caller reads the key back.
        """
        ...

    def put(self, key: str, data: bytes) -> None:
        """Create or replace: a reader finds the old content or the new."""
        ...

    def get(self, key: str) -> bytes:
        """Raises Missing."""
        ...

    def list(self, prefix: str) -> list[Item]:
        """Every key that starts with `prefix`, sorted."""
        ...

    def delete(self, key: str) -> None:
        """Remove; a key that is not there is fine."""
        ...

    def age_s(self, key: str) -> float | None:
        """Seconds since the key was last written, by the store's own clock. None when there is no such key."""
        ...

    def touch(self, key: str) -> bool:
        """Make the key's age nothing again without writing anything, where that can be: for a disk that is full. False
        where it can't, or the key is not there."""
        ...

    def digest(self, key: str) -> tuple[int, str]:
        """Size in bytes and sha256 (hex) of the content, read now. Raises Missing."""
        ...

    def settle(self, prefix: str) -> None:
        """Make durable whatever was written under `prefix` without going through the store."""
        ...

    def upload(self, files: Mapping[str, Path], progress: Progress = quiet) -> dict[str, tuple[int, str]]:
        """Create or replace each key from its file, many at a time. Size and sha256 of each, as it was sent."""
        ...

    def download(self, files: Mapping[str, Path], progress: Progress = quiet) -> dict[str, tuple[int, str]]:
        """Bring each key to its file. Size and sha256 of each, as it lies on the disk. Raises Missing."""
        ...

    def where(self, key: str) -> str:
        """The place a person would look at."""
        ...


def check_key(key: str) -> None:
    """Raises ValueError for a key that leaves its store."""
    parts = key.split("/")
    if (
        key.startswith("/")
        or any(part in ("..", ".", "") for part in parts[:-1])
        or parts[-1] in ("..", ".")
        or "\\" in key
    ):
        raise ValueError(f"{key!r} is no key")
