"""What outlives a driver that is killed: the small process that it was forked from, which begins it again.

A driver has Ray in it, and is what the kernel may pick when a head runs out of memory. Its ranks go with it, but nothing of
the run is lost that was committed: so it is begun again, under the same submission, and takes the run over at once, since
whoever forked it knows for certain that the holder is dead. A driver that was asked to end (TERM, INT, HUP) or that ended by
itself is not begun again; nor is one that is killed again and again.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from launcher.training.warm import with_parent

ASKED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
FORWARD_S = 2.0
"""Who ends a job signals the whole process group; who signals this process alone means its driver too, a little later."""
WAITS_S = (0.0, 5.0, 30.0)
"""Before a driver that was killed is begun again, the first, second, third time in a row."""
LONG_S = 600.0
"""After a life as long as this a driver's end is a new story."""


@dataclass(frozen=True)
class Killed:
    """The driver before this one."""

    pid: int
    number: int
    """The signal."""

    def __str__(self) -> str:
        try:
            name = signal.Signals(self.number).name
        except ValueError:
            name = f"signal {self.number}"
        hint = " (out of memory? see the kernel's log)" if self.number == signal.SIGKILL else ""
        return f"the driver (pid {self.pid}) was ended by {name}{hint}"


def kept(work: Callable[[Killed | None], int], given_up: Callable[[Killed], None]) -> int:
    """Do the work in a child, and again when a signal ends it. Returns the exit status, in the child and in its parent.

    work      given what ended the one before
    given_up  told, in the parent, when it is not tried again
    """
    died: Killed | None = None
    streak, parent = 0, os.getpid()
    while True:
        began, child = time.monotonic(), os.fork()
        if child == 0:
            with_parent(parent, signal.SIGTERM)
            return work(died)
        status, asked = _wait(child)
        if not os.WIFSIGNALED(status):
            return os.waitstatus_to_exitcode(status)
        number = os.WTERMSIG(status)
        if asked or number in ASKED:
            return 128 + number
        died = Killed(child, number)
        streak = 1 if time.monotonic() - began > LONG_S else streak + 1
        if streak > len(WAITS_S):
            given_up(died)
            return 128 + number
        time.sleep(WAITS_S[streak - 1])


def _wait(child: int) -> tuple[int, bool]:
    """The child's wait status, and whether it was asked to end. Signals that come meanwhile are passed on."""
    asked = threading.Event()

    def pass_on(number: int, frame: Any) -> None:
        if number == signal.SIGUSR1:
            return _send(child, number)
        if not asked.is_set():
            asked.set()
            timer = threading.Timer(FORWARD_S, _send, (child, number))
            timer.daemon = True
            timer.start()
        return None

    numbers = (*ASKED, signal.SIGUSR1)
    before = [signal.signal(number, pass_on) for number in numbers]
    try:
        return os.waitpid(child, 0)[1], asked.is_set()
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
