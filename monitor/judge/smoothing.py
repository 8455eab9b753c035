"""Smoothed logs: what one sample says that the one before did not.

    u_t = (y_t - rho y_(t-1)) / (1 - rho)

y is the loss as it was logged. Where the logger keeps a running mean, y_t = rho y_(t-1) + (1 - rho) x_t, u is the step's
own loss x; where the noise itself is autocorrelated it is white of the same level. Either way the tests, which count on
independent samples, work on u. rho is known from how much further two samples lie apart than one,

    1 + rho = (E |y_t - y_(t-2)| / E |y_t - y_(t-1)|) ** 2        both less their mean

which no level enters, and, within what that leaves open, from the products of neighbours about a level. It is taken a
little too large, since a remnant of correlation alarms and too little does not. Not looked for where the trend is not
small beside the noise; nothing is undone below ENGAGE, as in real per-step losses.
"""

import math

MEMORY = 1000
"""Samples that the differences remember."""
LEVEL = 200
"""Samples that the level remembers about which rho is looked for."""
SHORT = 50
"""Samples by which the way is told to be steep."""
LEAST = 100
"""Samples before anything is undone."""
YOUNG = 8
ENGAGE, RELEASE, MOST = 0.3, 0.15, 0.98
"""Correlations from which a log counts as smoothed, under which no longer, and up to which it is undone."""
OVER = 0.85
"""Share of 1 - rho that is used: too large a rho costs a little power, too small a one false alarms."""
UNSURE = 4.0
"""Over the root of the samples: how far the distances are trusted."""
MEAN_SIZE = 0.798
"""E |z| of a standard normal."""
SETTLED = 500
"""Samples up to which those under suspicion count too: it may be the young spread that is wrong."""
TREND = 0.2
"""Mean step over mean size of a step, from which the way is too steep to see the noise by."""
LOOK = 25
"""Samples between looks."""


