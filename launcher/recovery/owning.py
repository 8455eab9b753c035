"""Who holds a run while a driver works on it, and what only the driver can tell the monitor.

The rules are those of `launcher.storage.runlog`: the log decides who writes, the lease tells others whether to wait.
"""

import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from launcher.errors import Held
from launcher.recovery.keeper import Killed
from launcher.recovery.restarts import KILLED
from launcher.runspec.model import RunSpec
from launcher.storage.output import note_failure
from launcher.storage.runfolder import RunFolder, last_step
from launcher.storage.runlog import Holding
from launcher.training.saving import refuse_held, run_log

TELL_S = 5.0
"""How long the end of a driver waits for what it has told to arrive."""


class AlreadyOver(Exception):
    """This very submission was worked on by another start of its entrypoint, which has come to its end."""


def wait_for_turn(folder: RunFolder, submission: str, say: Callable[[str], None]) -> None:
    """Return when nobody alive holds the run. An entrypoint that was started twice waits here for the first one to lapse.

    Raises Held where the holder is of another submission, and AlreadyOver where one of this submission let go by itself
    meanwhile: the run was finished, stopped or given up, and is not begun again. Needs no cluster.
    """
    log = run_log(folder)
    standing, said = log.standing(), False
    while standing.alive:
        if standing.submission != submission:
            refuse_held(folder)
        elif not said:
            say(f"{folder.name}: waiting for {standing.who()}, who has this submission, to end or to lapse")
            said = True
        time.sleep(1.0)
        standing = log.standing()
    if said and standing.released and standing.submission == submission:
        raise AlreadyOver(f"attempt {standing.attempt.attempt if standing.attempt else 0} ended by itself")


def bury(folder: RunFolder, spec: RunSpec, submission: str, died: Killed) -> None:
    """Let go of the run in the place of a holder whose end this process's parent has seen, and write down what ended its
    attempt. Does nothing where somebody else holds the run."""
    log = run_log(folder)
    holder = log.standing().attempt
    if holder is None or holder.kind != "attempt":
        return
    by = holder.fields
    if (by.get("submission"), by.get("host"), by.get("pid")) != (submission, socket.gethostname(), died.pid):
        return
    step = last_step(folder, holder.attempt)
    note_failure(folder, holder.attempt, rank=None, cause=KILLED, message=str(died), step=step)
    _tell(spec, holder.attempt, "restart", {"time": time.time(), "cause": KILLED, "step": step})
    log.let_go(holder.attempt, holder.nonce)


class Ownership:
    """The right to write a run. Each restart goes on under a new attempt number."""

    def __init__(self, folder: RunFolder, spec: RunSpec, submission: str, say: Callable[[str], None]) -> None:
        self._folder, self._spec, self._submission, self._say = folder, spec, submission, say
        self._holding: Holding | None = None
        self._started = False
        self._telling: list[threading.Thread] = []
        self.lost: str | None = None
        """Why the run is no longer ours, once it is not. Set from the lease's thread."""

    def take(self) -> None:
        """Take the run. Waits for a holder of the same submission to lapse; raises Held for any other."""
        self._holding = run_log(self._folder).take(self._submission, on_lost=self._gone, say=self._say)

    def _gone(self, why: str) -> None:
        self.lost = why

    def next_attempt(self) -> int:
        """The number to train under: the one just taken, then a new one for each restart. Raises runlog.Superseded."""
        if self._holding is None:
            raise RuntimeError("the run was not taken")
        if self._started:
            self._holding.next_attempt()
        self._started = True
        return self._holding.attempt

    def committed(self) -> int:
        """Step of the newest commit of the attempt that trains, some seconds late; 0 while none is known. Asks nobody."""
        if self._holding is None or self._holding.committed[0] != self._holding.attempt:
            return 0
        return self._holding.committed[1]

    def tell(self, event: str, attempt: int, **fields: Any) -> None:
        """Tell the monitor what no rank can tell any more: a restart with its cause, or a failed end. Returns at once."""
        if self._spec.monitor is None:
            return
        thread = threading.Thread(
            target=_tell,
            args=(self._spec, attempt, event, {"time": time.time(), **fields}),
            name="losscast-tell",
            daemon=True,
        )
        thread.start()
        self._telling = [t for t in self._telling if t.is_alive()] + [thread]

    def close(self, *, over: bool = True) -> None:
        """Let go, and wait a little for what was told. Never raises. `over`: see `Holding.release`."""
        if self._holding is not None:
            self._holding.release(over=over)
        until = time.monotonic() + TELL_S
        for thread in self._telling:
            thread.join(max(0.0, until - time.monotonic()))


def _tell(spec: RunSpec, attempt: int, event: str, fields: dict[str, Any]) -> None:
    from launcher.reporter import Reporter

    if spec.monitor is None:
        return
    token = os.environ.get(spec.monitor.token_env, "")
    # no spool: the ranks' reporter has its own there, and what matters here is said again by the next attempt
    reporter = Reporter(spec.monitor.url, token, spec.name, attempt, None, quiet=True)
    reporter.event(event, **fields)
    reporter.close(reason=None, timeout_s=TELL_S)


def tell_lease_lost(folder: RunFolder, spec: RunSpec, held: Held) -> None:
    """Tell the monitor that a second writer was refused, or that this one lost its place. Under the holder's own
    attempt, since one that was superseded would not be heard. Never raises."""
    try:
        newest = run_log(folder).newest_attempt()
    except Exception:  # the storage that lost us the lease may be gone still
        return
    if newest is not None:
        _tell(
            spec,
            newest.attempt,
            "restart",
            {"time": time.time(), "cause": "lease_lost", "error": str(held)[:500]},
        )


def last_commit(folder: RunFolder) -> int:
    """Step of the newest commit, 0 where there is none or the log can't be read."""
    return _commits(folder, 0)


def oldest_commit(folder: RunFolder) -> int:
    """Step of the oldest commit that is still kept, 0 where there is none or the log can't be read."""
    return _commits(folder, -1)


def _commits(folder: RunFolder, which: int) -> int:
    try:
        log = run_log(folder)
        kept = [e for e in log.commits() if log.store.list(str(e.fields["manifest"]))]
        return int(kept[which].fields["step"])
    except Exception:  # asked for by the books and by policy, and neither may end a run
        return 0
