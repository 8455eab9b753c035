"""The service over HTTP: nobody in without a token, no bad input with a 500, and a restart that changes no verdict."""

import array
import asyncio
import gzip
import json
import math
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from monitor import schema
from monitor.judging.loop import Judging
from monitor.judging.run import band_columns
from monitor.schema import MAX_BODY_BYTES
from monitor.service.api import build
from monitor.service.guard import Guard
from monitor.service.monitor import Monitor
from monitor.service.states import states_of
from monitor.store.facts import RunFacts
from monitor.store.reading import FIELDS
from monitor.store.store import Store
from tests.monitor.live import wait_for
from tests.monitor.test_ingest import sample

GOLDEN = Path(__file__).parent / "golden"


class Open:
    """A monitor with its application and a client for each kind of visitor."""

    def __init__(self, folder: Path, **how: Any) -> None:
        self.monitor = Monitor(folder, **how)
        self.app = build(self.monitor)
        self.monitor.start()
        self.client = TestClient(self.app, base_url="http://monitor", raise_server_exceptions=False)
        self.token = self.monitor.tokens.create(("ingest", "read"))
        self.client.headers["Authorization"] = f"Bearer {self.token}"
        self.nobody = TestClient(self.app, base_url="http://monitor", raise_server_exceptions=False)

    def send(self, *lines: bytes) -> dict[str, Any]:
        answer = self.client.post("/v1/events", content=b"".join(lines))
        assert answer.status_code == 200, answer.text
        return answer.json()

    def judged(self) -> None:
        """Wait until all that was sent is judged."""
        until = time.monotonic() + 30

        def done(run_id: int, last_ord: int) -> bool:
            assert isinstance(self.monitor.judging, Judging)
            judge = self.monitor.judging._judges.get(run_id)
            if judge is None:  # not in memory: all was judged and written before
                return self.monitor.store.lasts().get(run_id, (0, {}))[0] >= last_ord
            return judge.cursor >= last_ord and not judge.urgent and judge.told

        while not all(done(f.run_id, f.last_ord) for f in self.monitor.ingest.runs.values() if f.last_ord):
            assert time.monotonic() < until, "not judged in 30 s"
            time.sleep(0.01)

    def close(self) -> None:
        self.monitor.stop()


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    made = Open(tmp_path / "store")
    yield made
    made.close()


def curve(n: int, seed: int = 0, start: int = 1) -> list[float]:
    noise = random.Random(seed)
    return [6.0 * (step + 10) ** -0.2 + noise.gauss(0.0, 0.02) for step in range(start, start + n)]


def lines(run: str, losses: list[float], attempt: int = 1, seq: int = 0, step: int = 1) -> list[bytes]:
    return [
        sample(run, attempt, seq + i, step + i, loss, tokens=512.0 * (step + i))
        for i, loss in enumerate(losses)
    ]


# who is let in


def test_every_route_wants_a_token(opened: Open) -> None:
    guard = opened.app
    assert isinstance(guard, Guard)
    open_to_all = set()
    for route in guard.app.routes:  # type: ignore[attr-defined]
        path = (
            route.path.replace("{run}", "a").replace("{file}", "app.js").replace("{page}", "LossDiverged.md")
        )
        for method in sorted(route.methods | {"OPTIONS", "PUT"}):
            for headers in ({}, {"Authorization": "Bearer lct_wrong"}, {"Cookie": "losscast=a.9999999999.b"}):
                status = opened.nobody.request(method, path, headers=headers).status_code
                if status != 401:
                    open_to_all.add(route.path)
    assert open_to_all == {"/", "/static/{file}", "/runbooks/", "/runbooks/{page}", "/healthz", "/session"}
    for path in (
        "/nothing",
        "/v1",
        "/v1/runs/",
        "/docs",
        "/openapi.json",
        "/debug",
        "//v1/runs",
        "/static",
        "/v1/runs/..%2f",
    ):
        assert opened.nobody.get(path).status_code == 401, path


def test_scopes_are_kept_apart(opened: Open) -> None:
    for scope, path, method, want in [
        ("read", "/v1/events", "POST", 403),
        ("ingest", "/v1/runs", "GET", 403),
        ("ingest", "/metrics", "GET", 403),
        ("operate", "/v1/runs/a", "GET", 403),
        ("ingest:b", "/v1/events", "POST", 403),
        ("ingest:a", "/v1/events", "POST", 200),
    ]:
        secret = opened.monitor.tokens.create((scope,))
        answer = opened.nobody.request(
            method, path, content=sample("a", 1, 0, 1), headers={"Authorization": f"Bearer {secret}"}
        )
        assert answer.status_code == want, (scope, path)


