"""What the API's routes have in common: bodies and numbers read within limits, answers and errors written as JSON."""

import json
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from monitor.schema import MAX_BODY_BYTES
from monitor.store.ingest import Refused
from monitor.store.reading import LAST
from monitor.wire import TooLarge


def trouble(status: int, message: str, **more: Any) -> Response:
    """An error's answer; `retry_after` becomes its header."""
    headers = {}
    if "retry_after" in more:
        headers["Retry-After"] = str(more.pop("retry_after"))
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": message, **more}, status, headers)


async def body_of(request: Request, most: int = MAX_BODY_BYTES) -> bytes:
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


async def said(request: Request) -> dict[str, Any]:
    """The JSON object in a request's body; {} where there is none. Raises Refused."""
    try:
        body = await body_of(request, 4096)
        found = json.loads(body) if body.strip() else {}
    except (ValueError, RecursionError, TooLarge):
        found = None
    if not isinstance(found, dict):
        raise Refused(422, "invalid", "need a JSON object of at most 4096 bytes")
    return found


def seconds(body: dict[str, Any], most: float) -> float | None:
    """`for_s` of a body; None where it is not said. Raises Refused."""
    value = body.get("for_s")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= most:
        raise Refused(422, "invalid", f"for_s: need seconds, more than nothing and at most {most:g}")
    return float(value)


def known(body: dict[str, Any], *names: str) -> None:
    """Raise Refused for a key that is none of these."""
    for name in body:
        if name not in names:
            raise Refused(422, "invalid", f"{name[:40]!r} is not known here; there are {', '.join(names)}")


def clean(text: str) -> str:
    """What a person typed, without halves of surrogate pairs."""
    return text.encode("utf-8", "replace").decode()


def refusal(refused: Refused) -> Response:
    """The answer to a request that was not taken."""
    return trouble(refused.status, str(refused), **refused.detail)


def count(request: Request, name: str, default: int) -> int:
    """A whole number from the query string, cut to -1..LAST. Raises Refused."""
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


def encode(value: Any) -> bytes:
    """As JSON."""
    try:
        return _fast(value)
    except (UnicodeEncodeError, OverflowError, TypeError):  # what only Python's own writer takes
        return json.dumps(value, separators=(",", ":")).encode()


def answer(value: Any) -> Response:
    """200 with a JSON body."""
    return Response(encode(value), media_type="application/json")
