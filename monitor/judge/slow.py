"""Slow tests: drift from the prediction or from a control of the same recipe, and continuity after a resume.

Gaps are counted in standard deviations of the prediction's band, which narrows as a run goes on. Nats per token.
"""

import math
from collections.abc import Mapping

from monitor.judge.base import LEARN_FROM, LEARN_TO, TWIN_TO, Held, band_sd
from monitor.judge.drift import Drift
from monitor.judge.line import Expected
from monitor.verdict import Alert, Sample

ON_ITS_WAY = 0.3
"""Share of the way that the sample before the newest must have been off as well, in a sparse log."""


class Slow(Held):
    """The slow tests, on top of what is held."""

    __slots__ = ()

    def _early(self, step: float) -> bool | None:
        """True while the run's own offset is learnt, None before."""
        if self._lead:
            return self.raw.count < 300
        share = self._share(step)
        if share is None:
            return True if self.raw.count > 50 else None
        if share < LEARN_FROM or self.raw.count < 3:
            return None
        return share <= LEARN_TO or self.drift.offset_count < 2

    def _slow(
        self, sample: Sample, expected: Expected | None, opened: list[Alert], closed: list[Alert]
    ) -> None:
        """Drift from the prediction, or from a control of the same recipe."""
        step = float(sample.step)
        early = self._early(step) if expected is not None else None
        if (
            expected is not None and early is not None and not self._fell
        ):  # a drop is judged for itself, and may come back
            self._slow_line(sample, expected, early, step, opened, closed)
        if self._paired and self.control is not None:
            self._slow_twin(sample, step, opened, closed)

    def _slow_line(
        self,
        sample: Sample,
        expected: Expected,
        early: bool,
        step: float,
        opened: list[Alert],
        closed: list[Alert],
    ) -> None:
        """Drift from the prediction, counted in standard deviations of its band, which narrows as a run goes on."""
        limits, drift, gap = self.settings, self.drift, self.gap
        spread = band_sd(expected)
        sd = gap.calm_sd if gap.count >= 3 else max(1.0, self.raw.calm_sd / spread)
        sd *= 1.0 + 4.0 / (gap.count + 1.0)
        drift.learn((sample.loss - expected.p50) / spread, sd, min(self.raw.weight, gap.weight), step, early)
        if early:
            return
        own, own_sd = drift.own_offset(sd, 1.0)
        noise = drift.recent_sd(sd)
        both = limits.drift_sigmas * math.hypot(noise, own_sd)
        room = limits.far_tolerance if self._extrapolated() else limits.drift_tolerance
        moved, recent, most = (
            drift.recent - own,
            drift.recent,
            limits.band_sigmas + limits.drift_sigmas * noise,
        )
        away = max(limits.drift_least, room + both)
        if self._plain():
            self._slow_sparse(sample, own, expected.p50, spread, opened, closed)
            self._will_miss(sample, recent * spread, noise * spread, expected, opened)
            return
        drift.above = drift.above + 1 if moved > away or recent > most else 0.0
        drift.below = drift.below + 1 if -moved > away + 0.5 or -recent > most else 0.0
        self._hold_drift(sample, drift, expected.p50 + own * spread, opened)
        if not self._by_twin and self._by_bend <= 0 and moved < 0.6 * away and recent < 0.9 * most:
            self._close("LossAbovePrediction", sample.step, closed)
        if not self._fell and self._by_bend >= 0 and -moved < 0.6 * away and -recent < 0.9 * most:
            self._close("LossBelowPrediction", sample.step, closed)
        self._will_miss(sample, recent * spread, noise * spread, expected, opened)

    def _slow_sparse(
        self,
        sample: Sample,
        own: float,
        middle: float,
        spread: float,
        opened: list[Alert],
        closed: list[Alert],
    ) -> None:
        """Drift in a sparse log: no smoothing, the newest sample is far off and the one before it was on its way."""
        least, drift = self.settings.drift_least, self.drift
        room = self.settings.far_tolerance - self.settings.drift_tolerance if self._extrapolated() else 0.0
        newer, older, least = self._newer - own, self._older - own, least + 0.5 + room
        most = self.settings.band_sigmas + 0.5 + room  # whatever the run's own offset
        lower, upper = sorted((self._newer, self._older))
        above = (newer > least and older > ON_ITS_WAY * least) or lower > most
        below = (-newer > least and -older > ON_ITS_WAY * least) or -upper > most
        drift.above, drift.below = (3.0 if above else 0.0), (3.0 if below else 0.0)
        self._hold_drift(sample, drift, middle + (own * spread if abs(own) < most else 0.0), opened)
        if not self._by_twin and self._by_bend <= 0 and newer < 0.6 * least and lower < 0.9 * most:
            self._close("LossAbovePrediction", sample.step, closed)
        if not self._fell and self._by_bend >= 0 and -newer < 0.6 * least and -upper < 0.9 * most:
            self._close("LossBelowPrediction", sample.step, closed)

    def _slow_twin(self, sample: Sample, step: float, opened: list[Alert], closed: list[Alert]) -> None:
        """Drift from a control of the same recipe: one whose noise is ours, at a loss next to ours."""
        limits, twin = self.settings, self.twin
        share = self._share(step)
        if self.control is None or share is None or share < TWIN_TO or twin.offset_count < 4:
            return
        rest, usual = self.control.rest, self.raw.calm_sd
        own, own_sd = twin.own_offset(rest.calm_sd, usual)
        if abs(own) > 0.5 * usual:
            return
        noise = twin.recent_sd(rest.calm_sd)
        room = limits.twin_tolerance * usual
        moved = twin.recent - own
        twin.above = twin.above + 1 if moved > room + limits.drift_sigmas * math.hypot(noise, own_sd) else 0.0
        if twin.above >= 3 and "LossAbovePrediction" not in self._open:
            self._by_twin = 1.0
            self._hold_drift(sample, twin, sample.loss - moved, opened)
        if self._by_twin and moved < 0.7 * room:
            self._by_twin = 0.0
            if self._by_bend <= 0:
                self._close("LossAbovePrediction", sample.step, closed)

    def _hold_drift(self, sample: Sample, drift: Drift, usual: float, opened: list[Alert]) -> None:
        lasting = 3 if drift.count > 60 else 2
        if drift.above >= lasting and "LossAbovePrediction" not in self._open:
            since = int(drift.since_up) or sample.step
            self._call("LossAbovePrediction", "warning", sample.step, since, sample.loss, usual, opened)
        if drift.below >= lasting and "LossBelowPrediction" not in self._open:
            since = int(drift.since_down) or sample.step
            self._call("LossBelowPrediction", "warning", sample.step, since, sample.loss, usual, opened)

    def _will_miss(
        self, sample: Sample, gap: float, noise: float, expected: Expected, opened: list[Alert]
    ) -> None:
        """A drift that all but surely misses the target is a page."""
        held, line, target = self._open.get("LossAbovePrediction"), self.line, self.target_loss
        share = self._share(float(sample.step))
        if (
            held is None
            or held.severity == "critical"
            or line is None
            or target is None
            or line.final is None
        ):
            return
        if share is None or share < 0.5:
            return
        spread = (line.final.p95 - line.final.p05) / 3.29 * math.sqrt(max(0.0, 1.0 - share * share))
        if line.final.p50 + gap - 2.6 * math.hypot(spread, noise) > target:
            self._call(
                "LossAbovePrediction",
                "critical",
                sample.step,
                held.since_step,
                sample.loss,
                expected.p50,
                opened,
            )

    def _extrapolated(self) -> bool:
        far = (self.prediction or {}).get("extrapolation") or {}
        ratio = far.get("flops_ratio") if isinstance(far, Mapping) else None
        return isinstance(ratio, (int, float)) and ratio > 1.5

    def _continuity(self, sample: Sample, opened: list[Alert], closed: list[Alert]) -> None:
        """Loss before and after a resume: the first samples' mean against the level they should go on from."""
        sd = self.raw.calm_sd
        if sd <= 0 or self.raw.count < 30:
            self._resume_n = 0.0
            return
        z = (sample.loss - self._resume_level) / sd
        self._resume_sum += max(-4.0, min(4.0, z))
        # it falls on by itself, by no more a step than it did before
        since = max(0.0, sample.step - self.evidence.number["resume_step"])
        falls = max(self._resume_slack, self._resume_lag) + self._resume_fall * since
        self._resume_below += max(-4.0, min(0.0, z + falls / sd))
        n = self._resume_n
        if "LossJumpAfterResume" not in self._open:
            away = 0.5 + 5.0 / math.sqrt(n)
            above = self._resume_sum / n > away + self._resume_slack / sd
            if n >= 4 and (above or -self._resume_below / n > away):
                self._call(
                    "LossJumpAfterResume",
                    "warning",
                    sample.step,
                    sample.step,
                    sample.loss,
                    self._resume_level,
                    opened,
                )
            elif n >= 32:
                self._resume_n = 0.0
                return
        elif n >= 64:
            self._close("LossJumpAfterResume", sample.step, closed)
            self._resume_n = 0.0
            return
        self._resume_n += 1
