"""Requests that are nearly right, by the ten thousand: no 500, none that takes a second, and nobody without a token let in.

Valid events, addresses, headers and cookies are cut, spliced, nested and swapped by a seeded generator and given to the service
as its server would give them. `test_monitor_fuzz` looks deeper with fewer. 18,000 in CI, 500,000 with LOSSCAST_FAULTS=long,
N with LOSSCAST_MUTANTS=N; LOSSCAST_SEED=N replays one order.
"""

import asyncio
import gzip
import json
import os
import random
import time
import urllib.parse
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from monitor import schema as wire
from monitor.service.guard import OPEN
from tests.monitor.test_service import Open, curve, lines

pytestmark = pytest.mark.faults

MUTANTS = int(
    os.environ.get("LOSSCAST_MUTANTS") or (500_000 if os.environ.get("LOSSCAST_FAULTS") == "long" else 18_000)
)
MOST_S = 1.0
"""Of this process's own time, whatever else the machine does."""
RUNS = ("a", "b", "c", "A", "x" * 64, "run-1.2_3")
PATHS = (
    "/healthz", "/readyz", "/metrics", "/v1/events", "/v1/runs", "/v1/runs/a", "/v1/runs/a/samples", "/v1/runs/b/samples",
    "/v1/runs/a/verdicts", "/v1/runs/a/advice", "/v1/runs/b/mute", "/v1/laws", "/v1/openapi.json", "/session", "/", "/static/app.js",
    "/runbooks/LossDiverged", "/v1/stream/x",
)  # fmt: skip
NASTY = (
    b"..", b"%2e%2e%2f", b"/etc/passwd", b"\x00", b"\xff\xfe", b"%00", b"//", b"\\", b"'", b'"', b"<script>alert(1)</script>", b"${7*7}",
    b"1e999", b"-1", b"9" * 40, b"NaN", b"Infinity", b"null", b"true", b"{}", b"[]", b" ", b"\r\n", b"\xed\xa0\x80", "ï¼…".encode(),
    b"\xf0\x9f\x94\xa5", b"%", b"&", b"=", b";", b"a" * 5000,
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**53, 2**53 + 1, -(2**63), 10**40, 0.0, -0.0, 1e308, 1e-320, 0.5, "NaN", "Infinity", "-Infinity",
    "", "a", "\u0000", "\ud800", "<img src=x onerror=alert(1)>", "../../x", "x" * 300, [], {}, [[[[]]]], {"a": {"b": {}}}, [1, "a", None],
)  # fmt: skip


@dataclass
class Mutant:
    """A request as an ASGI server hands it over."""

    method: str
    path: bytes
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes
    known: bool
    """It carries the token."""


class Breeder:
    """Makes them, the same ones from the same seed."""

    def __init__(self, seed: int, token: str) -> None:
        self.rng = random.Random(seed)
        self.token = token.encode()

    def event(self) -> bytes:
        """A line that was an event before one to three of its parts were changed; a quarter are whole."""
        rng, run = self.rng, self.rng.choice(RUNS)
        attempt, step = rng.randint(1, 3), rng.randint(0, 200)
        kind = rng.choice([*sorted(wire.EVENTS), "sample", "sample"])
        if kind == "sample":
            loss = rng.choice([2.5, 3.0, float("nan"), float("inf"), 1e9])
            line = wire.encode_event(wire.sample(run, attempt, step, step=step + 1, loss=loss, time=1.0))
        elif kind == "run_started":
            line = wire.encode_event(
                wire.run_started(run, attempt, time=1.0, resume_step=rng.choice([0, step]))
            )
        else:
            line = wire.encode_event(
                wire.event(kind, run, attempt, time=1.0, step=step, what="lr", reason="done")
            )
        for _ in range(rng.choice((0, 1, 1, 2, 3))):
            line = self.changed(line)
        return line

    def changed(self, line: bytes) -> bytes:
        """One part of a JSON line replaced, or bytes of it cut, doubled or put in between."""
        rng = self.rng
        if rng.random() < 0.7:
            try:
                body = json.loads(line)
            except (ValueError, RecursionError):
                body = None
            if isinstance(body, dict) and body:
                name = rng.choice(
                    [*body, "prediction", "target_loss", "control", "team", "total_tokens", "extra"]
                )
                if rng.random() < 0.15:
                    body.pop(name, None)
                else:
                    body[name] = rng.choice(VALUES)
                return json.dumps(body).encode("utf-8", "surrogatepass") + b"\n"
        return self.spliced(line)

    def spliced(self, text: bytes) -> bytes:
        rng = self.rng
        at, to = sorted(rng.randint(0, len(text)) for _ in range(2))
        how = rng.randrange(5)
        if how == 0:
            return text[:at] + text[to:]
        if how == 1:
            return text[:at] + text[at:to] * 2 + text[to:]
        if how == 2:
            return text[:at] + rng.choice(NASTY) + text[at:]
        if how == 3 and text:
            return text[: at - 1] + bytes([rng.randrange(256)]) + text[at:] if at else text
        return text[:at] + b"[" * rng.choice((1, 50, 2000)) + text[at:]

    def body(self) -> tuple[bytes, bytes]:
        """A body and how it is encoded."""
        rng = self.rng
        body = b"".join(self.event() for _ in range(rng.choice((0, 1, 1, 2, 6))))
        how = rng.randrange(8)
        if how == 0:
            return gzip.compress(body, 1), b"gzip"
        if how == 1:
            return self.spliced(gzip.compress(body, 1)), b"gzip"
        return body, rng.choice((b"", b"", b"", b"", b"br", b"identity"))

    def one(self) -> Mutant:
        rng = self.rng
        sends = rng.random() < 0.5
        path = b"/v1/events" if sends else rng.choice(PATHS).encode()
        if rng.random() < (0.1 if sends else 0.4):
            path = b"/" + self.spliced(path)[1:]
        query = b""
        if not sends or rng.random() < 0.1:
            query = b"&".join(
                rng.choice((b"from", b"to", b"max", b"attempt", b"names", b"x"))
                + b"="
                + rng.choice((b"1", b"3000", *NASTY))
                for _ in range(rng.randrange(4))
            )
        method = (
            "POST" if sends else rng.choice(("GET", "GET", "GET", "POST", "DELETE", "PUT", "OPTIONS", "HEAD"))
        )
        body, encoding = self.body() if method == "POST" else (b"", b"")
        headers = [(b"host", b"monitor")]
        if encoding:
            headers.append((b"content-encoding", encoding))
        if rng.random() < 0.2:
            headers.append((rng.choice((b"content-length", b"content-type", b"accept", b"origin", b"sec-fetch-site", b"last-event-id")),
                            rng.choice(NASTY).translate(None, b"\r\n\x00")))  # fmt: skip
        known = rng.random() < 0.8
        if known:
            headers.append((b"authorization", b"Bearer " + self.token))
        elif rng.random() < 0.7:
            name = rng.choice((b"authorization", b"cookie"))
            secret = self.token
            while secret.strip() == self.token:
                secret = self.spliced(self.token).translate(None, b"\r\n\x00")
            headers.append((name, (b"Bearer " if name == b"authorization" else b"losscast=") + secret))
        return Mutant(method, path, query, headers, body, known)


