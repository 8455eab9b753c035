"""The monitor over HTTP: who may ask what, and the answers.

Denied by default: whatever the path, a request without a token or a session gets 401, but for the page's own files,
the runbooks, `/healthz` and `/session`. A session is a cookie that no script can read and no other site can send.

What `POST /v1/events` answers: 200 on disk; 400 not NDJSON; 401, 403 the token; 409 an older attempt; 413 too large;
422 a line that can't be used; 429 too much waits, or too many runs; 503 and 507 nothing was stored, send it again.
"""

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from monitor.errors import Failed, WrongInput
from monitor.schema import MAX_BODY_BYTES, is_run_id, spell
from monitor.service.attention import MOST_S
from monitor.service.exporter import CONTENT_TYPE
from monitor.service.monitor import Monitor
from monitor.service.openapi import document
from monitor.service.tokens import SESSION_S, Token
from monitor.store.columns import Damaged
from monitor.store.facts import RunFacts
from monitor.store.ingest import Refused, Taken
from monitor.store.reading import LAST, rows
from monitor.web import HEADERS, static_routes
from monitor.web.runbook import runbook_routes
from monitor.wire import BadLine, TooLarge, inflate, parse
from monitor.wire import Request as Parsed

COOKIE = "losscast"
OPEN = frozenset({"/", "/healthz", "/session"})
LARGE_BODY_BYTES = 128 << 10
STREAM_S = 0.5
STREAM_RUNS = 500
MAX_STREAMS = 64
MAX_POINTS = 100_000


def _error(status: int, message: str, **more: Any) -> Response:
    headers = {}
    if "retry_after" in more:
        headers["Retry-After"] = str(more.pop("retry_after"))
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": message, **more}, status, headers)


class Guard:
    """Lets in who has a token, and puts the browser's rules on every answer."""

    def __init__(self, app: ASGIApp, monitor: Monitor):
        self.app, self.monitor = app, monitor

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            return

        async def sealed(message: Message) -> None:
            if message["type"] == "http.response.start":
                there = {name.lower() for name, _ in message["headers"]}
                more = [(k.lower().encode(), v.encode()) for k, v in HEADERS.items()]
                more.append((b"cache-control", b"no-store"))
                message["headers"] = [*message["headers"], *((k, v) for k, v in more if k not in there)]
            await send(message)

        path = scope["path"]
        if path in OPEN or path.startswith(("/static/", "/runbooks/")):
            await self.app(scope, receive, sealed)
            return
        request = Request(scope)
        token, why = self._token(request)
        if token is None:
            self.monitor.totals.reject("unauthorized")
            await _error(401, why)(scope, receive, sealed)
            return
        scope.setdefault("state", {})["token"] = token
        await self.app(scope, receive, sealed)

    def _token(self, request: Request) -> tuple[Token | None, str]:
        header = request.headers.get("authorization")
        if header is not None:
            kind, _, secret = header.partition(" ")
            found = self.monitor.tokens.find(secret.strip()) if kind.lower() == "bearer" else None
            return found, "unknown token; `losscast monitor token create --store DIR` makes one"
        cookie = request.cookies.get(COOKIE)
        if cookie is None:
            return None, "a token is needed: Authorization: Bearer ..."
        if _cross_site(request):
            return None, "a session serves its own page only"
        return self.monitor.tokens.of_session(
            cookie, self.monitor.clock()
        ), "the session is over; sign in again"


def _cross_site(request: Request) -> bool:
    """True for what a browser sends on behalf of another site."""
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        return site not in ("same-origin", "none")
    origin = request.headers.get("origin")
    return origin is not None and origin.partition("://")[2] != request.headers.get("host")


