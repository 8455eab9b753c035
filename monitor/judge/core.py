"""One run's judge: sequential tests of every sample against where the loss should be.

Fast   The loss less its own recent level, and where there is a prediction also the gap less its own level: the smaller
       of the two residuals goes into a pair of CUSUMs (`cusum`), so that a rise the prediction expects, or a bend it
       does not, is no alarm. Where there is a control on the same data order a second pair watches the difference.
Slow   The smoothed gap to the prediction, or to a control of the same recipe, less the run's own early offset
       (`drift`).
After  Off the line is a warning. It ends as a spike (the CUSUM comes back to nothing) or as a divergence, when the
       evidence summed since the onset is past all doubt and the loss is not on its way back; or at once when a run
       that is logged sparsely has lost half its way (the loss is back above where it was at half the steps).

Loss, levels and gaps are nats per token. No clock, no I/O; all that changes is in `state_dict()`.
"""

import math

from monitor.judge.base import CHECKPOINTS, PLAIN, SPARSE, band_sd
from monitor.judge.control import Control
from monitor.judge.drift import LEAST, MEMORY, Drift
from monitor.judge.fast import Fast
from monitor.judge.line import Expected
from monitor.judge.past import Past
from monitor.judge.plateau import Plateau
from monitor.judge.slow import Slow
from monitor.judge.smoothing import Smoothing
from monitor.judge.validation import Validation
from monitor.verdict import Alert, Cause, Sample, Source, State, Verdict

NEWEST = 0.7
"""Weight of the newest of two such samples up to half the run; all of it from three quarters on."""
LONGER = 0.05
"""Share by which a run may be longer than its prediction's curve and still have its end foretold by it."""
FRESH = 0.9
"""A validation speaks for the run until it is a tenth further."""
LAST = 0.9
"""Share of the run from which the gap is that of the newest samples: a tenth of the run is more than is left."""
SEEN = 32.0
"""Samples whose mean has an eighth of a sample's noise: with noise of a deviation of the band, so many say where it is."""
SECOND = 0.798 * math.sqrt(6.0)
"""E |a - 2 b + c| of three standard normals."""


