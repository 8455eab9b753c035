"""The page and the terminal view over the real service: signed in, fed, restarted."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from monitor.service.tokens import Tokens
from tests.e2e.chromium import Tab, chromium, needs_chromium
from tests.monitor.live import Service
from tests.monitor.made_up_runs import curve, diverged, loss_at, samples

pytestmark = [pytest.mark.e2e, needs_chromium]

FINAL = {"p05": 2.06, "p50": 2.118, "p95": 2.19}
PREDICTION = {
    "final_loss": FINAL, "curve": curve(), "params": 71.4e3, "tokens": 3000 * 512.0, "in_range": False,
    "identifiable": False, "made_at": "2026-11-22T10:00:00Z", "digest": "8f3c" * 16,
}  # fmt: skip


def started(run: str, attempt: int = 1, resume_step: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "event": "run_started", "run": run, "attempt": attempt, "resume_step": resume_step, "time": time.time() - 900,
        "prediction": PREDICTION, "target_loss": 2.15, "total_tokens": 3000 * 512.0, "price_per_hour": 32.0, **more,
    }  # fmt: skip


def lines(run: str, rows: list[list[Any]], attempt: int = 1) -> list[dict[str, Any]]:
    now = time.time()
    return [
        {
            "event": "sample", "run": run, "attempt": attempt, "seq": int(step), "step": int(step), "loss": loss,
            "tokens": 512 * int(step), "time": now - 0.2 * (rows[-1][0] - step), "tokens_per_s": 2560.0,
        }
        for step, loss in rows
    ]  # fmt: skip


def send(service: Service, events: list[dict[str, Any]]) -> None:
    for i in range(0, len(events), 1000):
        body = "".join(json.dumps(e) + "\n" for e in events[i : i + 1000]).encode()
        status, answer = service.ask("/v1/events", body)
        assert status == 200, answer


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with Service(tmp_path_factory.mktemp("monitor") / "store") as running:
        send(running, [started("healthy"), *lines("healthy", samples(until=1500))])
        send(running, [started("diverging"), *lines("diverging", diverged(800)[:1000])])
        second = [[step, loss] for step, loss in samples(seed=6, until=1400) if step > 900]
        restart = {
            "event": "restart",
            "run": "resumed",
            "attempt": 1,
            "time": time.time(),
            "cause": "worker lost",
        }
        send(running, [started("resumed"), *lines("resumed", samples(seed=5, until=1000)), restart])
        send(running, [started("resumed", 2, 900), *lines("resumed", second, 2)])
        yield running


@pytest.fixture(scope="module")
def tab(service: Service) -> Iterator[Tab]:
    with chromium() as browser:
        yield Tab(browser, service.url, service.token)


def test_a_divergence_is_on_top_with_its_alert_and_advice(tab: Tab) -> None:
    tab.page.wait_for_function(
        "() => document.querySelector('td.name a')?.textContent === 'diverging'", timeout=15000
    )
    page = tab.open("/?run=diverging")
    page.wait_for_selector(".alerts >> text=LossDiverged")
    assert tab.inked("#loss-chart") > 5000 and tab.inked("#gap-chart") > 1000
    assert "Held against the prediction that was registered for it" in page.inner_text("aside")
    assert "diverged" in page.inner_text(".heading")


def test_a_resumed_run_shows_both_attempts_and_why(tab: Tab) -> None:
    page = tab.open("/?run=resumed")
    text = page.inner_text("aside")
    assert "2: from step 900" in text
    assert "restart: worker lost" in text and "attempt 2 started, from step 900" in text
    assert any("attempt=1" in url and "from=901" in url for url in tab.asked)


def test_steps_arrive_without_a_reload_and_through_a_restart_of_the_monitor(
    tab: Tab, service: Service
) -> None:
    page = tab.open("/?run=healthy")
    page.wait_for_selector(".live.good")
    send(service, lines("healthy", [[step, loss_at(step)] for step in range(1501, 1531)]))
    page.wait_for_selector("text=1,530", timeout=10000)
    service.stop()
    page.wait_for_selector(".live.warn >> text=reconnecting", timeout=10000)
    service.start()
    page.wait_for_selector(".live.good >> text=live", timeout=15000)
    send(service, lines("healthy", [[step, loss_at(step)] for step in range(1531, 1561)]))
    page.wait_for_selector("text=1,560", timeout=10000)


def test_a_restart_is_shown_though_the_page_could_not_ask_for_it_at_once(tab: Tab, service: Service) -> None:
    send(service, [started("twice"), *lines("twice", samples(seed=7, until=400))])
    page = tab.open("/?run=twice")
    page.wait_for_selector(".live.good")
    failed = list[str]()

    def once(route: Any) -> None:
        if not failed:
            failed.append(route.request.url)
            return route.abort()
        return route.continue_()

    page.route("**/v1/runs/twice", once)
    again = [[step, loss_at(step)] for step in range(301, 431)]
    send(service, [started("twice", 2, 300), *lines("twice", again[:60], 2)])
    deadline = time.monotonic() + 15
    while not failed and time.monotonic() < deadline:
        page.wait_for_timeout(100)
    assert failed
    send(service, lines("twice", again[60:], 2))
    page.wait_for_function(
        "() => document.querySelector('aside').innerText.includes('2: from step 300')", timeout=15000
    )
    page.unroute("**/v1/runs/twice")
    assert any("attempt=1" in url and "from=301" in url for url in tab.asked), (
        "what was superseded is drawn as that"
    )


def test_a_session_that_is_over_asks_for_a_token_again(tab: Tab, service: Service) -> None:
    """The browser gives a stream up for good that is answered with 401."""
    tokens = Tokens(service.folder)
    other = Tab(tab.context.browser, service.url, tokens.create(("read",), "for-a-day"))
    other.page.wait_for_selector(".live.good")
    assert tokens.revoke("for-a-day") == 1
    other.page.wait_for_selector("#token", timeout=20000)
    other.context.close()


def test_the_terminal_shows_the_same(service: Service, tmp_path: Path) -> None:
    def watch(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "launcher.cli", "watch", "--once", "--url", service.url, *words]
        return subprocess.run(
            command, capture_output=True, text=True, env={"LOSSCAST_TOKEN": service.token}, timeout=60
        )

    every = watch()
    assert every.returncode == 0 and every.stdout.index("diverging") < every.stdout.index("healthy")
    one = watch("diverging")
    assert one.returncode == 3 and "LossDiverged" in one.stdout


def test_nothing_went_wrong_in_the_tab(tab: Tab) -> None:
    assert [
        e for e in tab.errors if "ERR_" not in e
    ] == []  # while the monitor was down nothing could be reached
