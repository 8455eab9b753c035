"""Who is let in. Denied by default: a request without a token or a session gets 401, whatever its path, but for OPEN, the
page's own files and the runbooks. A session is a cookie that no script can read and no other site can send.
"""

import json

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from monitor.service.answers import body_of, trouble
from monitor.service.monitor import Monitor
from monitor.service.tokens import SESSION_S, Token
from monitor.store.ingest import Refused
from monitor.web import HEADERS
from monitor.wire import TooLarge

COOKIE = "losscast"
OPEN = frozenset({"/", "/healthz", "/session"})


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
            if path == "/v1/events" and scope["method"] == "POST":  # a page that is opened refuses no events
                self.monitor.totals.reject("unauthorized")
            await trouble(401, why)(scope, receive, sealed)
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
        if cross_site(request):
            return None, "a session serves its own page only"
        return self.monitor.tokens.of_session(
            cookie, self.monitor.clock()
        ), "the session is over; sign in again"


def cross_site(request: Request) -> bool:
    """True for what a browser sends on behalf of another site."""
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        return site not in ("same-origin", "none")
    origin = request.headers.get("origin")
    return origin is not None and origin.partition("://")[2] != request.headers.get("host")


def needs(request: Request, scope: str) -> Token:
    """The request's token. Raises Refused where it lacks the scope."""
    token: Token = request.scope["state"]["token"]
    if not (token.may(scope) or (scope == "ingest" and token.may_ingest)):
        raise Refused(403, "scope", f"this token has no scope {scope}")
    return token


def session_route(monitor: Monitor, tls: bool) -> Route:
    """`/session`: a token for a cookie, and out again."""

    async def session(request: Request) -> Response:
        if cross_site(request):
            return trouble(403, "a session is made from the monitor's own page only")
        if request.method == "DELETE":
            answer = Response(status_code=204)
            answer.delete_cookie(COOKIE, httponly=True, samesite="strict", secure=tls)
            return answer
        try:
            said = json.loads(await body_of(request, 4096))
            secret = said.get("token") if isinstance(said, dict) else None
        except (ValueError, RecursionError, TooLarge):
            secret = None
        if not isinstance(secret, str):
            return trouble(400, 'need {"token": "..."}')
        token = monitor.tokens.find(secret.strip())
        if token is None or not token.may("read"):
            return trouble(401, "unknown token, or one that may not read")
        answer = Response(status_code=204)
        answer.set_cookie(
            COOKIE, monitor.tokens.session(token, monitor.clock()), max_age=SESSION_S, httponly=True,
            samesite="strict", secure=tls,
        )  # fmt: skip
        return answer

    return Route("/session", session, methods=["POST", "DELETE"])
