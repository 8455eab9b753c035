"""Plateau: a loss that has stopped falling while it should still fall.

    before = level at 0.35 of the way less level at 0.7      the way: steps from the first to this one
    since  = level at 0.7 less the level now
    pace   = (since + 3 standard errors) / (before * ln(1 / 0.7) / ln 2)

A loss that falls as a power of the step falls about as much in equal parts of log steps, so pace stays near one, and
under a decaying learning rate above it. After an announced change the first look is a tenth of the way behind it, where
that is later, and the second as far into what is left in log steps. Not judged while the learning rate is higher than
it was at either point (a warm-up, a cyclic schedule), nor where the prediction expects the loss to stay as well.
"""

import math

from monitor.judge.base import Held
from monitor.judge.line import Expected
from monitor.verdict import Alert, Sample

EARLIER, EARLY = 0.35, 0.7
PACE, PACE_AGAIN = 0.15, 0.4
"""Paces under which it is called and above which it is resolved."""
PART = math.log(EARLY / EARLIER) / math.log(1.0 / EARLIER)
"""Share of the log steps since the first look at which the second is."""
SETTLED = 0.1
"""Share of the way after an announced change in which the loss may do as it likes."""
LEAST_SAMPLES = 64
CLEAR = 8.0
"""Standard errors of a level that the earlier fall must be, to say anything of the later one."""
LOOKS = 3
"""Looks in a row, each an eighth of a hundredth of a run apart at most."""


class Plateau(Held):
    """The test of a loss that stays, on top of what is held."""

    __slots__ = ()

    def _plateau(
        self, sample: Sample, expected: Expected | None, opened: list[Alert], closed: list[Alert]
    ) -> None:
        past = self.past
        if past.count < LEAST_SAMPLES or past.count % max(1, past.stride // 4):
            return
        way = float(sample.step) - self._first_step
        first = EARLIER * way
        if self._lead:
            first = max(first, self._lead - self._first_step + SETTLED * way)
            if first >= way:
                return
        earlier, early = self._first_step + first, self._first_step + first * (way / first) ** PART
        then, later = past.at(earlier), past.at(early)
        if then is None or later is None:
            return
        remembered = min(2.0 * self.settings.memory, past.count / 4.0) * max(self.raw.weight, 0.05)
        noise = self.raw.calm_sd * math.sqrt(2.0 / max(1.0, remembered))
        # a fall that came at once, in one half of the stretch, promises no more of its kind
        middle = past.at(self._first_step + first * (way / first) ** (PART / 2.0))
        even = then - later if middle is None else 2.0 * min(then - middle, middle - later)
        before, since = min(then - later, even), later - self.raw.base
        should = before * (1.0 - PART) / PART
        if before <= CLEAR * noise or self._explained(earlier, early, before, expected):
            self._flat = 0.0
            return
        pace = (since + 3.0 * noise) / should
        self._flat = self._flat + 1.0 if pace < PACE else 0.0
        if self._flat >= LOOKS and "LossPlateau" not in self._open:
            onset = int(past.step_at(early))
            self._call(
                "LossPlateau", "warning", sample.step, onset, self.raw.base, later - 0.7 * should, opened
            )
        elif pace > PACE_AGAIN:
            self._close("LossPlateau", sample.step, closed)

    def _explained(self, earlier: float, early: float, before: float, expected: Expected | None) -> bool:
        """The learning rate is higher than it was, or the prediction expects no fall worth the name."""
        now = self.evidence.number["lr"]
        if now > 1.05 * min(self.past.lr_at(earlier), self.past.lr_at(early)):
            return True
        line = self.line
        if line is None or expected is None:
            return False
        at = line.at(early)
        return at is not None and at.p50 - expected.p50 < 0.2 * before