class Judge(Fast, Slow, Validation, Plateau):
    """Feed samples in step order; each gives the verdict after it. See `monitor.judge` for the whole interface."""

    __slots__ = ()

    def announce(self, step: int, what: str) -> None:
        """A planned change (learning rate, data) takes effect at `step`: the level is learnt anew from there."""
        self._quiet_from = float(step)
        self.evidence.announced(step, what)

    def checkpoint(self, step: int, ok: bool = True) -> None:
        """A checkpoint of `step` was committed, or turned out not to verify: one to go back to, or not."""
        held = [at for at in self.checkpoints if at != step]
        self.checkpoints = sorted([*held, step] if ok else held)[-CHECKPOINTS:]

    def restarted(self, step: int, attempt: int) -> None:
        """Attempt `attempt` goes on from `step`; steps after it come again and supersede what was seen."""
        if attempt <= self._attempt:
            return
        self._attempt = float(attempt)
        if self._samples == 0:
            return
        self.evidence.resumed(step)
        self.checkpoints = [at for at in self.checkpoints if at <= step]  # what came after is superseded
        self._rewound = 1.0
        slack = 0.0
        if step < self._step:
            remembered = min((step - self._first_step) / 8.0, self.settings.memory * self._every)
            level, slack = self.past.at(step), self.past.change_at(step, remembered)
            if self._off:
                self._settle()
            if level is None:
                self._begin_again(step)
                return
            self._step = float(step)
            self._tokens = -1.0
            self.past.forget(step)
            self._bend_back(step)
            self.raw.restart(level, self.past.count)
        self.smoothing.forget(self.raw.base)
        self.main.clear()
        self._waiting = 0.0
        self._resume_n, self._resume_sum, self._resume_level = 1.0, 0.0, self.raw.base
        self._resume_slack, self._resume_below, self._resume_fall = slack, 0.0, 0.0
        behind = min((step - self._first_step) / 4.0, self.settings.memory * self._every)
        if behind > 0:
            self._resume_fall = self.past.fall(step, behind, self.raw.base) / behind
        self._resume_lag = self._resume_fall * behind / 2.0  # an eighth of its way is remembered

    def _begin_again(self, step: int) -> None:
        """An attempt from a step at or before the first that is remembered: the run as if nothing had come before."""
        for track in (self.raw, self.gap, self.val):
            track.restart()
        self.past, self.smoothing = Past(), Smoothing()
        self.drift, self.twin = Drift(), Drift()
        self.main.clear()
        if self.control is not None:
            self.control.rest.restart()
            self.control.cusum.clear()
        for name in (
            "samples",
            "waiting",
            "lead",
            "paired",
            "by_twin",
            "tail",
            "gaps",
            "flat",
            "resume_n",
            "val_count",
            "drop",
            "fell",
            "apart_n",
            "near",
        ):
            setattr(self, "_" + name, 0.0)
        self._step, self._tokens = float(step), -1.0
        self._bend_back(None)

    def observe_control(self, sample: Sample) -> None:
        """The control run's sample on the same data order, before ours of the same step."""
        if self.control is None:
            self.control = Control(self.settings.memory)
        control = self.control
        if not math.isfinite(sample.loss):
            return
        z = control.own.score(sample.loss)
        if control.own.count > 30:
            control.own_cusum.add(z, control.own.weight, float(sample.step))
        quiet = control.own_cusum.quiet()
        if not control.own_cusum.over(self.settings.warn, self.settings.warn_quick):
            control.own.learn(sample.loss, quiet)
        else:
            control.own_cusum.hold(self.settings.warn, self.settings.warn_quick)
        control.offer(float(sample.step), sample.tokens, sample.loss)

    def observe(self, sample: Sample) -> Verdict:
        """The verdict after this sample. A step at or before the last one changes nothing, unless it is non-finite."""
        if sample.attempt != self._attempt:
            if sample.attempt < self._attempt:
                return self._say([], [])
            self.restarted(sample.step - 1, sample.attempt)
        x, step = sample.loss, sample.step
        opened: list[Alert] = []
        closed: list[Alert] = []
        if not math.isfinite(x):
            return self._non_finite(sample, opened)
        if step <= self._step:
            return self._say([], [])
        if self._samples == 0:
            self._first_step = float(step)
        self._samples += 1
        if self._samples > 1:
            self._every = step - self._step
        self._step, self._loss = float(step), x
        self._tokens = -1.0 if sample.tokens is None else sample.tokens
        if sample.time is not None:
            self._time = sample.time
            if not self._first_time:
                self._first_time, self._time_step = sample.time, float(step)
        self.evidence.learn(sample)
        if self._rewound:
            self._rewound = 0.0
            self._close("LossOffLine", step, closed)
            self._close("LossDiverged", step, closed)
        if 0 <= self._quiet_from <= step and not self._off:
            self._quiet_from = -1.0
            self._start_over()
        if "LossNonFinite" in self._open:
            self._finite_run += 1
            if self._finite_run >= self.settings.recover and not self._val_bad:
                self._close("LossNonFinite", step, closed)
        expected = self.line.at(step, sample.tokens) if self.line else None
        if expected is not None:
            u = max(-1e6, min(1e6, (x - expected.p50) / band_sd(expected)))
            self._oldest, self._older, self._newer = self._older, self._newer if self._gaps else u, u
            self._gaps += 1.0
            if self._gaps >= 3.0:
                bend = abs(u - 2.0 * self._older + self._oldest) / SECOND
                most = 4.0 * max(1.0, self._bare)
                self._bare += max(0.02, 1.0 / (self._gaps - 2.0)) * (min(most, bend) - self._bare)
                if self._gaps <= SPARSE:
                    self._rough += (min(4.0 * PLAIN, bend) - self._rough) / (self._gaps - 2.0)
        self._beside(sample, opened, closed)
        self._fast(sample, expected, opened, closed)
        if self._resume_n:
            self._continuity(sample, opened, closed)
        self._beside_old(sample, opened, closed)
        if not self._off:
            self._slow(sample, expected, opened, closed)
            self._plateau(sample, expected, opened, closed)
        self._stands(expected)
        self._validation(sample, expected, opened, closed)
        level = self.smoothing.level if self.smoothing.rho else self.raw.base
        self.past.learn(step, level, x, self.evidence.number["lr"])
        return self._say(opened, closed, expected)

    def _non_finite(self, sample: Sample, opened: list[Alert]) -> Verdict:
        """Called at the same step, whatever else is going on; the value enters no level and no spread."""
        self._finite_run = 0.0
        self._step, self._loss = max(self._step, float(sample.step)), sample.loss
        self.evidence.learn(sample)
        if "LossNonFinite" not in self._open:
            expected = self.line.at(sample.step, sample.tokens) if self.line else None
            usual = expected.p50 if expected else (self.raw.base if self.raw.count else None)
            self._call("LossNonFinite", "critical", sample.step, sample.step, sample.loss, usual, opened)
        return self._say(opened, [])

    def _stands(self, expected: Expected | None) -> None:
        """How far from its prediction it is while it is off its line or has dropped: the mean of the newest eighth of those
        samples, so that one that runs away is followed. The slow tests' mean clips what leaps, and stands still meanwhile. In the last tenth
        of the run, while it is on its line: the gap over as many samples as are left, or as it takes to see it."""
        if expected is None:
            return
        gap = self._loss - expected.p50
        if self._off or self._fell:
            self._apart_n += 1.0
            self._apart += self._gain() * (gap - self._apart)
            return
        self._apart_n = 0.0
        if (self._share(self._step) or 0.0) <= LAST:
            self._near = self.drift.recent
        else:
            most = max(4.0 * self._one(), 1.0, 0.2 * abs(self._near))
            move = gap / band_sd(expected) - self._near
            self._near += max(-most, min(most, move)) / self._newest()

    def _one(self) -> float:
        """Noise of one sample's gap, in standard deviations of the band."""
        return self.gap.calm_sd if self.gap.count >= 3 else 1.0

    def _newest(self) -> float:
        """Samples that say where it is in the last tenth of the run."""
        share = self._share(self._step) or 0.0
        left = (self._step / share - self._step) / max(1.0, self._every) if share > 0 else 0.0
        return max(LEAST, min(MEMORY * self.drift.count, max(left, SEEN * self._bare**2)))

    def _gain(self) -> float:
        return 1.0 / min(self._apart_n, max(5.0, self._apart_n / 8.0)) if self._apart_n else 1.0

    def _lasts(self, share: float) -> float:
        """How much of what it is off by now counts for the end: all of a divergence, and of a drop that has lasted as long as
        one must; else nothing, until less of the run is left than it has been off for, and all of it at the end."""
        if "LossDiverged" in self._open:
            return 1.0
        since = self._off_since if self._off else self._drop_since
        passed = max(self._every, self._step - since)
        left = self._step / share - self._step if share > 0 else math.inf
        passes = min(1.0, max(0.0, left - self._every) / passed)
        if not self._off:
            passes *= max(0.0, 1.0 - self._apart_n / self.settings.page_samples)
        return 1.0 - passes

    def _beside(self, sample: Sample, opened: list[Alert], closed: list[Alert]) -> None:
        """What is not the loss: one rank apart, throughput, a gradient norm that left first."""
        for name, severity, on, off, value, usual in self.evidence.alerts(sample):
            if on and name not in self._open:
                self._call(name, severity, sample.step, sample.step, value, usual, opened)
            elif off and name in self._open:
                self._close(name, sample.step, closed)

    def _say(self, opened: list[Alert], closed: list[Alert], expected: Expected | None = None) -> Verdict:
        x, step = self._loss, int(self._step)
        if expected is None and self.line is not None:
            expected = self.line.at(step, self._tokens if self._tokens >= 0 else None)
        state: State = "healthy" if self.raw.count > self.settings.warm_up else "warming_up"
        since: int | None = None
        causes: tuple[Cause, ...] = ()
        if self._open:
            held = self._worst()
            if held is not None:
                state, since = held[0], held[1].since_step
                causes = self.causes()
        if state == "healthy" and opened and opened[-1].alert == "LossSpike":
            state = "spike"
        if opened and not causes:
            causes = self._causes_of(opened[-1])
        finite = math.isfinite(x)
        if not finite and self._samples + len(self._open) > 0:
            state = "non_finite"
        source: Source
        sd = self.smoothing.spread or self.raw.calm_sd
        if expected is not None:
            centre, lower, upper = expected.p50, expected.p05, expected.p95
            source = "control" if self._paired else "prediction"
        elif self.raw.count:
            centre, lower, upper = self.raw.base, self.raw.base - 3.0 * sd, self.raw.base + 3.0 * sd
            source = "control" if self._paired else "own_past"
            old = None if self.old_runs is None or self._parted else self.old_runs.at(float(step))
            if old is not None:
                noise = 1.645 * math.hypot(old[1], sd)
                centre, lower, upper = old[0], old[0] - noise, old[0] + noise
                source = "control" if self._paired else "old_runs"
        else:
            centre = lower = upper = None
            source = "none"
        gap = x - centre if centre is not None and finite else None
        sigma = gap / sd if gap is not None and sd > 0 else None
        return Verdict(
            step,
            state,
            source,
            x,
            centre,
            lower,
            upper,
            gap,
            sigma,
            since,
            causes,
            tuple(opened),
            tuple(closed),
        )

    def _longer(self, share: float) -> float:
        """How many times as long as its prediction's curve the run is, or is known to become; 1 where it is not longer."""
        if self.line is None or share <= 0:
            return 1.0
        whole, last = self.total_tokens, self.line.last_tokens
        longer = max(share, whole / last if whole and last and self._tokens >= 0 else 1.0)
        return longer if longer > 1.0 + LONGER else 1.0

    def outlook(self) -> dict[str, float]:
        """What advice needs to know, as plain numbers (nats per token, share of the run)."""
        step = max(self._step, 0.0)
        expected = self.line.at(step, self._tokens if self._tokens >= 0 else None) if self.line else None
        share = self._share(step) or 0.0
        longer = self._longer(share)
        if expected is None and self.line is not None and 1.0 < share <= 1.0 + LONGER:
            expected = self.line.final  # a batch or so past the end
        # before the slow tests begin
        young = not self.drift.count and self.gap.count >= self.settings.warm_up
        answer = {
            "step": step,
            "share": share,
            "gap_samples": max(
                self.drift.count, self._val_count, self._gaps if self._gaps <= SPARSE or young else 0.0
            ),
            "loss": self._loss,
            "every": self._every,
            "warming_up": 1.0 if self._samples <= self.settings.warm_up else 0.0,
            "validation_broken": self._val_bad if math.isfinite(self._loss) else 0.0,
            "longer": longer,
        }
        answer |= {"gap": 0.0, "band_sd": 1.0, "gap_sd": 0.0}
        if self.line is not None and self.line.final is not None:
            answer["curve_end"] = self.line.final.p50
        if share > 0 and self._time > self._first_time > 0 and step > self._time_step:
            done = (
                self._tokens / self.total_tokens
                if longer > 1.0 and self.total_tokens and self._tokens > 0
                else share
            )
            left = max(0.0, step / done - step)
            answer["hours_left"] = left * (self._time - self._first_time) / (step - self._time_step) / 3600.0
        if expected is None:
            answer["gap_samples"] = 0.0  # nothing to hold the loss against: no gap, however many there were
            return answer
        if not (self.drift.count or 0 < self._gaps <= SPARSE or self._val_count or young):
            return answer
        spread, drift = band_sd(expected), self.drift
        fresh = self._val_count and (self._share(self._val_step) or 0.0) >= FRESH * share
        if fresh and self._apart_n and self._val_step < (self._off_since if self._off else self._drop_since):
            fresh = False  # from before it left
        if fresh or self._plain():
            # validations, or as few samples as one keeps of them: hardly any noise beside what the run itself does
            newer, older = (self._val_newer, self._val_older) if fresh else (self._newer, self._older)
            newest = NEWEST + (1.0 - NEWEST) * max(0.0, min(1.0, (share - 0.5) / 0.25))
            return answer | {"gap": (older + newest * (newer - older)) * spread, "band_sd": spread}
        one = self._one()
        gap, noise = drift.recent, drift.recent_sd(one)
        if share > LAST and drift.count:
            gap, noise = self._near, self._bare / math.sqrt(2.0 * self._newest())
        if young:
            gap, noise = self.gap.base, one / math.sqrt(self.settings.warm_up * self.gap.weight)
        if self._apart_n:
            lasts, gain = self._lasts(share), self._gain()
            by = self._apart / spread - gap
            gap += lasts * by
            noise = math.hypot((1.0 - lasts) * noise, lasts * one * math.sqrt(gain / (2.0 - gain)))
            answer["gap_either"] = math.sqrt(lasts * (1.0 - lasts)) * abs(by) * spread
        return answer | {"gap": gap * spread, "band_sd": spread, "gap_sd": noise * spread}
