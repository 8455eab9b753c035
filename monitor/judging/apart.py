"""The judges in a process of their own, out of the way of those who send: the service's side of it.

The process is `python -m monitor.judging.apart_child STORE`, with one end of a socket pair. It is told of new ordinals, reads the
store itself, and answers with verdicts, with what is to be written (the store has one writer, which is here) and every
half a second with a sign of life. It keeps nothing that the store does not have, so it can die at any moment: it is
started again and goes on. One that gives no sign of life for HUNG_S is killed first. It ends when this process does.
"""

import os
import subprocess
import sys
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from socket import socketpair
from typing import Any

import msgspec

from monitor.judge import Settings
from monitor.store.ingest import Refused, Taken
from monitor.store.store import Store
from monitor.store.tables import Judged

BEAT_S = 0.5
HUNG_S = 60.0
AGAIN_S = (0.5, 2.0, 10.0, 30.0)
"""Wait before it is started again, the first time, the second, ... without a minute of life between."""
ASK_S = 1.0
"""A page waits so long for bands that are not in the store yet, then goes without."""
STOP_S = 20.0
NICE = 5
"""The judge gives way to those who send: samples that are not taken pile up with the senders, verdicts catch up."""
SELDOM = (50_000, 20, 100)
"""Thresholds of the cyclic garbage collector, here and in the service: what is held of each of ten thousand runs has no cycles,
and to go over all of it again and again would cost a tenth of a core."""


class Notice(msgspec.Struct, array_like=True, tag="notice"):
    """Everything up to this ordinal is in the store."""

    ord: int


class Forget(msgspec.Struct, array_like=True, tag="forget"):
    """These runs are no more."""

    run_ids: list[int]


class Ask(msgspec.Struct, array_like=True, tag="ask"):
    """What was expected of this run's samples, as far as it is not in the store."""

    number: int
    run_id: int


class Written(msgspec.Struct, array_like=True, tag="written"):
    """What became of a Write: None, or why it is not on disk."""

    number: int
    error: str | None


class End(msgspec.Struct, array_like=True, tag="end"):
    """Judge what waits, write everything, end."""


class Said(msgspec.Struct, array_like=True, tag="said"):
    """New verdicts by run id."""

    last: dict[int, dict[str, Any]]


class Write(msgspec.Struct, array_like=True, tag="write"):
    """To be committed, and answered with Written."""

    number: int
    judged: list[Judged]


class Bands(msgspec.Struct, array_like=True, tag="bands"):
    """The answer to an Ask: attempt and packed rows."""

    number: int
    bands: list[tuple[int, bytes]]


class Beat(msgspec.Struct, array_like=True, tag="beat"):
    """A sign of life: how far behind, and what is wrong."""

    lag_s: float
    failing: str | None


ToChild = Notice | Forget | Ask | Written | End
ToParent = Said | Write | Bands | Beat
pack = msgspec.msgpack.Encoder().encode
to_child = msgspec.msgpack.Decoder(ToChild).decode
to_parent = msgspec.msgpack.Decoder(ToParent).decode