def test_only_refused_events_count_as_refused(opened: Open) -> None:
    def refused() -> str:
        text = opened.client.get("/metrics").text
        return re.findall(r'samples_rejected_total\{reason="unauthorized"\} (.*)', text)[0]

    for path in ("/v1/runs", "/v1/stream", "/metrics", "/v1/events", "/nothing"):
        assert opened.nobody.get(path).status_code == 401
    assert opened.nobody.post("/session", json={"token": "lct_wrong"}).status_code == 401
    assert float(refused()) == 0
    assert opened.nobody.post("/v1/events", content=sample("a", 1, 0, 1)).status_code == 401
    assert float(refused()) == 1


def test_a_session_is_a_cookie_that_no_script_and_no_other_site_can_use(opened: Open) -> None:
    browser = TestClient(opened.app, base_url="http://monitor")
    assert browser.post("/session", json={"token": "lct_wrong"}).status_code == 401
    assert browser.post("/session", content=b"[" * 3000).status_code == 400
    cross = {"Sec-Fetch-Site": "cross-site"}
    assert browser.post("/session", json={"token": opened.token}, headers=cross).status_code == 403
    answer = browser.post("/session", json={"token": opened.token})
    cookie = answer.headers["set-cookie"]
    assert answer.status_code == 204 and "HttpOnly" in cookie and "SameSite=strict" in cookie
    assert browser.get("/v1/runs").status_code == 200
    for headers in (cross, {"Sec-Fetch-Site": "same-site"}, {"Origin": "http://evil"}):
        assert browser.get("/v1/runs", headers=headers).status_code == 401
    assert browser.delete("/session").status_code == 204
    assert browser.get("/v1/runs").status_code == 401


def test_every_answer_carries_the_browser_rules(opened: Open) -> None:
    for answer in (
        opened.nobody.get("/v1/runs"),
        opened.client.get("/v1/runs"),
        opened.nobody.get("/"),
        opened.nobody.get("/healthz"),
    ):
        assert "script-src 'self'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in answer.headers
    assert opened.client.get("/v1/runs").headers["cache-control"] == "no-store"


# what is sent


def test_the_golden_files_are_taken_and_read_back(opened: Open) -> None:
    assert opened.send((GOLDEN / "v1-run.ndjson").read_bytes()) == {
        "accepted": 11,
        "duplicates": 0,
        "unknown": 0,
    }
    again = opened.client.post(
        "/v1/events",
        content=gzip.compress((GOLDEN / "v1-run.ndjson").read_bytes().splitlines(True)[-1]),
        headers={"Content-Encoding": "gzip"},
    )
    assert again.json() == {"accepted": 0, "duplicates": 1, "unknown": 0}
    assert opened.send((GOLDEN / "v1-future.ndjson").read_bytes())["unknown"] == 1
    opened.judged()
    detail = opened.client.get("/v1/runs/gpt-125m").json()
    assert (detail["phase"], detail["attempt"], detail["step"], detail["loss"]) == (
        "ended",
        2,
        4,
        "-Infinity",
    )
    assert [a["alert"] for a in detail["alerts"]] == ["LossNonFinite"]
    assert detail["target_loss"] == 2.85 and len(detail["attempts"]) == 2
    found = opened.client.get("/v1/runs/gpt-125m/samples").json()["samples"]
    assert [s["loss"] for s in found] == [10.9, "NaN", 10.5, "-Infinity"]
    assert found[1]["grad_norm"] == "Infinity" and found[0]["val_loss"] is None and found[3]["attempt"] == 2
    assert opened.client.get("/v1/runs/grows/samples").json()["samples"][0]["extra"]["other"] == "x"


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"not gzip", {"Content-Encoding": "gzip"}, 400),
        (b"x", {"Content-Encoding": "br"}, 400),
        (b'{"event":"sample","run":"A","attempt":1,"seq":0,"step":1,"loss":1}', {}, 422),
        (b" " * (MAX_BODY_BYTES + 1), {}, 413),
        (gzip.compress(b"\n" * (schema.MAX_TEXT_BYTES + 1)), {"Content-Encoding": "gzip"}, 413),
        (b"", {}, 200),
        (b"\n\n", {}, 200),
    ],
)
def test_bad_requests_are_told_apart(opened: Open, body: bytes, headers: dict[str, str], status: int) -> None:
    answer = opened.client.post("/v1/events", content=body, headers=headers)
    assert answer.status_code == status
    if status >= 400:
        assert answer.json()["error"]


