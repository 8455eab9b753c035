"""One series' level and spread, learnt online from healthy samples only.

    level    exponentially weighted mean of clipped samples; a second mean of that mean measures its lag
    spread   robust standard deviation of one sample about the lag-free level (Huber's proposal 2, clip 1.5)
    weight   (1 - rho) / (1 + rho) of the residuals' lag-1 correlation rho: what one sample of a smoothed log is worth

A sample is judged against the last level and spread that were learnt in calm. Samples under suspicion go on to move
a shadow of them, which takes over when the suspicion passes and is thrown away when it was right: what is being
judged never enters what it is judged by. Units are the series' own (nats per token); time is counted in samples, so
that step units and spacing change nothing.
"""

import math

CLIP = 1.5
EXPECTED = 0.7396
"""E min(|z|, 1.5) of a standard normal."""
MOST_LAG = 1.3
"""Sigmas of a falling level's lag that are made good: were the fall to stop dead, the level would be low by 0.37 of it,
which the reference of the CUSUM swallows. Less of it in the first 500 samples, when one outlier looks like a fall."""
GOES_ON = 0.8
"""Share of the present fall by which a level under suspicion goes on falling: a loss that should fall and stays is late."""
MOST_FALL = 1.0
"""Sigmas it falls at most in one suspicion."""
YOUNG = 30
"""Samples in which the spread is still learnt from nothing."""
UNDER_FLOOR = 1e-6
"""Nats per token under which a spread counts as rounding."""


class Track:
    """Level and spread of one series. Constant memory: fourteen numbers."""

    __slots__ = (
        "base",
        "before",
        "before2",
        "calm_sd",
        "count",
        "fallen",
        "follow",
        "known",
        "last",
        "memory",
        "product",
        "s1",
        "s2",
        "sd",
        "slope",
        "up",
        "weight",
    )  # fmt: skip
    SAVED = ("count", "s1", "s2", "sd", "product", "last", "before", "before2", "base", "calm_sd", "weight",
             "known", "fallen", "slope")  # fmt: skip

    def __init__(self, memory: int, up: float = 2.0, follow: bool = False) -> None:
        """`follow`: any trend is legitimate and followed; else only a falling level is, and by half a sigma."""
        self.memory, self.up, self.follow = memory, up, follow
        self.count = 0
        self.s1 = self.s2 = self.sd = self.product = self.last = 0.0
        self.before = self.before2 = 0.0
        self.base = self.calm_sd = 0.0
        self.weight = 1.0
        self.known = 0.0
        self.fallen = self.slope = 0.0

    def score(self, y: float) -> float:
        """The residual of y in robust standard deviations; 0 until three samples were learnt."""
        if self.count < 3:
            return 0.0
        z = (y - self.base + self.fallen) / self.calm_sd
        return z if -1e6 < z < 1e6 else math.copysign(1e6, z)

    def learn(self, y: float, calm: bool) -> None:
        """Take y into the shadow; promote the shadow to what is judged by when calm."""
        self.count = count = self.count + 1
        if count <= 3:
            self._begin(y)
            return
        sd = self.sd
        # where the level would be now had the trend gone on: unbiased for the spread, too eager to judge by
        ahead = 2.0 * self.s1 - self.s2
        e = (y - ahead) / sd
        size = e if e >= 0 else -e
        gain = 1.0 / self.memory
        if count < 8 * self.memory:  # the way is steep at first: remember an eighth of it
            gain = 8.0 / (count + 8.0) if count > 8 else 2.0 / (count + 1.0)
        quick = 4.0 / (count + 4.0) if count < 4 * self.memory - 4 else 1.0 / self.memory
        quick = quick if quick < 0.3 else 0.3
        most = CLIP if count > YOUNG else 4.0  # the first spread is one difference: let it grow
        sd *= 1.0 + quick * ((size if size < most else most) - EXPECTED) / EXPECTED
        if sd < UNDER_FLOOR:
            sd = UNDER_FLOOR
        clipped = CLIP if e > CLIP else (-CLIP if e < -CLIP else e)
        self.product += quick * (clipped * self.last - self.product)
        self.last = clipped
        step = y - self.s1
        if count > 20:
            top = self.up * sd
            if step > top:
                step = top
            elif step < -3.0 * top:
                step = -3.0 * top
        self.s1 += gain * step
        self.s2 += gain * (self.s1 - self.s2)
        self.sd = sd
        if calm or count <= YOUNG:
            self.promote()
            if not self.follow:
                lag = min(max(0.0, self.s2 - self.s1), MOST_LAG * sd) * max(
                    0.0, min(1.0, count / 500.0 - 0.5)
                )
                self.slope = GOES_ON * gain * lag
        elif self.fallen < MOST_FALL * self.calm_sd:
            self.fallen += self.slope

    def promote(self) -> None:
        """What was learnt so far is healthy: judge by it from here on."""
        lag = self.s2 - self.s1
        if self.follow:
            self.base = self.s1 - lag
        else:
            most = MOST_LAG * self.sd * min(1.0, self.count / 500.0)
            self.base = self.s1 - (0.0 if lag < 0.0 else (lag if lag < most else most))
        self.calm_sd = self.sd
        self.fallen = 0.0
        rho = self.product / 0.6 - 2.0 / math.sqrt(max(1, min(self.count, self.memory)))
        self.weight = 1.0 if rho <= 0.0 else (0.05 if rho > 0.9 else (1.0 - rho) / (1.0 + rho))

    def discard(self) -> None:
        """What was learnt under suspicion was not healthy: forget it."""
        lag = self.s2 - self.s1
        self.s1 = self.base
        self.s2 = self.base + (lag if self.follow else 0.0)
        self.sd = self.calm_sd
        self.fallen = 0.0

    def restart(self, level: float | None = None, count: int = 0) -> None:
        """Learn the level anew, from `level` where it is known and as quickly as after `count` samples; the spread is
        kept."""
        self.fallen = self.slope = 0.0
        if level is None:
            self.count = 0
        else:
            self.count = min(self.count, max(count, YOUNG + 1))
            self.s1 = self.s2 = self.base = level

    def rescale(self, by: float) -> None:
        """The spread is so many times what was learnt, and nothing is known of the correlation."""
        self.sd *= by
        self.calm_sd *= by
        self.product = self.last = 0.0
        self.weight = 1.0

    def _begin(self, y: float) -> None:
        if self.count == 1:
            self.s1 = self.s2 = self.base = y
        elif self.count == 2:
            self.s1 = self.s2 = self.base = 0.5 * (y + self.before)
            if not self.known:
                self.sd = self.calm_sd = max(abs(y - self.before), UNDER_FLOOR)
        else:
            # the second difference is blind to a steady fall, which the first samples of any run have
            self.s1 += (y - self.s1) / 3.0
            self.s2 = self.s1
            self.base = self.s1
            if not self.known:
                self.sd = self.calm_sd = max(abs(y - 2.0 * self.before + self.before2) / 2.45, UNDER_FLOOR)
                self.known = 1.0
        self.before2, self.before = self.before, y

    def state(self) -> list[float]:
        return [float(getattr(self, name)) for name in self.SAVED]

    def load(self, state: list[float]) -> None:
        for name, value in zip(self.SAVED, state, strict=False):
            setattr(self, name, float(value))
        self.count = int(self.count)
