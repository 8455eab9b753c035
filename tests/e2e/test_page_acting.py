"""What a person does on the page, over the real service: mute and unmute, acknowledge, snooze and take back."""

import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.chromium import Tab, chromium, needs_chromium
from tests.e2e.test_page_live import lines, send, started
from tests.monitor.live import Service
from tests.monitor.made_up_runs import samples

pytestmark = [pytest.mark.e2e, needs_chromium]
MS = 60_000


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with Service(tmp_path_factory.mktemp("acting") / "store") as running:
        books = {
            "event": "goodput", "run": "healthy", "attempt": 1, "time": time.time(), "step": 300, "gpu_seconds_useful": 900.0,
            "gpu_seconds_lost": 60.0, "gpu_seconds_idle": 40.0, "dollars_useful": 9.0, "dollars_lost": 0.6, "dollars_idle": 0.4,
        }  # fmt: skip
        send(running, [started("healthy"), *lines("healthy", samples(until=300)), books])
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def operator(service: Service) -> str:
    words = (
        "monitor",
        "token",
        "create",
        "--store",
        str(service.folder),
        "--scope",
        "read,operate",
        "--name",
        "mia",
    )
    done = subprocess.run(
        [sys.executable, "-m", "launcher.cli", *words], capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()[-1]


@pytest.fixture
def tab(browser: Any, service: Service, operator: str) -> Iterator[Tab]:
    made = Tab(browser, service.url, operator)
    yield made
    made.context.close()
    assert made.errors == []


def test_a_mute_is_marked_on_the_run_and_in_the_list_until_it_is_taken_back(
    tab: Tab, service: Service
) -> None:
    page = tab.open("/?run=healthy")
    page.click("button:text-is('8 h')")
    page.wait_for_selector("text=/All muted until .* by mia/", timeout=MS)
    muted = service.get("/v1/runs/healthy")["muted"]
    assert muted["by"] == "mia" and 7.9 * 3600 < muted["until"] - time.time() <= 8 * 3600
    page = tab.open("/")
    page.wait_for_selector("tr[data-run=healthy] .mute >> text=/all muted until/", timeout=MS)
    page = tab.open("/?run=healthy")
    page.click("button:text-is('Unmute')")
    page.wait_for_selector("button:text-is('8 h')", timeout=MS)
    assert service.get("/v1/runs/healthy")["muted"] is None


def test_advice_is_acknowledged_or_snoozed_and_taken_back(tab: Tab, service: Service) -> None:
    page = tab.open("/?run=healthy")
    for button, words in (("Acknowledge", "Acknowledged by mia"), ("Snooze 4 h", "Snoozed by mia until")):
        page.wait_for_selector(f"button:text-is('{button}')", timeout=MS)
        page.click(f"button:text-is('{button}')")
        page.wait_for_selector(f"text={words}", timeout=MS)
        assert service.get("/v1/runs/healthy")["advice"]["seen"]["by"] == "mia"
        page.click("button:text-is('Take back')")
        page.wait_for_selector("button:text-is('Acknowledge')", timeout=MS)
        assert service.get("/v1/runs/healthy")["advice"]["seen"] is None


def test_who_may_only_look_is_told_what_makes_a_token_that_may_touch(browser: Any, service: Service) -> None:
    tab = Tab(browser, service.url, service.token)
    page = tab.open("/?run=healthy")
    page.click("button:text-is('1 h')")
    page.wait_for_selector(".live.bad >> text=--scope read,operate", timeout=MS)
    assert service.get("/v1/runs/healthy")["muted"] is None
    assert [error for error in tab.errors if " 403 " not in error] == []
    tab.context.close()


def test_what_became_of_the_time_is_among_the_figures(tab: Tab) -> None:
    text = tab.open("/?run=healthy").inner_text(".facts")
    assert "Goodput\n90%" in text and "1 min 40 s of GPU time lost or idle, $1.00" in text
