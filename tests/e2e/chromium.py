"""A real headless Chromium for tests, and a tab that remembers what went wrong in it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    "--no-sandbox",
    "--headless",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

needs_chromium = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no {CHROMIUM} to open the page in")


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A browser with a profile of its own."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as p:
        started = p.chromium.launch(executable_path=str(CHROMIUM), args=list(FLAGS))
        yield started
        started.close()


class Tab:
    """One signed-in tab that remembers everything that went wrong in it."""

    def __init__(
        self,
        browser: Any,
        site: str,
        token: str | None = None,
        width: int = 1280,
        scheme: str = "light",
        phone: bool = False,
    ) -> None:
        """`phone`: fingers and no mouse."""
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, has_touch=phone, is_mobile=phone
        )
        self.page = self.context.new_page()
        self.site = site
        self.errors: list[str] = []
        self.asked: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on(
            "console",
            lambda m: self.errors.append(m.text) if m.type == "error" and " 401 " not in m.text else None,
        )
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(site)
        if token is not None:
            self.page.fill("#token", token)
            self.page.keyboard.press("Enter")
            self.page.wait_for_selector("table.runs")

    def open(self, path: str) -> Any:
        self.page.goto(self.site + path)
        self.page.wait_for_selector(".view")
        self.page.wait_for_timeout(150)
        return self.page

    def inked(self, selector: str) -> int:
        """How many of a canvas's pixels are drawn on."""
        return self.page.evaluate(
            """(s) => { const c = document.querySelector(s + " canvas");
                const d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
                let n = 0; for (let i = 3; i < d.length; i += 4) n += d[i] > 0; return n; }""",
            selector,
        )
