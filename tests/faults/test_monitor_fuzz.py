"""Everything that can be sent, sent: no 500, nothing that takes a second, every answer as the OpenAPI document says.

Random requests are made from the document itself (schemathesis) and, where it says nothing, from bytes: events, ids, query
strings, cookies. Of each kind 60 in CI, about 2,500 in all; 600 with LOSSCAST_FAULTS=long, about 25,000 in all; N with
LOSSCAST_EACH=N. `test_monitor_mutants` looks less deep with many more.
"""

import gzip
import json
import os
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from monitor import schema as wire
from monitor.service.guard import Guard
from tests.monitor.test_service import Open, curve, lines

schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis (the dev extra)")
conformance = pytest.importorskip("schemathesis.specs.openapi.checks")
CHECKS = [
    schemathesis.checks.not_a_server_error, conformance.status_code_conformance, conformance.content_type_conformance,
    conformance.response_schema_conformance,
]  # fmt: skip


@schemathesis.serializer("application/x-ndjson")
def ndjson(context: Any, value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")


LONG = os.environ.get("LOSSCAST_FAULTS") == "long"
MOST_S = 1.0
"""Of this process's own time, whatever else the machine does."""
EACH = int(os.environ.get("LOSSCAST_EACH") or (600 if LONG else 60))
quiet = [
    HealthCheck.too_slow,
    HealthCheck.function_scoped_fixture,
    HealthCheck.filter_too_much,
    HealthCheck.data_too_large,
]

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    made = Open(tmp_path_factory.mktemp("fuzz") / "store")
    made.send(*lines("a", curve(60)), wire.encode_event(wire.run_started("a", 2, time=1.0, resume_step=30)))
    made.send(*lines("b", [*curve(40), float("nan")]))
    made.judged()
    made.client.headers["Authorization"] = (
        f"Bearer {made.monitor.tokens.create(('ingest', 'read', 'operate'), max_runs=None)}"
    )
    yield made
    made.close()


@pytest.fixture
def document(opened: Open) -> Any:
    return schemathesis.openapi.from_asgi("/v1/openapi.json", opened.app, headers=bearer(opened))


def bearer(opened: Open) -> dict[str, str]:
    return {"Authorization": str(opened.client.headers["Authorization"])}


def test_the_document_has_every_route_and_no_other(opened: Open) -> None:
    guard = opened.app
    assert isinstance(guard, Guard)
    there: dict[str, set[str]] = {}
    for route in guard.app.routes:  # type: ignore[attr-defined]
        if route.path.startswith("/v1/") and route.path != "/v1/stream":
            there.setdefault(route.path, set()).update(m.lower() for m in route.methods - {"HEAD"})
    paths = opened.client.get("/v1/openapi.json").json()["paths"]
    assert {path: set(methods) for path, methods in paths.items()} == there
    assert opened.nobody.get("/v1/openapi.json").status_code == 401


def test_every_answer_is_as_the_document_says(opened: Open, document: Any) -> None:
    tried = 0
    for found in document.get_all_operations():
        operation = found.ok()
        if operation.path == "/v1/stream":
            continue

        @settings(max_examples=EACH, deadline=None, suppress_health_check=quiet, database=None)
        @given(case=operation.as_strategy())
        def hold(case: Any) -> None:
            nonlocal tried
            began = time.process_time()
            answer = case.call(headers=bearer(opened))
            took = time.process_time() - began
            case.validate_response(answer, checks=CHECKS, headers=bearer(opened))
            assert took < MOST_S, f"{took:.2f} s for {case.as_curl_command()}"
            tried += 1

        hold()
    assert tried > 8 * EACH


# what no document describes

anything = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20) | st.sampled_from(["NaN", "-Infinity", "a"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4), max_leaves=12,
)  # fmt: skip
names = st.sampled_from([*sorted(wire.EVENTS), "x"])
FIELDS = ("run", "attempt", "seq", "step", "loss", "time", "tokens", "lr", "resume_step", "prediction", "target_loss", "cause",
          "team", "control", "what", "reason", "ok", "total_tokens", "price_per_hour", "val_loss")  # fmt: skip
