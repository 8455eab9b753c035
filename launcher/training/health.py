"""Which rank is slow: each rank's own time in a step, gathered with its loss, and who stands apart for good.

Own time is from the step's begin to the end of its first forward pass, in seconds: what a rank does before it first
waits for the others. With ZeRO 3 and in a pipeline the forward pass already waits, and all ranks look alike: then
nobody is named. On a GPU it is measured by events, so that the step never waits for the clock.
"""

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


class Stragglers:
    """Finds the rank that is slow for good; one slow step is nobody's fault."""

    def __init__(self, window: int = WINDOW) -> None:
        self._rows: deque[Sequence[float]] = deque(maxlen=window)
        self._named: int | None = None
        self._news: str | None = None

    def add(self, own_s: Sequence[float]) -> dict[str, Any]:
        """Take one step's own times, by rank. Returns {"slow_rank", "slow_ratio"} for the wire; empty when none is slow.

        Needs a full window and two ranks; the others' median is taken without the slowest, so that it works for two.
        """
        self._rows.append(own_s)
        if len(own_s) < 2 or len(self._rows) < (self._rows.maxlen or 0):
            return {}
        slow, ratio = self._slowest(len(own_s))
        if slow != self._named:
            was, self._named = self._named, slow
            self._news = (
                f"rank {was} keeps up again"
                if slow is None
                else f"rank {slow} is slow: {ratio:.2f} x the others' time before they meet"
            )
        return {} if slow is None else {"slow_rank": slow, "slow_ratio": round(ratio, 3)}

    def news(self) -> str | None:
        """What changed, once."""
        news, self._news = self._news, None
        return news

    def _slowest(self, ranks: int) -> tuple[int | None, float]:
        usual = [statistics.median(row[rank] for row in self._rows) for rank in range(ranks)]
        slow = max(range(len(usual)), key=usual.__getitem__)
        others = statistics.median(usual[:slow] + usual[slow + 1 :])
        ratio = usual[slow] / others if others > 0 else 1.0
        named = self._named
        if named is not None and usual[named] >= FAIR_RATIO * others and ratio < SLOW_RATIO:
            slow, ratio = named, usual[named] / others
        elif ratio < SLOW_RATIO:
            return None, 1.0
        return slow, ratio