def test_an_older_attempt_gets_409_and_is_counted(opened: Open) -> None:
    opened.send(sample("a", 2, 0, 1))
    answer = opened.client.post("/v1/events", content=sample("a", 1, 0, 1))
    assert answer.status_code == 409 and answer.json()["attempt"] == 2
    assert 'rejected_total{reason="stale_attempt"} 1.0' in opened.client.get("/metrics").text


@pytest.mark.parametrize(
    "name", ["..", "%2e%2e", "a%2f..%2fb", "A", "a b", "<script>", "a" * 64, "%00", "a\u0301"]
)
def test_hostile_run_names_in_addresses_are_no_run(opened: Open, name: str) -> None:
    for tail in ("", "/samples", "/verdicts", "/advice"):
        assert opened.client.get(f"/v1/runs/{name}{tail}").status_code in (404, 405)


query = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    ["1e999", "-1", "NaN", "9" * 40, "0x10", "1_0", " 5 ", "inf"]
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(["from", "to", "max", "attempt", "x"]), query, max_size=4))
def test_no_query_string_breaks_it(shared: Open, params: dict[str, str]) -> None:
    assert shared.client.get("/v1/runs/a/samples", params=params).status_code in (200, 422)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    made = Open(tmp_path_factory.mktemp("shared") / "store")
    made.send(*lines("a", curve(50)))
    yield made
    made.close()


@pytest.mark.parametrize(
    "prediction",
    [
        {},
        {"curve": 7},
        {"curve": {"step": [1, 1], "p05": [1], "p50": [], "p95": None}},
        {"final_loss": "x", "curve": None},
        {
            "final_loss": {"p05": "a", "p50": None, "p95": []},
            "curve": {"step": [0, 10], "tokens": [], "p05": [1, 1], "p50": [2, 2], "p95": [3, 3]},
        },
        {"digest": ["unhashable"], "extrapolation": [], "tokens": "NaN"},
    ],
)
def test_a_prediction_that_makes_no_sense_leaves_the_run_judged_by_its_own_past(
    opened: Open, prediction: dict[str, Any]
) -> None:
    opened.send(schema.encode_event(schema.run_started("a", 1, time=1.0, prediction=prediction)))
    opened.send(*lines("a", [*curve(40), math.nan]))
    opened.judged()
    for path in ("/v1/runs", "/v1/runs/a", "/v1/runs/a/samples", "/v1/runs/a/advice", "/metrics"):
        assert opened.client.get(path).status_code == 200, path
    assert opened.client.get("/v1/runs/a").json()["state"] == "non_finite"


# what is judged


def test_a_nan_is_called_whatever_else_is_true(opened: Open) -> None:
    opened.send(*lines("a", [*curve(30), math.nan]))
    opened.judged()
    said = opened.client.get("/v1/runs/a").json()
    assert said["state"] == "non_finite" and said["loss"] == "NaN" and said["advice"]["action"] == "roll_back"
    alert = opened.client.get("/v1/runs/a/verdicts").json()["alerts"][0]
    assert (alert["alert"], alert["severity"], alert["step"], alert["value"]) == (
        "LossNonFinite",
        "critical",
        31,
        "NaN",
    )
    metrics = opened.client.get("/metrics").text
    assert 'losscast_verdict{run="a",state="non_finite",team=""} 1.0' in metrics
    assert 'losscast_samples_nonfinite_total{kind="nan",run="a"} 1.0' in metrics
    opened.send(*lines("a", curve(20, start=32), seq=31, step=32))
    opened.judged()
    assert opened.client.get("/v1/runs/a").json()["alerts"][0]["resolved_step"] is not None


