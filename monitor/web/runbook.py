"""The runbooks as pages of the monitor itself: what an alert means, what it costs, how to look, what to do.

They are packaged with it, hold no data, and so are open like the page's other files: who is paged reads first, and signs
in later. While the monitor is down `losscast alert runbook NAME` prints the same text.
"""

import functools
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from monitor.web.markup import Html, tag

FOLDER = Path(__file__).parent / "runbooks"


@functools.cache
def texts() -> dict[str, str]:
    """Every runbook's Markdown by the name of its alert."""
    return {path.stem: path.read_text("utf-8") for path in sorted(FOLDER.glob("*.md"))}


@functools.cache
def page(name: str) -> str:
    """A runbook as HTML; its list for "". Raises KeyError."""
    from markdown_it import MarkdownIt

    if name:
        body = Html(MarkdownIt("commonmark", {"html": False}).render(texts()[name]))
    else:
        links = (tag("li", tag("a", known, href=f"/runbooks/{known}.md")) for known in texts())
        body = Html(tag("h1", "Runbooks") + tag("ul", *links))
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"{tag('title', (name or 'Runbooks') + ' - losscast')}"
        '<link rel="icon" href="/static/icon.svg"><link rel="stylesheet" href="/static/theme.css">'
        '<link rel="stylesheet" href="/static/runbook.css"></head><body><main>'
    )
    way = tag(
        "p",
        tag("a", "all runbooks", href="/runbooks/"),
        " \N{MIDDLE DOT} ",
        tag("a", "runs", href="/"),
        cls="way",
    )
    return f"{head}{way}{body}</main></body></html>"


def runbook_routes(headers: dict[str, str]) -> list[Route]:
    """`/runbooks/` and `/runbooks/{alert}.md`."""

    async def answer(request: Request) -> Response:
        name = request.path_params.get("page", "").removesuffix(".md")
        if name and name not in texts():
            return Response("no such runbook\n", status_code=404, media_type="text/plain", headers=headers)
        return Response(page(name), media_type="text/html; charset=utf-8", headers=headers)

    return [
        Route("/runbooks/", answer, methods=["GET"]),
        Route("/runbooks/{page}", answer, methods=["GET"]),
    ]
