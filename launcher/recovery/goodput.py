"""What became of a run's time: useful, lost, idle, in GPU seconds and in money.

    useful   steps that still count: a later attempt went on from a checkpoint that holds them
    lost     steps that were trained again, or never will be: all after the last committed checkpoint of a failed attempt
    idle     everything else while ranks were held: starting, loading, saving, waiting before a restart

An attempt's time between its first and its last step is shared out over its steps evenly. On CPU a rank counts as one
GPU. What a commit holds is booked once the driver has seen the commit, so that the books of a run that lives are true up
to its newest checkpoint; where the run has to go on from an older one, useful seconds become lost ones. The ledger is
kept in the run's folder, so that it goes on through every driver of the run; the time between two drivers is nobody's
and not counted. A driver that went without a word (killed, its cluster or its machine gone) leaves its last attempt open in
there: the next driver books it, by the times at which that attempt's steps were recorded. At az:// the folder is one machine's,
and another machine's driver begins new books. Seconds, except where dollars are named.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from launcher.storage.runfolder import read_json, write_whole


@dataclass
class Attempt:
    """One attempt as the driver saw it. Times are seconds on the driver's own monotonic clock."""

    ranks: int
    began: float
    start_step: int
    first_step: float | None = None
    """When its first step was seen."""
    last_step: float | None = None
    reached: int = 0
    ended: float = 0.0
    booked_steps: int = 0
    """Before `start_step`, and booked as useful already: `Ledger.keep` moves `began` and `start_step` on."""
    booked_s: float = 0.0
    number: int = 0
    """In the run's log."""


ATTEMPT = frozenset(f.name for f in fields(Attempt))


