"""Moving many files in blocks: the threads that carry them, the count of bytes, and whole reads and writes."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from launcher.storage import Progress


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

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="losscast-blob")
        self._lock, self._pending = threading.Lock(), set[Future[None]]()

    def do(self, work: Callable[..., None], *args: Any) -> None:
        with self._lock:
            self._pending.add(self._pool.submit(work, *args))

    def check(self) -> None:
        """Raise what went wrong so far."""
        with self._lock:
            done = {f for f in self._pending if f.done()}
            self._pending -= done
        for future in done:
            future.result()

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            while error is None:
                with self._lock:
                    pending = set(self._pending)
                if not pending:
                    return
                wait(pending, return_when=FIRST_COMPLETED)
                self.check()
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
