"""Wire v1, as it was first written down and must be read for ever."""

import contextlib
import gzip
import json
import math
import random
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitor import schema
from monitor.service import events
from monitor.wire import BadLine, Event, SampleLine, Samples, TooLarge, inflate, parse

GOLDEN = Path(__file__).parent / "golden"
PLAIN = {"event": "sample", "run": "a", "attempt": 1, "seq": 0, "step": 1, "loss": 2.5}


def line(**changes: object) -> bytes:
    return json.dumps({k: v for k, v in {**PLAIN, **changes}.items() if v != "absent"}).encode() + b"\n"


def test_the_golden_v1_file_is_read_as_on_the_first_day() -> None:
    found = parse((GOLDEN / "v1-run.ndjson").read_bytes())
    kinds = [p.kind if isinstance(p, Event) else f"{len(p.lines)} samples" for p in found.parts]
    assert kinds == [
        "run_started", "3 samples", "announce", "checkpoint", "heartbeat", "restart", "run_started", "1 samples",
        "run_ended",
    ]  # fmt: skip
    samples = [s for p in found.parts if isinstance(p, Samples) for s in p.lines]
    assert [s.loss for s in samples if s.loss == s.loss] == [10.9, 10.5, -math.inf]
    assert math.isnan(samples[1].loss) and samples[1].grad_norm == math.inf
    assert (samples[2].val_loss, samples[2].mfu, samples[2].spread, samples[2].tokens) == (
        10.6,
        0.41,
        0.002,
        1572864,
    )
    assert found.samples == 4 and found.unknown == 0


def test_the_api_document_describes_every_event_as_it_is_taken() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    assert set(events.EVENTS) == schema.EVENTS
    assert set(events.EVENTS["sample"]["properties"]) == {"event", *SampleLine.__struct_fields__}
    sent = (GOLDEN / "v1-run.ndjson").read_bytes() + events.EXAMPLE.encode()
    sent += schema.encode_event(schema.event("goodput", "a", 1, time=1.0, gpu_seconds_useful=2.0))
    for text in sent.splitlines():
        event = json.loads(text)
        if event["event"] in events.EVENTS:
            jsonschema.validate(event, events.EVENTS[event["event"]])
    assert parse(events.EXAMPLE.encode()).samples == 2
    for bad in ({"attempt": -1}, {"run": "A b"}, {"loss": "high"}, {"loss": None}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**PLAIN, **bad}, events.EVENTS["sample"])
        with pytest.raises(BadLine):
            parse(line(**bad))


def test_unknown_fields_are_kept_and_unknown_events_counted() -> None:
    found = parse((GOLDEN / "v1-future.ndjson").read_bytes())
    assert found.unknown == 1
    samples = found.parts[0]
    assert isinstance(samples, Samples)
    assert samples.extra == {0: {"new_field": {"deep": [1, 2]}, "other": "x"}}
    assert isinstance(found.parts[1], Event) and found.parts[1].body["somewhere"] == "else"


def test_a_bare_nan_of_python_is_taken_as_one() -> None:
    found = parse((GOLDEN / "v1-future.ndjson").read_bytes())
    assert isinstance(found.parts[0], Samples) and math.isnan(found.parts[0].lines[1].loss)


