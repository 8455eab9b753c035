"""The page's files and the rules a browser keeps while it shows them.

Plain HTML, CSS and ES modules: what is in `static/` is what the browser runs. Files come from a dictionary
that is filled when the module is first asked, so a path is only looked up in it, never joined to a folder.
"""

import functools
import hashlib
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

STATIC = Path(__file__).parent / "static"

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
"""Content-Security-Policy of the page: no inline script or style. uPlot sets styles through the CSSOM."""

HEADERS = {
    "Content-Security-Policy": CSP,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}

KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}


@functools.cache
def files() -> dict[str, tuple[bytes, str, str]]:
    """Every file the page may ask for: name to content, media type and ETag."""
    found = {}
    for path in sorted(STATIC.iterdir()):
        if path.suffix in KINDS and path.is_file():
            content = path.read_bytes()
            found[path.name] = (content, KINDS[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    return found


def _answer(request: Request, name: str) -> Response:
    if name not in files():
        return Response("no such file\n", status_code=404, media_type="text/plain", headers=HEADERS)
    content, kind, etag = files()[name]
    headers = {**HEADERS, "ETag": etag, "Cache-Control": "no-cache"}
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if etag in known:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=kind, headers=headers)


async def _page(request: Request) -> Response:
    return _answer(request, "index.html")


async def _file(request: Request) -> Response:
    return _answer(request, request.path_params["file"])


def static_routes() -> list[Route]:
    """`/` and `/static/{file}`. They hold no data, so they are open; every answer carries the policy."""
    return [Route("/", _page, methods=["GET"]), Route("/static/{file}", _file, methods=["GET"])]
