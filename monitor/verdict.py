"""What the judge takes in and what it says: plain frozen records, shared by judge, replay, store, exporter and page.

loss, expected, gap    nats per token
step                   optimizer updates (count)
time                   seconds since the epoch, the sender's clock
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import msgspec

Severity = Literal["info", "warning", "critical"]
State = Literal[
    "warming_up",
    "healthy",
    "off_line",
    "diverged",
    "above",
    "below",
    "non_finite",
    "spike",
    "stalled",
    "plateau",
]
Source = Literal["control", "prediction", "old_runs", "own_past", "none"]
Action = Literal["continue", "stop", "roll_back", "lower_lr"]


class Sample(msgspec.Struct, frozen=True, gc=False):
    """One optimizer step as it was reported. `loss` may be NaN or infinite: that is an answer, not an accident.

    A struct, which is made in a tenth of a frozen dataclass's time: there is one a step. `msgspec.structs.replace` alters a copy.
    """

    step: int
    loss: float
    tokens: float | None = None
    time: float | None = None
    val_loss: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    tokens_per_s: float | None = None
    attempt: int = 1
    spread: float | None = None
    """Largest difference of one rank's loss from the mean over ranks, nats per token."""


@dataclass(frozen=True, slots=True)
class Cause:
    """A likely cause and the evidence in the samples that supports it."""

    name: str
    evidence: str
    step: int | None = None
    """Where the cause itself is seen first, when that is known better than the alert's onset."""


@dataclass(frozen=True, slots=True)
class Alert:
    """One alert as it was called. An escalation is a new entry with the same `alert` and `since_step`."""

    alert: str
    """A name from OPERATIONS: LossNonFinite, LossOffLine, LossDiverged, LossAbovePrediction, ..."""
    severity: Severity
    step: int
    """The sample at which it was called."""
    since_step: int
    """The estimated onset, at most `step`."""
    value: float
    expected: float | None
    resolved_step: int | None = None


class Verdict(NamedTuple):
    """What the judge holds of a run after one sample. A tuple, which is made in a third of the time: there is one a step."""

    step: int
    state: State
    source: Source
    """Where the expectation came from, best available first."""
    observed: float
    expected: float | None
    lower: float | None
    upper: float | None
    gap_nats: float | None
    gap_sigma: float | None
    since_step: int | None = None
    causes: tuple[Cause, ...] = ()
    opened: tuple[Alert, ...] = ()
    """Alerts called at this sample."""
    closed: tuple[Alert, ...] = ()
    """Alerts resolved at this sample, with `resolved_step` set."""


@dataclass(frozen=True, slots=True)
class Advice:
    """What to do about a run, as a probability with its evidence. Never a bare verdict."""

    step: int
    action: Action
    p_miss: float | None
    """Probability that the final loss misses the target; None without a target."""
    final_loss: dict[str, float] | None
    """Quantiles p05, p50, p95 of the final loss."""
    evidence: tuple[str, ...] = field(default=())
    hours_left: float | None = None
    money_left: float | None = None
    roll_back_to: int | None = None
    """Step of the newest checkpoint from before the trouble; None when there is none, or nothing to roll back."""
    skip: tuple[int, int] | None = None
    """First and last step whose batches should not be read again."""