class Smoothing:
    """Constant memory: seventeen numbers."""

    SAVED = (
        "count",
        "mean",
        "one",
        "two",
        "slope",
        "size",
        "s1",
        "s2",
        "square",
        "cross",
        "last",
        "seen",
        "before",
        "before2",
        "rho",
        "held",
        "began_steep",
    )
    __slots__ = SAVED

    def __init__(self) -> None:
        self.count = self.mean = self.one = self.two = 0.0
        self.slope = self.size = self.s1 = self.s2 = self.square = self.cross = self.last = self.seen = 0.0
        self.before = self.before2 = 0.0
        self.rho = self.began_steep = 0.0
        self.held = 0.0
        """How many of the two samples before are those right before: fewer after a gap or a restart."""

    def undo(self, y: float) -> float:
        """u of a sample that is not learnt yet."""
        rho = self.rho
        return y if rho <= 0.0 or not self.held else (y - rho * self.before) / (1.0 - rho)

    @property
    def undone(self) -> float:
        """u of the sample that was learnt last."""
        rho = self.rho
        return self.before if self.held < 2.0 else (self.before - rho * self.before2) / (1.0 - rho)

    @property
    def level(self) -> float:
        """The level of the log, nats per token."""
        return 2.0 * self.s1 - self.s2

    @property
    def spread(self) -> float:
        """Standard deviation of one sample as it was logged, nats per token; 0 where nothing is undone."""
        return math.sqrt(self.square) if self.rho else 0.0

    def learn(self, y: float, calm: bool, near: bool) -> float | None:
        """Take in a sample; it counts in calm, or in a young run not far off. The spread of one u where rho changed."""
        before, before2, held = self.before, self.before2, self.held
        self.before2, self.before, self.held = before, y, min(2.0, held + 1.0)
        if self.seen == 0.0:
            self.s1 = self.s2 = y
        if held < 2.0 or not (calm or (near and self.count < SETTLED)):
            return None
        # a level that follows the way, by a quarter of the samples so far
        seen = self.seen
        e = y - 2.0 * self.s1 + self.s2
        gain = 1.0 / (4.0 + 0.25 * seen) if seen < 4 * LEVEL - 16 else 1.0 / LEVEL
        self.seen = seen + 1.0
        self.s1 = s1 = self.s1 + gain * (y - self.s1)
        self.s2 += gain * (s1 - self.s2)
        step = y - before
        size = step if step >= 0.0 else -step
        count = self.count + 1.0
        gain = 1.0 / count if count < MEMORY else 1.0 / MEMORY
        quick = gain if count < SHORT else 1.0 / SHORT
        self.slope = slope = self.slope + quick * (step - self.slope)
        self.size = usual = self.size + quick * (size - self.size)
        steep = not (slope if slope >= 0.0 else -slope) < TREND * usual
        if count >= YOUNG and slope < -0.5 * usual:
            self.began_steep = 1.0
        if steep and count >= SHORT:
            if count == SHORT:
                self.count = self.began_steep = 0.0  # begin where it is no longer steep
            return None
        self.count = count
        one, two = step - self.mean, y - before2 - 2.0 * self.mean
        one, two = (one if one >= 0.0 else -one), (two if two >= 0.0 else -two)
        if count > 30:
            most = 4.0 * self.one
            one = most if one > most else one
            two = 2.0 * most if two > 2.0 * most else two
            step = most if step > most else (-most if step < -most else step)
            most = 3.0 * math.sqrt(self.square)
            e = most if e > most else (-most if e < -most else e)
        self.one += gain * (one - self.one)
        self.two += gain * (two - self.two)
        self.mean += gain * (step - self.mean)
        self.square += gain * (e * e - self.square)
        self.cross += gain * (e * self.last - self.cross)
        self.last = e
        if count < LEAST or count % LOOK:
            return None
        kept = min(count, MEMORY)
        apart, about = self._apart(), self._about()
        rho = min(about if count >= SETTLED else max(apart, about), apart + UNSURE / math.sqrt(kept))
        least = RELEASE if self.rho else max(ENGAGE, 3.0 / math.sqrt(kept))
        wanted = min(MOST, 1.0 - OVER * max(0.0, 1.0 - rho - 0.2 / math.sqrt(kept)))
        wanted = wanted if min(rho, apart) > least else 0.0
        if wanted == self.rho or (wanted and abs(wanted - self.rho) < 0.1 * (1.0 - max(wanted, self.rho))):
            return None
        self.rho = wanted
        return self.one / MEAN_SIZE * math.sqrt((1.0 + max(0.0, min(rho, MOST))) / 2.0) / (1.0 - wanted)

    def _apart(self) -> float:
        """rho by the distances."""
        return (self.two / self.one) ** 2 - 1.0 if self.one > 0.0 else 0.0

    def _about(self) -> float:
        """rho by the products about the level, less what the level takes with it."""
        about = self.cross / self.square if self.square > 0.0 else 0.0
        return about + (1.0 + 2.0 * max(0.0, about)) / min(4.0 + self.count / 4.0, LEVEL)

    def doubt(self) -> float:
        """How many times higher an alarm has to stand while a log looks smoothed and is too young for that to be known."""
        if not YOUNG < self.count < LEAST or self.began_steep:
            return 1.0
        rho = self._apart()
        return 1.0 / (1.0 - min(0.9, rho)) if rho > max(ENGAGE, 3.0 / math.sqrt(self.count)) else 1.0

    def forget(self, level: float) -> None:
        """What comes next does not go on from the sample before, but from a level."""
        self.held = 0.0
        self.s1 = self.s2 = level

    def state(self) -> list[float]:
        return [float(getattr(self, name)) for name in self.SAVED]

    def load(self, state: list[float]) -> None:
        for name, value in zip(self.SAVED, state, strict=False):
            setattr(self, name, float(value))
