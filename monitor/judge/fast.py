"""Departures within tens of samples, and what becomes of them: a spike that passes, or a divergence that pages.

The smaller of two residuals (from the run's own recent level; from the level of its gap to the prediction) feeds a
pair of CUSUMs, so that a rise the prediction expects, or a bend it does not, is no alarm; a control on the same data
order vetoes what it saw too, and has a quick CUSUM of its own. Nats per token; sigmas are the series' own.
"""

import math
from dataclasses import replace
from itertools import pairwise

from monitor.judge.base import TWIN_FROM, TWIN_TO, band_sd
from monitor.judge.bending import Bending
from monitor.judge.control import LEAST_PAIRS
from monitor.judge.drift import Drift
from monitor.judge.drop import Drop
from monitor.judge.line import Expected
from monitor.verdict import Alert, Sample

YOUNG_SLACK = 3.0
"""Sigmas over the root of the sample count: how far a level learnt from so few may itself be off."""
GROSS = 5.0
"""A sample so many times further out than any healthy one so far (5 sigmas at least) is called by itself."""
FALLEN, FALLEN_FOR = 3.0, 25.0
"""Sigmas below its level, and how many more of them in sum, from which a loss has fallen at once."""
NEAR = 6.0
"""Sigmas off its line up to which a young spread may itself be what is wrong."""
TAIL_KEPT = 1.0 - 1.0 / 20_000


