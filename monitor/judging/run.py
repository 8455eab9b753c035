"""One run before the judge: its `Watch`, what it was told beside samples, and what it said since it was last written.

Fed in the order of the store's ordinals and with nothing else, so a run that goes on from its persisted state comes to
the same verdicts. State, alerts and bands go to disk together, with the ordinal up to which they hold.
"""

import contextlib
import json
import math
from array import array
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import msgspec

from monitor.judge import Settings
from monitor.judging.feeding import ControlFeed, Row, Runs, rows_of_blob
from monitor.replay import Watch
from monitor.schema import spell, unspell
from monitor.store.columns import BAND, MISSING, Columns, Damaged, pack
from monitor.store.store import Store
from monitor.store.tables import ChunkRow, EventRow, Judged
from monitor.verdict import Sample, Verdict

_packed = msgspec.msgpack.Encoder().encode
DURATIONS = 256
RATES = 33
LATE_S = 3600.0
"""What a sample said so long ago is no news: a run that is judged again from its first sample pages nobody anew."""
BAND_ROWS = 4096
"""Samples whose expectations are kept together in one row of the store."""


@dataclass(slots=True)
class Court:
    """What the judges of all runs share."""

    store: Store
    settings: Settings
    runs: Runs
    predictions: dict[str, dict[str, Any]] = field(default_factory=dict)

    def shared(self, prediction: Any) -> dict[str, Any] | None:
        """The prediction; runs with the same one hold it once."""
        if not isinstance(prediction, dict):
            return None
        digest = prediction.get("digest")
        if not isinstance(digest, str) or len(self.predictions) > 1000:
            return prediction
        held = self.predictions.setdefault(digest, prediction)
        return held if held == prediction else prediction

    def brought_by(self, run_id: int, ord: int | None) -> dict[str, Any] | None:
        """The prediction that a run_started event brought."""
        if ord is None:
            return None
        for event in self.store.events(run_id, after=ord - 1, last=ord):
            return self.shared(event.fields.get("prediction"))
        return None


