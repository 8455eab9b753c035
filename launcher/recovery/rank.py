"""One rank as its owner sees it: a warm process (`launcher.training.warm`), the attempt it trains now, its pulse, its end.

Ray-free: a Ray actor owns one of these (`launcher.recovery.group`), a test can own one too. Thread-safe: one thread may wait in
`train` while others ask, look and end.
"""

import contextlib
import json
import mmap
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from typing import Any

from launcher.training.warm import PHASES, PULSE, SAVE_SIGNAL, STOP_SIGNAL

KILL_SIGNAL = 9
END_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Pulse:
    """The last sign of life of a rank's training."""

    step: int
    """The newest step it has made; -1 before the first of this attempt."""
    phase: str
    """What it does since: start, step, validate, checkpoint."""
    age_s: float
    """Since that sign."""
    p99_s: float
    """99th percentile of the time between two of its last 256 steps; 0 while there are none."""


class RankProcess:
    """Owns a warm process, started at once and again whenever it is found dead."""

    def __init__(self, env: dict[str, str] | None = None, *, aside: bool = False) -> None:
        """`env` is the warm process's, beside this one's. `aside`: its first imports give way to other processes."""
        # BLAS under numpy would start its threads on import, and only a process with one thread forks soundly
        self._env = {**os.environ, "OPENBLAS_NUM_THREADS": "1", **(env or {})}
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as this object)
        self._file.truncate(PULSE.size)
        self._pulse = mmap.mmap(self._file.fileno(), PULSE.size)
        self._changed = threading.Condition()
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = self._busy = False
        self._ended: dict[str, Any] | None = None
        self.pid: int | None = None
        """Of the process that trains, while there is one."""
        self.died: int | None = None
        """What the warm process has ended with, while there is none: a status, or less than 0, a signal."""
        self._start(aside)

    def _start(self, aside: bool = False) -> None:
        answers, say = os.pipe()
        self._ready, self.pid, self.died = False, None, None
        self._process = subprocess.Popen(
            [
                sys.executable, "-m", "launcher.training.warm", str(say), str(self._file.fileno()),
                *(["aside"] if aside else []),
            ],
            stdin=subprocess.PIPE,
            pass_fds=(say, self._file.fileno()),
            env=self._env,
        )  # fmt: skip
        os.close(say)
        threading.Thread(
            target=self._listen, args=(answers, self._process), name="losscast-rank", daemon=True
        ).start()

    def _listen(self, answers: int, process: "subprocess.Popen[bytes]") -> None:
        with os.fdopen(answers, "rb") as lines:
            for line in lines:
                answer = json.loads(line)
                with self._changed:
                    if "ready" in answer:
                        self._ready = True
                    elif "started" in answer:
                        self.pid = answer["started"]
                    elif "ended" in answer:
                        self._ended = answer["ended"]
                    elif "gone" in answer:
                        self.pid = None
                    self._changed.notify_all()
        status = process.wait()
        with self._changed:
            if process is self._process:
                self._process, self._ready, self.pid = None, False, None
                self.died = status
                if self._busy and self._ended is None:
                    self._ended = {
                        "died": {
                            "signal": -status if status < 0 else None,
                            "status": status if status >= 0 else None,
                        }
                    }
            self._changed.notify_all()

    def wait_ready(self, timeout_s: float | None = None) -> bool:
        """Wait until everything is imported, or can't be (`died`). Starts a new warm process where the last one died."""
        with self._changed:
            if self._process is None:
                self._start()
            self._changed.wait_for(lambda: self._ready or self._process is None, timeout_s)
            return self._ready

    def train(self, assignment: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
        """Train one attempt and wait for its end; `launcher.training.warm` names the answers."""
        # what the attempt before left is no sign of life of this one
        PULSE.pack_into(self._pulse, 0, -1, time.monotonic(), 0.0, PHASES.index("start"))
        for _ in range(2):  # a warm process may die between two attempts
            if self.wait_ready(300.0):
                break
        with self._changed:
            if not self._ready or self._process is None:
                return {"died": {"signal": None, "status": None, "why": "the warm process did not start"}}
            self._ended, self._busy = None, True
            self._order({"train": assignment, "environment": environment})
            self._changed.wait_for(lambda: self._ended is not None)
            self._busy = False
            assert self._ended is not None
            return self._ended

    def ask_to_save(self) -> None:
        """All ranks commit a checkpoint at the next step and go on: one rank's wish is enough."""
        self._signal(SAVE_SIGNAL)

    def ask_to_stop(self) -> None:
        """All ranks commit a checkpoint at the next step and end."""
        self._signal(STOP_SIGNAL)

    def end(self) -> bool:
        """Kill what trains, now. True when it is gone; the warm process stays."""
        self._signal(KILL_SIGNAL)
        with self._changed:
            return self._changed.wait_for(lambda: self.pid is None, END_TIMEOUT_S)

    def close(self) -> None:
        """End the warm process too."""
        with self._changed:
            process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()  # type: ignore[union-attr]
            try:
                process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def pulse(self) -> Pulse:
        """The last sign of life."""
        step, at, p99, phase = PULSE.unpack_from(self._pulse, 0)
        return Pulse(step, PHASES[phase], max(0.0, time.monotonic() - at), p99)

    def _signal(self, number: int) -> None:
        with self._changed:
            self._order({"signal": int(number)})

    def _order(self, order: dict[str, Any]) -> None:
        if self._process is None or self._process.stdin is None:
            return
        with contextlib.suppress(OSError):
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