class Fast(Drop, Bending):
    """The fast tests, on top of what is held."""

    __slots__ = ()

    def _fast(
        self, sample: Sample, expected: Expected | None, opened: list[Alert], closed: list[Alert]
    ) -> None:
        """Departure within tens of samples: CUSUMs of the run's own residuals, and of what a control leaves."""
        raw, limits, step = self.raw, self.settings, float(sample.step)
        x = self.smoothing.undo(sample.loss)
        if (spread := self.smoothing.learn(sample.loss, not self._off, self._recent < NEAR)) is not None:
            self._rescale(spread)
            x = self.smoothing.undone
        z, weight = raw.score(x), raw.weight
        if expected is not None:
            g = (x - expected.p50) / band_sd(expected)
            if self.gap.count > 30:
                z_gap = self.gap.score(g)
                if z_gap < z:
                    z = z_gap
                if self.gap.weight < weight:
                    weight = self.gap.weight
        else:
            g = None
        z_control = self._with_control(sample, step, opened, closed)
        if z_control is not None and z_control < z and not self._off:
            z = z_control  # the control saw the same: bad data, not our doing
        ready = raw.count >= limits.warm_up
        if ready:
            self.main.add(z - YOUNG_SLACK / math.sqrt(raw.count), weight, step)
            if self.evidence.warming_again() and not self._off:
                self.main.a = 0.0  # a rise that the schedule explains; only a jump is news
                had = self.past.level_at_rate(self.evidence.number["lr"]) if z >= 4.0 else None
                if z < 4.0 or (had is not None and sample.loss < had + 3.0 * raw.calm_sd):
                    self.main.b = 0.0  # the run had this loss at this rate before
                    if z >= 4.0:
                        raw.restart()
        own = raw.score(x)
        back = False
        if g is not None and expected is not None:
            back = self._falls(sample, own, g, expected.p50, self.gap, 1.0, opened, closed)
        elif expected is None:
            back = self._falls_beside(sample, own, opened, closed)
        self._far_below(own)
        if self._off:
            if self._by_control:
                if not (ready and self.main.over(limits.warn, limits.warn_quick)):
                    self._while_off_control(sample, z_control, closed)
                    return
                self._by_control = 0.0  # plain to see without the control by now: judge it as such
                self._evidence, self._peak, self._recent = self.main.a, z, z
            self._while_off(sample, z, weight, opened, closed)
            return
        gross = raw.count > 30 and not back and z > GROSS * max(self._tail, GROSS)
        if z > self._tail and not gross:
            self._tail = min(z, 1e3)
        else:
            self._tail *= TAIL_KEPT
        thrown_back = ready and not back and self._thrown_back(sample.loss, step)
        lost = gross or thrown_back
        quiet = self.main.quiet()
        if not lost:
            raw.learn(x, quiet)
            if g is not None:
                self.gap.learn(g, quiet)
        self._waiting = 0.0 if quiet else self._waiting + 1
        height = (1.0 + 50.0 / max(1, raw.count)) * self.smoothing.doubt()
        by_main = ready and self.main.over(limits.warn * height, limits.warn_quick * height)
        control = self.control
        by_control = (
            z_control is not None
            and control is not None
            and control.cusum.b > limits.warn_control * (1.0 + 30.0 / control.rest.count)
        )
        if by_main or by_control or lost:
            self._leave(
                sample, z if by_main or lost or z_control is None else z_control, by_main or lost, opened
            )
            if lost:
                self.main.a = max(self.main.a, 0.5 * limits.warn)  # so much to take back before it is over
                if thrown_back:
                    self._diverge(sample, opened)
        elif self._waiting > min(
            4 * limits.memory, 10 + raw.count / 3
        ):  # a level learnt from few may be off itself
            raw.promote()
            self.gap.promote()
            self.main.clear()
            self._waiting = 0.0

    def _far_below(self, z: float) -> None:
        """A loss that fell at once and stays there (another epoch, a rate cut, a skill learnt): its level begins anew, since
        one that follows falls on for a while after the fall has ended."""
        low = self._low + min(-z, 2.0 * FALLEN) - FALLEN
        self._low = low if low > 0.0 else 0.0
        if low > FALLEN_FOR and self.raw.count > 2 * FALLEN_FOR and not self._off:
            self.raw.restart()
            self.main.clear()
            self._low = self._waiting = 0.0

    def _rescale(self, spread: float) -> None:
        """The log turned out to be smoothed, or more or less so than was thought: its samples have another spread."""
        by = spread / self.raw.calm_sd if self.raw.calm_sd > 0 else 1.0
        self.raw.rescale(by)
        self.gap.rescale(by)
        self._tail /= by
        if by < 1.0 and not self._off:  # the level was learnt from noisier samples than it is to judge
            self.raw.restart(self.smoothing.level, self.raw.count)
            self.gap.restart()
        self.main.clear()
        self._waiting = 0.0

    def _leave(self, sample: Sample, z: float, by_main: bool, opened: list[Alert]) -> None:
        """Off its line: freeze what it is judged by, and start to count."""
        self._off, self._by_control = 1.0, 0.0 if by_main else 1.0
        cusum = self.main if by_main or self.control is None else self.control.cusum
        since = cusum.since if cusum.a > self.settings.warn else cusum.b_since
        self._off_since, self._off_count = since, self._waiting if by_main else 1.0
        seen = min(z, self.raw.score(sample.loss)) if by_main else z
        self._evidence, self._peak, self._recent, self._peak_loss = cusum.a, seen, seen, sample.loss
        usual = self._expected_now()
        self._call("LossOffLine", "warning", sample.step, int(since), sample.loss, usual, opened)

    def _while_off(
        self, sample: Sample, z: float, weight: float, opened: list[Alert], closed: list[Alert]
    ) -> None:
        """It comes back (a spike), or it stays (a divergence, which pages)."""
        limits, step = self.settings, sample.step
        self.main.hold(limits.warn, limits.warn_quick)
        self._off_count += 1
        self._evidence += weight * (max(-2.0, min(1.4, z)) - 0.45)
        seen = min(
            z, self.raw.score(sample.loss)
        )  # as it was logged: what is undone leaps with every step of it
        self._peak = max(self._peak, seen)
        self._recent += 0.2 * (seen - self._recent)
        self._peak_loss = max(self._peak_loss, sample.loss)
        if self.main.quiet():
            diverged = "LossDiverged" in self._open
            held = self._open.get("LossOffLine")
            self._close("LossDiverged", step, closed)
            self._close("LossOffLine", step, closed)
            if held is not None and not diverged:
                spike = replace(held, alert="LossSpike", severity="info", step=step, resolved_step=step)
                opened.append(replace(spike, value=self._peak_loss))
            self._settle()
            return
        if "LossDiverged" in self._open or "LossOffLine" not in self._open:
            return
        long = (
            self._off_count >= limits.page_samples
            and self._evidence >= limits.page
            and self._evidence >= limits.page_excess * self._off_count
        )
        staying = self._recent >= 0.5 * min(self._peak, 12.0) - 1.0
        if (long and staying) or (
            min(seen, self._recent) > 6.0 and self._lost_half(sample.loss, float(step))
        ):
            self._diverge(sample, opened)
        elif self._off_count >= 2 * limits.memory and self._evidence < limits.page_excess * self._off_count:
            # neither back nor gone: a small lasting change, which from here on is its level
            self._close("LossOffLine", step, closed)
            self._settle()
            self.raw.restart()
            self.gap.restart()

    def _while_off_control(self, sample: Sample, z: float | None, closed: list[Alert]) -> None:
        """Only the control shows it: a warning until it passes, the control ends, or it is the new difference.

        What lasts is the slow tests' to hold; it never pages by itself, since a control may be what moved.
        """
        control = self.control
        self._off_count += 1
        if z is None and control is not None and control.between():
            return
        if z is not None and control is not None:
            control.cusum.hold(self.settings.warn, self.settings.warn_control)
            if not control.cusum.b <= 0.0 and self._off_count < self.settings.memory:
                return
            if self._off_count >= self.settings.memory:
                control.rest.restart()
        self._close("LossOffLine", sample.step, closed)
        self._settle()

    def _diverge(self, sample: Sample, opened: list[Alert]) -> None:
        since = int(self._off_since)
        self._call("LossDiverged", "critical", sample.step, since, sample.loss, self._expected_now(), opened)

    def _thrown_back(self, x: float, step: float) -> bool:
        """One sparse sample that undoes half the run, far outside every change of the last eight samples."""
        held = self.past.latest
        if len(held) < 8 or x <= max(held) or not self._lost_half(x, step):
            return False
        largest = max(abs(b - a) for a, b in pairwise(held))
        half_way = self.past.at(self._first_step + 0.5 * (self.past.last_step - self._first_step))
        undone = 0.0 if half_way is None else half_way - self.raw.base
        return x - max(held) > 2.0 * largest and undone > 2.0 * largest

    def _lost_half(self, x: float, step: float) -> bool:
        """Off for a twentieth of the run, and back above the loss it had at half its steps."""
        last_good = self._off_since if self._off else self.past.last_step
        run = step - self._first_step
        if run <= 0 or step - last_good < 0.05 * run:
            return False
        then = self.past.at(self._first_step + 0.5 * (last_good - self._first_step))
        return then is not None and x > then

    def _settle(self) -> None:
        """Back on the line: go on from the level before it left."""
        self._off = self._by_control = self._waiting = 0.0
        self.raw.discard()
        self.gap.discard()
        self.main.clear()
        if self.control is not None:
            self.control.cusum.clear()
            self.control.rest.discard()

    def _start_over(self) -> None:
        """An announced change: learn level and offset anew."""
        for track in (self.raw, self.gap):
            track.restart()
        self.main.clear()
        self.drift = Drift()
        self.twin = Drift()
        self._drop = self._fell = 0.0
        self._parted = 1.0
        self._bend_back(None)
        if self.control is not None:
            self.control.rest.restart()
            self.control.cusum.clear()
        self._waiting = 0.0
        self._lead = max(1.0, self._step)  # the offset is learnt from here, whatever share of the run is done

    def _with_control(
        self, sample: Sample, step: float, opened: list[Alert], closed: list[Alert]
    ) -> float | None:
        """Residual of what the control leaves, in its own sigmas; None where there is no use of a control."""
        control = self.control
        if control is None:
            return None
        control.newest = None
        pair = control.matched(step, sample.tokens, sample.loss)
        if pair is None and control.between():
            return None
        if pair is None or control.own_cusum.over(self.settings.warn, self.settings.warn_quick):
            self._paired = 0.0
            return None
        x, c = pair
        y = control.residual(x, c)
        rest = control.rest
        z = rest.score(y)
        control.newest = y, z
        useful = control.shares_noise(self.raw.calm_sd, LEAST_PAIRS)
        if useful:
            control.cusum.add(z, rest.weight, step)
        if not self._off:
            rest.learn(y, control.cusum.b <= 0.0)
            control.learn(x, c)
            share = self._share(step)
            if useful and share is not None and share > TWIN_FROM and 0.8 < control.beta() < 1.25:
                self.twin.learn(x - c, rest.calm_sd, rest.weight, step, share <= TWIN_TO)
                if self.old_runs is None:
                    self._beside_one(sample, x - c, share, opened, closed)
        self._paired = 1.0 if useful else 0.0
        return z if useful else None
