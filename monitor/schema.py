"""Wire v1: the events a run sends to `POST /v1/events`, one JSON object a line.

Standard library only: the reporter inside a training process imports this and nothing else of the monitor.
Key of a sample is (run, attempt, seq). A non-finite number travels as the string "NaN", "Infinity" or
"-Infinity", since JSON has none. Unknown fields are kept and unknown events passed over, so that v1 can grow.
"""

import json
import math
import re
from typing import Any

RUN_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
"""Match with `fullmatch`. The only form of a run's name that is accepted, stored or put in a URL."""

VERSION = 1

MAX_BODY_BYTES = 8 << 20
"""Largest request body the service takes, compressed or not; a bigger one is refused with 413."""
MAX_TEXT_BYTES = 32 << 20
"""Largest body after decompression."""
MAX_COUNT = 2**53
"""Steps, sequence numbers, attempts and tokens stay below this, so that they are exact as floats."""

EVENTS = frozenset(
    {"run_started", "sample", "checkpoint", "restart", "heartbeat", "announce", "goodput", "run_ended"}
)

CAUSES = frozenset(
    {"killed", "raised", "hung", "host_lost", "preempted", "resized", "rollback", "lease_lost"}
)
"""Causes of a restart that are counted by name; any other is counted as `other`, and told on the page as it was said."""

SPELLED = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def is_run_id(name: object) -> bool:
    """True for a name that may stand in a URL, a label and a folder."""
    return isinstance(name, str) and RUN_ID.fullmatch(name) is not None


def spell(value: Any) -> Any:
    """The value with every non-finite float, at any depth, as its JSON spelling."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, dict):
        return {k: spell(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [spell(v) for v in value]
    return value


def unspell(value: Any) -> float | None:
    """The number behind a JSON number or one of its three spellings; None for None. Raises ValueError otherwise."""
    if value is None:
        return None
    if isinstance(value, str):
        if value in SPELLED:
            return SPELLED[value]
        raise ValueError(f"{value!r} is no number; a non-finite one is spelled NaN, Infinity or -Infinity")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"need a number; got {type(value).__name__}")
    return float(value)


def encode_event(event: dict[str, Any]) -> bytes:
    """One line of NDJSON, newline included."""
    try:
        return json.dumps(event, separators=(",", ":"), allow_nan=False).encode() + b"\n"
    except ValueError:
        return json.dumps(spell(event), separators=(",", ":"), allow_nan=False).encode() + b"\n"


def run_started(
    run: str,
    attempt: int,
    *,
    time: float,
    resume_step: int = 0,
    prediction: dict[str, Any] | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """A run, or a new attempt of it, begins. `resume_step` is the last step it keeps; it trains `resume_step + 1` next.

    fields  spec_digest, team, target_loss (nats per token), total_tokens (count), price_per_hour (money the whole
            run costs an hour), control (the run on the same data order it is compared with), and whatever else
    """
    return {
        "event": "run_started", "run": run, "attempt": attempt, "resume_step": resume_step, "time": time,
        "prediction": prediction, **fields,
    }  # fmt: skip


def sample(
    run: str, attempt: int, seq: int, *, step: int, loss: float, time: float, **fields: Any
) -> dict[str, Any]:
    """One optimizer step. `seq` counts this attempt's samples from 0 and makes a repeated send harmless.

    fields  tokens (count so far), val_loss, lr, grad_norm, tokens_per_s, mfu (0 to 1), spread (largest difference of
            one rank's loss from the mean, nats per token), and whatever else
    """
    return {
        "event": "sample", "run": run, "attempt": attempt, "seq": seq, "step": step, "time": time, "loss": loss,
        **fields,
    }  # fmt: skip


def event(name: str, run: str, attempt: int, *, time: float, **fields: Any) -> dict[str, Any]:
    """Any other event of a run.

    checkpoint  step, and optionally seconds, bytes, stage, ok (false: it did not verify)
    restart     cause, and optionally step
    goodput     what became of the run's time so far: gpu_seconds_useful, gpu_seconds_lost, gpu_seconds_idle (all three, each
                counted from the run's beginning), and optionally step, steps_lost, dollars_useful, dollars_lost,
                dollars_idle; a restart may carry the same
    heartbeat   nothing more: the run lives and has no new step
    announce    step, what: a planned change of learning rate or data from that step on
    run_ended   reason (finished, stopped, failed, ...)
    """
    return {"event": name, "run": run, "attempt": attempt, "time": time, **fields}
