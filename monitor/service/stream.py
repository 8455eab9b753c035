"""`/v1/stream`: what changes of the runs, over server-sent events, for as long as the token holds."""

import asyncio
from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from monitor.service.answers import encode, trouble
from monitor.service.guard import needs
from monitor.service.monitor import Monitor

STREAM_S = 0.5
STREAM_RUNS = 500
MAX_STREAMS = 64


def stream_route(monitor: Monitor) -> Route:
    """At most MAX_STREAMS pages at once."""
    streams = 0

    async def stream(request: Request) -> Response:
        token = needs(request, "read")
        if streams >= MAX_STREAMS:
            return trouble(429, "too many pages are open", retry_after=10)

        def changed(after: int) -> tuple[int, bytes]:
            now = monitor.clock()
            monitor.look(now)
            versions = dict(monitor.versions)
            by_id = {facts.run_id: facts for facts in list(monitor.ingest.runs.values())}
            fresh = sorted((v, id) for id, v in versions.items() if v > after)[-STREAM_RUNS:]
            runs = [by_id[id] for _, id in fresh if id in by_id]
            lines = [b"data: " + encode(one) + b"\n\n" for one in monitor.summaries(runs, now)]
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

    return Route("/v1/stream", stream, methods=["GET"])