class Apart:
    """As `judging.Judging`, for a judge in its own process. Start it with `start`, end it with `stop`."""

    def __init__(
        self,
        store: Store,
        write: Callable[[list[Judged]], "Future[Taken]"],
        *,
        settings: Settings | None = None,
        clock: Callable[[], float] = time.time,
        changed: Callable[[list[int]], None] = lambda run_ids: None,
    ):
        self.last: dict[int, dict[str, Any]] = {i: last for i, (_, last) in store.lasts().items() if last}
        self.starts = 0
        """How often its process was started."""
        self._folder, self._write, self._clock, self._changed = store.folder, write, clock, changed
        self._settings = settings or Settings()
        self._noticed = self._newest = store.newest_ord()
        self._said_lag_s, self._heard_s = 0.0, time.monotonic()
        self._trouble: str | None = None
        self._dead: str | None = "not started yet"
        self._stopping = threading.Event()
        self._out: deque[ToChild] = deque()
        self._ready = threading.Condition()
        self._asked: dict[int, Future[list[tuple[int, bytes]]]] = {}
        self._number = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._line: Connection | None = None
        self._keeper = threading.Thread(target=self._keep, name="losscast-judge-keeper", daemon=True)

    def start(self) -> None:
        """Start its process, and again whenever it ends."""
        self._spawn()
        self._keeper.start()

    def stop(self) -> None:
        """Let it judge what waits, for some seconds at most, and write everything; then it is ended."""
        self._stopping.set()
        self._send(End())
        process = self._process
        if process is not None:
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._keeper.is_alive():
            self._keeper.join(5.0)

    @property
    def failing(self) -> str | None:
        """Why something can't be judged or written; None while all is well."""
        return self._dead or self._trouble

    def notice(self, ord: int) -> None:
        """Everything up to this ordinal is in the store. Never waits."""
        with self._ready:
            self._newest = ord
            self._ready.notify()

    def forget(self, run_ids: list[int]) -> None:
        """These runs are no more."""
        for run_id in run_ids:
            self.last.pop(run_id, None)
        self._send(Forget(run_ids))

    def lag_s(self) -> float:
        """For how long the oldest sample that is not judged has been on disk; counts on while nothing is heard."""
        silent = time.monotonic() - self._heard_s
        return self._said_lag_s + (silent if silent > 4 * BEAT_S else 0.0)

    def pending_bands(self, run_id: int) -> "list[tuple[int, array[float]]]":
        """Attempt and what was expected of samples whose bands are not in the store yet. Any thread."""
        if self._dead is not None or time.monotonic() - self._heard_s > 4 * BEAT_S:
            return []
        answer: Future[list[tuple[int, bytes]]] = Future()
        with self._ready:
            self._number += 1
            number = self._number
            self._asked[number] = answer
        self._send(Ask(number, run_id))
        try:
            return [(attempt, array("d", flat)) for attempt, flat in answer.result(ASK_S)]
        except TimeoutError:
            return []
        finally:
            self._asked.pop(number, None)

    def _send(self, message: ToChild) -> None:
        with self._ready:
            self._out.append(message)
            self._ready.notify()

    # its process

    def _spawn(self) -> None:
        ours, theirs = socketpair()
        settings = msgspec.json.encode(asdict(self._settings)).decode()
        command = [
            sys.executable,
            "-m",
            "monitor.judging.apart_child",
            str(self._folder),
            str(theirs.fileno()),
            settings,
        ]
        root = str(Path(__file__).resolve().parents[2])
        env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        env["PYTHONPATH"] = root + (os.pathsep + env["PYTHONPATH"] if env.get("PYTHONPATH") else "")
        with theirs:
            self._process = subprocess.Popen(
                command, env=env, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, start_new_session=True
            )  # fmt: skip
        self._line = Connection(ours.detach())
        self.starts += 1
        self._heard_s = time.monotonic()
        with self._ready:
            self._out.clear()
            self._out.append(Notice(self._newest))
            self._noticed = self._newest
        threading.Thread(
            target=self._talk, args=(self._line,), name="losscast-judge-out", daemon=True
        ).start()
        threading.Thread(
            target=self._listen, args=(self._line,), name="losscast-judge-in", daemon=True
        ).start()

    def _keep(self) -> None:
        tried = 0
        while True:
            process, began = self._process, time.monotonic()
            assert process is not None
            while process.poll() is None:
                silent = time.monotonic() - self._heard_s
                if silent > HUNG_S and not self._stopping.is_set():
                    process.kill()
                time.sleep(0.05 if self._stopping.is_set() else 0.25)
            with self._ready:
                line, self._line = self._line, None
                self._ready.notify_all()
            if self._stopping.is_set():
                self._dead = "stopped"
                return
            self._dead = f"the judge's process ended with status {process.returncode}; it is started again"
            tried = 0 if time.monotonic() - began > 60 else tried + 1
            if self._stopping.wait(AGAIN_S[min(tried, len(AGAIN_S) - 1)]):
                return
            if line is not None:
                line.close()
            try:
                self._spawn()
            except OSError as error:
                self._dead = f"the judge's process can't be started: {error}"
                self._heard_s = time.monotonic() - 1

    def _talk(self, line: Connection) -> None:
        """Send what is to be sent; newer ordinals replace older ones while the process is busy."""
        try:
            while self._line is line:
                with self._ready:
                    while not self._out and self._newest == self._noticed and self._line is line:
                        self._ready.wait(1.0)
                    messages: list[ToChild] = list(self._out)
                    self._out.clear()
                    if self._newest != self._noticed:
                        self._noticed = self._newest
                        messages.append(Notice(self._newest))
                for message in messages:
                    line.send_bytes(pack(message))
        except OSError:
            return

    def _listen(self, line: Connection) -> None:
        try:
            while True:
                message = to_parent(line.recv_bytes())
                if self._line is line:
                    self._heard(message)
        except (OSError, EOFError):
            return

    def _heard(self, message: ToParent) -> None:
        self._heard_s = time.monotonic()
        if isinstance(message, Beat):
            self._said_lag_s, self._trouble, self._dead = message.lag_s, message.failing, None
        elif isinstance(message, Said):
            self.last.update(message.last)
            self._changed(list(message.last))
        elif isinstance(message, Bands):
            asked = self._asked.get(message.number)
            if asked is not None and not asked.done():
                asked.set_result(message.bands)
        else:
            number = message.number

            def done(future: "Future[Taken]") -> None:
                error = future.exception()
                self._send(Written(number, None if error is None else str(error)))

            try:
                self._write(message.judged).add_done_callback(done)
            except Refused as refused:
                self._send(Written(number, str(refused)))
