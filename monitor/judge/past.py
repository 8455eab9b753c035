"""The run's own way so far, thinned to at most 64 points: (step, level, learning rate); levels are nats per token.

Answers where the level was at an earlier step: after a resume from there, and to say how much of its way a run that
blew up has lost. When full, every other point goes and the stride doubles, so the points stay evenly spaced in
samples however long the run is.
"""

import math
from bisect import bisect_left, bisect_right
from typing import Any

KEEP = 64
RECENT = 8
"""Samples kept as they came."""


class Past:
    """Bounded memory; points rise in step."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.levels: list[float] = []
        self.rates: list[float] = []
        self.latest: list[float] = []
        self.stride = 1
        self.count = 0
        self.last_step = -1.0

    def learn(self, step: float, level: float, loss: float, lr: float = math.nan) -> None:
        """The level after the sample at this step, the sample itself, and its learning rate where it is known."""
        self.latest.append(loss)
        if len(self.latest) > RECENT:
            del self.latest[0]
        self.last_step = float(step)
        self.count += 1
        if self.count % self.stride:
            return
        self.steps.append(float(step))
        self.levels.append(round(level, 6))  # far below any noise, and short where it is saved
        self.rates.append(float(f"{lr:.5g}") if lr == lr else math.nan)
        if len(self.steps) >= KEEP:
            del self.steps[::2], self.levels[::2], self.rates[::2]
            self.stride *= 2

    def at(self, step: float) -> float | None:
        """The level at an earlier step, linear between points; None before the first point or without any."""
        steps = self.steps
        if not steps:
            return None
        i = bisect_left(steps, step)
        if i == len(steps):
            return self.levels[-1]
        if i == 0:
            return self.levels[0] if step == steps[0] else None
        share = (step - steps[i - 1]) / (steps[i] - steps[i - 1])
        return self.levels[i - 1] + share * (self.levels[i] - self.levels[i - 1])

    def change_at(self, step: float, behind: float) -> float:
        """Nats by which the level changed up to a step: since `behind` steps before it, or between the points around it."""
        i = bisect_left(self.steps, step)
        if not 0 < i < len(self.steps):
            return 0.0
        before, now = self.at(max(self.steps[0], step - behind)), self.at(step)
        since = 0.0 if before is None or now is None else before - now
        return max(since, abs(self.levels[i] - self.levels[i - 1]))

    def fall(self, step: float, behind: float, level: float) -> float:
        """Nats by which it fell to this level in the `behind` steps before one; 0 where it rose, or nobody knows."""
        before = self.at(max(self.steps[0], step - behind)) if self.steps else None
        return 0.0 if before is None else max(0.0, before - level)

    def step_at(self, step: float) -> float:
        """The step of the last point at or before this one: a step that was seen. The first point's where there is none."""
        return self.steps[max(0, bisect_right(self.steps, step) - 1)]

    def lr_at(self, step: float) -> float:
        """The learning rate of the last point at or before a step; infinite where it is not known, so that nothing is
        above it."""
        i = bisect_left(self.steps, step + 0.5)
        rate = self.rates[i - 1] if i else math.nan
        return rate if rate == rate else math.inf

    def level_at_rate(self, rate: float) -> float | None:
        """The newest level that was had at so high a learning rate; None where there was none."""
        for level, lr in zip(reversed(self.levels), reversed(self.rates), strict=True):
            if lr >= 0.95 * rate:
                return level
        return None

    def forget(self, step: float) -> None:
        """Points after this step are superseded."""
        i = bisect_left(self.steps, step + 0.5)
        del self.steps[i:], self.levels[i:], self.rates[i:]
        self.count = min(self.count, i * self.stride)
        self.last_step = min(self.last_step, float(step))

    def state(self) -> list[Any]:
        rates = [None if v != v else v for v in self.rates]
        return [
            self.steps[:],
            self.levels[:],
            [self.stride, self.count, self.last_step],
            self.latest[:],
            rates,
        ]

    def load(self, state: list[Any]) -> None:
        self.steps, self.levels = [float(v) for v in state[0]], [float(v) for v in state[1]]
        self.latest = [float(v) for v in state[3]]
        rates = state[4] if len(state) > 4 else [None] * len(self.steps)
        self.rates = [math.nan if v is None else float(v) for v in rates]
        self.stride, self.count, self.last_step = int(state[2][0]), int(state[2][1]), float(state[2][2])