def build(monitor: Monitor, *, tls: bool = False) -> ASGIApp:
    """The application. `tls`: cookies travel over TLS only."""

    def needs(request: Request, scope: str) -> Token:
        token: Token = request.scope["state"]["token"]
        if not (token.may(scope) or (scope == "ingest" and token.may_ingest)):
            raise Refused(403, "scope", f"this token has no scope {scope}")
        return token

    def run_of(request: Request) -> RunFacts:
        needs(request, "read")
        return named(request)

    def named(request: Request) -> RunFacts:
        name = request.path_params["run"]
        facts = monitor.run(name) if is_run_id(name) else None
        if facts is None:
            shown = f"no run is called {name}" if is_run_id(name) else "that is no run's name"
            raise Refused(404, "run", f"{shown}; GET /v1/runs lists them")
        return facts

    async def events(request: Request) -> Response:
        try:
            token = needs(request, "ingest")
            body = await _body(request)
            encoding = request.headers.get("content-encoding", "identity").strip().lower()
            if encoding not in ("identity", "gzip", ""):
                raise BadLine(0, f"Content-Encoding {encoding[:40]!r}; send gzip or none", "encoding")
            zipped = encoding == "gzip"
            if len(body) > LARGE_BODY_BYTES:
                parsed = await asyncio.to_thread(_parsed, body, zipped)
            else:
                parsed = _parsed(body, zipped)
            may = None if token.may("ingest") else token.may_write
            done: Future[Taken] = monitor.ingest.submit(parsed, token.id, may, token.max_runs)
            taken = await asyncio.wrap_future(done)
        except TooLarge as error:
            monitor.totals.reject("too_large")
            return _error(413, str(error))
        except BadLine as error:
            monitor.totals.reject(error.reason)
            return _error(400 if error.reason in ("json", "encoding") else 422, str(error), line=error.line)
        except Refused as refused:
            monitor.totals.reject(refused.reason)
            return _refused(refused)
        monitor.totals.passed_over(taken.unknown, taken.duplicates)
        return JSONResponse(
            {"accepted": taken.accepted, "duplicates": taken.duplicates, "unknown": taken.unknown}
        )

    def runs(request: Request) -> Response:
        needs(request, "read")
        now = monitor.clock()
        return _json({"runs": [monitor.summary(facts, now) for facts in list(monitor.ingest.runs.values())]})

    def run(request: Request) -> Response:
        return _json(monitor.detail(run_of(request), monitor.clock()))

    def samples(request: Request) -> Response:
        facts = run_of(request)
        first, last = _count(request, "from", 0), _count(request, "to", LAST)
        most, attempt = _count(request, "max", 0), _count(request, "attempt", -1)
        total, fewer, parts = monitor.samples(facts, first, last, None if attempt < 0 else attempt, most)

        def answer() -> Iterator[bytes]:
            yield b'{"run":"%s","thinned":%s,"total":%d,"samples":[' % (
                facts.run.encode(), b"true" if fewer else b"false", total
            )  # fmt: skip
            comma = b""
            for block in rows(parts):
                yield comma + _encode(block)[1:-1]
                comma = b","
            yield b"]}"

        if total <= 5000 or fewer:
            return Response(b"".join(answer()), media_type="application/json")
        return StreamingResponse(answer(), media_type="application/json")

    def verdicts(request: Request) -> Response:
        facts = run_of(request)
        return _json(
            {
                "run": facts.run,
                "verdicts": monitor.store.verdicts(facts.run_id),
                "alerts": monitor.store.alerts(facts.run_id),
            }
        )

    def advice(request: Request) -> Response:
        facts = run_of(request)
        return _json({"run": facts.run, "advice": monitor.advice(facts)})

    async def said(request: Request) -> dict[str, Any]:
        """The JSON object in a request's body; {} where there is none. Raises Refused."""
        try:
            body = await _body(request, 4096)
            found = json.loads(body) if body.strip() else {}
        except (ValueError, RecursionError, TooLarge):
            found = None
        if not isinstance(found, dict):
            raise Refused(422, "invalid", "need a JSON object of at most 4096 bytes")
        return found

    def seconds(body: dict[str, Any]) -> float | None:
        value = body.get("for_s")
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= MOST_S:
            raise Refused(422, "invalid", f"for_s: need seconds, more than nothing and at most {MOST_S:g}")
        return float(value)

    def known(body: dict[str, Any], *names: str) -> None:
        for name in body:
            if name not in names:
                raise Refused(
                    422, "invalid", f"{name[:40]!r} is not known here; there are {', '.join(names)}"
                )

    async def mute(request: Request) -> Response:
        token, facts = needs(request, "operate"), named(request)
        if request.method == "DELETE":
            await asyncio.to_thread(monitor.unmute, facts)
            return Response(status_code=204)
        body = await said(request)
        known(body, "for_s", "alerts", "why")
        for_s, names, why = seconds(body), body.get("alerts", []), body.get("why", "")
        if for_s is None or not isinstance(why, str) or len(why) > 300:
            raise Refused(
                422, "invalid", 'need {"for_s": 3600, "alerts": [...], "why": "..."}, the last two optional'
            )
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise Refused(422, "invalid", "alerts: need a list of alerts' names")
        by = token.name or token.id
        made = await asyncio.to_thread(monitor.mute, facts, for_s, tuple(names), by, _clean(why))
        return _json(made)

    async def see(request: Request) -> Response:
        token, facts = needs(request, "operate"), named(request)
        if request.method == "DELETE":
            await asyncio.to_thread(monitor.unsee, facts)
            return Response(status_code=204)
        body = await said(request)
        known(body, "for_s")
        for_s = seconds(body)
        found = monitor.advice(facts)
        if found is None:
            return _error(409, f"nothing is advised of {facts.run} yet")
        await asyncio.to_thread(monitor.see, facts, str(found.get("action")), for_s, token.name or token.id)
        return _json({"run": facts.run, "advice": monitor.advice(facts)})

    def laws(request: Request) -> Response:
        needs(request, "read")
        return _json(spell({"laws": monitor.law_views()}))

    def openapi(request: Request) -> Response:
        needs(request, "read")
        return _json(document(monitor.exporter.version))

    def metrics(request: Request) -> Response:
        needs(request, "read")
        return Response(monitor.exporter.text(), media_type=CONTENT_TYPE)

    async def healthz(request: Request) -> Response:
        return JSONResponse({"status": "ok" if monitor.ingest.failing is None else "store failing"})

    async def session(request: Request) -> Response:
        if _cross_site(request):
            return _error(403, "a session is made from the monitor's own page only")
        if request.method == "DELETE":
            answer = Response(status_code=204)
            answer.delete_cookie(COOKIE, httponly=True, samesite="strict", secure=tls)
            return answer
        try:
            said = json.loads(await _body(request, 4096))
            secret = said.get("token") if isinstance(said, dict) else None
        except (ValueError, RecursionError, TooLarge):
            secret = None
        if not isinstance(secret, str):
            return _error(400, 'need {"token": "..."}')
        token = monitor.tokens.find(secret.strip())
        if token is None or not token.may("read"):
            monitor.totals.reject("unauthorized")
            return _error(401, "unknown token, or one that may not read")
        answer = Response(status_code=204)
        answer.set_cookie(
            COOKIE, monitor.tokens.session(token, monitor.clock()), max_age=SESSION_S, httponly=True,
            samesite="strict", secure=tls,
        )  # fmt: skip
        return answer

    streams = 0

    async def stream(request: Request) -> Response:
        needs(request, "read")
        if streams >= MAX_STREAMS:
            return _error(429, "too many pages are open", retry_after=10)
        token: Token = request.scope["state"]["token"]

        def changed(after: int) -> tuple[int, bytes]:
            now = monitor.clock()
            versions = dict(monitor.versions)
            by_id = {facts.run_id: facts for facts in list(monitor.ingest.runs.values())}
            fresh = sorted((v, id) for id, v in versions.items() if v > after)[-STREAM_RUNS:]
            lines = [
                b"data: " + _encode(monitor.summary(by_id[id], now)) + b"\n\n"
                for _, id in fresh
                if id in by_id
            ]
            return (fresh[-1][0] if fresh else after), b"".join(lines)

        async def tell() -> AsyncIterator[bytes]:
            nonlocal streams
            streams += 1
            try:
                yield b"retry: 1000\n\n"
                seen, quiet_s = 0, 0.0
                while not monitor.stopping.is_set() and monitor.tokens.holds(token):
                    seen, said = await asyncio.to_thread(changed, seen)
                    if said:
                        quiet_s = 0.0
                        yield said
                    elif quiet_s >= 15.0:
                        quiet_s = 0.0
                        yield b": still here\n\n"
                    await asyncio.sleep(STREAM_S)
                    quiet_s += STREAM_S
            finally:
                streams -= 1

        return StreamingResponse(tell(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return _refused(error)

    async def damaged(request: Request, error: Exception) -> Response:
        return _error(503, str(error))

    async def wrong(request: Request, error: Exception) -> Response:
        return _error(422, str(error))

    async def nothing(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    async def left(request: Request, error: Exception) -> Response:
        return Response(status_code=400)  # nobody is there to read it

    app = Starlette(
        routes=[
            *static_routes(),
            *runbook_routes(HEADERS),
            Route("/healthz", healthz, methods=["GET"]),
            Route("/session", session, methods=["POST", "DELETE"]),
            Route("/metrics", metrics, methods=["GET"]),
            Route("/v1/events", events, methods=["POST"]),
            Route("/v1/stream", stream, methods=["GET"]),
            Route("/v1/runs", runs, methods=["GET"]),
            Route("/v1/runs/{run}", run, methods=["GET"]),
            Route("/v1/runs/{run}/samples", samples, methods=["GET"]),
            Route("/v1/runs/{run}/verdicts", verdicts, methods=["GET"]),
            Route("/v1/runs/{run}/advice", advice, methods=["GET"]),
            Route("/v1/runs/{run}/advice", see, methods=["POST", "DELETE"]),
            Route("/v1/runs/{run}/mute", mute, methods=["POST", "DELETE"]),
            Route("/v1/laws", laws, methods=["GET"]),
            Route("/v1/openapi.json", openapi, methods=["GET"]),
        ],
        exception_handlers={
            Refused: refused,
            Damaged: damaged,
            Failed: damaged,
            sqlite3.Error: damaged,
            WrongInput: wrong,
            HTTPException: nothing,
            ClientDisconnect: left,
        },
    )
    return Guard(app, monitor)


def _parsed(body: bytes, zipped: bool) -> Parsed:
    return parse(inflate(body) if zipped else body)


async def _body(request: Request, most: int = MAX_BODY_BYTES) -> bytes:
    """The body, at most `most` bytes. Raises TooLarge."""
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > most:
        raise TooLarge(f"{length[:20]} bytes; a request may have {most}, compressed or not")
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise TooLarge(f"a request may have {most} bytes, compressed or not")
        parts.append(part)
    return b"".join(parts)


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _refused(refused: Refused) -> Response:
    return _error(refused.status, str(refused), **refused.detail)


def _count(request: Request, name: str, default: int) -> int:
    text = request.query_params.get(name)
    if text is None or text == "":
        return default
    try:
        value = float(text) if len(text) <= 32 else float("nan")
        if value != value:
            raise ValueError
        return int(min(max(value, -1.0), float(LAST)))
    except ValueError:
        raise Refused(422, "invalid", f"{name}: need a number; got {text[:40]!r}") from None


_fast = msgspec.json.Encoder().encode


def _encode(value: Any) -> bytes:
    try:
        return _fast(value)
    except (UnicodeEncodeError, OverflowError, TypeError):  # what only Python's own writer takes
        return json.dumps(value, separators=(",", ":")).encode()


def _json(value: Any) -> Response:
    return Response(_encode(value), media_type="application/json")