def prediction(upto: int) -> dict[str, Any]:
    steps = [*range(1, upto + 1, 10), upto]
    p50 = [6.0 * (s + 10) ** -0.2 for s in steps]
    return {
        "final_loss": {"p05": p50[-1] - 0.05, "p50": p50[-1], "p95": p50[-1] + 0.05}, "digest": "d",
        "curve": {"step": steps, "tokens": [512.0 * s for s in steps], "p05": [v - 0.06 for v in p50], "p50": p50,
                  "p95": [v + 0.06 for v in p50]},
    }  # fmt: skip


def story() -> list[bytes]:
    """A run with a spike, a NaN, a restart that replays, a divergence: in events, one a list entry."""
    losses = curve(900)
    losses[300:304] = [loss + 2.0 for loss in losses[300:304]]
    losses[500] = math.nan
    for i in range(700, 900):
        losses[i] += 0.8
    out = [
        schema.encode_event(
            schema.run_started("tale", 1, time=1e9, prediction=prediction(1000), target_loss=1.7)
        )
    ]
    out += lines("tale", losses[:620])
    out.append(
        schema.encode_event(schema.event("restart", "tale", 1, time=1e9 + 620, cause="killed", step=620))
    )
    out.append(
        schema.encode_event(
            schema.run_started("tale", 2, time=1e9 + 630, resume_step=600, prediction=prediction(1000))
        )
    )
    return out + lines("tale", losses[600:], attempt=2, step=601)


def told(opened: Open) -> tuple[Any, Any, Any]:
    opened.judged()
    said = opened.client.get("/v1/runs/tale/verdicts").json()
    strip = [{k: v for k, v in one.items() if not k.endswith("time")} for one in said["verdicts"]]
    alerts = [{k: v for k, v in one.items() if not k.endswith("time")} for one in said["alerts"]]
    return strip, alerts, opened.client.get("/v1/runs/tale/samples").json()["samples"]


def test_restarts_mid_stream_change_no_verdict_and_lose_no_band(tmp_path: Path) -> None:
    events = story()
    whole = Open(tmp_path / "whole")
    for start in range(0, len(events), 150):
        whole.send(*events[start : start + 150])
    want = told(whole)
    whole.close()
    assert {a["alert"] for a in want[1]} >= {"LossNonFinite", "LossSpike", "LossDiverged"}
    assert all(s["expected"] is not None for s in want[2] if s["loss"] != "NaN")

    cuts = random.Random(7)
    at, pieces = 0, 0
    while at < len(events):
        opened = Open(tmp_path / "cut")
        step = cuts.randrange(1, 200)
        opened.send(*events[at : at + step])
        if pieces % 2:
            opened.judged()
            opened.monitor.judging._persist = lambda now, every=False: None  # type: ignore[method-assign]
        at += step
        pieces += 1
        if at < len(events):
            opened.close()
    got = told(opened)
    opened.close()
    assert pieces > 5
    assert got[1] == want[1]
    assert got[0] == want[0]
    assert got[2] == want[2]


def test_a_run_whose_samples_could_not_be_read_is_judged_when_they_can_though_nothing_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("monitor.judging.loop.RETRY_S", 0.1)
    made = Open(tmp_path / "store")
    made.send(*lines("a", [*curve(40), math.nan]))
    made.close()
    store = Store(tmp_path / "store")
    for table in ("judged", "bands", "alerts", "verdicts"):
        store.connection.execute(f"DELETE FROM {table}")
    store.connection.execute("UPDATE chunks SET crc=crc+1")
    store.close()
    made = Open(tmp_path / "store")
    try:
        wait_for(lambda: made.client.get("/v1/runs").json()["runs"][0]["trouble"])
        assert "losscast_judge_failing 1.0" in made.client.get("/metrics").text
        made.monitor.store.connection.execute("UPDATE chunks SET crc=crc-1")
        made.judged()
        wait_for(lambda: made.client.get("/v1/runs").json()["runs"][0]["trouble"] is None)
        assert made.client.get("/v1/runs").json()["runs"][0]["state"] == "non_finite"
        wait_for(lambda: "losscast_judge_failing 0.0" in made.client.get("/metrics").text)
    finally:
        made.close()


