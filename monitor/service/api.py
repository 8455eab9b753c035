"""The monitor over HTTP: its routes. `monitor.service.guard` says who is let in at all.

What `POST /v1/events` answers: 200 on disk; 400 not NDJSON; 401, 403 the token; 409 an older attempt; 413 too large;
422 a line that can't be used; 429 too much waits, or too many runs; 503 and 507 nothing was stored, send it again.
"""

import asyncio
import sqlite3
from collections.abc import Iterator
from concurrent.futures import Future

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from monitor.errors import Failed, WrongInput
from monitor.schema import is_run_id, spell
from monitor.service.answers import (
    answer,
    body_of,
    clean,
    count,
    encode,
    known,
    refusal,
    said,
    seconds,
    trouble,
)
from monitor.service.attention import MOST_S
from monitor.service.exporter import CONTENT_TYPE
from monitor.service.guard import Guard, needs, session_route
from monitor.service.monitor import Monitor
from monitor.service.openapi import document
from monitor.service.stream import stream_route
from monitor.store.columns import Damaged
from monitor.store.facts import RunFacts
from monitor.store.ingest import Refused, Taken
from monitor.store.reading import LAST, rows
from monitor.web import HEADERS, static_routes
from monitor.web.runbook import runbook_routes
from monitor.wire import BadLine, TooLarge, inflate, parse
from monitor.wire import Request as Parsed

LARGE_BODY_BYTES = 128 << 10
"""A body that takes longer to read than others should wait for; gzip makes an eighth of it."""


def build(monitor: Monitor, *, tls: bool = False) -> ASGIApp:
    """The application. `tls`: cookies travel over TLS only."""

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
            body = await body_of(request)
            encoding = request.headers.get("content-encoding", "identity").strip().lower()
            if encoding not in ("identity", "gzip", ""):
                raise BadLine(0, f"Content-Encoding {encoding[:40]!r}; send gzip or none", "encoding")
            zipped = encoding == "gzip"
            if len(body) * (8 if zipped else 1) > LARGE_BODY_BYTES:
                parsed = await asyncio.to_thread(_parsed, body, zipped)
            else:
                parsed = _parsed(body, zipped)
            may = None if token.may("ingest") else token.may_write
            done: Future[Taken] = monitor.ingest.submit(parsed, token.id, may, token.max_runs)
            taken = await asyncio.wrap_future(done)
        except TooLarge as error:
            monitor.totals.reject("too_large")
            return trouble(413, str(error))
        except BadLine as error:
            monitor.totals.reject(error.reason)
            return trouble(400 if error.reason in ("json", "encoding") else 422, str(error), line=error.line)
        except Refused as refused:
            monitor.totals.reject(refused.reason)
            return refusal(refused)
        monitor.totals.passed_over(taken.unknown, taken.duplicates)
        return JSONResponse(
            {"accepted": taken.accepted, "duplicates": taken.duplicates, "unknown": taken.unknown}
        )

    def runs(request: Request) -> Response:
        needs(request, "read")
        now = monitor.clock()
        return answer({"runs": list(monitor.summaries(list(monitor.ingest.runs.values()), now))})

    def run(request: Request) -> Response:
        return answer(monitor.detail(run_of(request), monitor.clock()))

    def samples(request: Request) -> Response:
        facts = run_of(request)
        first, last = count(request, "from", 0), count(request, "to", LAST)
        most, attempt = count(request, "max", 0), count(request, "attempt", -1)
        total, fewer, parts = monitor.samples(facts, first, last, None if attempt < 0 else attempt, most)

        def text() -> Iterator[bytes]:
            yield b'{"run":"%s","thinned":%s,"total":%d,"samples":[' % (
                facts.run.encode(), b"true" if fewer else b"false", total
            )  # fmt: skip
            comma = b""
            for block in rows(parts):
                yield comma + encode(block)[1:-1]
                comma = b","
            yield b"]}"

        if sum(columns.n for _, columns in parts) <= 5000:
            return Response(b"".join(text()), media_type="application/json")
        return StreamingResponse(text(), media_type="application/json")

    def verdicts(request: Request) -> Response:
        facts = run_of(request)
        return answer(
            {
                "run": facts.run,
                "verdicts": monitor.store.verdicts(facts.run_id),
                "alerts": monitor.store.alerts(facts.run_id),
            }
        )

    def advice(request: Request) -> Response:
        facts = run_of(request)
        return answer({"run": facts.run, "advice": monitor.advice(facts)})

    async def mute(request: Request) -> Response:
        token, facts = needs(request, "operate"), named(request)
        if request.method == "DELETE":
            await asyncio.to_thread(monitor.unmute, facts)
            return Response(status_code=204)
        body = await said(request)
        known(body, "for_s", "alerts", "why")
        for_s, names, why = seconds(body, MOST_S), body.get("alerts", []), body.get("why", "")
        if for_s is None or not isinstance(why, str) or len(why) > 300:
            raise Refused(
                422, "invalid", 'need {"for_s": 3600, "alerts": [...], "why": "..."}, the last two optional'
            )
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise Refused(422, "invalid", "alerts: need a list of alerts' names")
        by = token.name or token.id
        made = await asyncio.to_thread(monitor.mute, facts, for_s, tuple(names), by, clean(why))
        return answer(made)

    async def see(request: Request) -> Response:
        token, facts = needs(request, "operate"), named(request)
        if request.method == "DELETE":
            await asyncio.to_thread(monitor.unsee, facts)
            return Response(status_code=204)
        body = await said(request)
        known(body, "for_s")
        for_s = seconds(body, MOST_S)
        found = monitor.advice(facts)
        if found is None:
            return trouble(409, f"nothing is advised of {facts.run} yet")
        await asyncio.to_thread(monitor.see, facts, str(found.get("action")), for_s, token.name or token.id)
        return answer({"run": facts.run, "advice": monitor.advice(facts)})

    def laws(request: Request) -> Response:
        needs(request, "read")
        return answer(spell({"laws": monitor.law_views()}))

    def openapi(request: Request) -> Response:
        needs(request, "read")
        return answer(document(monitor.exporter.version))

    def metrics(request: Request) -> Response:
        needs(request, "read")
        return Response(monitor.exporter.text(), media_type=CONTENT_TYPE)

    async def healthz(request: Request) -> Response:
        return JSONResponse({"status": "ok" if monitor.ingest.failing is None else "store failing"})

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return refusal(error)

    async def damaged(request: Request, error: Exception) -> Response:
        return trouble(503, str(error))

    async def wrong(request: Request, error: Exception) -> Response:
        return trouble(422, str(error))

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
            session_route(monitor, tls),
            Route("/metrics", metrics, methods=["GET"]),
            Route("/v1/events", events, methods=["POST"]),
            stream_route(monitor),
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
