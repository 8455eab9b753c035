"""A loss that drops at once and far below its prediction: leaked data, another tokenizer, a broken evaluation.

    d  <- max(0, d + min(-z, 4) - 1.5)      z the larger of the two residuals: from the run's own level, from that of its gap

What both call a fall is none that the prediction expects, so a rate cut of its schedule or an epoch it knows is not news.
Called when d is past the height of the quick CUSUM and the mean gap since the onset lies three deviations of the band
under the level the gap had before, by what it is known to. It is over when the gap is two thirds of the way back, and
until then a rise is its return and no alarm. The slow test (`slow`) needs five deviations, since what comes slowly may be
the run's own way. Gaps are in deviations of the band.

Without a prediction a control that shares our noise is the line, and the deviation that of one of our samples: its distance
from ours is what falls, by three of them. What a control that shares none says of a fall is nothing.
"""

import math

from monitor.judge.base import Held
from monitor.judge.cusum import B_REFERENCE, B_UP
from monitor.judge.track import Track
from monitor.verdict import Alert, Sample

FELL = 3.0
"""Deviations of the band that a drop must be."""
KNOWN = 30
"""Gaps before it is judged."""
BACK = 0.3
"""Weight of the newest gap while it is waited for to come back."""
RETURNED = 1.0 / 3.0
"""Share of the drop that may be left when it is over."""
OVER = 2.0
"""Deviations of the band over the level it had from which a rise is more than a return."""


class Drop(Held):
    """The test of a sudden drop, on top of what is held."""

    __slots__ = ()

    def _falls_beside(self, sample: Sample, z: float, opened: list[Alert], closed: list[Alert]) -> bool:
        """The same beside a control, in nats per token."""
        control = self.control
        if control is None or control.newest is None or not self.raw.calm_sd > 0:
            return False
        if not self._fell and not control.shares_noise(self.raw.calm_sd, KNOWN):
            self._drop = 0.0
            return False
        y = control.newest[0]
        level = self._drop_from if self._fell or self._drop > 0.0 else control.rest.base
        return self._falls(
            sample, z, y, sample.loss - y + level, control.rest, self.raw.calm_sd, opened, closed
        )

    def _falls(
        self, sample: Sample, z: float, g: float, usual: float, gap: Track, unit: float,
        opened: list[Alert], closed: list[Alert],
    ) -> bool:  # fmt: skip
        """`z` the sample's residual from the run's own level, `g` its gap and `gap` the track of it, in which one deviation of
        the band is `unit`; before any of them learns it. `usual` the loss it should have.
        True while it is down or on its way back: a rise is then no news."""
        if self._fell:
            self._drop_mean += BACK * (g - self._drop_mean)
            back = g < self._drop_from + OVER * unit
            if back:
                self.main.clear()
                if self.control is not None:
                    self.control.cusum.clear()
            if self._drop_mean > self._drop_from - RETURNED * self._fell:
                self._fell = self._drop = 0.0
                self._close("LossBelowPrediction", sample.step, closed)
                self.raw.restart()
                if self.control is not None:
                    rest = self.control.rest
                    if gap is rest:
                        rest.restart(self._drop_from, rest.count)
                    else:
                        rest.restart()
                    self.control.cusum.clear()
                self.gap.restart()
                self.past.forget(self._drop_since)  # what lay below was not its way
            return back
        if gap.count <= KNOWN or self.raw.count < self.settings.warm_up or self._off:
            self._drop = 0.0
            return False
        low = -max(z, gap.score(g))
        if self._drop <= 0.0:
            self._drop_from, self._drop_n, self._drop_mean = gap.base, 0.0, 0.0
            self._drop_since = float(sample.step)
        drop = self._drop + min(low, B_UP) - B_REFERENCE
        self._drop = drop if drop > 0.0 else 0.0
        if drop <= 0.0:
            return False
        self._drop_n += 1.0
        self._drop_mean += (g - self._drop_mean) / self._drop_n
        fallen = self._drop_from - self._drop_mean
        height = self.settings.warn_quick * (1.0 + 50.0 / gap.count) * self.smoothing.doubt()
        if drop > height and fallen - 2.0 * gap.calm_sd / math.sqrt(self._drop_n) > FELL * unit:
            if "LossBelowPrediction" in self._open:
                return False
            self._fell = fallen
            since = int(self._drop_since)
            self._call("LossBelowPrediction", "warning", sample.step, since, sample.loss, usual, opened)
        return False
