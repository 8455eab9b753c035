"""The API as an OpenAPI 3.1 document: what may be asked, by whom, and what comes back. Served at `/v1/openapi.json`.

Written by hand beside the routes and held against them by a test, with every answer checked against it under random requests.
"""

from typing import Any

from monitor.service import events
from monitor.service.attention import MOST_S, RUN_ALERTS

Json = dict[str, Any]

RUN: Json = {
    "name": "run", "in": "path", "required": True,
    "schema": {"type": "string", "pattern": "^[a-z0-9][a-z0-9-]{0,62}$"},
}  # fmt: skip
ERROR: Json = {
    "description": "What is wrong, and what to do instead",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
}
WORDS = {
    400: "not NDJSON", 401: "no token, or an unknown one", 403: "the token lacks the scope", 404: "no such run",
    409: "an older attempt", 413: "too large", 422: "something in it can't be used", 429: "too much waits, or too many runs",
    503: "nothing was stored, or what is stored is damaged", 507: "the disk is full; nothing was stored",
}  # fmt: skip


def _number(name: str, words: str) -> Json:
    return {"name": name, "in": "query", "description": words, "schema": {"type": "number"}}


def _answer(schema: Json, words: str = "The answer") -> Json:
    return {"description": words, "content": {"application/json": {"schema": schema}}}


def _get(words: str, schema: Json, *parameters: Json, also: tuple[int, ...] = (401, 403, 404, 503)) -> Json:
    return {"get": _operation(words, "read", schema, list(parameters), None, also)}


def _operation(
    words: str,
    scope: str,
    schema: Json | None,
    parameters: list[Json],
    body: Json | None,
    also: tuple[int, ...],
) -> Json:
    good: Json = {"204": {"description": "Done"}} if schema is None else {"200": _answer(schema)}
    out: Json = {
        "summary": words, "security": [{"bearer": [scope]}, {"session": [scope]}], "parameters": parameters,
        "responses": {**good, **{str(code): {**ERROR, "description": WORDS[code]} for code in also}},
    }  # fmt: skip
    if body is not None:
        out["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    return out


def _object(**properties: Json) -> Json:
    return {"type": "object", "properties": properties, "required": list(properties)}


LIST: Json = {"type": "array", "items": {"type": "object"}}
SECONDS: Json = {"type": "number", "exclusiveMinimum": 0, "maximum": MOST_S}
MUTE_BODY: Json = {
    "type": "object", "required": ["for_s"], "additionalProperties": False,
    "properties": {
        "for_s": SECONDS, "why": {"type": "string", "maxLength": 300},
        "alerts": {"type": "array", "items": {"enum": sorted(RUN_ALERTS)}, "description": "Without them, all of the run's."},
    },
}  # fmt: skip
SEEN_BODY: Json = {
    "type": "object", "additionalProperties": False,
    "properties": {"for_s": {**SECONDS, "description": "Snooze it for so long; without it, it is acknowledged for good."}},
}  # fmt: skip


def document(version: str) -> Json:
    """The whole of it."""
    text: Json = {"type": "string"}
    mute = _object(
        until={"type": "number"},
        alerts={"type": "array", "items": text},
        by=text,
        why=text,
        at={"type": "number"},
    )
    nothing = (401, 403, 404)
    paths: Json = {
        "/v1/events": {
            "post": {
                "summary": "Send events of runs, one JSON object a line; 200 means on disk",
                "security": [{"bearer": ["ingest"]}],
                "requestBody": {"required": True, "content": events.body()},
                "responses": {
                    "200": _answer(_object(accepted={"type": "integer"}, duplicates={"type": "integer"}, unknown={"type": "integer"})),
                    **{str(code): {**ERROR, "description": WORDS[code]} for code in (400, 401, 403, 409, 413, 422, 429, 503, 507)},
                },
            }
        },
        "/v1/runs": _get("Every run, in short", _object(runs=LIST), also=(401, 403)),
        "/v1/runs/{run}": _get("One run: its prediction, attempts, events and alerts", {"type": "object"}, RUN),
        "/v1/runs/{run}/samples": _get(
            "Its samples, the newest attempt's word for every step",
            _object(run=text, thinned={"type": "boolean"}, total={"type": "integer"}, samples=LIST), RUN,
            _number("from", "First step"), _number("to", "Last step"),
            _number("max", "About so many, thinned without hiding a spike; 0 for all"),
            _number("attempt", "All that this attempt sent"), also=(401, 403, 404, 422, 503),
        ),
        "/v1/runs/{run}/verdicts": _get("Changes of its state, and its alerts", _object(run=text, verdicts=LIST, alerts=LIST), RUN),
        "/v1/runs/{run}/advice": {
            **_get("What is advised now", _object(run=text, advice={"type": ["object", "null"]}), RUN),
            "post": _operation("Acknowledge the advice, or snooze it", "operate", _object(run=text, advice={"type": "object"}),
                               [RUN], SEEN_BODY, (*nothing, 409, 422, 503)),
            "delete": _operation("Take the acknowledgement back", "operate", None, [RUN], None, (*nothing, 503)),
        },
        "/v1/runs/{run}/mute": {
            "post": _operation("Mute the run's alerts for a while", "operate", mute, [RUN], MUTE_BODY, (*nothing, 422, 503)),
            "delete": _operation("Let them sound again", "operate", None, [RUN], None, (*nothing, 503)),
        },
        "/v1/laws": _get("The scaling laws put beside the store, as data to draw", _object(laws=LIST), also=(401, 403)),
        "/v1/openapi.json": _get("This document", {"type": "object"}, also=(401, 403)),
    }  # fmt: skip
    return {
        "openapi": "3.1.0",
        "info": {"title": "losscast monitor", "version": version, "license": {"name": "Apache-2.0"}},
        "paths": paths,
        "components": {
            "schemas": {
                "Error": {"type": "object", "properties": {"error": text}, "required": ["error"]},
                **events.schemas(),
            },
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "losscast monitor token create",
                },
                "session": {
                    "type": "apiKey",
                    "in": "cookie",
                    "name": "losscast",
                    "description": "Made by POST /session",
                },
            },
        },
    }
