"""The page in a real headless Chromium, over a stand-in API with made-up runs. Skipped without chromium."""

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from monitor.web.report import report_html
from tests.e2e.chromium import Tab, chromium, needs_chromium
from tests.monitor import page_stub
from tests.monitor.made_up_runs import loss_at, report_data

HOSTILE = "<img src=x onerror=window.hit=1><script>window.hit=1</script>\"'`${window.hit=1}</script>"
VIEWS = ("/", "/?run=gpt-71k-lr-x30", "/?run=resumed&x=tokens&xs=log", "/?run=gpt-71k-nan", "/?run=waiting-for-gpus",
         "/?view=compare&runs=gpt-71k-target,gpt-28k-ladder", "/?view=law")  # fmt: skip

pytestmark = [pytest.mark.e2e, needs_chromium]


@contextlib.contextmanager
def served(runs: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The stand-in on a free port of this machine, in a thread."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(page_stub.app(runs), log_level="error", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(5)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def runs() -> dict[str, dict[str, Any]]:
    return page_stub.made_up(million=1_000_000)


@pytest.fixture(scope="module")
def site(runs: dict[str, dict[str, Any]]) -> Iterator[str]:
    with served(runs) as address:
        yield address


@pytest.fixture
def tab(browser: Any, site: str) -> Iterator[Tab]:
    made = Tab(browser, site, page_stub.TOKEN)
    yield made
    made.context.close()
    assert made.errors == []


def test_without_a_token_there_is_a_sign_in_and_no_data(browser: Any, site: str) -> None:
    tab = Tab(browser, site)
    tab.page.wait_for_selector("#token")
    assert "gpt-71k" not in tab.page.content()
    tab.page.fill("#token", "wrong")
    tab.page.keyboard.press("Enter")
    tab.page.wait_for_selector("text=does not know this token")
    tab.page.fill("#token", page_stub.TOKEN)
    tab.page.keyboard.press("Enter")
    tab.page.wait_for_selector("table.runs")
    cookie = tab.context.cookies()[0]
    assert cookie["httpOnly"] and cookie["sameSite"] == "Strict"
    tab.page.click("#leave")
    tab.page.wait_for_selector("#token")
    assert "gpt-71k" not in tab.page.content()
    tab.context.close()


def test_the_runs_that_need_a_person_come_first(tab: Tab) -> None:
    names = tab.page.locator("td.name a").all_inner_texts()
    assert set(names[:2]) == {"gpt-71k-lr-x30", "gpt-71k-nan"}
    assert names.index("resumed") < names.index("gpt-71k-target") < names.index("gpt-28k-ladder")
    row = tab.page.locator("tr[data-run=gpt-71k-nan]").inner_text()
    assert "NaN" in row and "not a number" in row


def test_the_whole_view_is_in_the_address(tab: Tab) -> None:
    page = tab.open("/?run=gpt-71k-target")
    assert tab.inked("#loss-chart") > 5000 and tab.inked("#gap-chart") > 1000
    page.click("button:text-is('tokens')")
    page.locator("[aria-label='x scale'] button:text-is('log')").click()
    page.select_option("select", "200")
    assert "x=tokens" in page.url and "xs=log" in page.url and "smooth=200" in page.url
    page.reload()
    page.wait_for_selector("#loss-chart canvas")
    for text in ("tokens", "log"):
        assert page.locator(f"button[aria-pressed=true]:text-is('{text}')").count()
    assert page.input_value("select") == "200"
    page.go_back()
    page.wait_for_selector("table.runs")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_view_opens_without_an_error_and_fits_a_phone(browser: Any, site: str, scheme: str) -> None:
    tab = Tab(browser, site, page_stub.TOKEN, width=390, scheme=scheme)
    wide = {
        path: tab.open(path).evaluate("document.documentElement.scrollWidth - innerWidth") for path in VIEWS
    }
    tab.context.close()
    assert [path for path, more in wide.items() if more > 0] == []
    assert tab.errors == []


@pytest.mark.parametrize("width", [360, 390, 700, 900, 1280])
def test_the_longest_names_and_no_run_at_all_fit_every_width(browser: Any, width: int) -> None:
    long = page_stub.made_up(hostile="x" * 200)
    for k, detail in enumerate([*long.values()]):
        name = f"{'a' * 61}{k:02d}"
        detail["detail"]["run"] = name
        long[name] = detail
    for name in [name for name in long if len(name) < 63]:
        del long[name]
    first, second = list(long)[:2]
    for runs, paths in (({}, ("/", "/?view=compare", "/?view=law")),
                        (long, ("/", f"/?run={first}", f"/?view=compare&runs={first},{second}"))):  # fmt: skip
        with served(runs) as site:
            tab = Tab(browser, site, width=width)
            tab.page.fill("#token", page_stub.TOKEN)
            tab.page.keyboard.press("Enter")
            tab.page.wait_for_selector(".view")
            for path in paths:
                page = tab.open(path)
                assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, path
                bar = page.locator(".bar").bounding_box()
                assert bar and bar["height"] < 60, "the bar at the top has one line"
            tab.context.close()
            assert tab.errors == []


def test_a_loss_that_no_logarithm_shows_is_drawn_all_the_same(browser: Any) -> None:
    runs = page_stub.made_up()
    some = next(iter(runs))
    samples = runs[some]["samples"]
    for k, s in enumerate(samples):  # falls below zero
        s["loss"] = s["expected"] = s["mean"] = 2.0 - 4.0 * k / len(samples)
        s["lower"], s["upper"] = s["loss"] - 0.1, s["loss"] + 0.1
    with served(runs) as site:
        tab = Tab(browser, site, page_stub.TOKEN)
        tab.open(f"/?run={some}")
        below = tab.inked("#loss-chart")
        assert not tab.page.locator("button:text-is('log loss')").count()
        for k, s in enumerate(samples):  # over a hundred powers of ten, its usual range below zero
            s["loss"], s["lower"] = 10.0 ** (100 * k / len(samples)), -1.0
        tab.open(f"/?run={some}")
        tab.page.reload()
        tab.page.wait_for_selector("#loss-chart canvas")
        assert tab.inked("#loss-chart") > 5000 < below
        tab.context.close()
        assert tab.errors == []


@pytest.mark.parametrize(
    "path",
    ["/?run=gpt-71k-target", "/?run=gpt-71k-target&ys=linear&xs=log", "/?run=gpt-71k-lr-x30", "/?view=law"],
)
def test_every_axis_has_its_numbers(tab: Tab, path: str) -> None:
    inked = """(s) => { const c = document.querySelector(s + " canvas"), r = devicePixelRatio;
        const ink = (x, y, w, h) => { const d = c.getContext("2d").getImageData(x * r, y * r, w * r, h * r).data;
            let n = 0; for (let i = 3; i < d.length; i += 4) n += d[i] > 60; return n; };
        return [ink(22, 0, 26, c.height / r - 60), ink(60, c.height / r - 52, c.width / r - 70, 20)]; }"""
    page = tab.open(path)
    left, below = page.evaluate(inked, "#loss-chart" if "run=" in path else ".view-law .plot")
    assert left > 25 and below > 25, "numbers beside the y axis and under the x axis"


def test_a_run_that_is_not_there_is_said_in_words(browser: Any, site: str) -> None:
    tab = Tab(browser, site, page_stub.TOKEN)
    tab.page.goto(f"{site}/?run=nosuch")
    text = tab.page.wait_for_selector("text=could not be read").inner_text()
    assert "no such run" in text and "{" not in text
    tab.context.close()


def test_dragging_zooms_and_asks_for_the_steps_in_view(tab: Tab, runs: dict[str, dict[str, Any]]) -> None:
    spike = runs["a-million"]["samples"].spike
    page = tab.open("/?run=a-million")
    page.wait_for_selector("text=the smoothed line follows the bucket's mean")
    for _ in range(3):
        box = page.locator("#loss-chart .u-over").bounding_box()
        seen = dict(re.findall(r"(from|to)=(\d+)", page.url))
        low, high = float(seen.get("from", 1)), float(seen.get("to", 1_000_000))
        at = box["x"] + box["width"] * (spike - low) / (high - low)
        page.mouse.move(at - 25, box["y"] + 80)
        page.mouse.down()
        page.mouse.move(at + 25, box["y"] + 90, steps=4)
        page.mouse.up()
        page.wait_for_timeout(400)
    last = [url for url in tab.asked if "/samples" in url][-1]
    low, high = (float(re.findall(rf"{name}=(\d+)", last)[0]) for name in ("from", "to"))
    assert low <= spike <= high and high - low < 2000
    assert "Thinned" not in page.inner_text("#main")
    assert page.locator("#loss-chart canvas").count() == 1
    box = page.locator("#loss-chart .u-over").bounding_box()
    page.mouse.dblclick(box["x"] + 100, box["y"] + 100)
    page.wait_for_timeout(300)
    assert "from=" not in page.url


def test_a_million_points_are_drawn_and_the_wheel_zooms_onto_the_spike(
    tab: Tab, runs: dict[str, dict[str, Any]]
) -> None:
    spike = runs["a-million"]["samples"].spike
    page = tab.open("/?run=a-million")
    page.wait_for_selector("#loss-chart canvas")
    assert tab.inked("#loss-chart") > 5000

    def turn(**how: Any) -> None:
        seen = dict(re.findall(r"(from|to)=(\d+)", page.url))
        low, high = float(seen.get("from", 1)), float(seen.get("to", 1_000_000))
        before = page.url
        page.evaluate(
            """([at, how]) => { const over = document.querySelector("#loss-chart .u-over"), box = over.getBoundingClientRect();
                over.dispatchEvent(new WheelEvent("wheel", { clientX: box.left + box.width * at, clientY: box.top + 50, bubbles: true, cancelable: true, ...how })); }""",
            [(spike - low) / (high - low), how],
        )
        page.wait_for_function("(before) => location.href !== before", arg=before, timeout=60000)

    for _ in range(7):
        turn(deltaY=-240, ctrlKey=True)
    low, high = (float(re.findall(rf"{name}=(\d+)", page.url)[0]) for name in ("from", "to"))
    assert low <= spike <= high and high - low < 2000
    page.wait_for_function(
        "() => !document.querySelector('#main').innerText.includes('Thinned')", timeout=60000
    )
    turn(deltaY=100, shiftKey=True)
    assert float(re.findall(r"from=(\d+)", page.url)[0]) > low
    page.keyboard.press("0")
    page.wait_for_function("() => !location.search.includes('from=')", timeout=60000)


def test_on_a_phone_two_fingers_zoom_one_moves_and_two_taps_show_the_whole(browser: Any, site: str) -> None:
    tab = Tab(browser, site, page_stub.TOKEN, width=390, phone=True)
    page = tab.open("/?run=a-million")
    page.wait_for_selector("text=the smoothed line follows the bucket's mean")
    page.wait_for_selector("text=pinch to zoom")
    page.locator("#loss-chart .u-over").scroll_into_view_if_needed()
    box = page.locator("#loss-chart .u-over").bounding_box()
    devtools = tab.context.new_cdp_session(page)

    def touch(kind: str, *shares: float, down: float = 0.5) -> None:
        """Fingers at these shares of the width."""
        points = [
            {"x": box["x"] + box["width"] * share, "y": box["y"] + box["height"] * down, "id": i}
            for i, share in enumerate(shares)
        ]
        devtools.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    def window() -> tuple[float, float]:
        page.wait_for_timeout(400)
        seen = dict(re.findall(r"(from|to)=(\d+)", page.url))
        return float(seen.get("from", 0)), float(seen.get("to", 1_000_000))

    touch("touchStart", 0.45, 0.55)
    for k in range(1, 5):
        touch("touchMove", 0.45 - 0.05 * k, 0.55 + 0.05 * k)
    touch("touchEnd")
    low, high = window()
    assert 0.45e6 < (low + high) / 2 < 0.55e6 and 0.15e6 < high - low < 0.25e6, (low, high)
    page.wait_for_selector("text=drag to move")
    touch("touchStart", 0.5)
    for k in range(1, 5):
        touch("touchMove", 0.5 - 0.1 * k)
    touch("touchEnd")
    moved = window()
    assert moved[0] - low == pytest.approx(0.4 * (high - low), rel=0.1), (low, high, moved)
    assert moved[1] - moved[0] == pytest.approx(high - low, rel=0.02)
    assert page.evaluate("scrollX") == 0
    scrolled = page.evaluate("scrollY")
    touch("touchStart", 0.5)
    for k in range(1, 6):
        touch("touchMove", 0.5, down=0.5 - 0.1 * k)
    touch("touchEnd")
    assert window() == moved, "a finger that goes up scrolls the page"
    assert page.evaluate("scrollY") > scrolled
    page.locator("#loss-chart .u-over").scroll_into_view_if_needed()
    box = page.locator("#loss-chart .u-over").bounding_box()
    for _ in range(2):
        touch("touchStart", 0.4)
        touch("touchEnd")
    page.wait_for_function("() => !location.search.includes('from=')")
    touch("touchStart", 0.3)
    touch("touchMove", 0.35)
    assert "step" in page.inner_text("#loss-chart .readout")
    touch("touchEnd")
    tab.context.close()
    assert tab.errors == []


def test_a_run_moves_without_a_reload(tab: Tab, runs: dict[str, dict[str, Any]]) -> None:
    page = tab.open("/?run=gpt-71k-target")
    held = runs["gpt-71k-target"]
    step = held["detail"]["step"]
    last = held["samples"][-1]
    for k in range(1, 31):
        held["samples"].append(
            {**last, "step": step + k, "tokens": 512.0 * (step + k), "loss": loss_at(step + k)}
        )
    held["detail"] |= {"step": step + 30, "loss": 1.2345, "state": "off_line"}
    page.wait_for_selector(f"text={step + 30:,}", timeout=5000)
    page.wait_for_selector(".heading >> text=off its line", timeout=5000)
    assert "1.2345" in page.inner_text("#main")
    assert any(f"from={step + 1}" in url for url in tab.asked)


def test_the_keyboard_goes_everywhere(tab: Tab) -> None:
    page = tab.page
    page.keyboard.press("?")
    assert page.locator("dialog[open]").count()
    page.keyboard.press("Escape")
    page.keyboard.press("/")
    page.keyboard.type("ladder")
    page.wait_for_function("() => document.querySelectorAll('td.name a').length === 1")
    assert "find=ladder" in page.url
    page.keyboard.press("Escape")
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.wait_for_selector("#loss-chart canvas")
    page.keyboard.press("x")
    assert "x=tokens" in page.url
    page.keyboard.press("g")
    page.keyboard.press("l")
    page.wait_for_selector("#law-chart canvas")
    page.keyboard.press("g")
    page.keyboard.press("r")
    page.wait_for_selector("table.runs")
    page.keyboard.press("j")
    page.keyboard.press("j")
    assert page.evaluate("document.activeElement.closest('tr').rowIndex") in (1, 2)


def test_runs_are_compared_by_tokens_unless_told_otherwise(tab: Tab) -> None:
    page = tab.open("/?view=compare")
    page.wait_for_selector("#compare-chart canvas")
    assert (
        len(page.locator("fieldset input:checked").all()) == 3
    )  # the latest, so that the first look shows something
    assert page.locator("button[aria-pressed=true]:text-is('tokens')").count()
    page.click("button:text-is('steps')")
    page.locator("label:has-text('no-prediction-yet') input").check()
    page.wait_for_function(
        "() => location.search.includes('no-prediction-yet') && location.search.includes('by=steps')"
    )
    page.reload()
    page.wait_for_selector("#compare-chart canvas")
    assert page.locator("button[aria-pressed=true]:text-is('steps')").count()
    assert tab.inked("#compare-chart") > 3000


def test_what_is_seen_can_be_taken_away(tab: Tab, tmp_path: Path) -> None:
    page = tab.open("/?run=gpt-71k-nan&from=1000&to=1211")
    with page.expect_download() as got:
        page.click("button:text-is('PNG')")
    got.value.save_as(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with page.expect_download() as got:
        page.click("button:text-is('CSV')")
    got.value.save_as(tmp_path / "a.csv")
    lines = (tmp_path / "a.csv").read_text().splitlines()
    assert lines[0].startswith("run,step,loss") and len(lines) == 1 + 212
    assert lines[-1].startswith("gpt-71k-nan,1211,NaN")


def test_hostile_strings_execute_nowhere(browser: Any) -> None:
    hostile = page_stub.made_up(HOSTILE)
    for held in hostile.values():
        held["detail"] |= {"state": HOSTILE, "phase": "running", "events": [HOSTILE]}
        held["detail"]["advice"]["action"] = HOSTILE
    hostile["bad"] = {"detail": {**hostile["resumed"]["detail"], "run": HOSTILE}, "samples": []}
    with served(hostile) as site:
        tab = Tab(browser, site, page_stub.TOKEN)
        for path in (
            *VIEWS,
            f"/?run={HOSTILE}",
            f"/?find={HOSTILE}&x={HOSTILE}&from=1e999",
            "/?view=__proto__&runs=a,,--",
        ):
            page = tab.open(path)
            assert page.evaluate("window.hit") is None
            assert (
                page.evaluate("document.querySelectorAll('main img, main script, main iframe').length") == 0
            )
        assert "onerror=window.hit" in tab.open("/").inner_text("table.runs")
        tab.context.close()
        assert [
            error for error in tab.errors if " 404 " not in error
        ] == []  # a run that is not there is no fault


def test_the_report_opens_alone_and_asks_for_nothing(browser: Any, tmp_path: Path) -> None:
    for name in ("", HOSTILE):
        (tmp_path / "report.html").write_text(report_html(report_data(name)))
        for width in (1400, 390):
            page = browser.new_page(viewport={"width": width, "height": 900})
            errors, asked = [], []
            page.on("pageerror", lambda error, errors=errors: errors.append(str(error)))
            page.on("console", lambda m, errors=errors: errors.append(m.text) if m.type == "error" else None)
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.goto((tmp_path / "report.html").as_uri())
            page.wait_for_selector("#drill-1 canvas")
            page.click("button:text-is('log')")
            assert page.locator("canvas").count() == 4
            assert page.evaluate("window.hit") is None
            assert len(asked) == 1 and errors == []
            if not name:
                assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
            page.close()


def test_a_row_stays_under_the_hand_while_others_move(tab: Tab, runs: dict[str, dict[str, Any]]) -> None:
    page = tab.open("/")
    page.focus("tr[data-run=gpt-28k-ladder] a")
    page.evaluate("window.row = document.querySelector('tr[data-run=gpt-28k-ladder]')")
    runs["resumed"]["detail"]["step"] = 424242
    page.wait_for_selector("text=step 424,242")
    assert page.evaluate("window.row.isConnected && document.activeElement.closest('tr') === window.row")


def test_numbers_read_well_at_every_size(tab: Tab) -> None:
    said = tab.page.evaluate(
        """async () => { const f = await import("/static/format.js");
            return [[2.5, 12.3456, 1234567, NaN, null, "NaN", Infinity].map(f.loss), [0, 999, 1000, 999999, 1.5e9, 3e15].map((v) => f.short(v)),
                    [0, 0.25, 7.5, 89, 90, 3600, 90061, null].map(f.duration), [0.004, 0.5, 0.999, null].map(f.percent),
                    [1e12, 6.58e11, 3].map(f.power), [[1.234, 2], [-0.5, 1], [0, 1]].map((a) => f.signed(...a))]; }"""
    )
    assert said == [
        ["2.5000", "12.346", "1.23e+6", "\N{EN DASH}", "\N{EN DASH}", "NaN", "Infinity"],
        ["0", "999", "1k", "1M", "1.5B", "3\N{MULTIPLICATION SIGN}10¹⁵"],
        ["0 s", "250 ms", "7.5 s", "89 s", "1 min 30 s", "1 h", "1 d 1 h", "\N{EN DASH}"],
        ["<1%", "50%", ">99%", "\N{EN DASH}"],
        ["10¹²", "6.58\N{MULTIPLICATION SIGN}10¹¹", "3\N{MULTIPLICATION SIGN}10⁰"],
        ["+1.23", "\N{MINUS SIGN}0.5", "0.0"],
    ]


def test_the_address_parses_anything(tab: Tab) -> None:
    same = tab.page.evaluate(
        """async () => { const a = await import("/static/address.js");
            const s = a.parse("?run=a-b&x=time&xs=log&smooth=50&from=3&to=9&junk=1&ys=%3Cb%3E");
            const t = a.parse("?x=tokens&run=../..&runs=ok,NO,also-ok");
            return JSON.stringify([a.address(s), t.runs, a.parse("?run=A").run]); }"""
    )
    assert json.loads(same) == ["/?x=time&xs=log&run=a-b&smooth=50&from=3&to=9", ["ok", "also-ok"], None]
