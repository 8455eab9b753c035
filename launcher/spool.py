"""What a run has to say and the monitor has not taken yet: lines in segments, on disk where that works.

A reporter owns one folder `<run>.<attempt>.<n>` under the spool folder and holds a lock on it while it lives. A
later reporter of the same run adopts folders whose owner died, oldest attempt first, so that nothing a crashed
attempt said is lost. In a segment every line is `crc32 json`: a torn or flipped line is found, counted and left
out, and the lines around it are still good. A segment is called `<number>-<lines>.seg`, after each write anew, so that lines
cut off its end are counted too.

Bounded: past `limit_bytes` the least thinned, oldest segment loses every second sample, again and again. Events
and samples with a non-finite loss are never thinned. Where the disk refuses (full, read-only), segments live in
memory under the same bound; it is tried again at times, and what waits in memory goes to it when it takes it. Nothing is fsynced: a spool outlives the process, and the run's checkpoints outlive
the machine.

Standard library only. Times nothing, sends nothing. Safe to use from two threads.
"""

import contextlib
import fcntl
import os
import threading
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

SEGMENT_LINES = 1000
SEGMENT_BYTES = 1 << 20
AGAIN_S = 10.0
"""Before a disk that refused is tried again."""
MOST_THINNED = 8
"""A segment thinned this often keeps 1 sample of 256, and goes entirely when the bound still asks."""


@dataclass(slots=True)
class Segment:
    """Consecutive lines. In memory when `path` is None."""

    path: Path | None
    lines: list[bytes] = field(default_factory=list)
    """Only in memory."""
    count: int = 0
    size: int = 0
    """Bytes."""
    thinned: int = 0
    """How often every second sample was taken out."""
    lost: int = 0
    """Lines of it that were found damaged or gone, and are counted."""
    busy: bool = False
    """Being sent: leave it as it is."""


def seal(line: bytes) -> bytes:
    """One NDJSON line, newline included, with its checksum in front."""
    return b"%08x %s" % (zlib.crc32(line), line)


def unseal(sealed: bytes) -> bytes | None:
    """The line behind a checksum; None for a damaged one."""
    try:
        checksum, line = int(sealed[:8], 16), sealed[9:]
    except ValueError:
        return None
    return line if sealed[8:9] == b" " and line.endswith(b"\n") and zlib.crc32(line) == checksum else None


def may_thin(line: bytes) -> bool:
    """True for a sample whose loss is a number and which carries no validation loss."""
    return b'"event":"sample"' in line and b'"loss":"' not in line and b'"val_loss"' not in line


