"""What is on its way to be a checkpoint while training goes on: which step, since when, and how it ended.

`Committer` is for a run in a folder: its shards lie where they belong, and what is left is to make them durable, hash and
commit them, and to let old ones go. A thread waits for all of it: fsync runs without the interpreter's lock, and what takes
CPU, hashing, is done by a process that steps aside (`launcher.storage.beside`).
What carries shards to another place is in `launcher.training.upload`.
"""

import threading
import time
from collections.abc import Callable

from launcher.errors import one_line
from launcher.storage.runlog import Superseded

WISH_PATIENCE_S = 30.0
"""How long ranks wait for a checkpoint that somebody asked for, and that does not get on, where the run and its hosts go on."""
CLOSE_S = 5.0
"""How long the end of an attempt waits for a commit that is under way."""


class Underway:
    """At most one step at a time. Safe between the thread that trains and the one that hears of the end."""

    def __init__(self) -> None:
        self.step: int | None = None
        self.busy = False
        self._began, self._progress = 0.0, ""
        self._outcomes: dict[int, str | None] = {}
        self._news: list[tuple[int, str | None]] = []
        self._superseded: str | None = None
        self._changed = threading.Condition()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def how_far(self) -> str:
        return self._progress

    def idle(self, timeout_s: float) -> bool:
        """True when nothing is under way; waits for that so long."""
        with self._changed:
            return self._changed.wait_for(lambda: not self.busy, timeout_s)

    def outcome(self, step: int) -> str | None:
        """None: committed. Else why not."""
        return self._outcomes.get(step, "it was never carried")

    def news(self) -> list[tuple[int, str | None]]:
        """Outcomes since the last call."""
        self.raise_if_superseded()
        with self._changed:
            news, self._news = self._news, []
        return news

    def raise_if_superseded(self) -> None:
        if self._superseded is not None:
            raise Superseded(self._superseded)

    def _begin(self, step: int) -> None:
        with self._changed:
            self.step, self.busy, self._began, self._progress = step, True, time.monotonic(), ""

    def _end(self, step: int, why: str | None) -> None:
        self._outcomes[step] = why
        self._news.append((step, why))
        self.busy = False
        self._changed.notify_all()


class Committer(Underway):
    """Commits in a thread."""

    def __init__(self, commit: Callable[[int, bool], None]) -> None:
        """commit: makes a step's files a checkpoint, or raises; told whether training waits for it"""
        super().__init__()
        self._commit = commit

    def carry(self, step: int, at_once: bool = False) -> None:
        """Have the step committed; all ranks have written it. `at_once`: it is, or failed, when this returns."""
        self._begin(step)
        if at_once:
            return self._work(step, at_once)
        threading.Thread(target=self._work, args=(step, at_once), name="losscast-commit", daemon=True).start()
        return None

    def close(self) -> None:
        """Wait a little for what is under way. After that it may still be committed, unless another attempt begins."""
        with self._changed:
            self._changed.wait_for(lambda: not self.busy, CLOSE_S)

    def _work(self, step: int, at_once: bool) -> None:
        why: str | None = None
        superseded: str | None = None
        try:
            self._commit(step, at_once)
        except Superseded as error:
            why = superseded = str(error)
        except Exception as error:  # whatever it is: the next save must not wait for this one for ever
            why = one_line(error)
        with self._changed:
            self._superseded = superseded or self._superseded
            self._end(step, why)
