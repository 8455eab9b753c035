"""What holds of a run now, in the words of `losscast_verdict{state}`: what the judge says of its loss, and the clock of its
silence. Times are seconds since the epoch, by the monitor's clock.
"""

from collections.abc import Iterator
from typing import Any

from monitor.prometheus import alerts
from monitor.store.facts import RunFacts

STATE_OF = {
    "LossNonFinite": "non_finite",
    "LossDiverged": "diverged",
    "LossOffLine": "off_line",
    "LossAbovePrediction": "above",
    "LossBelowPrediction": "below",
    "LossJumpAfterResume": "jump_after_resume",
    "LossPlateau": "plateau",
    "ValidationApart": "validation_apart",
    "RankApart": "rank_apart",
    "GradNormHigh": "grad_norm_high",
}
CALM = frozenset({"healthy", "warming_up", "spike"})


def states_of(
    facts: RunFacts, last: dict[str, Any], now: float, *, started: float, stalled_after_s: float
) -> tuple[str, ...]:
    """All that holds of a run, the judge's word first.

    last             the judge's newest verdict, {} without any
    started          when the monitor began to listen: before that it can't say that a run was silent
    stalled_after_s  no run is called stalled or silent before it has made no step for so long
    """
    state = last.get("state") or "warming_up"
    if _all_quiet(facts, last, now, min(stalled_after_s, alerts.STALE_UNKNOWN_S)):
        return (state,)
    out = [state]
    for alert in last.get("open", ()):
        state = STATE_OF.get(alert["alert"])
        if state:
            out.append(state)
        if alert["alert"] == "LossAbovePrediction" and alert["severity"] == "critical":
            out.append("will_miss")
    called = last.get("called")
    if called:
        out += [
            STATE_OF[name] for name, at in called.items() if now - at < alerts.HOLD_S and name in STATE_OF
        ]
    for state, at in (
        ("spike", last.get("spike_time")),
        ("checkpoint_bad", facts.checkpoint_failed_received),
        ("lease_lost", facts.lease_lost_received),
    ):
        if at is not None and now - at < alerts.RECENT_S:
            out.append(state)
    if facts.ended_received is None:
        out.extend(_clocked(facts, last, now, started, stalled_after_s))
    return tuple(out) if len(out) == 1 else tuple(dict.fromkeys(out))


def _all_quiet(facts: RunFacts, last: dict[str, Any], now: float, soonest_s: float) -> bool:
    """True where nothing holds but the judge's word, as of nearly all runs at nearly all times: told at a glance, since a scrape
    asks it of ten thousand."""
    return not (
        last.get("open")
        or "called" in last
        or "spike_time" in last
        or facts.last_step_received is None
        or now - facts.last_step_received > soonest_s
        or facts.checkpoint_received is not None
        or facts.checkpoint_failed_received is not None
        or facts.lease_lost_received is not None
        or facts.restarts_since_step
        or not -alerts.SKEW_S <= facts.skew_s <= alerts.SKEW_S
    )


def _clocked(
    facts: RunFacts, last: dict[str, Any], now: float, started: float, stalled_after_s: float
) -> Iterator[str]:
    """What the clock alone says of a run that should be training."""
    if facts.restarts_since_step >= alerts.RESTART_LIMIT:
        yield "restart_loop"
    if abs(facts.skew_s) > alerts.SKEW_S:
        yield "clock_skew"
    if facts.last_step_received is None:
        return
    # a step every second says nothing of a run that tells every 500th; what was written before reports were timed has it alone
    took = last.get("report_s", last.get("step_s", (0.0, None))[1])
    stale = alerts.STALE_UNKNOWN_S if took is None else max(stalled_after_s, alerts.STALE_FACTOR * took)
    attempt, restart = facts.attempt_received or 0.0, facts.restart_received or 0.0
    started = max(started, attempt, restart)  # before that the run was paused, or starting again
    stands_s, quiet_s = (now - max(at, started) for at in (facts.last_step_received, facts.last_received))
    # an attempt that has made no step yet loads, or compiles, and nobody knows for how long; before it is heard of at all
    # nobody sends its heartbeats
    unknown = max(stale, alerts.STALE_UNKNOWN_S)
    loads = facts.last_step_received < max(attempt, restart)
    begins = restart > max(facts.last_step_received, attempt)
    if stands_s > stale and quiet_s > (unknown if begins else stale):
        yield "silent"
    elif stands_s > (unknown if loads else stale):
        yield "stalled"
    if facts.checkpoint_received is not None and facts.checkpoint_interval_s is not None:
        due = max(alerts.CHECKPOINT_LEAST_S, alerts.CHECKPOINT_FACTOR * facts.checkpoint_interval_s)
        if now - max(facts.checkpoint_received, started) > due:
            yield "checkpoint_overdue"


def shown_state(states: tuple[str, ...]) -> str:
    """The one word for a list: the judge's, but where it sees nothing wrong that the run stands still."""
    if states[0] in CALM and not {"stalled", "silent"}.isdisjoint(states):
        return "stalled"
    return states[0]
