"""Drift beside runs of the same recipe: its old runs, where they were given, or else one control on the same data order.

old runs   the gap in each window is the run's mean less theirs, and how healthy gaps hang together is known (`old_runs`)
control    the gap is the mean difference of paired samples; how such pairs hang together is `base.LIKE`, up to a factor that
           the pair itself tells, so there are no calls before a few windows and they come later

Both go to the same test (`bend`). A window in which the run was off its line, or went back, is left out.
"""

from monitor.judge.base import Held
from monitor.judge.bend import FIRST, PARTS, Bend, Window
from monitor.verdict import Alert, Sample

HEIGHT = 4.0
"""Normal deviates past which one in 1,000 healthy runs goes up beside old runs, and as many down."""
HEIGHT_PAIR = 4.5
"""The same beside one control."""
BACK = 2.0
"""Normal deviates under which a call is over."""
FEW = 4
"""Pairs that make a window."""
COMPLETE = 0.9
"""Share of a window's samples that must have come."""
SAME = 0.25
"""Sigmas of a sample's noise up to which a control that begins apart may be of our recipe: a smaller twin's gap bends of
itself, and begins further off."""
SEEN = 0.05
"""The same from which a bend is anybody's trouble."""
OTHER = 4.0
"""Times the old runs' batch noise from which the run's is held for another's: it reads other batches than they did."""


class Bending(Held):
    """The tests of a bending gap, on top of what is held."""

    __slots__ = ()

    def _beside_old(self, sample: Sample, opened: list[Alert], closed: list[Alert]) -> None:
        """Take a sample into its window of the old runs; look where the window is complete."""
        old, bend = self.old_runs, self.bend
        if old is None or bend is None:
            return
        if self._parted:  # what comes is not what they did
            if self._by_bend:
                self._close(
                    "LossAbovePrediction" if self._by_bend > 0 else "LossBelowPrediction", sample.step, closed
                )
                self._by_bend = 0.0
            return
        at = old.window(float(sample.step))
        if at != self._part:
            if self._part >= 0:
                self._complete(sample, opened, closed)
            self._begin_part(at)
        if at < 0 or sample.step not in old.steps:
            return
        if self._off or "LossNonFinite" in self._open:
            self._part_bad = 1.0
        self._part_sum += sample.loss
        self._part_turns += sample.loss if self._part_count % 2 == 0 else -sample.loss
        self._part_count += 1.0
        if sample.step >= old.last[at]:
            self._complete(sample, opened, closed)
            self._part_bad = 1.0  # nothing more belongs to it

    def _begin_part(self, at: int) -> None:
        self._part = float(at)
        self._part_sum = self._part_turns = self._part_count = self._part_bad = 0.0

    def _complete(self, sample: Sample, opened: list[Alert], closed: list[Alert]) -> None:
        """The window in hand is over."""
        old, bend, at, n = self.old_runs, self.bend, int(self._part), self._part_count
        if old is None or bend is None or self._part_bad or n < COMPLETE * old.count[at]:
            return
        own = self.raw.calm_sd**2
        missing = old.count[at] - n
        if missing == 0 and n > 1:
            self._turned += (self._part_turns - old.turns[at]) ** 2
            self._turned_n += n
        noise = self._turned / self._turned_n if self._turned_n else 0.0
        extra = (noise - old.noise) / n if noise > OTHER * old.noise else 0.0
        extra += missing * own / (n * n)
        mean = self._part_sum / n
        bend.add(Window(at, old.share[at], round(mean - old.mean[at], 9), extra))
        self._bent(sample, bend, HEIGHT, old.last_step, mean, old.mean[at], opened, closed)

    def _beside_one(
        self, sample: Sample, apart: float, share: float, opened: list[Alert], closed: list[Alert]
    ) -> None:
        """Take the difference of a pair into its window; look at the one before where it is over."""
        at = int(PARTS * share)
        if at != self._pair:
            n = self._pair_count
            if (
                n >= FEW
                and not self._pair_bad
                and (not self.pair.windows or self._pair > self.pair.windows[-1].place)
            ):
                gap = self._pair_sum / n
                self.pair.add(Window(int(self._pair), round(self._pair_share / n, 6), round(gap, 9), 0.0))
                end = float(sample.step) / share
                first = self.pair.windows[0].gap
                noise = self.raw.calm_sd
                if self._by_bend or (abs(first) < SAME * noise and abs(gap - first) > SEEN * noise):
                    usual = sample.loss - gap + first
                    self._bent(sample, self.pair, HEIGHT_PAIR, end, sample.loss, usual, opened, closed)
            self._pair, self._pair_sum, self._pair_share = float(at), 0.0, 0.0
            self._pair_count = 0.0
            self._pair_bad = 1.0 if at < FIRST or at >= PARTS else 0.0
        self._pair_sum += apart
        self._pair_share += share
        self._pair_count += 1.0

    def _bent(
        self, sample: Sample, bend: Bend, height: float, end: float, value: float, usual: float,
        opened: list[Alert], closed: list[Alert],
    ) -> None:  # fmt: skip
        """Call what has bent, and resolve it when it is back."""
        look, called = bend.newest, bend.called(height)
        for sign, name, since, now in (
            (1.0, "LossAbovePrediction", look.since_up, look.up),
            (-1.0, "LossBelowPrediction", look.since_down, look.down),
        ):
            if called == sign and name not in self._open:
                self._by_bend = sign
                self._call(name, "warning", sample.step, int(since * end), value, usual, opened)
            elif self._by_bend == sign and now < BACK:
                self._by_bend = 0.0
                self._close(name, sample.step, closed)

    def _bend_back(self, step: float | None) -> None:
        """The run goes on from a step, or anew (None): windows behind it are superseded."""
        share = 0.0 if step is None else (self._share(step) or 0.0)
        self.pair = self.pair.until(int(PARTS * share))
        self._pair_bad = 1.0
        old = self.old_runs
        if old is not None and self.bend is not None:
            at = -1 if step is None else old.window(step)
            self.bend = self.bend.until(at)
            self._begin_part(at)
            self._part_bad = 1.0 if step is not None else 0.0
