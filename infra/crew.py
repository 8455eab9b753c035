"""Moving many files in blocks: the threads that carry them, the count of bytes, and whole reads and writes."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from infra.objects import Progress


class Meter:
    """Bytes done of bytes in all, told as they move."""

    def __init__(self, total: int, progress: Progress) -> None:
        self.total, self.done, self._progress, self._lock = total, 0, progress, threading.Lock()

    def expect(self, size: int) -> None:
        with self._lock:
            self.total += size

    def add(self, size: int) -> None:
        with self._lock:
            self.done += size
            self._progress(self.done, self.total)


class Crew:
    """Threads that carry blocks, and may order more. At the end of the context all is carried; the first error is raised
    and what had not begun is dropped."""

    def __init__(self, threads: int, room_bytes: int) -> None:
        """room_bytes: what work in turn may hold in memory; one piece of work always has room"""
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="losscast-blob")
        self._room, self._held = room_bytes, 0
        self._changed = threading.Condition()
        self._left = 0
        self._error: BaseException | None = None

    def do(self, work: Callable[..., None], *args: Any) -> None:
        """Have it done. For work that orders more work: never waits."""
        with self._changed:
            self._left += 1
        self._pool.submit(self._run, 0, work, args)

    def do_in_turn(self, size: int, work: Callable[..., None], *args: Any) -> None:
        """Have it done; waits for room for `size` bytes. Raises the error of others."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._error is not None or not self._held or self._held + size <= self._room
            )
            if self._error is not None:
                raise self._error
            self._left += 1
            self._held += size
        self._pool.submit(self._run, size, work, args)

    def _run(self, size: int, work: Callable[..., None], args: tuple[Any, ...]) -> None:
        try:
            if self._error is None:
                work(*args)
        except BaseException as error:
            with self._changed:
                self._error = self._error or error
        finally:
            with self._changed:
                self._left -= 1
                self._held -= size
                if size or self._left == 0 or self._error is not None:
                    self._changed.notify_all()

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if error is None:
                with self._changed:
                    self._changed.wait_for(lambda: self._left == 0 or self._error is not None)
                if self._error is not None:
                    raise self._error
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)


def read_fully(file: Any, count: int) -> bytes:
    parts = []
    while count > 0:
        part = file.read(count)
        if not part:
            break
        parts.append(part)
        count -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def write_at(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
