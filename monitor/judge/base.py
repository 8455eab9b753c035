"""What the judge holds of a run, and how it is saved: the part under its tests.

All that `observe` changes lives here and is in `state_dict()`, which `from_state` reads back.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self

from monitor.judge.bend import Bend, Shape
from monitor.judge.control import Control
from monitor.judge.cusum import Cusum
from monitor.judge.drift import Drift
from monitor.judge.evidence import Evidence
from monitor.judge.line import Expected, Line
from monitor.judge.old_runs import OldRuns
from monitor.judge.order import Order
from monitor.judge.past import Past
from monitor.judge.settings import Settings
from monitor.judge.smoothing import Smoothing
from monitor.judge.track import Track
from monitor.verdict import Alert, Cause, Severity, State

STATES: tuple[tuple[str, State], ...] = (
    ("LossNonFinite", "non_finite"),
    ("LossDiverged", "diverged"),
    ("LossOffLine", "off_line"),
    ("LossAbovePrediction", "above"),
    ("LossBelowPrediction", "below"),
    ("LossPlateau", "plateau"),
)
"""What an open alert makes of the run, worst first."""

BY_DATA = frozenset({"LossNonFinite", "LossOffLine", "LossDiverged", "LossSpike"})
"""Alerts that a bad batch can raise."""

SPARSE = 60
"""Samples up to which a run's log counts as sparse: each of them says where the run is."""

PLAIN, PLAIN_AT = 1.5, 12
"""Noise of one sample, in standard deviations of the band, up to which a sparse log's samples count as they are; and
the samples it takes to know."""

CHECKPOINTS = 16
"""Checkpoints remembered."""

LEARN_FROM, LEARN_TO = 0.07, 0.2
"""Shares of the run between which its own offset from the prediction is learnt."""

TWIN_FROM, TWIN_TO = 0.1, 0.25
"""The same for its difference from a control of its recipe, which wanders in the first tenth."""

LIKE = Shape()
"""What the differences of two runs of a recipe are like: the likeliest of `old_runs.SHAPES` on each of two recipes."""
NOTHING_KNOWN = 1e-12
"""Degrees of freedom of their size, which is known from the pair alone."""

NUMBERS = (
    "samples", "step", "tokens", "loss", "attempt", "first_step", "waiting", "off", "off_since", "off_count",
    "evidence", "peak", "recent", "peak_loss", "by_control", "finite_run", "rewound", "resume_n", "resume_sum",
    "resume_level", "resume_slack", "resume_fall", "resume_lag", "resume_below", "quiet_from", "paired", "lead", "by_twin", "time", "first_time", "time_step", "tail",
    "gaps", "newer", "older", "oldest", "rough", "val_bad", "val_count", "val_newer", "val_older", "val_step", "val_apart", "flat", "every", "low",
    "drop", "drop_from", "drop_mean", "drop_n", "drop_since", "fell",
    "part", "part_sum", "part_turns", "part_count", "part_bad", "turned", "turned_n", "parted", "by_bend", "pair", "pair_sum", "pair_share",
    "pair_count", "pair_bad", "apart", "apart_n", "near", "bare",
)  # fmt: skip

NOT_NOTHING = frozenset({"step", "tokens", "loss", "attempt", "quiet_from", "part", "pair"})
"""Those that begin as something else than 0; what is 0 is not written."""


