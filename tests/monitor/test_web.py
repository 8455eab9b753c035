"""The page's files: a fixed few, with a policy, and no inline code anywhere."""

import asyncio
import re

import httpx
import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from monitor.prometheus.alerts import RULES
from monitor.web import CSP, HEADERS, STATIC, files, static_routes
from monitor.web.runbook import runbook_routes


class Client:
    """GET requests to the page's routes alone."""

    transport = httpx.ASGITransport(app=Starlette(routes=list(static_routes())))

    def get(self, path: str, headers: dict[str, str] | None = None) -> httpx.Response:
        async def ask() -> httpx.Response:
            async with httpx.AsyncClient(transport=self.transport, base_url="http://page") as client:
                return await client.get(path, headers=headers)

        return asyncio.run(ask())


@pytest.fixture(scope="module")
def client() -> Client:
    return Client()


def test_every_file_the_page_names_is_served(client: Client) -> None:
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    wanted = set(re.findall(r'(?:src|href)="/static/([^"]+)"', page.text))
    seen: set[str] = set()
    while wanted - seen:
        name = (wanted - seen).pop()
        seen.add(name)
        answer = client.get(f"/static/{name}")
        assert answer.status_code == 200, name
        wanted |= set(re.findall(r'from "\./([^"]+)"', answer.text))
    assert {"app.js", "run.js", "theme.css", "uPlot.iife.min.js"} <= seen


def test_every_answer_carries_the_policy(client: Client) -> None:
    for path in ("/", "/static/app.js", "/static/nothing.js"):
        headers = client.get(path).headers
        assert headers["content-security-policy"] == CSP
        assert headers["x-content-type-options"] == "nosniff"
    assert "unsafe" not in CSP and "default-src 'none'" in CSP


def test_a_file_that_did_not_change_is_not_sent_again(client: Client) -> None:
    first = client.get("/static/app.js")
    again = client.get("/static/app.js", headers={"If-None-Match": first.headers["etag"]})
    assert again.status_code == 304 and again.content == b""
    assert client.get("/static/app.js", headers={"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize(
    "name",
    [
        "../__init__.py",
        "%2e%2e%2f__init__.py",
        "..%5c__init__.py",
        "/etc/passwd",
        "%2fetc%2fpasswd",
        "app.js%00",
        ".",
    ],
)
def test_no_path_reaches_outside(client: Client, name: str) -> None:
    answer = client.get(f"/static/{name}")
    assert answer.status_code == 404
    assert "import" not in answer.text


def test_nothing_in_the_page_runs_inline_or_parses_html() -> None:
    page = (STATIC / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|javascript:", page)
    for name in files():
        if name.endswith(".js") and not name.startswith("uPlot"):
            code = (STATIC / name).read_text()
            assert not re.search(
                r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", code
            ), name
            assert "http://" not in code and "https://" not in code, name


def _contrast(one: str, other: str) -> float:
    """WCAG 2 contrast of two colours, 1 to 21."""

    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _over(color: str, ground: str) -> str:
    """An 8-digit colour laid over a ground."""
    alpha = int(color[7:9], 16) / 255
    mixed = (
        round(int(color[i : i + 2], 16) * alpha + int(ground[i : i + 2], 16) * (1 - alpha)) for i in (1, 3, 5)
    )
    return "#" + "".join(f"{v:02x}" for v in mixed)


def test_text_has_aa_contrast_in_both_schemes() -> None:
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6,8});", block))
        for block in re.findall(r":root \{(.*?)\n\s*\}", (STATIC / "theme.css").read_text(), flags=re.DOTALL)
    )
    for scheme in (light, dark):
        for ground in ("paper", "card"):
            for text in ("ink", "muted", "predicted", "bad", "warn", "good", "second", "third", "fourth"):
                assert _contrast(scheme[text], scheme[ground]) >= 4.5, (text, ground, scheme[text])
        for tone in ("bad", "warn", "good", "predicted"):
            for ground in ("paper", "card"):
                fill = scheme.get(f"{tone}-soft") or scheme[f"{tone}-fill"]
                badge = _over(fill, scheme[ground])
                assert _contrast(scheme[tone], badge) >= 4.5, (tone, ground)


def test_every_runbook_is_a_page_that_says_what_to_do_and_nothing_else_is_served_there() -> None:
    app = Starlette(routes=runbook_routes(HEADERS))
    client = TestClient(app)
    listed = client.get("/runbooks/").text
    for rule in RULES:
        assert f'href="/runbooks/{rule.alert}.md"' in listed
        page = client.get(f"/runbooks/{rule.alert}.md")
        assert page.status_code == 200 and "<h2>Mitigation</h2>" in page.text
        assert page.headers["content-security-policy"] == CSP and "<script" not in page.text
    for bad in ("..%2f..%2falerts", "LossDiverged", "%00.md", "x.md"):
        answer = client.get(f"/runbooks/{bad}")
        assert answer.status_code == (200 if bad == "LossDiverged" else 404), bad
