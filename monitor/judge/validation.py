"""Validation losses inside a training stream: apart from the training loss, or not a number.

    d = val_loss - the training loss's own level        nats per token

The training level is known to a twentieth of its noise, and a validation averages many batches, so d is far steadier
than either: it moves slowly (another data mix, a second epoch) and never leaps in a healthy run. A leap means a broken
evaluation, a leak, or other weights than those that train. Validations are sparse: the first six only teach.
"""

import math

from monitor.judge.base import Held, band_sd
from monitor.judge.line import Expected
from monitor.verdict import Alert, Sample

TEACH = 6
"""Validations before any is judged."""
LEAP = 12.0
"""Standard deviations of d that are a leap, and not only a noisy validation."""
TRAINING_SIGMAS = 3.0
"""Standard deviations of one training sample that it must be as well: what is smaller is nobody's trouble."""
FORGET = 20
"""Validations after which a d that stays is the new one."""


class Validation(Held):
    """The test of validation losses, on top of what is held."""

    __slots__ = ()

    def _validation(
        self, sample: Sample, expected: Expected | None, opened: list[Alert], closed: list[Alert]
    ) -> None:
        value = sample.val_loss
        if value is None:
            return
        if not math.isfinite(value):
            self._val_bad = 1.0
            self._finite_run = 0.0
            if "LossNonFinite" not in self._open:
                usual = self.val.base + self.raw.base if self.val.count else None
                self._call("LossNonFinite", "critical", sample.step, sample.step, value, usual, opened)
            return
        self._val_bad = 0.0
        if expected is not None:
            u = (value - expected.p50) / band_sd(expected)
            self._val_older = self._val_newer if self._val_count else u
            self._val_newer, self._val_step = u, float(sample.step)
            self._val_count += 1.0
        if self._off or "LossNonFinite" in self._open or self.raw.count < self.settings.warm_up:
            return  # both left together: the fast tests hold that
        track = self.val
        d = value - self.raw.base
        z = track.score(d)
        far = abs(z) > LEAP and abs(d - track.base) > TRAINING_SIGMAS * self.raw.calm_sd
        if track.count < TEACH:
            track.learn(d, True)
        elif far and "ValidationApart" not in self._open:
            self._val_apart = 1.0
            usual = track.base + self.raw.base
            self._call("ValidationApart", "warning", sample.step, sample.step, value, usual, opened)
        elif "ValidationApart" in self._open:
            self._val_apart += 1.0
            if not far:
                track.learn(d, True)
                self._close("ValidationApart", sample.step, closed)
            elif self._val_apart > FORGET:
                track.restart()
                track.learn(d, True)
                self._close("ValidationApart", sample.step, closed)
        else:
            track.learn(d, True)
