"""One request to Azure, again and again while that may help and there is time; what goes wrong becomes one line.

The SDK's own retries are off: they count tries, not time. A read retries three times inside the SDK after a body was cut
short, which the time given to a single try allows for. A server that sends a byte now and then can stretch a try: what must
act in time (a run's lease) watches the clock in a thread of its own.
"""

import errno
import logging
import random
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

from azure.core.exceptions import (
    AzureError,
    ClientAuthenticationError,
    HttpResponseError,
    ResourceNotFoundError,
)

from infra.objects import Missing

T = TypeVar("T")
Timeouts = dict[str, Any]
"""Keywords of the SDK: how long one try waits for a connection, and for an answer."""

TRY_S = 20.0
"""A single try waits this long for an answer, at most."""
PASSING = frozenset({408, 429, 500, 502, 503, 504})
"""Statuses after which the same request may succeed."""

logging.getLogger("azure").addHandler(logging.NullHandler())  # it says in pages what we say in a line


class Refused(OSError):
    """Azure said no, and would say it again. One line."""

    exit_status = 1

    def __str__(self) -> str:
        return str(self.strerror)


class TooLate(TimeoutError):
    """The time limit is over, and the outcome open: what was asked may have been done. One line."""

    exit_status = 1

    def __str__(self) -> str:
        return str(self.strerror)


class Conflict(Exception):
    """409 or 412: somebody wrote before us, or an earlier try of ours did."""


def tried(
    what: str,
    once: Callable[[Timeouts], T],
    *,
    limit_s: float,
    deadline: float | None = None,
    conflicts_pass: bool = False,
) -> T:
    """`once`, again while the error may pass and there is time. It is given the timeouts of this try.

    conflicts_pass  nothing we asked for can conflict: a 409 or 412 is a passing trouble of the service
    Raises Missing, TooLate, Refused, and Conflict unless conflicts pass.
    """
    began, tries = time.monotonic(), 0
    deadline = began + limit_s if deadline is None else deadline
    while True:
        tries += 1
        left = max(0.05, deadline - time.monotonic())
        wait_s = min(TRY_S, left / 3.5)  # a read tries three times inside the SDK
        try:
            return once({"connection_timeout": min(5.0, wait_s), "read_timeout": wait_s})
        except ResourceNotFoundError as error:
            if getattr(error, "error_code", None) == "ContainerNotFound":
                raise Refused(errno.ENOENT, f"{what}: there is no such container: {_line(error)}") from error
            raise Missing(what) from None
        except AzureError as error:
            status = error.status_code if isinstance(error, HttpResponseError) else None
            if status in (409, 412) and not conflicts_pass:
                raise Conflict from error
            passing = status in PASSING or status in (409, 412) or _unanswered(error)
            if not passing:
                raise _refusal(what, status, error) from error
            pause = min(5.0, 0.1 * 2 ** min(tries, 8)) * random.uniform(0.5, 1.0)
            if time.monotonic() + pause >= deadline:
                raise TooLate(
                    errno.ETIMEDOUT,
                    f"{what}: given up after {time.monotonic() - began:.1f} s and {tries} tries: {_line(error)}",
                ) from error
            time.sleep(pause)


def _unanswered(error: AzureError) -> bool:
    """No answer came, or only a part of it. An identity that gave no token is not asked on and on: the next operation
    will."""
    if isinstance(error, ClientAuthenticationError):
        return False
    return (
        not isinstance(error, HttpResponseError)
        or error.status_code is None
        or 200 <= error.status_code < 300
    )


def _refusal(what: str, status: int | None, error: AzureError) -> OSError:
    """What Azure refused, and what to do about it."""
    if isinstance(error, ClientAuthenticationError) or status in (401, 403):
        return Refused(
            errno.EACCES,
            f"{what}: refused ({_line(error)}). On a cluster, check the workload identity and its role on the container; "
            "on your own machine, `az login`.",
        )
    return Refused(errno.EIO, f"{what}: {_line(error)}")


def _line(error: BaseException) -> str:
    """An error of Azure in one line: its code where it has one, and the first words."""
    code = getattr(error, "error_code", None)
    if isinstance(error, ClientAuthenticationError) and code is None:
        lines = [x.strip() for x in str(error).splitlines()]
        causes = [x for x in lines if x and x.count(": ") and not x.startswith(("Attempted", "To mitigate"))]
        return "no token: " + (" ".join(causes) or lines[0])[:400]
    text = " ".join(str(getattr(error, "message", None) or error).split())
    if plain := re.findall(r"\[Errno \d+\] ([^)\"']+)|(\w+ timed out)", text):
        text = "nobody answers: " + "".join(plain[-1])
    for end in (" RequestId:", " Time:", " ErrorCode:", " Content:"):
        text = text.split(end)[0]
    status = getattr(error, "status_code", None)
    head = " ".join(str(getattr(part, "value", part)) for part in (status, code) if part)
    return f"{head}: {text[:300]}" if head else text[:300] or type(error).__name__
