"""From `report()` to a person: seconds until Prometheus has the alert firing, and until the webhook has it.

    python bench/report_to_page.py [--rounds N] [--json OUT]

A real monitor, Debian's prometheus (1 s scrape and evaluation) and prometheus-alertmanager, a webhook. Every round a run of its
own reports 400 healthy steps, then either one loss that is not a number (timed from that report) or steps that are 1.5
nats too high, 20 a second (timed from the first of them: the judge waits until it knows that they stay).
Goal: a NaN's page <= 4 s.
"""

import argparse
import contextlib
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

from launcher.reporter import Reporter
from monitor.prometheus.alerts import rules_yaml
from tests.monitor.live import Restartable, Service, Webhook, alertmanager, prometheus, wait_for


def fires(scraper: Restartable, alert: str, run: str) -> bool:
    with contextlib.suppress(OSError):
        found = scraper.json("/api/v1/alerts")["data"]["alerts"]
        return any(
            a["labels"].get("run") == run and a["labels"]["alertname"] == alert and a["state"] == "firing"
            for a in found
        )
    return False


def one(
    service: Service, scraper: Restartable, webhook: Webhook, folder: Path, run: str, alert: str
) -> tuple[float, float]:
    """Seconds from the report to firing and to the webhook."""
    rng = random.Random(run)
    reporter = Reporter(service.url, service.token, run, 1, folder / run)
    reporter.start()

    def report(step: int, more: float = 0.0) -> None:
        loss = 6.0 * (step + 10) ** -0.2 + rng.gauss(0.0, 0.02) + more
        reporter.report(step=step, loss=loss, tokens=512 * step)

    for step in range(1, 401):
        report(step)
    wait_for(lambda: (service.get(f"/v1/runs/{run}") or {}).get("step") == 400, 60)
    time.sleep(2.0 + rng.random())  # a report comes at any moment between two scrapes
    began, step, fired = time.time(), 400, 0.0
    until = began + 60
    while not (fired and webhook.firing(alert, run)):
        if time.time() > until:
            raise SystemExit(f"{alert} of {run} did not come in 60 s")
        step += 1
        if alert == "LossDiverged":
            report(step, 1.5)
        elif step == 401:
            report(step, math.nan)
        if not fired and fires(scraper, alert, run):
            fired = time.time()
        time.sleep(0.05)
    reporter.close("finished")
    return fired - began, webhook.firing(alert, run)[0] - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10, help="of each kind (default %(default)s)")
    parser.add_argument("--json", metavar="OUT")
    args = parser.parse_args()
    webhook, found = Webhook(), dict[str, Any]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (
            Service(folder / "store") as service,
            alertmanager(folder / "am", webhook) as manager,
            prometheus(folder / "prom", service, rules_yaml(), manager.url) as scraper,
        ):
            for alert in ("LossNonFinite", "LossDiverged"):
                took = [
                    one(service, scraper, webhook, folder, f"{alert.lower()}-{i}", alert)
                    for i in range(args.rounds)
                ]
                for what, values in (("firing", [a for a, _ in took]), ("webhook", [b for _, b in took])):
                    found[f"{alert}_to_{what}_s"] = {
                        "median": round(statistics.median(values), 2), "worst": round(max(values), 2), "rounds": len(values),
                    }  # fmt: skip
    for key, value in found.items():
        print(f"{key:28} {value}")
    if args.json:
        Path(args.json).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
