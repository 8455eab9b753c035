"""The alerts: one table, valid rules, and each of them fires, does not fire, and says nothing without data."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from monitor.prometheus.alerts import RULES, Rule, rules, rules_yaml
from monitor.service.attention import RUN_ALERTS

ROOT = Path(__file__).parents[2]
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="needs promtool (Debian's prometheus)")
NAMES = {
    "LossNonFinite", "LossOffLine", "LossDiverged", "LossAbovePrediction", "LossBelowPrediction", "LossSpike",
    "LossJumpAfterResume", "RunStalled", "MetricsStale", "ThroughputDropped", "RestartLoop", "CheckpointOverdue",
    "CheckpointVerifyFailed", "LeaseLost", "MonitorDown", "StoreDiskLow", "IngestRejecting", "SeriesOverflow",
    "ClockSkew", "Watchdog", "JudgeBehind", "JudgeFailing",
    "LossPlateau", "ValidationApart", "RankApart", "GradNormHigh",
}  # fmt: skip


def test_the_file_on_the_cluster_is_the_table() -> None:
    assert (ROOT / "k8s/rules/losscast.rules.yaml").read_text() == rules_yaml(), (
        "run `losscast alert rules > k8s/rules/losscast.rules.yaml`"
    )
    assert yaml.safe_load(rules_yaml()) == rules()
    assert {r.alert for r in RULES} == NAMES


@pytest.mark.parametrize("rule", RULES, ids=lambda r: f"{r.alert}-{r.severity}")
def test_every_alert_is_told_in_full(rule: Rule) -> None:
    assert rule.severity in ("none", "info", "warning", "critical")
    assert (rule.keep == "15m") == (rule.severity == "critical")
    assert "{{" not in rule.summary
    page = ROOT / "k8s" / "runbooks" / f"{rule.alert}.md"
    text = page.read_text()
    for part in ("Meaning", "Impact", "Diagnosis", "Mitigation"):
        assert re.search(rf"^#+ {part}", text, re.MULTILINE), f"{page.name} has no {part}"
    assert text.startswith(f"# {rule.alert}\n\n**First:** "), (
        f"{page.name} does not begin with what to do first"
    )
    assert "attempt=" not in rule.expr and "step=" not in rule.expr


@needs_promtool
def test_promtool_takes_the_rules() -> None:
    done = subprocess.run(
        [str(PROMTOOL), "check", "rules", str(ROOT / "k8s/rules/losscast.rules.yaml")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


STATE = {
    "LossNonFinite": "non_finite", "LossDiverged": "diverged", "LossOffLine": "off_line", "LossSpike": "spike",
    "LossBelowPrediction": "below", "LossJumpAfterResume": "jump_after_resume", "RunStalled": "stalled",
    "MetricsStale": "silent", "RestartLoop": "restart_loop", "CheckpointOverdue": "checkpoint_overdue",
    "CheckpointVerifyFailed": "checkpoint_bad", "LeaseLost": "lease_lost", "ClockSkew": "clock_skew",
    "LossPlateau": "plateau", "ValidationApart": "validation_apart", "RankApart": "rank_apart", "GradNormHigh": "grad_norm_high",
}  # fmt: skip


def fires(rule: Rule) -> tuple[list[dict[str, str]], dict[str, str]]:
    """Series under which it fires by minute 20, and the labels that it then has."""
    if "losscast_verdict" in rule.expr:
        state = STATE.get(rule.alert) or ("above" if rule.severity == "warning" else "will_miss")
        return [{f'losscast_verdict{{run="r",team="t",state="{state}"}}': "1x40"}], {"run": "r", "team": "t"}
    return {
        "ThroughputDropped": ([{'losscast_run_tokens_per_second{run="r"}': "100x13 60x26"}], {"run": "r"}),
        "MonitorDown": ([{'up{job="losscast",instance="m"}': "0x40"}], {"job": "losscast", "instance": "m"}),
        "JudgeBehind": ([{"losscast_judge_lag_seconds": "1000x40"}], {}),
        "JudgeFailing": ([{"losscast_judge_failing": "1x40"}], {}),
        "StoreDiskLow": ([{"losscast_store_free_bytes": "1000x40"}], {}),
        "IngestRejecting": (
            [{'losscast_samples_rejected_total{reason="json"}': "0+6x40"}],
            {"reason": "json"},
        ),
        "SeriesOverflow": ([{"losscast_series_dropped_total": "0+5x40"}], {}),
        "Watchdog": ([], {}),
    }[rule.alert]


QUIET = {
    "ThroughputDropped": {'losscast_run_tokens_per_second{run="r"}': "100x5 80x40"},
    "MonitorDown": {'up{job="losscast",instance="m"}': "1x40"},
    "JudgeBehind": {"losscast_judge_lag_seconds": "0x8 200x1 30x31"},
    "JudgeFailing": {"losscast_judge_failing": "0x10 1 0x29"},
    "StoreDiskLow": {"losscast_store_free_bytes": "90000000000x40"},
    "IngestRejecting": {'losscast_samples_rejected_total{reason="stale_attempt"}': "0+6x40",
                        'losscast_samples_rejected_total{reason="json"}': "7x40"},
    "SeriesOverflow": {"losscast_series_dropped_total": "5x40"},
}  # fmt: skip
ABSENT_FIRES = {"MonitorDown", "Watchdog"}


def case(series: list[dict[str, str]], alerts: list[str]) -> dict[str, Any]:
    """None of the alerts may fire at minute 20 over these series."""
    listed = [{"series": name, "values": values} for one in series for name, values in one.items()]
    asked = [{"eval_time": "20m", "alertname": alert, "exp_alerts": []} for alert in dict.fromkeys(alerts)]
    return {"interval": "1m", "input_series": listed, "alert_rule_test": asked}


@needs_promtool
def test_each_alert_fires_with_its_labels(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(rules_yaml())
    every = {name: values for rule in RULES for one in fires(rule)[0] for name, values in one.items()}
    said = _promtool(
        tmp_path, [case([every], [r.alert for r in RULES])]
    )  # says what it got instead of nothing
    missing = []
    for rule in RULES:
        want = {"alertname": rule.alert, "severity": rule.severity, **fires(rule)[1]}
        labels = "{" + ", ".join(f'{k}="{v}"' for k, v in sorted(want.items())) + "}"
        if labels not in said:
            missing.append(labels)
    assert not missing
    assert "error" not in said.lower(), "a template can't be rendered"


@needs_promtool
def test_no_alert_fires_over_a_healthy_run_or_without_data(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(rules_yaml())
    calm = {
        'losscast_verdict{run="r",team="t",state="healthy"}': "1x40",
        'losscast_run_step{run="r"}': "0+1x40",
    }
    for quiet in QUIET.values():
        calm |= quiet
    names = [r.alert for r in RULES]
    said = _promtool(
        tmp_path,
        [
            case([calm], [n for n in names if n != "Watchdog"]),
            case([], [n for n in names if n not in ABSENT_FIRES]),
        ],
    )
    assert "SUCCESS" in said, said[:2000]


@needs_promtool
def test_a_mute_silences_the_alert_it_names_or_all_of_the_run_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(rules_yaml())
    of_runs = [r for r in RULES if "run" in fires(r)[1]]
    assert {r.alert for r in of_runs} == RUN_ALERTS, (
        "each that can be muted is tried, and nothing else can be"
    )

    def muted(run: str, alert: str) -> dict[str, str]:
        return {f'losscast_run_muted{{run="{run}",alert="{alert}"}}': "1x40"}

    silent = [
        case([*fires(rule)[0], muted("r", by)], [rule.alert])
        for rule in of_runs
        for by in (rule.alert, "all")
    ]
    assert "SUCCESS" in (said := _promtool(tmp_path, silent)), said[:2000]
    others = {r.alert: "LossPlateau" if r.alert == "LossSpike" else "LossSpike" for r in of_runs}
    loud = [case([*fires(r)[0], muted("r", others[r.alert]), muted("s", "all")], [r.alert]) for r in of_runs]
    heard = _promtool(tmp_path, loud)
    for rule in of_runs:
        labels = {"alertname": rule.alert, "severity": rule.severity, **fires(rule)[1]}
        wanted = "{" + ", ".join(f'{k}="{v}"' for k, v in sorted(labels.items())) + "}"
        assert wanted in heard, f"{rule.alert} was silenced by the mute of another alert or run"


@needs_promtool
def test_a_description_says_value_and_expected(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(rules_yaml())
    series = [{
        'losscast_verdict{run="r",team="t",state="diverged"}': "1x40", 'losscast_run_loss{run="r"}': "3.25x40",
        'losscast_run_predicted_loss{run="r"}': "2.5x40", 'losscast_run_step{run="r"}': "1200x40",
    }]  # fmt: skip
    said = _promtool(tmp_path, [case(series, ["LossDiverged"])])
    assert "Last finite loss 3.25, expected 2.5" in said and "step 1.2k" in said


@needs_promtool
def test_a_link_leads_to_the_runbook_that_the_monitor_serves_also_while_it_is_down(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(rules_yaml())
    series = [{
        'losscast_page_info{url="https://m.example/x"}': "1x10 stale", 'up{job="losscast",instance="m"}': "1x10 0x30",
    }]  # fmt: skip
    assert "https://m.example/x/runbooks/MonitorDown.md" in _promtool(
        tmp_path, [case(series, ["MonitorDown"])]
    )
    assert "{{" not in rules_yaml("https://wiki/x").split("runbook_url: ")[1].splitlines()[0]


def _promtool(folder: Path, cases: list[dict[str, Any]]) -> str:
    path = folder / "tests.json"
    path.write_text(json.dumps({"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": cases}))
    done = subprocess.run([str(PROMTOOL), "test", "rules", str(path)], capture_output=True, text=True)
    return (done.stdout + done.stderr).replace("\\n", "\n").replace('\\"', '"')


@pytest.mark.skipif(shutil.which("amtool") is None, reason="needs amtool (Debian's prometheus-alertmanager)")
@pytest.mark.parametrize(
    ("labels", "receiver"),
    [
        ("alertname=LossDiverged severity=critical run=a", "pager"),
        ("alertname=LossOffLine severity=warning run=a", "channel"),
        ("alertname=LossSpike severity=info run=a", "nobody"),
        ("alertname=Watchdog severity=none", "dead-mans-switch"),
        ("alertname=MonitorDown severity=critical", "pager"),
    ],
)
def test_the_example_for_alertmanager_is_valid_and_routes_by_severity(labels: str, receiver: str) -> None:
    example = str(ROOT / "k8s/rules/alertmanager.example.yaml")
    command = ["amtool", "config", "routes", "test", f"--config.file={example}", *labels.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == receiver, done.stdout + done.stderr
    checked = subprocess.run(["amtool", "check-config", example], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