class Spool:
    """Lines go in at one end and leave in segments at the other, oldest first."""

    def __init__(
        self, folder: str | os.PathLike[str] | None, run: str, attempt: int, limit_bytes: int = 64 << 20
    ):
        self.limit_bytes = limit_bytes
        self.thinned = 0
        """Samples taken out to keep the bound."""
        self.damaged = 0
        """Lines left out because their checksum was wrong, or that are gone from their segment."""
        self.disk_error: str | None = None
        """Why lines are kept in memory, when they are."""
        self._lock = threading.RLock()
        self._segments: list[Segment] = []
        self._open: IO[bytes] | None = None
        self._next = 0
        self._home: Path | None = None
        self._place = None if folder is None else (Path(folder), run, attempt)
        self._own: Path | None = None
        """The folder of our own, once it was made, whether or not its disk takes anything now."""
        self._again_s = 0.0
        self._locks: list[int] = []
        if folder is None:
            self.disk_error = "no spool folder was given"
            return
        try:
            root = Path(folder)
            root.mkdir(parents=True, exist_ok=True)
            self._adopt(root, run)
            self._home = self._own = self._settle(root, run, attempt)
        except OSError as error:
            self._to_memory(error)

    @property
    def size(self) -> int:
        """Bytes waiting."""
        with self._lock:
            return sum(s.size for s in self._segments)

    @property
    def waiting(self) -> int:
        """Lines waiting."""
        with self._lock:
            return sum(s.count for s in self._segments)

    def append(self, lines: list[bytes]) -> None:
        """Keep these lines. Never raises: what the disk refuses stays in memory."""
        with self._lock:
            if self._home is None and self._place is not None and time.monotonic() >= self._again_s:
                self._spill()
            for start in range(0, len(lines), SEGMENT_LINES):
                self._append(lines[start : start + SEGMENT_LINES])
            while self.size > self.limit_bytes and self._thin():
                pass

    def _append(self, lines: list[bytes]) -> None:
        if self._home is not None:
            sealed = b"".join(map(seal, lines))
            try:
                if self._open is None:
                    path = self._home / f"{self._next:010d}-0.seg"
                    self._open = open(path, "ab", buffering=0)  # noqa: SIM115
                    self._next += 1
                    self._segments.append(Segment(path))
                segment = self._segments[-1]
                written = self._open.write(sealed) or 0
                if written < len(sealed):
                    raise OSError(28, "the disk is full")
                segment.count += len(lines)
                segment.size += len(sealed)
                with contextlib.suppress(OSError):  # a name that says fewer accuses nobody
                    assert segment.path is not None
                    segment.path = segment.path.rename(_named(segment.path, segment.count))
                if segment.count >= SEGMENT_LINES or segment.size >= SEGMENT_BYTES:
                    self._roll()
                return
            except OSError as error:
                self._take_back()
                self._to_memory(error)
        last = self._segments[-1] if self._segments else None
        if last is None or last.path is not None or last.busy or last.count + len(lines) > SEGMENT_LINES:
            last = Segment(None)
            self._segments.append(last)
        last.lines += lines
        last.count += len(lines)
        last.size += sum(map(len, lines))

    def _take_back(self) -> None:
        """Cut off what a failed write left of itself."""
        if self._open is None:
            return
        segment = self._segments[-1]
        with contextlib.suppress(OSError):
            os.ftruncate(self._open.fileno(), segment.size)
        self._roll()
        if not segment.count:
            self.drop(segment)

    def take(self) -> tuple[Segment, list[bytes]] | None:
        """The oldest segment that nobody has, with its lines, to be sent and then `drop`ped or `put_back`; None when there is
        none."""
        with self._lock:
            while (segment := next((s for s in self._segments if not s.busy), None)) is not None:
                if segment is self._segments[-1]:
                    self._roll()
                lines = self._read(segment)
                if lines:
                    segment.busy = True
                    return segment, lines
                self.drop(segment)
            return None

    def drop(self, segment: Segment) -> None:
        """Forget a segment: it was delivered, or never will be."""
        with self._lock:
            if segment in self._segments:
                self._segments.remove(segment)
            if segment.path is not None:
                try:
                    segment.path.unlink(missing_ok=True)
                    if segment.path.parent != self._own:
                        self._remove_if_empty(segment.path.parent)
                except OSError:
                    pass

    def put_back(self, segment: Segment) -> None:
        """Keep a segment that could not be delivered."""
        with self._lock:
            segment.busy = False

    def close(self) -> None:
        """Let go of the folder: another reporter of this run may adopt what is left."""
        with self._lock:
            self._roll()
            self._spill(every=True)
            if self._own is not None:
                self._remove_if_empty(self._own)
            for lock in self._locks:
                os.close(lock)
            self._locks.clear()
            self._home = self._own = self._place = None

    def _spill(self, every: bool = False) -> None:
        """Try once more to put on disk what had to stay in memory, oldest first; where all of it is there, later lines go there
        too. `every`: also what is being sent, since nobody may hear how that ended; what is sent twice counts once."""
        if self._place is None:
            return
        try:
            if self._own is None:
                self._place[0].mkdir(parents=True, exist_ok=True)
                self._own = self._settle(*self._place)
            for segment in self._segments:
                if segment.path is None and (every or not segment.busy):
                    self._to_disk(self._own, segment)
        except OSError as error:
            return self._to_memory(error)
        self._home, self.disk_error = self._own, None
        return None

    def _to_disk(self, home: Path, segment: Segment) -> None:
        path, sealed = home / f"{self._next:010d}-{segment.count}.seg", b"".join(map(seal, segment.lines))
        try:
            path.write_bytes(sealed)
        except OSError:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            raise
        self._next += 1
        segment.path, segment.lines, segment.size = path, [], len(sealed)

    def _to_memory(self, error: OSError) -> None:
        self._roll()
        self.disk_error = f"{error.strerror or error}"
        self._home, self._again_s = None, time.monotonic() + AGAIN_S

    def _roll(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None

    def _read(self, segment: Segment) -> list[bytes]:
        if segment.path is None:
            return segment.lines
        try:
            sealed = segment.path.read_bytes().splitlines(keepends=True)
        except OSError:
            sealed = []
        lines = [line for s in sealed if (line := unseal(s)) is not None]
        lost = max(segment.count, len(sealed)) - len(lines)
        self.damaged += max(0, lost - segment.lost)
        segment.lost = max(lost, segment.lost)
        return lines

    def _thin(self) -> bool:
        """Take every second sample out of the oldest of the least thinned segments. False when none is left."""
        idle = [s for s in self._segments[:-1] if not s.busy] or [s for s in self._segments if not s.busy]
        if not idle:
            return False
        segment = min(idle, key=lambda s: s.thinned)
        if segment is self._segments[-1]:
            self._roll()
        lines = self._read(segment)
        kept, odd = [], False
        for line in lines:
            if may_thin(line):
                odd = not odd
                if odd or segment.thinned >= MOST_THINNED:
                    continue
            kept.append(line)
        if segment.thinned > MOST_THINNED:  # only events are left in it, and still too much
            self.thinned += len(lines)
            self.drop(segment)
            return True
        self.thinned += len(lines) - len(kept)
        segment.thinned += 1
        self._rewrite(segment, kept)
        return True

    def _rewrite(self, segment: Segment, lines: list[bytes]) -> None:
        segment.count, segment.lost = len(lines), 0
        if segment.path is None:
            segment.lines, segment.size = lines, sum(map(len, lines))
            return
        sealed = b"".join(map(seal, lines))
        scratch = segment.path.with_suffix(".new")
        try:
            scratch.write_bytes(sealed)
            fresh = _named(segment.path, segment.count)
            os.replace(scratch, fresh)
            if fresh != segment.path:
                segment.path.unlink(missing_ok=True)
            segment.path, segment.size = fresh, len(sealed)
        except OSError:  # no room even for half of it: give it up
            self.thinned += len(lines)
            self.drop(segment)

    def _settle(self, root: Path, run: str, attempt: int) -> Path:
        """A folder of our own, locked."""
        for n in range(1000):
            home = root / f"{run}.{attempt}.{n}"
            try:
                home.mkdir()
            except FileExistsError:
                continue
            self._locks.append(_lock(home) or -1)
            return home
        raise OSError(17, f"{root} holds a thousand folders of this attempt")

    def _adopt(self, root: Path, run: str) -> None:
        """Take over segments of dead reporters of this run."""
        for home in sorted(root.glob(f"{run}.*.*"), key=_age):
            lock = _lock(home)
            if lock is None:
                continue
            self._locks.append(lock)
            segments: dict[str, Path] = {}
            for path in sorted(home.glob("*.seg"), key=_numbers):
                number, count = _numbers(path)
                if segments.setdefault(number, path) != path:
                    path.unlink()  # as it was before it was thinned
                    continue
                data = path.read_bytes()
                count = max(count, data.count(b"\n"))
                self._segments.append(Segment(path, count=count, size=len(data)))
            if not segments:
                self._remove_if_empty(home)

    def _remove_if_empty(self, home: Path) -> None:
        try:
            if not any(home.glob("*.seg")):
                for left in (*home.glob("*.new"), home / "lock"):
                    left.unlink(missing_ok=True)
                home.rmdir()
        except OSError:
            pass


def _numbers(path: Path) -> tuple[str, int]:
    """A segment's number, and how many lines its name says it has; 0 where it doesn't say."""
    number, _, count = path.stem.partition("-")
    return number, int(count) if count.isdecimal() else 0


def _named(path: Path, count: int) -> Path:
    """What a segment of so many lines is called."""
    return path.with_name(f"{_numbers(path)[0]}-{count}.seg")


def _age(home: Path) -> tuple[int, int]:
    """Sort key of a reporter's folder: its attempt, then its number."""
    parts = home.name.rsplit(".", 2)
    return (int(parts[1]), int(parts[2])) if parts[1].isdigit() and parts[2].isdigit() else (0, 0)


def _lock(home: Path) -> int | None:
    """A lock on a reporter's folder, held until the descriptor closes; None when somebody alive has it."""
    descriptor = os.open(home / "lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor
    except OSError:
        os.close(descriptor)
        return None
