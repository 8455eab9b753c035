"""Many files to and from a blob service in blocks: what is under way at once, and each byte hashed once.

up     a file is read once, in order, and hashed as it is read, while its blocks and those of files before it travel
down   blocks arrive in any order, are written where they belong, and hashed in order by whoever brings the next one, so
       that nothing is read back from the disk

Blocks of all files share one crew of threads, so that 500 small files and 8 large ones both keep every connection busy. A
large file has as many blocks under way as the others leave room for: one each where there are many, all where there is one.
Memory: what lies in ROOM_BLOCKS blocks, and a first block a thread.
"""

import contextlib
import errno
import hashlib
import math
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from infra.crew import Crew, Meter, read_fully, write_at
from infra.lean import Part
from infra.objects import Progress

BLOCK_BYTES = 8 << 20
MAX_BLOCKS = 40_000
"""Of one blob; Azure allows 50,000."""
ROOM_BLOCKS = 10
"""Blocks of an upload that are in memory at once, and of a download those beyond the first of each file."""


class Service(Protocol):
    """One request each, with all its tries."""

    def put(self, key: str, data: bytes) -> None: ...
    def stage(self, key: str, name: str, data: bytes) -> None: ...
    def commit(self, key: str, names: list[str]) -> None: ...
    def part(self, key: str, offset: int, length: int, etag: str | None) -> Part:
        """Of the very version that `etag` names. Raises Missing."""
        ...


def upload(
    service: Service, files: Mapping[str, Path], threads: int, progress: Progress
) -> dict[str, tuple[int, str]]:
    """Size and sha256 of each, as it was sent."""
    sizes = {key: path.stat().st_size for key, path in files.items()}
    meter = Meter(sum(sizes.values()), progress)
    with Crew(threads, ROOM_BLOCKS * BLOCK_BYTES) as crew:
        return {key: _send(service, crew, meter, key, path, sizes[key]) for key, path in files.items()}


def _send(service: Service, crew: Crew, meter: Meter, key: str, path: Path, size: int) -> tuple[int, str]:
    """Read and hash one file, its blocks handed to the crew; the last one to arrive makes the blob."""
    sha, block = hashlib.sha256(), max(BLOCK_BYTES, math.ceil(size / MAX_BLOCKS))
    names = [f"{i:08d}" for i in range(math.ceil(size / block))]
    left, lock, read = len(names), threading.Lock(), 0

    def whole(data: bytes) -> None:
        service.put(key, data)
        meter.add(len(data))

    def part(name: str, data: bytes) -> None:
        nonlocal left
        service.stage(key, name, data)
        meter.add(len(data))
        with lock:
            left -= 1
            last = left == 0
        if last:
            service.commit(key, names)

    with path.open("rb", buffering=0) as file:
        for index in range(max(1, len(names))):
            data = read_fully(file, min(block, size - read))
            read += len(data)
            if size <= block:
                crew.do_in_turn(len(data), whole, data)
            else:
                crew.do_in_turn(len(data), part, names[index], data)
            sha.update(data)  # while it travels
        if read != size or file.read(1):
            raise OSError(errno.EIO, f"{path} changed while it was uploaded")
    return size, sha.hexdigest()


def download(
    service: Service, files: Mapping[str, Path], threads: int, progress: Progress
) -> dict[str, tuple[int, str]]:
    """Size and sha256 of each, as it came and was written. Raises Missing."""
    for folder in {path.parent for path in files.values()}:
        folder.mkdir(parents=True, exist_ok=True)
    arriving = [_Arriving(key, path) for key, path in files.items()]
    try:
        with Crew(threads, 0) as crew:
            bringing = _Bringing(service, crew, Meter(0, progress))
            for one in arriving:
                crew.do(bringing.first, one)
    finally:
        for one in arriving:
            one.close()
    return {one.key: one.digest for one in arriving if one.digest is not None}


@dataclass
class _Arriving:
    """One file of a download. Offsets and sizes in bytes."""

    key: str
    path: Path
    descriptor: int = -1
    size: int = -1
    etag: str | None = None
    ordered: int = 0
    """Up to here it was asked for."""
    hashed: int = 0
    """Up to here it came and was hashed."""
    early: dict[int, bytes] = field(default_factory=dict[int, bytes])
    """Blocks that are on the disk and wait for their turn to be hashed."""
    hashing: bool = False
    sha: Any = field(default_factory=hashlib.sha256)
    digest: tuple[int, str] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def close(self) -> None:
        if self.descriptor >= 0:
            with contextlib.suppress(OSError):
                os.close(self.descriptor)
            self.descriptor = -1

    def took(self, offset: int, data: bytes) -> bool:
        """Hash what has its turn now; a thread that finds another at it leaves its block there. True for the one that
        hashed the last byte."""
        with self.lock:
            self.early[offset] = data
            if self.hashing:
                return False
            self.hashing = True
        while True:
            with self.lock:
                now = self.early.pop(self.hashed, None)
                if now is None or self.digest is not None:
                    self.hashing = False
                    return False
            self.sha.update(now)
            with self.lock:
                self.hashed += len(now)
                if self.hashed == self.size:
                    self.digest = self.size, self.sha.hexdigest()
                    return True


class _Bringing:
    """What a crew does for one download."""

    def __init__(self, service: Service, crew: Crew, meter: Meter) -> None:
        self._service, self._crew, self._meter = service, crew, meter
        self._lock, self._large = threading.Lock(), 0

    def first(self, one: _Arriving) -> None:
        """The first block of a file, which tells its size: a small file is done, for a large one the rest is ordered."""
        part = self._service.part(one.key, 0, BLOCK_BYTES, None)
        one.size, one.etag, one.ordered = part.size, part.etag, len(part.data)
        self._meter.expect(part.size)
        if part.size > len(part.data):
            with self._lock:
                self._large += 1
        one.descriptor = os.open(one.path, os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o644)
        self._keep(one, 0, part.data)

    def _next(self, one: _Arriving, offset: int, length: int) -> None:
        self._keep(one, offset, self._service.part(one.key, offset, length, one.etag).data)

    def _keep(self, one: _Arriving, offset: int, data: bytes) -> None:
        write_at(one.descriptor, data, offset)
        self._meter.add(len(data))
        if one.took(offset, data):
            if (there := os.fstat(one.descriptor).st_size) != one.size:
                raise OSError(errno.EIO, f"{one.path} has {there} bytes of {one.size} that were written")
            one.close()
            if one.size > BLOCK_BYTES:
                with self._lock:
                    self._large -= 1
            return
        with self._lock:
            room = max(1, ROOM_BLOCKS // max(1, self._large)) * BLOCK_BYTES
        with one.lock:
            offsets = list[int]()
            while one.ordered < one.size and one.ordered - one.hashed < room:
                offsets.append(one.ordered)
                one.ordered = min(one.size, one.ordered + BLOCK_BYTES)
        for at in offsets:
            self._crew.do(self._next, one, at, min(BLOCK_BYTES, one.size - at))