@dataclass(slots=True)
class Run:
    """One run's judge and what it has said since it was last written."""

    run_id: int
    watch: Watch
    cursor: int = 0
    """Ordinal up to which it was fed."""
    last: dict[str, Any] = field(default_factory=dict)
    context: dict[str, Any] = field(default_factory=dict)
    """What the judge was told beside samples: target_loss, total_tokens, total_steps, prediction_ord, control."""
    attempt: int = -1
    state: str = ""
    heard_s: float = 0.0
    written_s: float = 0.0
    advised_s: float = 0.0
    told_s: float = 0.0
    told: bool = True
    """Its newest verdict was made known."""
    urgent: bool = False
    bands: "list[tuple[int, int, array[float]]]" = field(default_factory=list)
    """Attempt, the last ordinal it is for, and seq, step, expected, lower, upper, gap_sigma one after the other."""
    opened: list[tuple[Any, ...]] = field(default_factory=list)
    closed: list[tuple[Any, ...]] = field(default_factory=list)
    verdicts: list[tuple[int, int, int, float, str]] = field(default_factory=list)
    pending: int = 0
    dirty: bool = False
    durations: "array[float]" = field(default_factory=lambda: array("d"))
    """Seconds a step took, of the latest ones."""
    gaps: "array[float]" = field(default_factory=lambda: array("d"))
    """Seconds between two reports: the same where each step is reported."""
    rates: "array[float]" = field(default_factory=lambda: array("d"))
    """Tokens a second, of the latest samples that say so."""
    timed: tuple[int, float] | None = None
    """Step and time of the newest sample of this attempt, by its sender's clock."""
    control: ControlFeed | None = None
    outside: list[int] = field(default_factory=lambda: [0, 0])
    """Samples above the band, and below it."""
    since: int = 0
    """The cursor as it was last written."""
    fed: tuple[int, int] = (-1, 0)
    """The newest attempt, and how many of its samples it was fed."""
    event_ord: int = 0
    """Ordinal of the last event it was fed."""
    unheard: list[str] = field(default_factory=list)
    """Critical alerts that were called and not made known yet."""
    verdict: Verdict | None = None
    """The newest one, while it is not in `last` yet: most are followed by another before anybody asks."""

    # what it is fed

    def feed(self, court: Court, row: ChunkRow | EventRow) -> None:
        """The next row of the store. Raises Damaged where there should have been another before it."""
        if isinstance(row, EventRow):
            if row.prev != self.event_ord:
                raise Damaged(f"an event is missing before event {row.ord}")
            self.event(court, row)
            self.event_ord = row.ord
        else:
            have = self.fed[1] if row.attempt == self.fed[0] else 0
            if row.before != have:
                raise Damaged(f"{row.before - have} samples are missing before chunk {row.ord}")
            self.samples(row.attempt, row.ord, row.received, rows_of_blob(row.body))
            self.fed = row.attempt, have + row.n
        self.cursor = row.ord

    def event(self, court: Court, row: EventRow) -> None:
        """Anything but samples."""
        body = row.fields
        if row.kind == "run_started":
            self._started(court, row, body)
        elif row.kind == "announce" and isinstance(body.get("step"), int):
            self.watch.announce(body["step"], str(body.get("what", ""))[:80])
        elif row.kind == "checkpoint" and isinstance(body.get("step"), int):
            self.watch.checkpoint(body["step"], body.get("ok") is not False)
        elif row.kind == "run_ended" and self.watch.order.waiting:
            self.samples(self.attempt, row.ord, row.received, cast(list[Row], self.watch.order.flush()))
        self.dirty = True

    def _started(self, court: Court, row: EventRow, body: dict[str, Any]) -> None:
        context = dict(self.context)
        for name in ("target_loss", "total_tokens", "total_steps", "price_per_hour"):
            value = body.get(name)
            if isinstance(value, (int, float, str)) and not isinstance(value, bool):
                with contextlib.suppress(ValueError):
                    number = unspell(value)
                    if number is not None and math.isfinite(number):
                        context[name] = number
        prediction = court.shared(body.get("prediction"))
        if prediction is not None:
            context["prediction_ord"] = row.ord
        else:
            prediction = self.watch.prediction
        control = body.get("control")
        if isinstance(control, str) and control != context.get("control"):
            context["control"] = control
            self.control = ControlFeed(court.store, court.runs, control, None)
        elif control is None and "control" in body:  # it reads other batches from here on
            context.pop("control", None)
            self.control = None
        if context != self.context:
            state = self.watch.state_dict()
            try:
                self.watch = watch_of(court.settings, state, prediction, context)
            except Exception as error:  # a prediction that can't be read: judge by the run's own past
                context.pop("prediction_ord", None)
                context["prediction_error"] = str(error)[:300]
                self.watch = watch_of(court.settings, state, None, context)
            self.context = context
        resume = body.get("resume_step")
        if row.attempt > self.attempt >= 0 and isinstance(resume, int):
            self.watch.restarted(resume, row.attempt + 1)
        if row.attempt > self.attempt:
            self.attempt, self.timed = row.attempt, None  # the time between two attempts is no step's

    def samples(self, attempt: int, ord: int, received: float, rows: list[Row]) -> None:
        """A chunk of samples of one attempt."""
        watch, feed = self.watch, self.control
        durations, gaps, rates = self.durations, self.gaps, self.rates
        if attempt > self.attempt:
            self.attempt, self.timed = attempt, None
        band = self._band(attempt, ord)
        verdict: Verdict | None = None
        observe, add = watch.observe, band.append
        rows = cast(list[Row], watch.order.ready(attempt, rows))
        for seq, step, loss, tokens, at, val_loss, lr, grad_norm, rate, spread in rows:
            sample = Sample(
                step, loss, tokens, at, val_loss, lr, grad_norm, rate, attempt + 1, spread
            )  # the judge counts attempts from 1
            if feed is not None:
                for other in feed.until(step, tokens):
                    watch.observe_control(other)
            verdict = observe(sample)
            if verdict.step == step:
                expected, lower, upper, sigma = (
                    verdict.expected,
                    verdict.lower,
                    verdict.upper,
                    verdict.gap_sigma,
                )
                add(seq)
                add(step)
                add(MISSING if expected is None else expected)
                add(MISSING if lower is None else lower)
                add(MISSING if upper is None else upper)
                add(MISSING if sigma is None else sigma)
                if upper is not None and lower is not None:
                    if loss > upper:
                        self.outside[0] += 1
                    elif loss < lower:
                        self.outside[1] += 1
            if verdict.opened or verdict.closed or verdict.state != self.state:
                self._changes(attempt, ord, received, verdict)
            if rate is not None and 0 < rate < math.inf:
                rates.append(rate)
            if at is not None:
                timed, self.timed = self.timed, (step, at)
                if timed is not None and step > timed[0] and 0 < at - timed[1] < 86400:
                    gaps.append(at - timed[1])
                    durations.append(gaps[-1] / (step - timed[0]))
        del durations[:-DURATIONS], gaps[:-DURATIONS], rates[:-RATES]
        self.pending += len(rows)
        self.dirty = True
        if verdict is not None:
            self.verdict = verdict

    def _settle(self) -> None:
        """Put the newest verdict into `last`."""
        if self.verdict is not None:
            self.last = {**self.last, **_said(self.verdict), "outside": self.outside[:]}
            self.verdict = None

    def _band(self, attempt: int, ord: int) -> "array[float]":
        """Where what is expected of a chunk's samples goes: to the chunk's before it, while that has room."""
        if self.bands:
            of, _, flat = self.bands[-1]
            if of == attempt and len(flat) < BAND_ROWS * len(BAND):
                self.bands[-1] = (of, ord, flat)
                return flat
        flat: array[float] = array("d")
        self.bands.append((attempt, ord, flat))
        return flat

    def _changes(self, attempt: int, ord: int, received: float, verdict: Verdict) -> None:
        for a in verdict.closed:
            self.closed.append((attempt, a.resolved_step, received, a.alert))
        for a in verdict.opened:
            if a.alert == "LossSpike":
                self.last = {**self.last, "spike_time": received}
            if a.severity == "critical":
                self.last = {**self.last, "called": {**self.last.get("called", {}), a.alert: received}}
                self.unheard.append(a.alert)
            value = spell(a.value)
            special = value if isinstance(value, str) else None
            number = None if special else value
            self.opened.append(
                (
                    ord,
                    attempt,
                    a.alert,
                    a.severity,
                    a.step,
                    a.since_step,
                    number,
                    a.expected,
                    special,
                    received,
                )
            )
            if a.resolved_step is not None:
                self.closed.append((attempt, a.resolved_step, received, a.alert))
        body = _said(verdict)
        body["opened"] = [a.alert for a in verdict.opened]
        body["closed"] = [a.alert for a in verdict.closed]
        self.verdicts.append((ord, attempt, verdict.step, received, json.dumps(body, separators=(",", ":"))))
        self.state = verdict.state
        self.urgent = True

    # what it says

    def advise(self) -> None:
        """Put the advice of this moment beside the verdict."""
        advice = None
        with contextlib.suppress(ArithmeticError, ValueError, KeyError, TypeError):
            found = self.watch.advice()
            advice = spell({name: getattr(found, name) for name in found.__dataclass_fields__})
        self._settle()
        self.last = {**self.last, "advice": advice}
        if "prediction_error" in self.context:
            self.last["trouble"] = self.context["prediction_error"]
        if len(self.durations) >= 2:
            self.last["step_s"] = list(_middle_and_most(self.durations))
        if len(self.gaps) >= 2:
            self.last["report_s"] = _middle_and_most(self.gaps)[1]
        if self.rates:
            self.last["tokens_per_s"] = _middle_and_most(self.rates)[0]

    def hold(self, now: float) -> None:
        """What was called is held out to be scraped from when it is made known, not from when its sample came: of a judge that is
        behind, an alert that has passed again would be over before anybody could see it."""
        called = dict(self.last.get("called", {}))
        for alert in self.unheard:
            if alert in called and now - called[alert] < LATE_S:
                called[alert] = max(called[alert], now)
        self.unheard = []
        self.last = {**self.last, "called": called}

    def tell(self) -> dict[str, Any]:
        """The newest verdict with the open alerts."""
        final = (self.watch.prediction or {}).get("final_loss")
        self._settle()
        self.last = {
            **self.last,
            "open": [spell(asdict(a)) for a in self.watch.open_alerts()],
            "predicted_final": final if isinstance(final, dict) else None,
            "predicted": self.watch.line is not None,
        }
        return self.last

    def to_write(self) -> Judged:
        """All that changed since it was last written."""
        self._settle()
        durations, gaps = ([round(d, 5) for d in kept] for kept in (self.durations, self.gaps))
        state = {
            "watch": self.watch.state_dict(), "context": self.context, "attempt": self.attempt, "state": self.state,
            "durations": durations, "gaps": None if gaps == durations else gaps,
            "rates": self.rates.tolist(), "outside": self.outside, "timed": self.timed,
            "control_at": None if self.control is None else self.control.at, "fed": self.fed,
            "event_ord": self.event_ord,
        }  # fmt: skip
        return Judged(
            self.run_id, self.since, self.cursor, _packed(state), json.dumps(self.last, separators=(",", ":")),
            [(attempt, ord, pack(band_columns(flat), BAND)) for attempt, ord, flat in self.bands if flat],
            self.opened, self.closed, self.verdicts,
        )  # fmt: skip

    def written(self, now: float) -> None:
        """What `to_write` gave is on disk."""
        self.bands, self.opened, self.closed, self.verdicts, self.pending = [], [], [], [], 0
        self.dirty = self.urgent = False
        self.written_s, self.since = now, self.cursor


