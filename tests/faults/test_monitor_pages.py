"""P5: monitor, Prometheus and Alertmanager are killed while runs break; every page arrives, and no other."""

import os
import random
import time
from pathlib import Path

import pytest

from launcher.reporter import Reporter
from monitor.prometheus.alerts import rules_yaml
from tests.monitor.live import ALERTMANAGER, PROMETHEUS, Service, Webhook, alertmanager, prometheus, wait_for

LONG = os.environ.get("LOSSCAST_FAULTS") == "long"
ROUNDS = 20 if LONG else 2

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(
        not (PROMETHEUS and ALERTMANAGER), reason="needs Debian's prometheus and prometheus-alertmanager"
    ),
]


def test_killed_every_few_seconds_no_page_is_missed_and_none_is_false(tmp_path: Path) -> None:
    rng = random.Random(5)
    webhook = Webhook()
    with (
        Service(tmp_path / "store") as service,
        alertmanager(tmp_path / "am", webhook) as manager,
        prometheus(tmp_path / "prom", service, rules_yaml(), manager.url) as prom,
    ):
        reporters: list[Reporter] = []
        wanted: dict[str, str] = {}
        calm: list[str] = []

        def train(run: str, kind: str, n: int = 450) -> None:
            reporter = Reporter(service.url, service.token, run, 1, tmp_path / run, quiet=True)
            reporters.append(reporter)
            reporter.start()
            noise = random.Random(run)
            for step in range(1, n + 1):
                loss = 6.0 * (step + 10) ** -0.2 + noise.gauss(0.0, 0.02)
                if kind == "diverges" and step > 300:
                    loss += 1.5
                if kind == "nan" and step == n - 5:
                    loss = float("nan")
                reporter.report(step=step, loss=loss, tokens=step * 512)

        def kill(what: str) -> None:
            if what == "monitor":
                service.kill()
                time.sleep(rng.uniform(0.0, 2.0))
                service.start(30)
            else:
                process = prom if what == "prometheus" else manager
                process.kill()
                time.sleep(rng.uniform(0.0, 2.0))
                process.start()

        for i in range(ROUNDS):
            for kind, alert in (("calm", None), ("diverges", "LossDiverged"), ("nan", "LossNonFinite")):
                run = f"{kind}-{i}"
                train(run, kind)
                if alert is None:
                    calm.append(run)
                else:
                    wanted[run] = alert
                time.sleep(rng.uniform(0.0, 1.5))
                kill(rng.choice(("monitor", "prometheus", "alertmanager")))
        for run, alert in wanted.items():
            wait_for(lambda run=run, alert=alert: webhook.firing(alert, run), 60, 0.2)
        time.sleep(3.0)
        paged = {a["labels"].get("run") for _, a in webhook.got if a["labels"]["severity"] == "critical"}
        assert not paged & set(calm), "a healthy run was paged for"
        assert paged - {None} == set(wanted)
        resolved = {
            a["labels"].get("run")
            for _, a in webhook.got
            if a["status"] == "resolved" and a["labels"]["alertname"] == "LossDiverged"
        }
        assert not resolved, "a live divergence was resolved"
        for reporter in reporters:
            assert reporter.close("finished"), reporter.stats()
