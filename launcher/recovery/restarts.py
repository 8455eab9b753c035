"""Whether to try again after a failure, and how long to wait first. Pure: no clock, no I/O.

A failure that came from outside (a process killed, a host lost) is tried again at once; one that the run raised itself
waits longer each time it repeats. Steps gained since the last failure make it a new story. Without them, three in a row
are a crash loop: the fault is in the run, trying again only costs, and the error that counts is the loop's first, since
later ones are often only its echo.

Steps count optimizer updates, waits are seconds.
"""

from collections import Counter
from dataclasses import dataclass, field

from launcher.runspec.model import Policy

KILLED, RAISED, HUNG, HOST_LOST, PREEMPTED = "killed", "raised", "hung", "host_lost", "preempted"
RESIZED, ROLLBACK, LEASE_LOST = "resized", "rollback", "lease_lost"
"""Causes of a restart, as the monitor counts them. The second row is nobody's fault."""

WAITS_S: dict[str, tuple[float, ...]] = {
    KILLED: (0, 1, 5, 15, 60),
    RAISED: (1, 5, 15, 60),
    HUNG: (0, 5, 30, 60),
    HOST_LOST: (0, 1, 5, 15, 60),
    PREEMPTED: (0,),
}
"""Before the first, second, ... try again without a step gained; the last one repeats."""
SAME_STEP_LIMIT = 3
"""Failures in a row that gained no step."""
FREE = frozenset({PREEMPTED, RESIZED, ROLLBACK})
"""Not counted against policy.max_restarts: a spot machine is taken away as often as it likes."""


@dataclass(frozen=True)
class Failure:
    """One attempt that ended before its time."""

    cause: str
    message: str
    reached: int
    """The newest step that any rank had made."""
    rank: int | None = None

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.message}" if self.rank is not None else self.message


@dataclass(frozen=True)
class Verdict:
    """Go on after `wait_s`, or give up, and why."""

    wait_s: float = 0.0
    give_up: str | None = None
    error: Failure | None = None
    """With `give_up`: the error to show."""


@dataclass
class Restarts:
    """The failures of one run under one driver."""

    policy: Policy
    by_cause: Counter[str] = field(default_factory=Counter)
    best_step: int = -1
    idle: list[Failure] = field(default_factory=list)
    """Failures since the last step gained, oldest first."""
    first: Failure | None = None

    @property
    def counted(self) -> int:
        """Restarts that policy.max_restarts is about."""
        return sum(n for cause, n in self.by_cause.items() if cause not in FREE)

    def failed(self, failure: Failure) -> Verdict:
        """Take a failure; say what to do. Call once a failure."""
        gained = failure.reached > self.best_step
        self.best_step = max(self.best_step, failure.reached)
        if gained:
            self.idle = []
        self.by_cause[failure.cause] += 1
        if failure.cause in FREE:
            return Verdict()
        self.first = self.first or failure
        self.idle.append(failure)
        if len(self.idle) > SAME_STEP_LIMIT:
            return Verdict(give_up=f"{len(self.idle)} failures without a step gained", error=self.idle[0])
        if self.counted > self.policy.max_restarts:
            return Verdict(
                give_up=f"policy.max_restarts: {self.policy.max_restarts} is used up", error=self.first
            )
        waits = WAITS_S.get(failure.cause, WAITS_S[RAISED])
        streak = sum(f.cause == failure.cause for f in self.idle)
        return Verdict(wait_s=waits[min(streak, len(waits)) - 1])

    def told(self) -> str:
        """Counts by cause, in words."""
        return ", ".join(f"{n} {cause}" for cause, n in sorted(self.by_cause.items())) or "none"
