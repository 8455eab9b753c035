"""The run's own way so far, thinned to at most 64 points: (step, level), nats per token.

Answers where the level was at an earlier step: after a resume from there, and to say how much of its way a run that
blew up has lost. When full, every other point goes and the stride doubles, so the points stay evenly spaced in
samples however long the run is.
"""

from bisect import bisect_left

KEEP = 64
RECENT = 8
"""Samples kept as they came."""


class Past:
    """Bounded memory; points rise in step."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.levels: list[float] = []
        self.latest: list[float] = []
        self.stride = 1
        self.count = 0
        self.last_step = -1.0

    def learn(self, step: float, level: float, loss: float) -> None:
        """The level after the sample at this step, and the sample itself."""
        self.latest.append(loss)
        if len(self.latest) > RECENT:
            del self.latest[0]
        self.last_step = float(step)
        self.count += 1
        if self.count % self.stride:
            return
        self.steps.append(float(step))
        self.levels.append(level)
        if len(self.steps) >= KEEP:
            del self.steps[::2], self.levels[::2]
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

    def forget(self, step: float) -> None:
        """Points after this step are superseded."""
        i = bisect_left(self.steps, step + 0.5)
        del self.steps[i:], self.levels[i:]
        self.last_step = min(self.last_step, float(step))

    def state(self) -> list[list[float]]:
        return [self.steps[:], self.levels[:], [self.stride, self.count, self.last_step], self.latest[:]]

    def load(self, state: list[list[float]]) -> None:
        self.steps, self.levels = [float(v) for v in state[0]], [float(v) for v in state[1]]
        self.latest = [float(v) for v in state[3]]
        self.stride, self.count, self.last_step = int(state[2][0]), int(state[2][1]), float(state[2][2])
