"""Visitors that hold on: a revoked token on a busy stream, requests that never end, a client that leaves in the middle."""

import http.client
import logging
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from monitor.service.api import build
from monitor.service.monitor import Monitor
from monitor.service.serving import Dawdlers
from tests.monitor.live import wait_for

pytestmark = pytest.mark.faults


class _Impatient(uvicorn.Server):
    """Looks at every tick, so that the test need not wait for a minute."""

    dawdlers = Dawdlers(slowest_s=0.5)

    async def on_tick(self, counter: int) -> bool:
        self.dawdlers.look(self.server_state.connections, time.monotonic())
        return await super().on_tick(counter)


class Visited:
    """A monitor on a port of its own, its server in a thread."""

    def __init__(self, folder: Path) -> None:
        self.monitor = Monitor(folder)
        self.monitor.start()
        self.token = self.monitor.tokens.create(("ingest", "read"))
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        config = uvicorn.Config(
            build(self.monitor), log_level="warning", lifespan="off", ws="none", http="h11",
            timeout_graceful_shutdown=1, timeout_keep_alive=30,
        )  # fmt: skip
        self.server = _Impatient(config)
        self.thread = threading.Thread(
            target=self.server.run, kwargs={"sockets": [self.listener]}, daemon=True
        )
        self.thread.start()
        wait_for(lambda: self.server.started)

    def connect(self, head: str) -> socket.socket:
        made = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        made.sendall(head.encode())
        return made

    def head(self, path: str, token: str, *more: str) -> str:
        method, _, path = path.partition(" ")
        fields = (f"{method} {path} HTTP/1.1", "Host: monitor", f"Authorization: Bearer {token}", *more)
        return "\r\n".join(fields) + "\r\n\r\n"

    def send(self, seq: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        body = b'{"event":"sample","run":"busy","attempt":1,"seq":%d,"step":%d,"loss":2.5}\n' % (seq, seq)
        connection.request("POST", "/v1/events", body, {"Authorization": f"Bearer {self.token}"})
        assert connection.getresponse().status == 200
        connection.close()

    def close(self) -> None:
        self.monitor.stopping.set()
        self.server.should_exit = True
        self.thread.join(10)
        self.monitor.stop()
        self.listener.close()


@pytest.fixture
def visited(tmp_path: Path) -> Iterator[Visited]:
    made = Visited(tmp_path / "store")
    yield made
    made.close()


def ended(one: socket.socket) -> bool:
    """Whether the other side has closed it, after whatever it still sends."""
    one.settimeout(0.05)
    try:
        while one.recv(65536):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


def test_a_stream_ends_with_its_token_however_much_there_is_to_say(visited: Visited) -> None:
    guest = visited.monitor.tokens.create(("read",), name="guest")
    stream = visited.connect(visited.head("GET /v1/stream", guest, "Connection: close"))
    seqs = iter(range(1, 100_000))
    wait_for(lambda: (visited.send(next(seqs)), b"busy" in stream.recv(65536))[1])
    visited.monitor.tokens.revoke("guest")

    def over() -> bool:
        visited.send(next(seqs))  # never quiet
        return ended(stream)

    wait_for(over, 10)


@pytest.mark.parametrize("where", ["nothing", "head", "body"])
def test_a_request_that_does_not_come_to_its_end_is_not_waited_for(visited: Visited, where: str) -> None:
    head = visited.head("POST /v1/events", visited.token, "Content-Length: 1000")
    dawdling = visited.connect({"nothing": "", "head": head[:40], "body": head + "{"}[where])
    wait_for(lambda: ended(dawdling), 10)


def test_who_sends_slowly_and_who_waits_between_two_requests_is_left_alone(visited: Visited) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", visited.port, timeout=10)
    for _ in range(2):
        connection.request("GET", "/healthz")
        assert connection.getresponse().read()
        kept = connection.sock
        time.sleep(1.5)  # three times what a request may take
    connection.request("GET", "/healthz")
    assert connection.getresponse().status == 200 and connection.sock is kept
    stream = visited.connect(visited.head("GET /v1/stream", visited.token))
    time.sleep(1.5)
    assert not ended(stream)
    stream.close()
    connection.close()


def test_who_leaves_in_the_middle_of_a_body_leaves_no_traceback(
    visited: Visited, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            visited.connect(
                visited.head("POST /v1/events", visited.token, "Content-Length: 1000") + "{"
            ).close()
        visited.send(1)
        time.sleep(0.3)
    assert [record for record in caplog.records if record.exc_info] == []


def test_a_thousand_half_requests_keep_nobody_out(visited: Visited) -> None:
    crowd = [visited.connect("GET / HTTP/1.1\r\nX: ") for _ in range(1000)]
    visited.send(1)
    wait_for(lambda: all(ended(one) for one in crowd[::50]), 20)
    visited.send(2)
    for one in crowd:
        one.close()


def test_looking_costs_little_with_many_connections() -> None:
    class Waiting:
        timeout_keep_alive_task = object()

    many: list[Any] = [Waiting() for _ in range(20_000)]
    began = time.thread_time()
    Dawdlers().look(many, 0.0)
    assert time.thread_time() - began < 0.5
