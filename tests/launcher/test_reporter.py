"""The reporter against real sockets: a monitor that is up, away, hung, wrong, and comes back."""

import gzip
import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from launcher.ports import free_port
from launcher.reporter import Reporter
from launcher.spool import Spool, seal
from monitor.schema import encode_event, sample


class Service:
    """A monitor of a few lines: keeps what it gets, answers what it is told to."""

    def __init__(self, port: int = 0) -> None:
        self.events: list[dict[str, Any]] = []
        self.answer: Callable[[list[dict[str, Any]]], int] = lambda events: 200
        self.tokens: set[str | None] = set()
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = gzip.decompress(self.rfile.read(int(self.headers["Content-Length"])))
                events = [json.loads(line) for line in body.splitlines()]
                service.tokens.add(self.headers["Authorization"])
                status = service.answer(events)
                if status < 300:
                    service.events += events
                self.send_response(status)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()

    def samples(self) -> list[dict[str, Any]]:
        return [e for e in self.events if e["event"] == "sample"]

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service()
    yield service
    service.stop()


def reporter(url: str | None, spool: Path | None, attempt: int = 1, **more: Any) -> Reporter:
    return Reporter(url, "secret", "run-a", attempt, spool, timeout_s=1.0, drain_s=0.02, quiet=True, **more)


def wait_for(true: Callable[[], bool], seconds: float = 5.0) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "nothing happened in time"
        time.sleep(0.01)


def test_everything_arrives_once_and_in_order(service: Service, tmp_path: Path) -> None:
    voice = reporter(service.url, tmp_path)
    voice.start(resume_step=0, team="a", prediction=None)
    for step in range(1, 2501):
        voice.report(step=step, loss=1.0 / step, lr=1e-3)
    voice.event("checkpoint", step=2500)
    assert voice.close("finished")
    assert [e["event"] for e in service.events[:1]] == ["run_started"]
    assert [s["seq"] for s in service.samples()] == list(range(2500))
    assert service.events[-1]["event"] == "run_ended" and service.events[-1]["reason"] == "finished"
    assert service.tokens == {"Bearer secret"}
    assert not list(tmp_path.iterdir()), "a delivered spool leaves nothing behind"


def test_a_non_finite_loss_is_spelled_out(service: Service, tmp_path: Path) -> None:
    voice = reporter(service.url, tmp_path)
    for step, loss in enumerate([float("nan"), float("inf"), float("-inf")], 1):
        voice.report(step=step, loss=loss)
    assert voice.close()
    assert [s["loss"] for s in service.samples()] == ["NaN", "Infinity", "-Infinity"]


def test_what_was_said_while_the_monitor_was_away_arrives_when_it_comes_back(tmp_path: Path) -> None:
    port = free_port()
    voice = reporter(f"http://127.0.0.1:{port}", tmp_path)
    for step in range(300):
        voice.report(step=step, loss=2.0)
    wait_for(lambda: voice.stats().away)
    service = Service(port)
    try:
        for step in range(300, 400):
            voice.report(step=step, loss=2.0)
        assert voice.close(timeout_s=10)
        assert [s["step"] for s in service.samples()] == list(range(400))
    finally:
        service.stop()


def test_a_spool_that_waited_goes_out_in_few_large_requests_and_in_small_ones_after_a_failure(
    tmp_path: Path,
) -> None:
    port, sizes = free_port(), list[int]()
    voice = reporter(f"http://127.0.0.1:{port}", tmp_path)
    for step in range(20_000):
        voice.report(step=step, loss=2.0)
        if step % 1000 == 999:
            wait_for(lambda: not voice._queue)
    wait_for(lambda: voice.stats().away)
    service = Service(port)

    def answer(events: list[dict[str, Any]]) -> int:
        sizes.append(len(events))
        return 503 if len(sizes) == 4 else 200

    service.answer = answer
    try:
        assert voice.close(timeout_s=20)
    finally:
        service.stop()
    assert [s["seq"] for s in service.samples()] == list(range(20_000))
    assert max(sizes) >= 4000 and sizes[4] <= 1000 < sizes[3], sizes
    assert len(sizes) < 14, sizes


