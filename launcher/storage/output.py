"""What every process of a run printed and how it ended, kept in the run's own folder, so that it outlives the cluster.

    RUN/output/<submission>.log            the job: its driver, and rank 0
    RUN/output/<submission>.end.json       how the job ended: status, error, time
    RUN/output/<submission>.killed.json    a person ended it at once
    RUN/attempts/<k>/output/rank-<n>.log   one rank of one attempt, stdout and stderr in one
    RUN/attempts/<k>/output/rank-<n>.error.json   the exception that ended it, with its time
    RUN/attempts/<k>/failure.json          what the driver saw of the failure: rank, cause, message, step

File descriptors 1 and 2 are pointed at the file itself, not at a pipe: what a crashing C++ library says last is on
disk though no thread of ours lives to move it. A thread copies the file to where output went before, so that Ray's own
log views go on working. A disk that is full costs lines, never the run: Python's writes are tried and forgiven.

For a run at az:// the files are carried there while they grow (`launcher.storage.carried`). Standard library only.
"""

import contextlib
import io
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from launcher.storage.carried import Carrier, publish
from launcher.storage.runfolder import RunFolder, write_whole

ECHO_S = 0.2
"""Between two looks of the thread that copies to the old output."""
TRACE_LINES = 60
MESSAGE_CHARS = 2000


class Forgiving(io.TextIOBase):
    """Text to a file descriptor. What can't be written goes to another one, or is dropped: a run does not end because a
    log can't be written, and what a full disk hinders is the very thing that has to be read."""

    def __init__(self, descriptor: int, instead: int | None = None) -> None:
        self._descriptor, self._instead = descriptor, instead

    def write(self, text: str) -> int:
        data = memoryview(text.encode("utf-8", "backslashreplace"))
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError:
            if self._instead is not None:
                with contextlib.suppress(OSError):
                    os.write(self._instead, data)
        return len(text)

    def fileno(self) -> int:
        return self._descriptor

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "utf-8"


@contextlib.contextmanager
def kept(folder: RunFolder, path: Path, *, echo: bool = True) -> Iterator[None]:
    """Everything that this process and its children print goes to the end of `path`, a file of the run's folder, and
    with `echo` on to where it went before.

    Where the file can't be opened, output stays where it was, and that is said.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        print(f"losscast: output is not kept in the run's folder: {error}", file=sys.stderr)
        yield
        return
    before: tuple[TextIO, TextIO] = sys.stdout, sys.stderr
    for stream in before:
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    old = os.dup(1), os.dup(2)
    stop, start = threading.Event(), os.fstat(target).st_size
    copier = threading.Thread(
        target=_echo, args=(path, start, old[0], stop), name="losscast-echo", daemon=True
    )
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
    instead = old if echo else (None, None)
    sys.stdout, sys.stderr = Forgiving(1, instead[0]), Forgiving(2, instead[1])  # type: ignore[assignment]
    carrier = Carrier(folder, path)
    if echo:
        copier.start()
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        os.dup2(old[0], 1)
        os.dup2(old[1], 2)
        stop.set()
        carrier.close()
        if echo:
            copier.join(5.0)
        for descriptor in old:
            os.close(descriptor)


def _echo(path: Path, start: int, to: int, stop: threading.Event) -> None:
    """Copy what is added to the file to another descriptor, until stopped; then the rest."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            last = False
            while True:
                while data := file.read(1 << 16):
                    os.write(to, data)
                if last:
                    return
                last = stop.wait(ECHO_S)
    except OSError:
        return  # the old output is gone: the file has everything


def rank_log(folder: RunFolder, attempt: int, rank: int) -> Path:
    return folder.attempt(attempt) / "output" / f"rank-{rank}.log"


def job_log(folder: RunFolder, submission: str) -> Path:
    return folder.path / "output" / f"{submission}.log"