def test_what_the_constructors_write_is_read_back() -> None:
    events = [
        schema.run_started("r", 1, time=1.0, prediction={"final_loss": {"p50": math.nan}}),
        schema.sample("r", 1, 0, step=1, loss=math.nan, time=2.0, lr=1e-3, mine=3),
        schema.event("checkpoint", "r", 1, time=3.0, step=1),
    ]
    found = parse(b"".join(map(schema.encode_event, events)))
    assert [type(p).__name__ for p in found.parts] == ["Event", "Samples", "Event"]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"{", "json"),
        (b"[1]\n", "json"),
        (b"\xff\n", "json"),
        (b"[" * 100_000, "json"),
        (b'{"event":"checkpoint","run":"a","attempt":1,"x":"\\ud800"}\n', "json"),
        (b'{"run":"a"}\n', "invalid"),
        (b'{"event":' + b"[" * 2000 + b'"sample"\n', "json"),
        (b'{"event":"sample","loss":' + b"[" * 2000 + b"]" * 2000 + b"}\n", "json"),
        (line(run="../etc"), "run_id"),
        (line(run="A"), "run_id"),
        (line(run="a\n"), "run_id"),
        (line(run="a" * 64), "run_id"),
        (line(run=None), "run_id"),
        (line(run=7), "run_id"),
        (line(attempt=-1), "invalid"),
        (line(attempt=1.5), "invalid"),
        (line(attempt=True), "invalid"),
        (line(seq=2**53), "invalid"),
        (line(step="1"), "invalid"),
        (line(loss="nan"), "invalid"),
        (line(loss="absent"), "invalid"),
        (line(loss=None), "invalid"),
        (line(loss=10**400), "invalid"),
        (line(time=[1]), "invalid"),
        (line(huge="x" * 5000), "too_large"),
        (b'{"event":"run_started","run":"a","attempt":1,"prediction":[]}\n', "invalid"),
        (b'{"event":"heartbeat","run":"a","attempt":1,"time":"NaN"}\n', "invalid"),
        (
            b'{"event":"run_started","run":"a","attempt":1,"prediction":{"tokens":1%s}}' % (b"0" * 400),
            "invalid",
        ),
        (
            b'{"event":"run_started","run":"a","attempt":1,"prediction":{"x":[{"y":-1%s}]}}' % (b"0" * 400),
            "invalid",
        ),
    ],
)
def test_a_bad_line_is_refused_with_its_number(bad: bytes, reason: str) -> None:
    with pytest.raises(BadLine) as caught:
        parse(line() + bad)
    assert caught.value.reason == reason
    assert caught.value.line == 2
    assert len(str(caught.value)) < 300


def test_gzip_is_taken_in_one_or_more_members_and_bombs_are_not() -> None:
    assert inflate(gzip.compress(b"ab") + gzip.compress(b"c")) == b"abc"
    for broken in (gzip.compress(b"a" * 1000)[:-9], b"nonsense", gzip.compress(b"a") + b"tail"):
        with pytest.raises(BadLine):
            inflate(broken)
    with pytest.raises(TooLarge):
        inflate(gzip.compress(b"\0" * (schema.MAX_TEXT_BYTES + 1)))


def test_a_body_of_many_tiny_gzip_streams_costs_no_more_than_one_of_its_size() -> None:
    tiny = gzip.compress(b"\n")
    began = time.thread_time()
    with pytest.raises(BadLine, match="gzip streams"):
        inflate(tiny * (schema.MAX_BODY_BYTES // len(tiny)))
    assert time.thread_time() - began < 2.0
    large = gzip.compress(random.Random(0).randbytes(200_000), 1)  # ends in the middle of a piece
    assert len(inflate(large * 20)) == 4_000_000


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.dictionaries(
            st.sampled_from([*PLAIN, "time", "tokens", "prediction", "resume_step", "x"]), anything
        ).map(lambda d: {"event": "sample", "run": "a", **d})
        | st.fixed_dictionaries(
            {"event": st.sampled_from(sorted(schema.EVENTS)), "attempt": anything, "run": anything}
        )
        | anything,
        max_size=4,
    )
)
def test_whatever_comes_is_taken_or_refused(lines: list[object]) -> None:
    body = b"\n".join(json.dumps(one).encode("utf-8", "surrogatepass") for one in lines)
    try:
        found = parse(body)
    except BadLine:
        return
    assert found.samples == sum(len(p.lines) for p in found.parts if isinstance(p, Samples))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_whatever_bytes_come_are_taken_or_refused(body: bytes) -> None:
    for read in (parse, inflate):
        with contextlib.suppress(BadLine, TooLarge):
            read(body)
