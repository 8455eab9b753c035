"""Which rank is slow, and which one computes something else: each rank's own time in a step and its loss, gathered together, and
who stands apart for good.

Own time is from the step's begin to the end of its first forward pass, in seconds: what a rank does before it first
waits for the others. With ZeRO 3 and in a pipeline the forward pass already waits, and all ranks look alike: then
nobody is named. On a GPU it is measured by events, so that the step never waits for the clock.

A lag of less than MATTERS_S is the scheduler's noise and not worth a person's look, whatever its ratio; where ranks take
turns at being slow, that is said once in SAY_S and the turns are counted.
"""

import math
import statistics
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

WINDOW = 64
"""Steps that a judgement looks back on."""
SLOW_RATIO = 1.3
"""A rank is a straggler when the median of its own time is this many times the median rank's."""
FAIR_RATIO = 1.1
"""And it is none any more below this."""
MATTERS_S = 0.005
"""Nor is it one while it keeps the others waiting for less than this, in each step."""
SAY_S = 60.0
"""Between two words in the log."""

APART_RATIO = 3.0
"""A rank's loss is apart at this many times the usual largest distance from the mean, as the monitor's RankApart has it,"""
APART_LEAST = 1e-3
"""but not for fewer nats than this, where ranks that share a model differ by rounding,"""
APART_STEPS = 5
"""and is named when the same one was so in so many steps running."""


class Stopwatch:
    """A rank's own time. `seconds` is that of the newest step whose end is known: on a GPU, the one before."""

    def __init__(self, cuda: bool) -> None:
        self.seconds = 0.0
        self._cuda, self._began, self._open = cuda, 0.0, False
        if cuda:
            import torch

            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def start(self) -> None:
        """The step begins here."""
        self._open = True
        if self._cuda:
            if self._began and self._events[1].query():
                self.seconds = self._events[0].elapsed_time(self._events[1]) / 1e3
            self._events[0].record()
        self._began = time.monotonic()

    def lap(self) -> None:
        """The first forward pass of the step ends here; later calls in the same step change nothing."""
        if not self._open:
            return
        self._open = False
        if self._cuda:
            self._events[1].record()
        else:
            self.seconds = time.monotonic() - self._began


class Apart:
    """Names the rank whose loss has left the others': the monitor is told only how far apart they are."""

    def __init__(self) -> None:
        self._usual, self._seen = 0.0, 0
        self._ranks, self._running, self._said = list[int](), 0, float("-inf")

    def add(self, losses: Sequence[float], now: float) -> str | None:
        """Take one step's losses, by rank. What to say, at most every SAY_S seconds; `now` in seconds of any clock that goes
        forward. A loss that is no number is apart from any that is one."""
        if len(losses) < 2:
            return None
        finite = [x for x in losses if math.isfinite(x)]
        mean = statistics.fmean(finite) if finite else 0.0
        off = [abs(x - mean) if math.isfinite(x) else math.inf for x in losses]
        most = max(off)
        # of two each is as far from their mean as the other
        ranks = [rank for rank, x in enumerate(off) if x >= 0.999 * most]
        if finite and self._seen >= WINDOW and most > max(APART_RATIO * self._usual, APART_LEAST):
            self._running = self._running + 1 if ranks == self._ranks else 1
            self._ranks = ranks
        else:
            self._running = 0
            if math.isfinite(most):
                self._seen += 1
                self._usual += (most - self._usual) / min(self._seen, WINDOW)
        if self._running < APART_STEPS or now - self._said < SAY_S:
            return None
        self._said = now
        who = " or ".join(map(str, ranks[:8]))
        return (
            f"rank {who} stands apart: its loss is {losses[ranks[0]]:.4f}, the mean {mean:.4f}, and the farthest is usually "
            f"{self._usual:.4f} off"
        )


class Stragglers:
    """Finds the rank that is slow for good; one slow step is nobody's fault."""

    def __init__(self, window: int = WINDOW) -> None:
        self._rows: deque[Sequence[float]] = deque(maxlen=window)
        self._named: int | None = None
        self._told: int | None = None
        self._ratio, self._changes, self._said = 1.0, 0, float("-inf")

    def add(self, own_s: Sequence[float]) -> dict[str, Any]:
        """Take one step's own times, by rank. Returns {"slow_rank", "slow_ratio"} for the wire; empty when none is slow.

        Needs a full window and two ranks; the others' median is taken without the slowest, so that it works for two.
        """
        self._rows.append(own_s)
        if len(own_s) < 2 or len(self._rows) < (self._rows.maxlen or 0):
            return {}
        slow, self._ratio = self._slowest(len(own_s))
        self._changes += slow != self._named
        self._named = slow
        return {} if slow is None else {"slow_rank": slow, "slow_ratio": round(self._ratio, 3)}

    def news(self, now: float) -> str | None:
        """What changed, once, and at most every SAY_S seconds; what changed back meanwhile is counted. `now` in seconds,
        of any clock that goes forward."""
        if self._named == self._told or now - self._said < SAY_S:
            return None
        turns = f" ({self._changes} changes in {now - self._said:.0f} s)" if self._changes > 1 else ""
        was, self._told, self._changes, self._said = self._told, self._named, 0, now
        if self._named is None:
            return f"rank {was} keeps up again{turns}"
        return f"rank {self._named} is slow: {self._ratio:.2f} x the others' time before they meet{turns}"

    def _slowest(self, ranks: int) -> tuple[int | None, float]:
        usual = [statistics.median(row[rank] for row in self._rows) for rank in range(ranks)]
        slow = max(range(len(usual)), key=usual.__getitem__)
        others = statistics.median(usual[:slow] + usual[slow + 1 :])
        ratio = usual[slow] / others if others > 0 else 1.0
        named = self._named
        if ratio >= SLOW_RATIO and usual[slow] - others >= MATTERS_S:
            return slow, ratio
        if (
            named is not None
            and usual[named] >= FAIR_RATIO * others
            and usual[named] - others >= MATTERS_S / 2
        ):
            return named, usual[named] / others
        return None, 1.0