@contextlib.contextmanager
def rank_output(folder: str, attempt: int, rank: int) -> Iterator[None]:
    """Around one rank's training: keeps what it prints, and the exception it ends with, as it passes through.

    Rank 0 speaks for all to Ray, whose job log would else hold every line a thousand times.
    """
    where = RunFolder.at(folder)
    path = rank_log(where, attempt, rank)
    with kept(where, path, echo=rank == 0):
        try:
            yield
        except BaseException as error:
            _note(
                where, path.with_suffix(".error.json"), {"rank": rank, "attempt": attempt, **described(error)}
            )
            sys.stderr.write(_told(error))
            raise


class JobEnd:
    """How a job ends; filled in while it runs."""

    def __init__(self) -> None:
        self.status: int | None = None
        """Exit status; None as long as nothing is known, which a crash leaves so."""


@contextlib.contextmanager
def job_output(folder: RunFolder, submission: str) -> Iterator[JobEnd]:
    """Around a job's driver: keeps what it prints, and how it ended."""
    end, path = JobEnd(), job_log(folder, submission)
    with kept(folder, path):
        said: dict[str, Any] = {}
        try:
            yield end
        except BaseException as error:
            said = described(error)
            sys.stderr.write(_told(error))
            raise
        finally:
            _note(
                folder,
                path.with_suffix(".end.json"),
                {"submission": submission, "status": end.status, "time": time.time(), **said},
            )


def note_end(folder: RunFolder, submission: str, status: int, error: BaseException) -> None:
    """Write down how a job ends that can't end in the ordinary way. Never raises for the disk."""
    said = {"submission": submission, "status": status, **described(error)}
    _note(folder, job_log(folder, submission).with_suffix(".end.json"), said)


def note_failure(
    folder: RunFolder, attempt: int, *, rank: int | None, cause: str, message: str, step: int
) -> None:
    """Write down what the driver saw of an attempt's failure. Never raises for the disk."""
    document = {
        "attempt": attempt,
        "rank": rank,
        "cause": cause,
        "message": message[:MESSAGE_CHARS],
        "step": step,
    }
    _note(folder, folder.attempt(attempt) / "failure.json", {**document, "time": time.time()})


def described(error: BaseException) -> dict[str, Any]:
    """An exception as plain data: its type, message, the end of its trace, and when."""
    trace = "".join(traceback.format_exception(error)).splitlines()
    return {
        "time": time.time(),
        "type": type(error).__name__,
        "message": str(error)[:MESSAGE_CHARS],
        "trace": trace[-TRACE_LINES:],
    }


class EndedAtOnce(SystemExit):
    """A job that SIGTERM ends: by `losscast stop`, or by whoever ended its Ray."""

    was_asked = False
    """SIGTERM came. Ray raises a SystemExit of its own in place of ours where its C++ waits."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)

    def __str__(self) -> str:
        return "ended at once by a person, who stopped its job or its Ray"


def end_when_asked() -> None:
    """Have SIGTERM end this process with EndedAtOnce, and nothing be printed by Ray's own C++, whose handler writes a stack
    of it each time. To be called after `ray.init`, which installs that, and in the main thread."""

    def asked(number: int, frame: Any) -> None:
        EndedAtOnce.was_asked = True
        raise EndedAtOnce

    signal.signal(signal.SIGTERM, asked)


def _told(error: BaseException) -> str:
    """An error as the log shows it: what is a person's to mend in one line, anything else with its trace."""
    if EndedAtOnce.was_asked and isinstance(error, SystemExit):
        return f"losscast: {EndedAtOnce()}\n"
    if getattr(error, "exit_status", None) is not None:
        return f"losscast: {error}\n"
    if not isinstance(error, Exception):
        return f"losscast: ended: {type(error).__name__}\n"
    return "".join(traceback.format_exception(error))


def _note(folder: RunFolder, path: Path, document: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        write_whole(path, document)
        publish(folder, path)