@dataclass
class Ledger:
    """GPU seconds of a whole run."""

    useful_s: float = 0.0
    lost_s: float = 0.0
    idle_s: float = 0.0
    steps_lost: int = 0
    attempts: int = 0
    price_per_gpu_hour: float = 0.0
    open: list[Attempt] = field(default_factory=list)
    """The attempt that is not settled yet, if any."""
    left: Attempt | None = None
    """What an earlier driver had open when it went. Its times are seconds since the epoch."""

    @property
    def total_s(self) -> float:
        return self.useful_s + self.lost_s + self.idle_s

    @property
    def ratio(self) -> float | None:
        """Useful over all; None before there is any."""
        return self.useful_s / self.total_s if self.total_s > 0 else None

    def dollars(self, seconds: float) -> float:
        return seconds / 3600.0 * self.price_per_gpu_hour

    def begin(self, ranks: int, start_step: int, now: float, number: int = 0) -> None:
        """An attempt begins; one that is still open ended without a word."""
        if self.open:
            self.end(now)
        self.open = [Attempt(ranks, now, start_step, reached=start_step, number=number)]
        self.attempts += 1

    def saw(self, step: int, now: float, age_s: float = 0.0) -> None:
        """The open attempt has made `step`, `age_s` ago."""
        if not self.open or step <= self.open[0].reached:
            return
        attempt = self.open[0]
        attempt.first_step = attempt.first_step if attempt.first_step is not None else now - age_s
        attempt.last_step, attempt.reached = now - age_s, step

    def end(self, now: float) -> None:
        """The open attempt trains no more."""
        if self.open:
            self.open[0].ended = now

    def settle(self, kept_step: int, now: float) -> int:
        """What the run goes on from, or ended with, is known: book the open attempt, and the wait since its end as
        idle. Returns the steps lost."""
        if not self.open:
            return 0
        return self._book(self.open.pop(), kept_step, now)

    def take_over(self, steps: Sequence[tuple[int, float]], kept_step: int) -> int:
        """Book what an earlier driver left open. Returns the steps lost.

        steps      of that attempt after `left.start_step`, oldest first, each with when it was recorded (seconds since the epoch)
        kept_step  what the run goes on from
        """
        if self.left is None:
            return 0
        a, self.left = self.left, None
        if steps:
            ahead = max(0.0, a.began - steps[0][1])  # the recorder's clock may lag behind the driver's
            a.first_step, a.last_step, a.reached = steps[0][1] + ahead, steps[-1][1] + ahead, steps[-1][0]
        a.ended = max(a.began, a.last_step or 0.0)  # when it went is not known
        return self._book(a, kept_step, a.ended)

    def _book(self, a: Attempt, kept_step: int, now: float) -> int:
        trained, span = _trained(a, a.ended or now)
        kept = min(max(0, kept_step - a.start_step), trained)
        useful = span * kept / trained if trained else 0.0
        void = min(max(0, a.start_step - kept_step), a.booked_steps)
        undone = a.booked_s * void / a.booked_steps if void else 0.0
        self.useful_s += a.ranks * (useful - undone)
        self.lost_s += a.ranks * (span - useful + undone)
        self.idle_s += a.ranks * max(0.0, now - a.began - span)
        self.steps_lost += trained - kept + void
        return trained - kept + void

    def keep(self, kept_step: int) -> bool:
        """A commit of the open attempt is known: book its steps and what came before them. The attempt stays open with
        the rest. False, and nothing is booked, as long as no step after the commit was seen."""
        if not self.open or self.open[0].last_step is None:
            return False
        a = self.open[0]
        trained, span = _trained(a, a.last_step or 0.0)
        kept = kept_step - a.start_step
        if not 0 < kept < trained or span <= 0:
            return False
        useful, begins = span * kept / trained, (a.last_step or 0.0) - span
        self.useful_s += a.ranks * useful
        self.idle_s += a.ranks * (begins - a.began)
        a.booked_steps, a.booked_s = a.booked_steps + kept, a.booked_s + useful
        a.start_step, a.began = kept_step, begins + useful
        a.first_step = a.began + span / trained
        return True

    def idle(self, ranks: int, seconds: float) -> None:
        """Ranks were held for a while outside of any attempt."""
        self.idle_s += ranks * max(0.0, seconds)

    def told(self) -> str:
        """The whole of it in one line, for people."""
        if not self.total_s:
            return "no GPU time was used"
        parts = []
        for name, seconds in (("useful", self.useful_s), ("lost", self.lost_s), ("idle", self.idle_s)):
            money = f" (${self.dollars(seconds):,.2f})" if self.price_per_gpu_hour else ""
            parts.append(f"{seconds:,.0f} s {name}{money}")
        return f"GPU time {', '.join(parts)}: {100 * self.useful_s / self.total_s:.1f}% useful, {self.steps_lost} steps trained twice"

    def fields(self) -> dict[str, Any]:
        """For the wire."""
        money = (
            {
                f"dollars_{k}": round(self.dollars(v), 4)
                for k, v in (("useful", self.useful_s), ("lost", self.lost_s), ("idle", self.idle_s))
            }
            if self.price_per_gpu_hour
            else {}
        )
        return {
            "gpu_seconds_useful": round(self.useful_s, 3),
            "gpu_seconds_lost": round(self.lost_s, 3),
            "gpu_seconds_idle": round(self.idle_s, 3),
            "steps_lost": self.steps_lost,
            **money,
        }

    def write(self, path: Path) -> None:
        """Keep the books, and what is open. A disk that refuses, or is away, costs the books, not the run."""
        since = time.time() - time.monotonic()
        still = self.left or (shifted(self.open[0], since) if self.open else None)
        document = asdict(self) | {"left": asdict(still) if still else None}
        try:
            if not path.parent.is_dir():
                raise FileNotFoundError(f"{path.parent} is not there")
            write_whole(path, {k: v for k, v in document.items() if k != "open"})
        except OSError as error:
            print(f"losscast: goodput is not kept: {error}", flush=True)

    @classmethod
    def read(cls, path: Path, price_per_gpu_hour: float | None) -> "Ledger":
        """The ledger so far; a new one where there is none or it can't be read."""
        try:
            kept = read_json(path) or {}
            known = {k: v for k, v in kept.items() if k in cls.__dataclass_fields__ and k != "open"}
            left = known.get("left")
            known["left"] = Attempt(**left) if isinstance(left, dict) and left.keys() <= ATTEMPT else None
            ledger = cls(**known)
        except (ValueError, OSError, TypeError):
            ledger = cls()
        ledger.price_per_gpu_hour = price_per_gpu_hour or 0.0
        return ledger


def shifted(a: Attempt, seconds: float) -> Attempt:
    """The attempt by a clock that is so much ahead."""
    first, last = (None if t is None else t + seconds for t in (a.first_step, a.last_step))
    ended = a.ended + seconds if a.ended else 0.0
    return replace(a, began=a.began + seconds, first_step=first, last_step=last, ended=ended)


def _trained(a: Attempt, ended: float) -> tuple[int, float]:
    """Steps that an attempt has made, and the seconds that they took."""
    trained = max(0, a.reached - a.start_step)
    # first to last step seen is one step less than was trained: the first one's own time is added
    span = (a.last_step or 0.0) - a.first_step if a.first_step is not None else 0.0
    return trained, min(span * trained / (trained - 1) if trained > 1 else span, ended - a.began)
