"""Which of several ranks' failures came first, and what it was. Pure.

When one rank ends, its neighbours' collectives fail too; their complaints are echoes. The cause is a process that was
killed, before an error that a rank raised by itself, before an error about a connection.
"""

import re
import signal
from collections.abc import Sequence
from typing import Any

ECHO = re.compile(
    r"connection (closed|reset|refused)|timed? ?out|broken pipe|gloo|nccl|recvBytes|socket|store", re.I
)
"""Errors that a rank has when another one ends."""


class RankFailed(RuntimeError):
    """An attempt ended before its time: by which rank (None: not known), by what, and what there is to say of it."""

    def __init__(self, rank: int | None, cause: str, message: str, trace: str = "") -> None:
        super().__init__(f"rank {rank}: {message}" if rank is not None else message)
        self.rank, self.cause, self.message, self.trace = rank, cause, message, trace
        self.dumps: dict[int, str] = {}
        """By rank: every thread's stack, where the attempt hung."""


def seen_in(rank: int, answer: dict[str, Any], notice: bool) -> RankFailed | None:
    """The failure in a rank's answer, None where there is none. `notice`: its host was to be taken away."""
    if "raised" in answer:
        error = answer["raised"]
        return RankFailed(rank, "raised", f"{error['type']}: {error['message']}", error.get("trace", ""))
    if "died" in answer:
        return RankFailed(rank, "preempted" if notice else "killed", _death(answer["died"]))
    return None


def _death(died: dict[str, Any]) -> str:
    if died.get("why"):
        return str(died["why"])
    number = died.get("signal")
    if number is None:
        return f"its process left with status {died.get('status')}"
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    hint = " (out of memory? see the kernel's log)" if name == "SIGKILL" else ""
    return f"its process was ended by {name}{hint}"


def blame(failures: Sequence[RankFailed]) -> RankFailed:
    """The one that explains the others. Raises ValueError for none at all."""
    if not failures:
        raise ValueError("need a failure")
    return min(
        failures,
        key=lambda f: (f.cause == "raised", bool(f.cause == "raised" and ECHO.search(f.message))),
    )