plausible: dict[str, st.SearchStrategy[Any]] = {
    "run": st.sampled_from(["a", "b", "c", "A", "..", "", "x" * 64]), "attempt": st.integers(-1, 4), "seq": st.integers(-1, 99),
    "step": st.integers(-1, 99) | st.just(2**53), "loss": st.floats() | st.sampled_from(["NaN", "Infinity", "1"]),
}  # fmt: skip


@st.composite
def event(draw: st.DrawFn) -> bytes:
    """A line that is nearly an event."""
    body: dict[str, Any] = {"event": draw(names)}
    for name in FIELDS:
        if name in ("run", "attempt") or draw(st.integers(0, 3)) > 1:
            body[name] = draw(plausible.get(name, anything) if draw(st.integers(0, 9)) else anything)
    line = json.dumps(body).encode()
    if draw(st.integers(0, 9)) == 0:
        at = draw(st.integers(0, len(line)))
        line = line[:at] + draw(st.binary(max_size=6)) + line[at:]
    return line


@settings(max_examples=8 * EACH, deadline=None, suppress_health_check=quiet)
@given(body=st.lists(event(), max_size=6).map(b"\n".join) | st.binary(max_size=300), zipped=st.booleans())
@example(body=b"[" * 100_000, zipped=False)
@example(
    body=b'{"event":"sample","run":"a","attempt":9,"seq":0,"step":1,"loss":1' + b"0" * 5000 + b"}",
    zipped=True,
)
@example(body=b'{"event":"heartbeat","run":"a","attempt":9,"x":"\\ud800"}', zipped=False)
def test_no_event_breaks_it(opened: Open, body: bytes, zipped: bool) -> None:
    headers = {"Content-Encoding": "gzip"} if zipped else {}
    _calm(opened, "POST", "/v1/events", content=gzip.compress(body) if zipped else body, headers=headers)


@settings(max_examples=10 * EACH, deadline=None, suppress_health_check=quiet)
@given(
    path=st.sampled_from(["/v1/runs", "/v1/runs/a/samples", "/v1/stream/x", "/static", "/runbooks", "/metrics", "/session", ""]),
    tail=st.text(max_size=12), query=st.text(max_size=30), method=st.sampled_from(["GET", "POST", "DELETE", "PUT", "OPTIONS"]),
)  # fmt: skip
def test_no_address_breaks_it(opened: Open, path: str, tail: str, query: str, method: str) -> None:
    said = urllib.parse.quote(tail, safe="/.%", errors="replace")
    _calm(opened, method, f"{path}/{said}", params={"from": query, query[:5]: tail})


@settings(max_examples=10 * EACH, deadline=None, suppress_health_check=quiet)
@given(
    cookie=st.binary(max_size=80),
    header=st.binary(max_size=60),
    site=st.sampled_from(["", "cross-site", "same-origin"]),
)
def test_no_cookie_and_no_header_lets_anybody_in(
    opened: Open, cookie: bytes, header: bytes, site: str
) -> None:
    for name, value in (
        (b"cookie", b"losscast=" + cookie),
        (b"authorization", b"Bearer " + header),
        (b"authorization", header),
    ):
        value = bytes(c for c in value if c not in b"\r\n\0")
        headers = [(name, value), (b"sec-fetch-site", site.encode())]
        answer = opened.nobody.get("/v1/runs", headers=headers)
        assert answer.status_code == 401, (name, value)


def _calm(opened: Open, method: str, path: str, **how: Any) -> None:
    began = time.process_time()
    answer = opened.client.request(method, path, **how)
    took = time.process_time() - began
    assert answer.status_code < 500, (method, path, how, answer.text[:300])
    assert took < MOST_S, (took, method, path, how)
