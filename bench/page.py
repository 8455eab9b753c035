"""How soon a million points are on the screen, and how soon they follow the hand: real service, real Chromium, loopback.

    python bench/page.py [--samples N] [--json OUT]

One run of N samples with every column and a registered prediction, judged, with one spike of a single step. Its page is
opened cold (the monitor just started, a browser that has nothing of the page), then warm; zoomed with the wheel onto the
spike and moved. Goal: first picture <= 1 s at a million.

    first picture   from the start of navigation to the first frame with the loss drawn; its parts are the browser's own timings:
                    page (HTML, scripts), query (asked to first byte: read, thin, encode), transfer, draw (parse, draw, paint)
    wheel           from a wheel event to the next frame, in which the chart is drawn again; at_rest: until the steps in view
                    have come and are drawn, 150 ms of waiting for the hand included

Needs chromium and playwright.
"""

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.e2e.chromium import Tab, chromium
from tests.monitor.live import Service, wait_for

PICTURE = """() => new Promise((done) => {
    const look = () => {
        const c = document.querySelector("#loss-chart canvas");
        const drawn = c && c.width > 400 && (() => {
            const d = c.getContext("2d").getImageData(c.width >> 2, 0, 64, c.height).data;
            let n = 0; for (let i = 3; i < d.length; i += 4) n += d[i] > 0; return n > 60; })();
        if (!drawn) return requestAnimationFrame(look);
        const asked = performance.getEntriesByType("resource").filter((e) => e.name.includes("/samples"))[0];
        done({ whole: performance.now(), page: asked.startTime, query: asked.responseStart - asked.startTime,
               transfer: asked.responseEnd - asked.responseStart, draw: performance.now() - asked.responseEnd });
    };
    requestAnimationFrame(look);
})"""
TURN = """([at, turns, shift]) => new Promise(async (done) => {
    const over = () => document.querySelector("#loss-chart .u-over");
    const next = () => new Promise((r) => requestAnimationFrame(() => { const c = new MessageChannel(); c.port1.onmessage = r; c.port2.postMessage(0); }));
    const box = over().getBoundingClientRect(), ms = [];
    performance.clearResourceTimings();
    for (let i = 0; i < turns; i++) {
        const began = performance.now();
        over().dispatchEvent(new WheelEvent("wheel", { deltaY: shift ? 40 : -60, ctrlKey: !shift, shiftKey: shift, clientX: box.left + box.width * at, clientY: box.top + 50, bubbles: true, cancelable: true }));
        await next();
        ms.push(performance.now() - began);
    }
    const last = performance.now();
    while (!performance.getEntriesByType("resource").some((e) => e.name.includes("/samples") && e.startTime >= last - 20 && e.responseEnd)) await next();
    for (let i = 0; i < 2; i++) await next();
    done([ms, performance.now() - last]);
})"""


def expected(step: float) -> float:
    return 2 + 3.6 / (1 + step / 14) ** 0.3


def feed(service: Service, n: int, spike: int) -> float:
    """Send one run; samples acknowledged a second."""
    rng, began_s = random.Random(0), time.time() - n
    steps = sorted({max(1, round(n * (i / 400) ** 2)) for i in range(1, 401)})
    line = [expected(step) for step in steps]
    prediction = {
        "final_loss": {"p05": line[-1] - 0.03, "p50": line[-1], "p95": line[-1] + 0.03}, "params": 1e9, "tokens": 512.0 * n,
        "in_range": True, "identifiable": True, "made_at": "2026-11-22T10:00:00Z", "digest": "8f" * 32,
        "curve": {"step": steps, "tokens": [512.0 * s for s in steps], "p05": [v - 0.03 for v in line], "p50": line, "p95": [v + 0.03 for v in line]},
    }  # fmt: skip
    head = {"event": "run_started", "run": "long", "attempt": 1, "resume_step": 0, "time": began_s, "prediction": prediction,
            "total_tokens": 512.0 * n}  # fmt: skip
    batch, began = [json.dumps(head)], time.monotonic()
    for step in range(1, n + 1):
        loss = expected(step) + rng.gauss(0, 0.01) + (1.7 if step == spike else 0)
        batch.append(
            f'{{"event":"sample","run":"long","attempt":1,"seq":{step},"step":{step},"time":{began_s + step:.2f},"loss":{loss:.6f},'
            f'"tokens":{512 * step},"lr":0.0003,"grad_norm":{0.5 + rng.random():.4f},"tokens_per_s":512.0,"mfu":0.41}}'
        )
        if len(batch) == 2000 or step == n:
            status, answer = service.ask("/v1/events", ("\n".join(batch) + "\n").encode())
            if status != 200:
                raise SystemExit(f"the monitor answered {status}: {answer[:200]!r}")
            batch = []
    return n / (time.monotonic() - began)