def test_samples_can_be_cut_thinned_and_asked_by_attempt(opened: Open) -> None:
    opened.send(*lines("a", curve(3000)))
    opened.send(schema.encode_event(schema.run_started("a", 2, time=1.0, resume_step=2000)))
    opened.send(*lines("a", [1.0] * 10, attempt=2, step=2001))
    opened.judged()

    def steps(**params: int) -> list[tuple[int, int]]:
        found = opened.client.get("/v1/runs/a/samples", params=params).json()
        return [(s["attempt"], s["step"]) for s in found["samples"]]

    assert steps() == [(1, s) for s in range(1, 2001)] + [(2, s) for s in range(2001, 2011)]
    assert steps(**{"from": 1999, "to": 2002}) == [(1, 1999), (1, 2000), (2, 2001), (2, 2002)]
    assert len(steps(attempt=1)) == 3000 and steps(attempt=7) == []
    one = opened.client.get("/v1/runs/a/samples", params={"from": 1, "to": 1}).json()["samples"][0]
    assert set(one) == {*FIELDS, "attempt"} and one["val_loss"] is None, "a value that is missing is null"
    thinned = steps(max=100)
    assert 20 < len(thinned) <= 110 and thinned[0] == (1, 1) and thinned[-1] == (2, 2010)


def test_the_shapes_the_page_reads_are_there(opened: Open) -> None:
    from tests.monitor.page_stub import made_up

    want = made_up()["gpt-71k-target"]["detail"]
    opened.send(*story()[:50])
    opened.judged()
    detail = opened.client.get("/v1/runs/tale").json()
    assert set(want) <= set(detail)
    assert set(want["advice"]) <= set(detail["advice"])
    assert set(want["attempts"][0]) <= set(detail["attempts"][0])
    assert detail["prediction"]["curve"]["step"]
    listed = opened.client.get("/v1/runs").json()["runs"]
    assert [r["run"] for r in listed] == ["tale"] and set(want) - {"prediction", "attempts", "events"} <= set(
        listed[0]
    )


def test_a_page_that_is_over_at_once_is_still_there_to_be_scraped(tmp_path: Path) -> None:
    now = [2e9]
    opened = Open(tmp_path / "store", clock=lambda: now[0])
    losses = curve(400)
    losses[300] = float("nan")
    opened.send(*lines("a", losses))
    opened.judged()
    assert opened.client.get("/v1/runs/a").json()["alerts"][0]["resolved_step"] is not None
    held = 'losscast_verdict{run="a",state="non_finite",team=""} 1.0'
    assert held in opened.client.get("/metrics").text
    now[0] += 61
    assert held not in opened.client.get("/metrics").text
    opened.close()


# what the clock says


def test_a_run_that_stops_stepping_is_stalled_and_one_that_says_nothing_is_silent(tmp_path: Path) -> None:
    now = [1e9]
    opened = Open(tmp_path / "store", clock=lambda: now[0])
    opened.send(*lines("a", curve(30)), *lines("b", curve(30)))
    opened.judged()
    assert opened.client.get("/v1/runs/a").json()["states"] == ["healthy"]
    for _ in range(8):
        now[0] += 30
        opened.send(schema.encode_event(schema.event("heartbeat", "a", 1, time=now[0])))
    assert opened.client.get("/v1/runs/a").json()["states"] == ["healthy", "stalled"]
    assert opened.client.get("/v1/runs/b").json()["states"] == ["healthy", "silent"]
    assert 'losscast_verdict{run="b",state="silent",team=""} 1.0' in opened.client.get("/metrics").text
    opened.send(schema.encode_event(schema.event("run_ended", "b", 1, time=now[0], reason="finished")))
    assert opened.client.get("/v1/runs/b").json()["states"] == ["healthy"]
    now[0] += 1000
    assert 'run="b"' not in opened.client.get("/metrics").text
    opened.close()


