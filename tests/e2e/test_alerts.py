"""From `report()` in a training process to a webhook, through a real Prometheus and a real Alertmanager."""

import random
import threading
import time
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.reporter import Reporter
from monitor.prometheus.alerts import rules_yaml
from tests.monitor.live import ALERTMANAGER, PROMETHEUS, Service, Webhook, alertmanager, prometheus, wait_for

EXAMPLE = Path(__file__).parents[2] / "k8s" / "rules" / "alertmanager.example.yaml"

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        not (PROMETHEUS and ALERTMANAGER), reason="needs Debian's prometheus and prometheus-alertmanager"
    ),
]


def train(
    reporter: Reporter,
    upto: int,
    *,
    bad_from: int | None = None,
    shift: float = 0.0,
    seed: int = 0,
    pace_s: float = 0.0,
) -> None:
    noise = random.Random(seed)
    for step in range(1, upto + 1):
        loss = 6.0 * (step + 10) ** -0.2 + noise.gauss(0.0, 0.02)
        if bad_from is not None and step >= bad_from:
            loss = loss + shift
        reporter.report(step=step, loss=loss, tokens=step * 512)
        if pace_s:
            time.sleep(pace_s)


def test_a_nan_and_a_divergence_reach_a_person_and_a_healthy_run_does_not(tmp_path: Path) -> None:
    webhook = Webhook()
    with (
        Service(tmp_path / "store") as service,
        alertmanager(tmp_path / "am", webhook) as manager,
        prometheus(tmp_path / "prom", service, rules_yaml(), manager.url),
    ):
        runs = {
            n: Reporter(service.url, service.token, n, 1, tmp_path / n) for n in ("calm", "breaks", "leaves")
        }
        for reporter in runs.values():
            reporter.start()
        threads = [
            threading.Thread(target=train, args=(runs["calm"], 400), kwargs={"seed": 1}),
            threading.Thread(target=train, args=(runs["breaks"], 400), kwargs={"seed": 2}),
            threading.Thread(
                target=train, args=(runs["leaves"], 600), kwargs={"seed": 3, "bad_from": 400, "shift": 1.5}
            ),
        ]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        wait_for(lambda: (service.get("/v1/runs/breaks") or {}).get("step") == 400)
        time.sleep(2.0)
        said = time.time()
        runs["breaks"].report(step=401, loss=float("nan"))
        nan_came = wait_for(lambda: webhook.firing("LossNonFinite", "breaks"), 60)[0]
        wait_for(lambda: webhook.firing("LossDiverged", "leaves"), 60)
        print(f"report() to webhook: {nan_came - said:.1f} s")
        time.sleep(1.0)
        assert not [a for _, a in webhook.got if a["labels"].get("run") == "calm"]
        sent = {
            (a["labels"]["alertname"], a["labels"].get("run"))
            for _, a in webhook.got
            if a["status"] == "firing"
        }
        assert all("step" not in a["labels"] and "attempt" not in a["labels"] for _, a in webhook.got)
        assert ("LossNonFinite", "breaks") in sent
        text = next(
            a["annotations"]["description"]
            for _, a in webhook.got
            if a["labels"]["alertname"] == "LossDiverged"
        )
        assert "Run leaves diverged" in text and "expected" in text
        for reporter in runs.values():
            assert reporter.close("finished")


def test_a_page_does_not_resolve_when_the_monitor_dies(tmp_path: Path) -> None:
    webhook = Webhook()
    with (
        Service(tmp_path / "store") as service,
        alertmanager(tmp_path / "am", webhook) as manager,
        prometheus(tmp_path / "prom", service, rules_yaml(), manager.url),
    ):
        reporter = Reporter(service.url, service.token, "breaks", 1, tmp_path / "spool", quiet=True)
        train(reporter, 50)
        reporter.report(step=51, loss=float("inf"))
        wait_for(lambda: webhook.firing("LossNonFinite", "breaks"), 60)
        service.kill()
        time.sleep(6.0)
        assert not [a for _, a in webhook.got if a["status"] == "resolved"]
        reporter.report(step=52, loss=2.0)
        service.start()
        wait_for(lambda: (service.get("/v1/runs/breaks") or {}).get("step") == 52, 60)
        reporter.close()
        assert not [a for _, a in webhook.got if a["status"] == "resolved"]


def test_a_test_alert_arrives(tmp_path: Path) -> None:
    webhook = Webhook()
    with alertmanager(tmp_path / "am", webhook) as manager:
        assert main(["alert", "test", "--alertmanager", manager.url, "--severity", "warning"]) == 0
        wait_for(lambda: webhook.firing("LosscastTest", "losscast-test"), 10)
    assert main(["alert", "test", "--alertmanager", manager.url]) == 1


def test_a_test_alert_goes_where_the_example_configuration_sends_its_severity_and_resolves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pager, channel = Webhook(), Webhook()
    config = EXAMPLE.read_text().replace("http://127.0.0.1:9099/pager", pager.url)
    config = config.replace("http://127.0.0.1:9099/channel", channel.url).replace(
        "group_wait: 5s", "group_wait: 1s"
    )
    with alertmanager(tmp_path / "am", pager, config) as manager:
        for severity in ("critical", "warning", "info"):
            sent = [
                "alert",
                "test",
                "--alertmanager",
                manager.url + "/",
                "--severity",
                severity,
                "--team",
                "text",
            ]
            assert main(sent) == 0
            assert severity in capsys.readouterr().err
        wait_for(lambda: pager.firing("LosscastTest", "losscast-test"), 10)
        # a page of the same alert and run is under way: the warning is inhibited, as a real one would be
        time.sleep(3.0)
        assert not channel.got
        assert {a["labels"]["team"] for _, a in pager.got} == {"text"}
        assert {a["labels"]["severity"] for _, a in pager.got} == {"critical"}
    with alertmanager(tmp_path / "calm", pager, config) as manager:
        assert main(["alert", "test", "--alertmanager", manager.url, "--severity", "warning"]) == 0
        wait_for(lambda: channel.firing("LosscastTest", "losscast-test"), 10)
        assert len(pager.got) == 1


def test_what_is_no_alertmanager_is_named_with_what_to_give_instead(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        Service(tmp_path / "store") as service,
        prometheus(tmp_path / "prom", service, rules_yaml()) as other,
    ):
        for url, status, words in (
            (service.url, 1, "is this an Alertmanager?"), (other.url, 1, "is this an Alertmanager?"),
            ("127.0.0.1:9093", 2, "give http://HOST:PORT"), ("http://[::1", 2, "give http://HOST:PORT"),
        ):  # fmt: skip
            assert main(["alert", "test", "--alertmanager", url]) == status, url
            said = capsys.readouterr().err
            assert words in said and url in said and len(said.splitlines()) == 1