class Held:
    """Tracks, tests and open alerts of one run, without the judging. Slots: there are ten thousand of them, and what each is
    asked for is seldom in the processor's cache."""

    __slots__ = (
        "settings", "prediction", "target_loss", "total_tokens", "line", "total_steps", "raw", "gap", "val", "smoothing",
        "main", "drift", "past", "evidence", "order", "checkpoints", "control", "twin", "old_runs", "bend", "pair",
        "_open", *("_" + name for name in NUMBERS),
    )  # fmt: skip

    _samples: float
    _step: float
    _tokens: float
    _loss: float
    _attempt: float
    _first_step: float
    _waiting: float
    _off: float
    _off_since: float
    _off_count: float
    _evidence: float
    _peak: float
    _recent: float
    _peak_loss: float
    _by_control: float
    _finite_run: float
    _rewound: float
    _resume_n: float
    _resume_sum: float
    _resume_level: float
    _resume_slack: float
    """Nats by which the level fell before the step that was gone back to: it lags, and is known no better."""
    _resume_fall: float
    """Nats a step by which the level fell before it: the loss falls on while it is held against the level."""
    _resume_lag: float
    """Nats by which the loss may have been below the level, which lags."""
    _resume_below: float
    """Sum of what the samples were below even so, in deviations of one sample."""
    _quiet_from: float
    _paired: float
    _lead: float
    """Step from which the newest announced change took effect, at least 1; 0 without any."""
    _by_twin: float
    _time: float
    _first_time: float
    _time_step: float
    _tail: float
    _gaps: float
    _newer: float
    _older: float
    _oldest: float
    _rough: float
    """Noise of one sample's gap, in standard deviations of the band, by second differences, to which a drift is nothing."""
    _val_bad: float
    _val_count: float
    _val_newer: float
    _val_older: float
    _val_step: float
    _val_apart: float
    _flat: float
    _low: float
    _drop: float
    _drop_from: float
    _drop_mean: float
    _drop_n: float
    _drop_since: float
    _fell: float
    """By how much it dropped at once, while that lasts (deviations of the band; nats beside a control alone); 0 where it did not."""
    _part: float
    """Window of the old runs that is in hand, -1 before the first; `_pair` the same beside a control."""
    _part_sum: float
    _part_turns: float
    _part_count: float
    _part_bad: float
    _turned: float
    _turned_n: float
    _parted: float
    """The run left what the old runs did: an announced change."""
    _by_bend: float
    """1 or -1 while a bending gap is what holds LossAbovePrediction or LossBelowPrediction open."""
    _pair: float
    _pair_sum: float
    _pair_share: float
    _pair_count: float
    _pair_bad: float
    _apart: float
    """Nats by which it is off its prediction while it is off its line or has dropped, by its newest samples."""
    _apart_n: float
    """Samples for which it has been."""
    _bare: float
    """As `_rough`, of the newest fifty gaps, in a log of any length."""
    _near: float
    """Gap by the newest samples in the last tenth of the run, in standard deviations of the band."""
    _every: float
    """Steps from the last sample but one to the last: what is seen at a step may have begun as many before it."""

    def __init__(
        self,
        settings: Settings | None = None,
        prediction: Mapping[str, Any] | None = None,
        target_loss: float | None = None,
        total_tokens: float | None = None,
        total_steps: float | None = None,
        old_runs: OldRuns | None = None,
    ) -> None:
        self.settings = settings or Settings()
        self.prediction = dict(prediction) if prediction else None
        self.target_loss = target_loss
        self.total_tokens = total_tokens
        curve = (prediction or {}).get("curve")
        self.line = Line(curve) if curve else None
        self.total_steps = self.line.last_step if self.line else total_steps
        memory = self.settings.memory
        self.raw = Track(memory)
        self.gap = Track(memory, follow=True)
        self.val = Track(memory, follow=True)
        self.smoothing = Smoothing()
        self.main = Cusum()
        self.drift = Drift()
        self.past = Past()
        self.evidence = Evidence()
        self.order = Order()
        """For a caller whose samples may arrive out of order; the judge itself takes them as they come."""
        self.checkpoints: list[int] = []
        """Steps of the newest checkpoints that are there to go back to, rising."""
        self.control: Control | None = None
        self.twin = Drift()
        self.old_runs = old_runs
        self.bend = old_runs.bend() if old_runs is not None else None
        self.pair = Bend(lambda a, b: LIKE.at(a.share, b.share), NOTHING_KNOWN)
        """Beside one control."""
        self._open: dict[str, Alert] = {}
        for name in NUMBERS:
            setattr(self, "_" + name, 0.0)
        self._step = self._tokens = self._quiet_from = self._part = self._pair = -1.0
        self._loss = math.nan
        self._attempt = 1.0

    def state_dict(self) -> dict[str, Any]:
        """Everything observe() changes, as JSON-able data (non-finite numbers as None where they can be)."""
        return {
            "version": 1,
            "numbers": {
                name: _plain(value)
                for name in NUMBERS
                if (value := getattr(self, "_" + name)) != 0.0 or name in NOT_NOTHING
            },
            "tracks": [self.raw.state(), self.gap.state(), self.val.state()],
            "smoothing": self.smoothing.state(),
            "main": self.main.state(),
            "drift": self.drift.state(),
            "twin": self.twin.state(),
            "bend": [None if self.bend is None else self.bend.state(), self.pair.state()],
            "past": self.past.state(),
            "evidence": self.evidence.state(),
            "order": self.order.state(),
            "checkpoints": self.checkpoints[:],
            "control": self.control.state() if self.control is not None else None,
            "open": [
                [a.alert, a.severity, a.step, a.since_step, _plain(a.value), a.expected]
                for a in self._open.values()
            ],
        }

    @classmethod
    def from_state(
        cls,
        settings: Settings | None,
        state: Mapping[str, Any],
        prediction: Mapping[str, Any] | None = None,
        target_loss: float | None = None,
        total_tokens: float | None = None,
        total_steps: float | None = None,
        old_runs: OldRuns | None = None,
    ) -> Self:
        """The judge that wrote `state`, going on. Raises ValueError for a state of another version."""
        if state.get("version") != 1:
            raise ValueError(f"judge state of version {state.get('version')!r}; this one reads version 1")
        judge = cls(settings, prediction, target_loss, total_tokens, total_steps, old_runs)
        for name, value in state["numbers"].items():
            if name in NUMBERS:
                setattr(judge, "_" + name, _number(value))
        judge.raw.load(state["tracks"][0])
        judge.gap.load(state["tracks"][1])
        if len(state["tracks"]) > 2:
            judge.val.load(state["tracks"][2])
        judge.smoothing.load(state.get("smoothing", ()))
        judge.main.load(state["main"])
        judge.drift.load(state["drift"])
        judge.twin.load(state["twin"])
        held, pair = state.get("bend", (None, ()))
        judge.pair.load(pair)
        if judge.bend is not None and held is not None:
            judge.bend.load(held)
        judge.past.load(state["past"])
        judge.evidence.load(state["evidence"])
        if "order" in state:
            judge.order.load(state["order"])
        judge.checkpoints = [int(step) for step in state.get("checkpoints", ())]
        if state["control"] is not None:
            judge.control = Control(judge.settings.memory)
            judge.control.load(state["control"])
        for name, severity, step, since, value, expected in state["open"]:
            judge._open[name] = Alert(name, severity, step, since, _number(value), expected)
        return judge

    def open_alerts(self) -> tuple[Alert, ...]:
        """The alerts open now, oldest first."""
        return tuple(sorted(self._open.values(), key=lambda alert: (alert.step, alert.alert)))

    def causes(self) -> tuple[Cause, ...]:
        """Likely causes of what is open now, with the evidence for each."""
        held = self._worst()
        alert = held[1] if held is not None else next(iter(self.open_alerts()), None)
        return self._causes_of(alert) if alert is not None else ()

    def _causes_of(self, alert: Alert) -> tuple[Cause, ...]:
        off = self._off_count if self._off else 0.0
        found = self.evidence.causes(alert.since_step, off)
        if found or alert.alert not in BY_DATA:
            return found
        first = alert.since_step - max(0, int(self._every) - 1)
        where = f"steps {first} to {alert.step}"
        if self._tokens > 0 and self._step > 0:  # exact where every batch has the same size
            each = self._tokens / self._step
            where += f", about tokens {each * max(0, first - 1):.0f} to {each * alert.step:.0f}"
        return (Cause("data_position", f"nothing else changed: look at the batches of {where}"),)

    def _worst(self) -> tuple[State, Alert] | None:
        for name, state in STATES:
            if name in self._open:
                return state, self._open[name]
        return None

    def _expected_now(self) -> float:
        return self.raw.base

    def _plain(self) -> bool:
        """A sparse log whose samples say by themselves where the run is: their noise is small beside the band."""
        return self._gaps <= SPARSE and (self._gaps < PLAIN_AT or self._rough <= PLAIN)

    def _share(self, step: float) -> float | None:
        """Share of the run that is done; None when nobody said how long it is."""
        last_tokens = self.line.last_tokens if self.line else None
        if last_tokens and self._tokens >= 0:
            return self._tokens / last_tokens
        total = self.total_steps
        if total is None and self.total_tokens and self._tokens > 0 and step > 0:
            total = self.total_tokens / self._tokens * step
        return step / total if total else None

    def _call(
        self,
        name: str,
        severity: Severity,
        step: int,
        since: int,
        value: float,
        usual: float | None,
        opened: list[Alert],
    ) -> None:
        alert = Alert(name, severity, step, min(since, step), value, usual)
        self._open[name] = alert
        opened.append(alert)

    def _close(self, name: str, step: int, closed: list[Alert]) -> None:
        alert = self._open.pop(name, None)
        if alert is not None:
            closed.append(replace(alert, resolved_step=step))


def band_sd(expected: Expected) -> float:
    """Standard deviation that the 90% band stands for, nats per token; never nothing."""
    return max((expected.p95 - expected.p05) / 3.29, 1e-4)


def _plain(value: float) -> float | str:
    return (
        value
        if math.isfinite(value)
        else ("NaN" if value != value else ("Infinity" if value > 0 else "-Infinity"))
    )


def _number(value: float | str) -> float:
    return float(value.replace("Infinity", "inf")) if isinstance(value, str) else float(value)
