"""What is known of a run, brought up to date with what arrived. Times in seconds since the epoch, losses in nats per token.

What a sender typed is cut to a length, and where it becomes a label of a metric it is one word of a fixed list.
"""

import math
from itertools import islice
from operator import attrgetter, lt
from typing import Any

from monitor.schema import CAUSES, MAX_COUNT, unspell
from monitor.store.facts import AttemptFacts, RunFacts
from monitor.store.tables import EventRow
from monitor.wire import Event, SampleLine

_step, _loss = attrgetter("step"), attrgetter("loss")


def note_attempt(facts: RunFacts, number: int, now: float) -> AttemptFacts:
    """The attempt that something arrived of at `now`. With a new one the run goes on, though it had ended."""
    attempt = facts.attempt_facts(number)
    if attempt is None:
        attempt = AttemptFacts(number)
        facts.attempts = [*facts.attempts[-999:], attempt]
        facts.ended_time = facts.ended_received = facts.end_reason = None
        facts.attempt_received = now
        if len(facts.attempts) > 1:
            facts.restarts_since_step += 1
    return attempt


def note_samples(facts: RunFacts, attempt: AttemptFacts, lines: list[SampleLine], now: float) -> None:
    """Bring what is known of a run up to date with samples that arrived at `now`."""
    if attempt.resume_step is None:
        attempt.resume_step = max(lines[0].step - 1, 0)
    facts.samples += len(lines)
    facts.last_step_received = now
    if not math.isfinite(sum(map(_loss, lines))):
        for line in lines:
            if math.isnan(line.loss):
                facts.nan_samples += 1
            elif math.isinf(line.loss):
                facts.inf_samples += 1
    last = lines[-1]
    if len(lines) > 1 and not all(map(lt, map(_step, lines), map(_step, islice(lines, 1, None)))):
        last = max(lines, key=_step)
    furthest = facts.furthest_step
    if furthest is None:
        furthest = max((a.last_step for a in facts.attempts if a.last_step is not None), default=None)
    if furthest is None or last.step > furthest:
        furthest, facts.restarts_since_step = last.step, 0
    facts.furthest_step = furthest
    if attempt.last_step is None or last.step > attempt.last_step:
        attempt.last_step = last.step
    if facts.step is None or last.step > facts.step or attempt.samples == len(lines):
        facts.step = last.step
        facts.last_loss = last.loss
        finite = (
            last
            if math.isfinite(last.loss)
            else next((s for s in reversed(lines) if math.isfinite(s.loss)), None)
        )
        if finite is not None:
            facts.loss = finite.loss
        if last.tokens is not None:
            facts.tokens = last.tokens
        if last.tokens_per_s is not None:
            facts.tokens_per_s = last.tokens_per_s
        if last.mfu is not None:
            facts.mfu = last.mfu
    if last.time is not None and math.isfinite(last.time):
        facts.last_time = last.time
        facts.skew_s = last.time - now
    if facts.started_time is None:
        first = lines[0].time
        facts.started_time = first if first is not None and math.isfinite(first) else now
    if attempt.started_time is None:
        attempt.started_time = facts.last_time


def note_event(facts: RunFacts, attempt: AttemptFacts, part: Event, row: EventRow) -> None:
    """Bring what is known of a run up to date with an event."""
    body = part.body
    at = unspell(body.get("time"))
    if at is not None:
        facts.last_time = at
    if part.kind in ("goodput", "restart"):
        _note_goodput(facts, body)
    if part.kind == "run_started":
        if body.get("resume_step") is not None:
            attempt.resume_step = body["resume_step"]
        attempt.started_time = at if at is not None else row.received
        if facts.started_time is None:
            facts.started_time = attempt.started_time
        if isinstance(body.get("team"), str):
            facts.team = body["team"][:64]
        for name in ("target_loss", "total_tokens", "price_per_hour"):
            if body.get(name) is not None:
                setattr(facts, name, unspell(body[name]))
        # a pacer is a control: what becomes of it is shown, and pages nobody either
        facts.imported = body.get("imported") is True or isinstance(body.get("paces"), str)
        if isinstance(body.get("control"), str):
            facts.control = body["control"][:63]
        if body.get("prediction") is not None:
            facts.prediction_ord = row.ord
            if facts.total_tokens is None and isinstance(body["prediction"].get("tokens"), (int, float)):
                facts.total_tokens = float(body["prediction"]["tokens"])
    elif part.kind == "run_ended":
        facts.ended_time = at if at is not None else row.received
        facts.ended_received = row.received
        facts.end_reason = str(body.get("reason", ""))[:64]
    elif part.kind == "restart":
        said = body.get("cause")
        cause = said if isinstance(said, str) and said in CAUSES else "other"  # it becomes a label
        if cause == "lease_lost":
            facts.leases_lost += 1
            facts.lease_lost_received = row.received
        else:
            facts.restart_received = row.received
        facts.restarts = {**facts.restarts, cause: facts.restarts.get(cause, 0) + 1}
    elif part.kind == "checkpoint":
        if body.get("ok") is False:
            facts.checkpoint_failures += 1
            facts.checkpoint_failed_received = row.received
        else:
            if facts.checkpoint_received is not None:
                # a pause is no interval
                since = max(facts.checkpoint_received, facts.attempt_received or 0.0)
                facts.checkpoint_interval_s = max(
                    row.received - since, (facts.checkpoint_interval_s or 0.0) * 0.9
                )
            facts.checkpoint_received = row.received
            if body.get("step") is not None:
                facts.checkpoint_step = body["step"]


def _note_goodput(facts: RunFacts, body: dict[str, Any]) -> None:
    """The books of the run's time; taken as a whole or not at all."""
    seconds = {name: _amount(body.get(f"gpu_seconds_{name}")) for name in ("useful", "lost", "idle")}
    if None in seconds.values():
        return
    facts.gpu_seconds = {name: value for name, value in seconds.items() if value is not None}
    dollars = {name: _amount(body.get(f"dollars_{name}")) for name in seconds}
    facts.gpu_dollars = {name: value for name, value in dollars.items() if value is not None}
    steps = body.get("steps_lost")
    facts.steps_lost = steps if type(steps) is int and 0 <= steps < MAX_COUNT else None


def _amount(value: object) -> float | None:
    """A finite number that is not negative, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e18:
        return None
    return float(value)
