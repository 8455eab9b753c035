"""The events of wire v1 as JSON Schemas, for the OpenAPI document. What each means is said in `monitor.schema`."""

from typing import Any

from monitor.schema import CAUSES, MAX_COUNT, RUN_ID, SPELLED

Json = dict[str, Any]

COUNT: Json = {"type": "integer", "minimum": 0, "exclusiveMaximum": MAX_COUNT}
NUMBER: Json = {"anyOf": [{"type": "number"}, {"enum": sorted(SPELLED)}]}
TEXT: Json = {"type": "string"}
NAMED: Json = {
    "run": {"type": "string", "pattern": f"^{RUN_ID.pattern}$"},
    "attempt": {**COUNT, "description": "Counted from 1; a restart is a new one, and older ones are refused from then on."},
    "time": {"type": "number", "description": "Seconds since 1970; without it, when it came."},
}  # fmt: skip

EXAMPLE = (
    '{"event":"run_started","run":"mine","attempt":1,"time":1767225600,"total_tokens":1e9}\n'
    '{"event":"sample","run":"mine","attempt":1,"seq":0,"step":1,"loss":5.44,"tokens":4096,"time":1767225601}\n'
    '{"event":"sample","run":"mine","attempt":1,"seq":1,"step":2,"loss":5.21,"tokens":8192,"time":1767225602}\n'
    '{"event":"run_ended","run":"mine","attempt":1,"reason":"finished","time":1767225603}\n'
)


def _event(name: str, words: str, *required: str, **fields: Json) -> Json:
    return {
        "type": "object", "description": words, "properties": {"event": {"const": name}, **NAMED, **fields},
        "required": ["event", "run", "attempt", *required],
    }  # fmt: skip


def _numbers(*names: str) -> dict[str, Json]:
    return {name: {"anyOf": [*NUMBER["anyOf"], {"type": "null"}]} for name in names}


EVENTS: dict[str, Json] = {
    "run_started": _event(
        "run_started", "A run, or a new attempt of it, begins: before its samples.",
        resume_step={**COUNT, "description": "The last step it keeps."},
        prediction={"type": ["object", "null"], "description": "prediction.json as `losscast predict -o` writes it."},
        team=TEXT, spec_digest=TEXT, control={"type": ["string", "null"]},
        **_numbers("target_loss", "total_tokens", "price_per_hour"),
    ),
    "sample": _event(
        "sample", "One optimizer step. Fields beyond these are kept.", "seq", "step", "loss",
        seq={**COUNT, "description": "Counts this attempt's samples; what is sent again under one seq counts once."},
        step=COUNT, loss={**NUMBER, "description": "Nats per token."},
        **_numbers("tokens", "val_loss", "lr", "grad_norm", "tokens_per_s", "mfu", "spread"),
    ),
    "checkpoint": _event("checkpoint", "A checkpoint was committed.", step=COUNT, ok={"type": "boolean"}, stage=TEXT,
                         **_numbers("seconds", "bytes")),
    "restart": _event("restart", "The attempt takes over from one that failed.",
                      cause={"type": "string", "examples": sorted(CAUSES)}, step=COUNT),
    "heartbeat": _event("heartbeat", "The run lives and has no new step."),
    "announce": _event("announce", "A planned change of learning rate or data from a step on: no anomaly.",
                       step=COUNT, what=TEXT),
    "goodput": _event("goodput", "What became of the run's time, counted from its beginning.", step=COUNT,
                      **_numbers("gpu_seconds_useful", "gpu_seconds_lost", "gpu_seconds_idle")),
    "run_ended": _event("run_ended", "It is over.", reason={"type": "string", "examples": ["finished", "stopped", "failed"]}),
}  # fmt: skip


def body() -> Json:
    """The request body of POST /v1/events."""
    words = (
        "Events, one JSON object a line (`#/components/schemas/Event`), plain or with Content-Encoding: gzip."
    )
    return {"application/x-ndjson": {"schema": {"type": "string", "description": words}, "example": EXAMPLE}}


def schemas() -> Json:
    """Components: each event by its name, and `Event`, which is any of them."""
    refs = [{"$ref": f"#/components/schemas/{name}"} for name in EVENTS]
    return {**EVENTS, "Event": {"oneOf": refs, "discriminator": {"propertyName": "event"}}}