def judged(service: Service, n: int) -> bool:
    rows = (service.get(f"/v1/runs/long/samples?from={n}") or {}).get("samples")
    return bool(rows) and rows[-1]["expected"] is not None


def picture(tab: Tab, address: str) -> dict[str, float]:
    tab.page.goto(address)
    return tab.page.evaluate(PICTURE)


def said(values: list[float]) -> dict[str, int]:
    return {"median": round(statistics.median(values)), "worst": math.ceil(max(values))}


def wheel(tab: Tab, service: Service, n: int, spike: int) -> dict[str, Any]:
    """Turn the wheel onto the spike from the whole run, then move beside it."""
    out: dict[str, Any] = {}
    tab.page.goto(f"{service.url}/?run=long")
    tab.page.evaluate(PICTURE)
    tab.page.wait_for_timeout(500)
    zoomed: list[float] = []
    rests: list[float] = []
    for _ in range(8):
        low, high = tab.page.evaluate(
            "([n]) => { const q = new URLSearchParams(location.search); return [Number(q.get('from') ?? 0), Number(q.get('to') ?? n)]; }",
            [n],
        )
        frames, rest = tab.page.evaluate(TURN, [(spike - low) / (high - low), 4, False])
        zoomed += frames
        rests.append(rest)
        if high - low < 4000:
            break
    out["wheel_zoom_to_frame_ms"], out["at_rest_ms"] = said(zoomed), said(rests)
    tab.page.goto(f"{service.url}/?run=long&from={spike - n // 40}&to={spike + n // 40}")
    tab.page.evaluate(PICTURE)
    tab.page.wait_for_timeout(500)
    out["wheel_move_to_frame_ms"] = said(tab.page.evaluate(TURN, [0.5, 40, True])[0])
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--json", metavar="OUT")
    args = parser.parse_args()
    n, spike = args.samples, args.samples * 5 // 8 + 123
    found: dict[str, Any] = {"samples": n}
    with tempfile.TemporaryDirectory() as folder, Service(Path(folder) / "store") as service:
        found["sent_per_s"] = round(feed(service, n, spike))
        began = time.monotonic()
        wait_for(lambda: judged(service, n), 280, 0.5)
        found["judged_after_s"] = round(time.monotonic() - began, 1)
        with chromium() as browser:
            pictures: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
            for _ in range(4):
                tab = Tab(
                    browser, service.url, service.token
                )  # signed in, and then without anything of the page
                tab.context.close()
                service.stop()
                service.start(60)
                tab = Tab(browser, service.url)
                tab.page.evaluate(
                    "(token) => fetch('/session', {method: 'POST', headers: {'Content-Type': 'application/json'}, body: JSON.stringify({token})})",
                    service.token,
                )
                client = tab.context.new_cdp_session(tab.page)
                client.send("Network.clearBrowserCache")
                pictures["cold"].append(picture(tab, f"{service.url}/?run=long"))
                for _ in range(5):
                    pictures["warm"].append(picture(tab, f"{service.url}/?run=long"))
                tab.context.close()
            for kind, taken in pictures.items():
                for part in ("whole", "page", "query", "transfer", "draw"):
                    found[f"{kind}_{part}_ms"] = said([one[part] for one in taken])
            tab = Tab(browser, service.url, service.token)
            zooms = [
                picture(tab, f"{service.url}/?run=long&from={spike - width // 2}&to={spike + width // 2}")
                for width in (n // 4, n // 16, n // 64, 2000)
            ]
            found["zoomed_page_ms"] = said([one["whole"] for one in zooms])
            found |= wheel(tab, service, n, spike)
            rows = service.get("/v1/runs/long/samples?max=3000")["samples"]
            found["points_sent_to_the_page"] = len(rows)
            found["spike_kept"] = any(row["step"] == spike for row in rows)
            found["errors"] = tab.errors
    for name, value in found.items():
        print(f"{name:28} {value}")
    if args.json:
        Path(args.json).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
