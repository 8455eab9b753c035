"""Slow drift: the smoothed gap to the expectation against the run's own early offset and the band.

    offset   mean gap over an early stretch of the run, shrunk towards zero by the law's between-run spread
    recent   mean gap with a memory of a tenth of the run so far
    drift    recent - offset

A run may sit a little off its line from the start (its own offset); moving away from there is what no baseline of a
run's own past can see. Called when the drift is past what the band leaves open and past `sigmas` of its own noise;
windows grow with the run, so a run of any length has only some hundred looks. Gaps are nats per token.
"""

import math

MEMORY = 0.1
"""Share of the run so far that `recent` remembers."""
LEAST = 3.0
"""Samples it remembers at least."""


class Drift:
    """Constant memory: nine numbers."""

    SAVED = (
        "count",
        "offset",
        "offset_count",
        "recent",
        "above",
        "below",
        "since_up",
        "since_down",
        "weight",
    )
    __slots__ = SAVED

    def __init__(self) -> None:
        self.count = self.offset_count = 0.0
        self.offset = self.recent = 0.0
        self.above = self.below = 0.0
        self.since_up = self.since_down = 0.0
        self.weight = 1.0

    def learn(self, gap: float, sd: float, weight: float, step: float, early: bool) -> None:
        """Take in one gap. `sd` spread of one sample; `early` while the run's own offset is being learnt."""
        self.count += 1.0
        self.weight = max(weight, 0.3)  # a drift itself correlates neighbours
        gain = 1.0 / min(self.count, max(LEAST, MEMORY * self.count))
        limit = 4.0 * sd
        move = gap - self.recent
        if self.count > 10:
            move = limit if move > limit else (-limit if move < -limit else move)
        self.recent += gain * move
        if early:
            self.offset_count += 1.0
            move = gap - self.offset
            if self.offset_count > 10:
                move = limit if move > limit else (-limit if move < -limit else move)
            self.offset += move / self.offset_count
        if self.recent <= self.offset:
            self.since_up = step
        else:
            self.since_down = step

    def own_offset(self, sd: float, between_runs: float) -> tuple[float, float]:
        """The run's own offset and its standard deviation, given the law's between-run spread (both nats)."""
        if self.offset_count < 1:
            return 0.0, between_runs
        noise = sd * sd / max(1.0, self.offset_count * self.weight)
        prior = between_runs * between_runs
        share = prior / (prior + noise) if prior + noise > 0 else 0.0
        return share * self.offset, math.sqrt(share * noise)

    def recent_sd(self, sd: float) -> float:
        """Standard deviation of `recent` by the noise of single samples."""
        kept = min(self.count, 2.0 * max(LEAST, MEMORY * self.count)) * self.weight
        return sd / math.sqrt(max(1.0, kept))

    def state(self) -> list[float]:
        return [float(getattr(self, name)) for name in self.SAVED]

    def load(self, state: list[float]) -> None:
        for name, value in zip(self.SAVED, state, strict=False):
            setattr(self, name, float(value))