def printable(target: bytes) -> bytes:
    """Part of an address as one can be sent at all: an HTTP server refuses other bytes itself."""
    return b"".join(bytes([c]) if 0x21 <= c <= 0x7E and c not in b"?#" else b"%%%02X" % c for c in target)


async def answer(app: Any, mutant: Mutant) -> tuple[int, bytes]:
    """What the application says to it."""
    raw = printable(mutant.path)
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": mutant.method, "scheme": "http",
        "path": urllib.parse.unquote(raw.decode()), "raw_path": raw, "query_string": printable(mutant.query), "root_path": "",
        "headers": mutant.headers, "client": ("127.0.0.1", 1), "server": ("monitor", 80), "state": {},
    }  # fmt: skip
    given = [{"type": "http.request", "body": mutant.body, "more_body": False}]
    status, parts = 0, list[bytes]()

    async def receive() -> dict[str, Any]:
        if given:
            return given.pop()
        await asyncio.sleep(0.01)  # whoever sent it hangs up: a stream would not end
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            parts.append(message.get("body", b""))

    await app(scope, receive, send)
    return status, b"".join(parts)


def open_to_all(path: str) -> bool:
    return path in OPEN or path.startswith(("/static/", "/runbooks/"))


def test_no_request_that_is_nearly_right_breaks_it_or_gets_in(tmp_path: Path) -> None:
    seed = int(os.environ.get("LOSSCAST_SEED", "20261130"))
    opened = Open(tmp_path / "store")
    opened.monitor.store.connection.execute("PRAGMA synchronous=OFF")  # it is not the disk that is tried here
    opened.send(*lines("a", curve(60)), *lines("b", [*curve(40), float("nan")]))
    token = opened.monitor.tokens.create(("ingest", "read", "operate"), max_runs=None)
    breeder, statuses = Breeder(seed, token), Counter[int]()

    async def all_of_them() -> None:
        for number in range(MUTANTS):
            mutant = breeder.one()
            began = time.process_time()
            status, body = await answer(opened.app, mutant)
            took = time.process_time() - began
            path = urllib.parse.unquote(printable(mutant.path).decode())
            wrong = (
                not 200 <= status < 500
                or took >= MOST_S
                or (not mutant.known and status != 401 and not open_to_all(path))
                or b"Traceback" in body
                or b"root:x:" in body
            )
            assert not wrong, (
                f"number {number} of seed {seed}, {took:.2f} s: {mutant}: {status} {body[:300]!r}"
            )
            statuses[status] += 1

    try:
        asyncio.run(all_of_them())
        told = opened.monitor.ingest.runs
        assert {"a", "b"} <= set(told) and all(wire.is_run_id(run) for run in told)
    finally:
        opened.close()
    assert min(statuses[s] for s in (200, 400, 401, 404, 405, 422)) > 0, statuses
    print(f"{MUTANTS} requests of seed {seed}: {dict(sorted(statuses.items()))}")