@pytest.mark.parametrize("again", [False, True], ids=["at work", "started again"])
def test_a_run_that_reports_every_500th_step_stands_still_by_its_reports(tmp_path: Path, again: bool) -> None:
    now = [1e9]
    opened = Open(tmp_path / "store", clock=lambda: now[0])
    for at in range(500, 5001, 500):  # a step a second
        now[0] = 1e9 + at
        opened.send(sample("a", 1, at // 500 - 1, at, 6.0 * at**-0.2))
    opened.judged()
    run_id = opened.monitor.ingest.runs["a"].run_id
    wait_for(lambda: "step_s" in opened.monitor.judging.last[run_id])
    if again:
        opened.close()
        opened = Open(tmp_path / "store", clock=lambda: now[0])
        now[0] += 500
        opened.send(sample("a", 1, 10, 5500, 1.07))  # its judge goes on from what was written
        opened.judged()
        wait_for(lambda: opened.monitor.judging.last[run_id]["step"] == 5500)
    assert opened.monitor.judging.last[run_id]["step_s"] == [1.0, 1.0]
    told = now[0]
    for waited, states in ((490, ["healthy"]), (1490, ["healthy"]), (1510, ["healthy", "stalled"])):
        now[0] = told + waited
        opened.send(schema.encode_event(schema.event("heartbeat", "a", 1, time=now[0])))
        assert opened.client.get("/v1/runs/a").json()["states"] == states, waited
    opened.close()


def test_what_a_judge_wrote_before_it_timed_reports_still_says_when_a_run_stands_still() -> None:
    facts = RunFacts(1, "a", step=5, last_step_received=1000.0, last_received=1300.0)
    how = {"started": 0.0, "stalled_after_s": 180.0}
    assert states_of(facts, {"step_s": [1.0, 2.0]}, 1300.0, **how) == ("warming_up", "stalled")
    assert states_of(facts, {}, 1300.0, **how) == ("warming_up",)


def test_a_run_that_goes_on_after_a_pause_is_given_its_time_and_no_more(tmp_path: Path) -> None:
    now = [1e9]
    opened = Open(tmp_path / "store", clock=lambda: now[0])

    def event(kind: str, attempt: int, **fields: Any) -> None:
        opened.send(schema.encode_event(schema.event(kind, "a", attempt, time=now[0], **fields)))

    opened.send(*lines("a", curve(30)))
    for step in (10, 20, 30):
        now[0] += 60
        event("checkpoint", 1, step=step)
    opened.judged()
    event("run_ended", 1, reason="stopped")
    now[0] += 36000
    opened.send(schema.encode_event(schema.run_started("a", 2, time=now[0], resume_step=30)))
    for waited, more in (
        (100, set()),
        (60, set()),
        (540, {"checkpoint_overdue"}),
        (1000, {"checkpoint_overdue"}),  # it may load a large model
        (200, {"stalled", "checkpoint_overdue"}),
    ):
        now[0] += waited
        event("heartbeat", 2)
        assert {*opened.client.get("/v1/runs/a").json()["states"]} - {"healthy"} == more
    event("checkpoint", 2, step=40)
    assert opened.monitor.ingest.runs["a"].checkpoint_interval_s == 1900.0  # and the pause makes none
    now[0] += 190
    assert "silent" in opened.client.get("/v1/runs/a").json()["states"], (
        "who loads sends heartbeats all the same"
    )
    opened.close()


def test_nobody_is_paged_while_a_restart_loads_and_somebody_is_where_it_does_not_come() -> None:
    """Between a driver's word of a restart and the next attempt's first one nobody sends heartbeats."""
    facts = RunFacts(
        1,
        "a",
        step=5,
        last_step_received=1000.0,
        last_received=1005.0,
        attempt_received=10.0,
        restart_received=1005.0,
    )
    how, last = {"started": 0.0, "stalled_after_s": 180.0}, {"state": "healthy", "step_s": [1.0, 2.0]}
    for waited, states in ((60, ()), (1000, ()), (1790, ()), (1810, ("silent",))):
        assert states_of(facts, last, 1005.0 + waited, **how) == ("healthy", *states), waited
    facts.attempt_received = facts.last_received = 1600.0  # it is heard of, and then no more
    for waited, states in ((170, ()), (190, ("silent",))):
        assert states_of(facts, last, 1600.0 + waited, **how) == ("healthy", *states), waited


def test_an_open_page_is_told_that_a_run_fell_silent_and_that_it_is_back(tmp_path: Path) -> None:
    now = [1e9]
    opened = Open(tmp_path / "store", clock=lambda: now[0])
    opened.send(*lines("a", curve(30)), *lines("b", curve(30)))
    opened.judged()
    wait_for(lambda: all("step_s" in last for last in opened.monitor.judging.last.values()))
    said: list[list[str]] = []
    scope = {
        "type": "http", "method": "GET", "path": "/v1/stream", "query_string": b"",
        "headers": [(b"authorization", f"Bearer {opened.token}".encode())],
    }  # fmt: skip

    async def page() -> None:
        async def receive() -> dict[str, Any]:
            await asyncio.sleep(60)
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            found = [
                json.loads(line[6:])
                for line in message.get("body", b"").splitlines()
                if line[:6] == b"data: "
            ]
            said.extend([[run["run"], *run["states"]] for run in found])

        async def life() -> None:
            for change in (lambda: None, fall_silent, come_back):
                change()
                have = len(said)
                until = time.monotonic() + 20
                while len(said) == have:
                    assert time.monotonic() < until, said
                    await asyncio.sleep(0.05)
            opened.monitor.stopping.set()

        stream = asyncio.create_task(opened.app(scope, receive, send))  # type: ignore[arg-type]
        await life()
        await asyncio.wait_for(stream, 10)

    def fall_silent() -> None:
        now[0] += 400
        opened.monitor.ingest.runs["a"].last_step_received = now[0]  # of the two, this one goes on

    def come_back() -> None:
        opened.monitor.ingest.runs["b"].last_step_received = now[0]
        now[0] += 10

    asyncio.run(page())
    assert sorted(said[:2]) == [["a", "healthy"], ["b", "healthy"]]
    assert said[2:] == [["b", "healthy", "silent"], ["b", "healthy"]]
    opened.close()


def test_looking_at_the_clock_of_ten_thousand_runs_costs_little(opened: Open) -> None:
    now = opened.monitor.clock()
    for id in range(10_000):
        facts = RunFacts(
            id, f"r{id}", step=5, last_step_received=now, last_received=now, checkpoint_received=now
        )
        opened.monitor.ingest.runs[facts.run] = facts
        opened.monitor.judging.last[id] = {"state": "healthy", "step_s": [1.0, 1.0], "report_s": 1.0}
    took = []
    for turn in range(3):
        began = time.process_time()
        opened.monitor.look(now + 10.0 * turn)
        took.append(time.process_time() - began)
    opened.monitor.ingest.runs.clear()
    assert min(took) < 0.15, took


def test_how_fast_a_run_trains_is_told_while_it_trains(opened: Open) -> None:
    opened.send(
        *(sample("a", 1, i, i + 1, loss, tokens_per_s=1e5, mfu=0.4) for i, loss in enumerate(curve(30)))
    )
    for name in ("run_tokens_per_second", "run_mfu_ratio"):
        assert f'losscast_{name}{{run="a"}}' in opened.client.get("/metrics").text
    opened.send(schema.encode_event(schema.event("run_ended", "a", 1, time=1e9, reason="finished")))
    text = opened.client.get("/metrics").text
    assert 'losscast_run_loss{run="a"}' in text  # shown a while longer
    assert "losscast_run_tokens_per_second{" not in text and "losscast_run_mfu_ratio{" not in text


def test_one_slow_step_makes_no_run_longer(opened: Open) -> None:
    opened.send(
        schema.encode_event(schema.run_started("a", 1, time=1e9, total_tokens=72e6, price_per_hour=10.0))
    )
    rates = [1e4] * 99 + [10.0]
    opened.send(
        *(
            sample("a", 1, i, i + 1, loss, tokens=360e3 * (i + 1), tokens_per_s=rate)
            for i, (loss, rate) in enumerate(zip(curve(100), rates, strict=True))
        )
    )
    opened.judged()
    wait_for(lambda: "tokens_per_s" in opened.monitor.judging.last[opened.monitor.ingest.runs["a"].run_id])
    found = opened.client.get("/v1/runs/a/advice").json()["advice"]
    assert found["hours_left"] == pytest.approx(1.0) and found["money_left"] == pytest.approx(10.0)


def test_three_restarts_without_a_step_are_a_loop(opened: Open) -> None:
    opened.send(*lines("a", curve(5)))
    for attempt in (2, 3, 4):
        opened.send(schema.encode_event(schema.run_started("a", attempt, time=1.0, resume_step=5)))
    assert "restart_loop" in opened.client.get("/v1/runs/a").json()["states"]
    opened.send(sample("a", 4, 0, 6))
    assert "restart_loop" not in opened.client.get("/v1/runs/a").json()["states"]


def test_a_clock_a_day_off_is_told_and_hurts_nothing(opened: Open) -> None:
    opened.send(
        *[
            json.dumps({**json.loads(line), "time": time.time() + 86400}).encode() + b"\n"
            for line in lines("a", curve(5))
        ]
    )
    assert "clock_skew" in opened.client.get("/v1/runs/a").json()["states"]
    assert "silent" not in opened.client.get("/v1/runs/a").json()["states"]


def test_reading_while_the_judge_writes_never_sees_half_a_row(opened: Open) -> None:
    flat = array.array("d", range(6 * 3 + 4))
    assert band_columns(flat).n == 3
    opened.send(*lines("a", curve(4000)))
    for _ in range(20):
        assert opened.client.get("/v1/runs/a/samples", params={"max": 50}).status_code == 200


def test_old_runs_are_removed_with_all_that_is_kept_of_them_and_may_come_again(tmp_path: Path) -> None:
    now = [1e9]
    opened = Open(tmp_path / "store", clock=lambda: now[0], keep_days=30)
    opened.send(*lines("old", [*curve(40), math.nan]))
    opened.judged()
    now[0] += 29 * 86400
    opened.send(*lines("young", curve(5)))
    assert opened.monitor.remove_old() == 0
    now[0] += 2 * 86400
    assert opened.monitor.remove_old() == 1
    assert [r["run"] for r in opened.client.get("/v1/runs").json()["runs"]] == ["young"]
    assert opened.client.get("/v1/runs/old").status_code == 404
    db = opened.monitor.store.reader()
    for table in ("chunks", "events", "judged", "bands", "alerts", "verdicts", "runs"):
        assert {id for (id,) in db.execute(f"SELECT run_id FROM {table}")} <= {2}
    opened.send(*lines("old", curve(3)))
    opened.judged()
    assert len(opened.client.get("/v1/runs/old/samples").json()["samples"]) == 3
    assert opened.client.get("/v1/runs/old").json()["alerts"] == []
    opened.close()


@pytest.mark.parametrize("at_once", [False, True])
def test_an_alert_that_ends_in_a_newer_attempt_at_an_earlier_step_has_ended(
    opened: Open, at_once: bool
) -> None:
    resumed = schema.encode_event(schema.run_started("a", 2, time=1.0, resume_step=100))
    parts = [
        lines("a", [*curve(100), math.nan, *curve(100, start=102), math.nan]),
        [resumed, *lines("a", curve(30, start=101), attempt=2, step=101)],
        lines("a", [math.nan], attempt=2, seq=30, step=131),
    ]
    for body in [[line for part in parts for line in part]] if at_once else parts:
        opened.send(*body)
        opened.judged()
    alerts = opened.client.get("/v1/runs/a/verdicts").json()["alerts"]
    called = [a for a in alerts if a["alert"] == "LossNonFinite"]
    found = sorted((a["attempt"], a["step"], a["resolved_step"]) for a in called)
    assert [row[:2] for row in found] == [(1, 101), (1, 202), (2, 131)]
    ended = [row[2] for row in found]
    assert 101 < ended[0] < 202 and 101 <= ended[1] < 131 and ended[2] is None


def test_a_run_that_is_heard_of_is_not_removed_however_long_ago_it_ended(tmp_path: Path) -> None:
    now = [1e9]
    opened = Open(tmp_path / "store", clock=lambda: now[0], keep_days=30)
    ended = schema.encode_event(schema.event("run_ended", "a", 1, time=1.0, reason="stopped"))
    opened.send(*lines("a", curve(5)), ended)
    now[0] += 20 * 86400
    opened.send(*lines("a", curve(5, start=6), seq=5, step=6))
    now[0] += 20 * 86400
    assert opened.monitor.remove_old() == 0
    opened.close()


def test_what_was_written_is_let_go_and_is_not_judged_twice(opened: Open) -> None:
    losses = [*curve(60), math.nan, *curve(40, start=62)]
    opened.send(*lines("a", losses))
    opened.judged()
    last = dict(opened.monitor.judging.last[1])
    opened.monitor.judging.notice(opened.monitor.store.newest_ord())
    opened.send(*lines("a", curve(5, start=102), seq=101, step=102))
    opened.judged()
    said = opened.client.get("/v1/runs/a/verdicts").json()
    assert [a["alert"] for a in said["alerts"]] == ["LossNonFinite"]
    assert said["alerts"][0]["resolved_step"] is not None and last["state"] == "healthy"
    opened.monitor.judging.stop()
    assert opened.monitor.judging.pending_bands(1) == []
    assert len(opened.client.get("/v1/runs/a/samples").json()["samples"]) == 106