def fresh(court: Court, run_id: int) -> Run:
    """A run of which nothing was judged."""
    return Run(run_id, Watch(court.settings))


def restored(court: Court, run_id: int, cursor: int, blob: bytes, last: dict[str, Any]) -> Run:
    """The run as `to_write` left it. Raises ValueError, KeyError or TypeError for a state that can't be read."""
    kept = (
        json.loads(blob) if blob[:1] == b"{" else msgspec.msgpack.decode(blob)
    )  # as JSON they were written before
    context = kept["context"]
    prediction = court.brought_by(run_id, context.get("prediction_ord"))
    watch = watch_of(court.settings, kept["watch"], prediction, context)
    last = {name: value for name, value in last.items() if name != "trouble"}
    run = Run(run_id, watch, cursor, last, context, kept["attempt"], kept["state"], since=cursor)
    run.fed, run.event_ord = (kept["fed"][0], kept["fed"][1]), kept["event_ord"]
    run.durations = array("d", kept.get("durations", ()))
    gaps = kept.get("gaps", ())  # not there: written before they were kept
    run.gaps = run.durations[:] if gaps is None else array("d", gaps)
    run.rates = array("d", kept.get("rates", ()))
    run.outside = kept.get("outside", [0, 0])
    timed = kept.get("timed")
    run.timed = None if timed is None else (timed[0], timed[1])
    if context.get("control"):
        run.control = ControlFeed(court.store, court.runs, context["control"], kept.get("control_at"))
    return run


