"""How soon a million points are on the screen: real service, real Chromium, over loopback.

    python bench/page.py [--samples N] [--json OUT]

One run of N samples with one spike of a single step is sent to a monitor; then its page is opened, zoomed in on the
spike, and moved. First picture counts from the start of navigation to the first drawn chart. Goal: <= 1 s at a million.
Needs chromium and playwright.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.e2e.chromium import Tab, chromium
from tests.monitor.live import Service

DRAWN = """() => { const c = document.querySelector("#loss-chart canvas"); if (!c) return false;
    const d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
    let n = 0; for (let i = 3; i < d.length; i += 40) n += d[i] > 0; return n > 500 ? performance.now() : false; }"""


def feed(service: Service, n: int, spike: int) -> float:
    """Send one run; samples acknowledged a second."""
    rng = random.Random(0)
    head = {
        "event": "run_started",
        "run": "long",
        "attempt": 1,
        "resume_step": 0,
        "time": 1.0,
        "prediction": None,
    }
    batch, began = [json.dumps(head)], time.monotonic()
    for step in range(1, n + 1):
        loss = 3.75 if step == spike else 2 + 3.6 / (1 + step / 14) ** 0.3 + rng.gauss(0, 0.01)
        batch.append(
            f'{{"event":"sample","run":"long","attempt":1,"seq":{step},"step":{step},"time":{step},"loss":{loss:.6f},'
            f'"tokens":{512 * step}}}'
        )
        if len(batch) == 2000 or step == n:
            status, answer = service.ask("/v1/events", ("\n".join(batch) + "\n").encode())
            if status != 200:
                raise SystemExit(f"the monitor answered {status}: {answer[:200]!r}")
            batch = []
    return n / (time.monotonic() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--json", metavar="OUT")
    args = parser.parse_args()
    n, spike = args.samples, args.samples * 5 // 8 + 123
    found: dict[str, Any] = {"samples": n}
    with tempfile.TemporaryDirectory() as folder, Service(Path(folder) / "store") as service:
        found["sent_per_s"] = round(feed(service, n, spike))
        with chromium() as browser:
            tab = Tab(browser, service.url, service.token)
            firsts = []
            for _ in range(5):
                tab.page.goto(f"{service.url}/?run=long")
                firsts.append(tab.page.wait_for_function(DRAWN, timeout=60000).json_value())
            found["first_picture_ms"] = {
                "median": round(statistics.median(firsts)),
                "worst": round(max(firsts)),
            }
            moves = []
            for width in (n // 4, n // 16, n // 64, 2000):
                low, high = max(0, spike - width // 2), spike + width // 2
                began = time.monotonic()
                tab.page.goto(f"{service.url}/?run=long&from={low}&to={high}")
                tab.page.wait_for_function(DRAWN, timeout=60000)
                moves.append(1000 * (time.monotonic() - began))
            found["zoomed_page_ms"] = {"median": round(statistics.median(moves)), "worst": round(max(moves))}
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