def test_what_is_left_of_an_attempt_that_is_still_listened_to_is_not_refused_with_an_older_one(
    service: Service, tmp_path: Path
) -> None:
    for attempt, count in ((1, 1500), (2, 3)):
        left = Spool(tmp_path, "run-a", attempt)
        left._segments.clear()  # what it adopted stays where it lies
        left.append(
            [encode_event(sample("run-a", attempt, s, step=s, loss=1.0, time=1e9)) for s in range(count)]
        )
        left.close()
    service.answer = lambda events: 409 if any(e["attempt"] < 2 for e in events) else 200
    voice = reporter(service.url, tmp_path, attempt=3)
    voice.report(step=4, loss=1.0)
    assert voice.close(None)
    assert [(s["attempt"], s["seq"]) for s in service.samples()] == [(2, 0), (2, 1), (2, 2), (3, 0)]
    assert voice.stats().refused == 1500 and not voice.superseded


def test_the_next_attempt_delivers_what_a_killed_one_left(service: Service, tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:  # a trainer whose monitor is away, killed without warning
        voice = reporter(f"http://127.0.0.1:{free_port()}", tmp_path)
        voice.start()
        for step in range(50):
            voice.report(step=step, loss=2.0)
        time.sleep(0.2)
        os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    voice = reporter(service.url, tmp_path, attempt=2)
    voice.start(resume_step=40)
    assert voice.close()
    order = [(e["attempt"], e["event"]) for e in service.events]
    assert order[0] == (1, "run_started") and order[51] == (2, "run_started")
    assert len(service.samples()) == 50
    assert not list(tmp_path.iterdir())


def test_the_spool_of_a_living_reporter_is_left_alone(service: Service, tmp_path: Path) -> None:
    first = reporter(f"http://127.0.0.1:{free_port()}", tmp_path)
    first.report(step=1, loss=1.0)
    wait_for(lambda: first.stats().spool_bytes > 0)
    second = reporter(service.url, tmp_path, attempt=2)
    assert second.close(None)
    assert service.events == []
    assert not first.close(timeout_s=0.1) and first.stats().waiting == 2


def silent() -> tuple[str, socket.socket]:
    """A port that accepts and never answers."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    return f"http://127.0.0.1:{listener.getsockname()[1]}", listener


@pytest.mark.parametrize("fault", ["refused", "hung", "unresolvable", "wrong token", "error", "not a url"])
def test_whatever_is_wrong_with_the_monitor_no_call_raises_or_waits(
    fault: str, tmp_path: Path, service: Service
) -> None:
    url, keep = {"hung": silent}.get(fault, lambda: (service.url, None))()
    service.answer = lambda events: {"wrong token": 401, "error": 503}.get(fault, 200)
    if fault == "refused":
        url = f"http://127.0.0.1:{free_port()}"
    if fault == "unresolvable":
        url = "http://monitor.invalid:8700"
    if fault == "not a url":
        url = "monitor:8700"
    voice = reporter(url, tmp_path)
    voice.start()
    slowest = 0.0
    for step in range(100):
        began = time.perf_counter()
        voice.report(step=step, loss=1.0, lr=0.1)
        slowest = max(slowest, time.perf_counter() - began)
        time.sleep(0.001)
    assert slowest < 1.0, "a call waited for the network"
    began = time.monotonic()
    assert voice.close(timeout_s=0.15) == (fault == "not a url")
    assert time.monotonic() - began < 5.0
    if fault != "not a url":
        assert voice.stats().waiting == 102, "nothing is lost"
    if keep:
        keep.close()


def test_a_request_that_is_refused_costs_only_the_lines_that_are_wrong(
    service: Service, tmp_path: Path
) -> None:
    service.answer = lambda events: 400 if any(e.get("step") == 77 for e in events) else 200
    voice = reporter(service.url, tmp_path)
    for step in range(200):
        voice.report(step=step, loss=1.0)
    assert voice.close()
    assert [s["step"] for s in service.samples()] == [s for s in range(200) if s != 77]
    assert voice.stats().refused == 1


def test_a_superseded_attempt_is_told_so(service: Service, tmp_path: Path) -> None:
    service.answer = lambda events: 409
    voice = reporter(service.url, tmp_path)
    voice.report(step=1, loss=1.0)
    wait_for(lambda: voice.superseded)
    assert voice.close()


def test_a_value_that_is_no_number_costs_its_own_line_only(service: Service, tmp_path: Path) -> None:
    voice = reporter(service.url, tmp_path)
    voice.report(step=1, loss="what?")  # type: ignore[arg-type]
    voice.report(step=2, loss=1.0, odd=object())
    voice.report(step=3, loss=1.0)
    assert voice.close()
    assert [s["step"] for s in service.samples()] == [2, 3]
    assert voice.stats().refused == 1


def test_a_time_of_the_callers_own_is_kept(service: Service, tmp_path: Path) -> None:
    voice = reporter(service.url, tmp_path)
    voice.report(step=1, loss=1.0, time=12.5)
    voice.event("restart", cause="killed", time=13.5)
    assert voice.close(None)
    assert [e["time"] for e in service.events] == [12.5, 13.5]


def test_without_a_monitor_nothing_is_kept() -> None:
    voice = reporter(None, None)
    voice.start()
    voice.report(step=1, loss=1.0)
    assert voice.close() and voice.stats().waiting == 0


def test_a_run_without_steps_says_that_it_lives(service: Service, tmp_path: Path) -> None:
    voice = reporter(service.url, tmp_path, heartbeat_s=0.3)
    wait_for(lambda: any(e["event"] == "heartbeat" for e in service.events))
    assert voice.close()


def line(step: int, loss: str = "1.0", event: str = "sample") -> bytes:
    return f'{{"event":"{event}","run":"run-a","attempt":1,"seq":{step},"loss":{loss}}}\n'.encode()


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_full_spool_thins_its_oldest_samples_and_counts_them(on_disk: bool, tmp_path: Path) -> None:
    spool = Spool(tmp_path if on_disk else None, "run-a", 1, limit_bytes=200_000)
    spool.append([line(0, event="run_started"), line(1, '"NaN"')])
    for start in range(2, 20_002, 100):
        spool.append([line(s) for s in range(start, start + 100)])
    assert spool.size <= 200_000
    kept: list[dict[str, Any]] = []
    while (taken := spool.take()) is not None:
        kept += [json.loads(text) for text in taken[1]]
        spool.drop(taken[0])
    steps = [k["seq"] for k in kept]
    assert steps == sorted(steps) and len(steps) + spool.thinned == 20_002
    assert steps[:2] == [0, 1], "events and non-finite losses are never thinned"
    assert steps[-50:] == list(range(19_952, 20_002)), "the newest are whole"
    widest = max(b - a for a, b in itertools.pairwise(steps))
    assert widest <= 64, "no hole: what is left is spread over the whole run"
    spool.close()


def test_a_damaged_line_is_counted_and_its_neighbours_are_delivered(service: Service, tmp_path: Path) -> None:
    home = tmp_path / "run-a.1.0"
    home.mkdir()
    good = [seal(line(s)) for s in range(5)]
    flipped = bytearray(good[2])
    flipped[30] ^= 1
    torn = good[4][:-9]
    (home / "0000000000.seg").write_bytes(b"".join([*good[:2], bytes(flipped), good[3], torn]))
    voice = reporter(service.url, tmp_path, attempt=2)
    assert voice.close(None)
    assert [s["seq"] for s in service.samples()] == [0, 1, 3]
    assert voice.stats().damaged == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_moves_the_spool_into_memory(tmp_path: Path) -> None:
    spool = Spool(tmp_path, "run-a", 1)
    (tmp_path / "run-a.1.0" / "0000000000-0.seg").symlink_to("/dev/full")
    spool.append([line(1), line(2)])
    assert spool.disk_error is not None
    spool.append([line(3)])
    taken = spool.take()
    assert taken is not None and taken[1] == [line(1), line(2), line(3)]