def watch_of(
    settings: Settings, state: Any, prediction: dict[str, Any] | None, context: dict[str, Any]
) -> Watch:
    """The judge with this state."""
    given = (context.get("target_loss"), context.get("total_tokens"), context.get("total_steps"))
    watch = cast(Watch, Watch.from_state(settings, state, prediction, *given))
    watch.price_per_hour = context.get("price_per_hour")
    return watch


def band_columns(flat: "array[float]") -> Columns:
    """Columns of BAND from its rows laid end to end."""
    import numpy as np

    whole = len(flat) // len(BAND) * len(BAND)  # a reader may come while a row is being added
    table = np.array(flat[:whole], dtype=np.float64).reshape(-1, len(BAND))
    return Columns(len(table), {name: table[:, i] for i, name in enumerate(BAND)})


def _middle_and_most(values: "array[float]") -> tuple[float, float]:
    """The median and the 99th percentile."""
    found = sorted(values)
    return found[len(found) // 2], found[min(len(found) - 1, int(len(found) * 0.99))]


def _said(v: Verdict) -> dict[str, Any]:
    """A verdict as plain data, without the alerts that changed."""
    out: dict[str, Any] = {
        "step": v.step, "state": v.state, "source": v.source, "observed": v.observed, "expected": v.expected,
        "lower": v.lower, "upper": v.upper, "gap_nats": v.gap_nats, "gap_sigma": v.gap_sigma,
        "since_step": v.since_step, "causes": [{"name": c.name, "evidence": c.evidence} for c in v.causes],
    }  # fmt: skip
    total = v.observed + (v.expected or 0.0) + (v.lower or 0.0) + (v.upper or 0.0) + (v.gap_sigma or 0.0)
    return out if total - total == 0 else spell(out)
