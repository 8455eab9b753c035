"""Every alert losscast can raise: one table, from which the Prometheus rules are made.

The monitor does the statistics and exports what it holds of each run as `losscast_verdict{run, team, state} 1`; a rule
only decides when that pages whom. So most of the rules are one comparison, and what they mean is in the judge.

A critical rule keeps firing for 15 minutes after its expression stopped holding: a failed scrape must not resolve a live
divergence. Labels never carry attempt, step or value, so one trouble is one alert. Written for Prometheus 2.42 and later.
"""

from dataclasses import dataclass
from typing import Any

RUNBOOKS = (
    '{{ with query "last_over_time(losscast_page_info[1d])" }}{{ . | first | label "url" }}{{ end }}/runbooks'
)
"""Where the runbook pages are: the monitor serves them itself and says where in `losscast_page_info` (`monitor serve --url`)."""
JOB = "losscast"

STALE_FACTOR, STALE_LEAST_S, STALE_UNKNOWN_S = 3.0, 180.0, 1800.0
"""No step told for 3 times the 99th percentile of the times between two reports, and at least 3 minutes; half an hour while
it has none."""
THROUGHPUT_SHARE = 0.7
RESTART_LIMIT = 3
SKEW_S = 300.0
CHECKPOINT_FACTOR, CHECKPOINT_LEAST_S = 3.0, 600.0
JUDGE_LATE_S, JUDGE_TOO_LATE_S = 60.0, 900.0
DISK_WARNING_BYTES, DISK_CRITICAL_BYTES = 2 << 30, 256 << 20
HOLD_S = 60.0
"""For how long at least a critical alert is held out to be scraped: at fifty steps a second a NaN is over in less time
than passes between two scrapes, and the page would be lost."""
RECENT_S = 900.0
"""For how long the monitor says of something that happened once (a spike, a lost lease) that it is so."""


@dataclass(frozen=True)
class Rule:
    """One alerting rule. `summary` is fixed; `description` may hold Prometheus' templates."""

    alert: str
    severity: str
    expr: str
    wait: str
    """Prometheus' `for`."""
    summary: str
    description: str
    keep: str | None = None
    """Prometheus' `keep_firing_for`."""


def _unmuted(alert: str) -> str:
    """Nobody muted this alert of the run."""
    return f' unless on (run) losscast_run_muted{{alert=~"all|{alert}"}}'


def _held(alert: str, state: str) -> str:
    return f'max by (run, team) (losscast_verdict{{state="{state}"}}) == 1' + _unmuted(alert)


def _now(metric: str, words: str) -> str:
    """Words about a metric of the alert's run, left out when there is none."""
    query = f"printf \"losscast_{metric}{{run='%s'}}\" $labels.run | query"
    return "{{ with " + query + " }}" + words.replace("@", "{{ . | first | value | humanize }}") + "{{ end }}"


_LOSS = _now("run_loss", " Last finite loss @") + _now("run_predicted_loss", ", expected @") + (
    _now("run_band_upper", " (at most @)") + _now("run_loss_gap_sigma", ", @ sigmas off") + "."
)  # fmt: skip
_STEP = _now("run_step", " It is at step @.")
_RUN = "Run {{ $labels.run }}"


def _run(alert: str, severity: str, state: str, wait: str, summary: str, description: str) -> Rule:
    keep = "15m" if severity == "critical" else None
    return Rule(alert, severity, _held(alert, state), wait, summary, f"{_RUN} {description}", keep)


RULES: tuple[Rule, ...] = (
    _run("LossNonFinite", "critical", "non_finite", "0s", "The loss is NaN or infinite",
         "reported a loss that is not a number." + _LOSS + _STEP),
    _run("LossDiverged", "critical", "diverged", "0s", "The loss left its line for good",
         "diverged." + _LOSS + _STEP),
    _run("LossOffLine", "warning", "off_line", "0s", "The loss is off its line, not yet known for how long",
         "is off its line; it will end as a spike or as a divergence." + _LOSS + _STEP),
    _run("LossAbovePrediction", "warning", "above", "1m", "The loss drifts above its prediction",
         "drifts above the line." + _LOSS + _now("run_predicted_final_loss", " Predicted end @.") + _STEP),
    _run("LossAbovePrediction", "critical", "will_miss", "1m", "The final loss will miss its target",
         "drifts so far above the line that it will all but surely miss its target." + _LOSS + _STEP),
    _run("LossBelowPrediction", "warning", "below", "1m", "The loss is better than it should be: look for a leak",
         "is below the line: leaked data, the wrong tokenizer or a broken evaluation look like this." + _LOSS),
    _run("LossSpike", "info", "spike", "0s", "The loss spiked and came back",
         "had a spike that recovered by itself." + _LOSS),
    _run("LossJumpAfterResume", "warning", "jump_after_resume", "0s", "The loss before and after a resume disagree",
         "goes on from a checkpoint with another loss than it had there." + _LOSS + _STEP),
    _run("LossPlateau", "warning", "plateau", "1m", "The loss no longer falls",
         "falls at less than a seventh of the pace it had, and neither its learning rate nor its prediction says why."
         + _LOSS + _STEP),
    _run("ValidationApart", "warning", "validation_apart", "0s", "The validation loss leapt away from the training loss",
         "has a validation loss that left the training loss: a broken evaluation, a leak, or other weights." + _LOSS + _STEP),
    _run("RankApart", "warning", "rank_apart", "0s", "One rank's loss is far from the others'",
         "has one rank far from the others, as silent data corruption or a bad GPU shows." + _LOSS + _STEP),
    _run("GradNormHigh", "info", "grad_norm_high", "0s", "The gradient norm left its level",
         "has a gradient norm of several times its level; the loss often follows within a few steps." + _LOSS + _STEP),
    _run("RunStalled", "critical", "stalled", "0s", "A run lives and makes no step",
         f"is alive but has told of no step for more than {STALE_FACTOR:g} times the 99th percentile of the times between its reports"
         f" (at least {STALE_LEAST_S:g} s)." + _STEP),
    _run("MetricsStale", "critical", "silent", "0s", "Nothing is heard of a run that should be training",
         f"said nothing for more than {STALE_FACTOR:g} times the 99th percentile of the times between its reports"
         f" (at least {STALE_LEAST_S:g} s), not even a heartbeat." + _STEP),
    Rule("ThroughputDropped", "warning",
         f"max by (run) (losscast_run_tokens_per_second) < {THROUGHPUT_SHARE:g} * "
         "max by (run) (quantile_over_time(0.5, losscast_run_tokens_per_second[6h]))" + _unmuted("ThroughputDropped"),
         "5m", "A run is slower than it was",
         _RUN + f" trains at {{{{ $value | humanize }}}} tokens a second, under {THROUGHPUT_SHARE:.0%} of its own median."),
    _run("RestartLoop", "critical", "restart_loop", "0s", "A run restarts and makes no step",
         f"restarted {RESTART_LIMIT} times or more without a new step." + _STEP),
    _run("CheckpointOverdue", "warning", "checkpoint_overdue", "1m", "No checkpoint for too long",
         f"has committed no checkpoint for more than {CHECKPOINT_FACTOR:g} times its usual interval." + _STEP),
    _run("CheckpointVerifyFailed", "critical", "checkpoint_bad", "0s", "A checkpoint does not verify",
         "has a checkpoint that does not verify; an older one is used." + _STEP),
    _run("LeaseLost", "warning", "lease_lost", "0s", "A second writer of a run was refused",
         "had a second writer, or its launcher lost the lease." + _STEP),
    Rule("MonitorDown", "critical", f'absent(up{{job="{JOB}"}}) or up{{job="{JOB}"}} == 0', "1m",
         "The monitor can't be scraped", "No losscast monitor answers: nothing watches the runs. Training goes on. "
         "Start it again on the same store; its runbook page is down with it: `losscast alert runbook MonitorDown`.", "15m"),
    Rule("JudgeBehind", "warning", f"losscast_judge_lag_seconds > {JUDGE_LATE_S:g}", "2m", "Verdicts come late",
         "The oldest sample that is not judged has waited for {{ $value | humanizeDuration }}."),
    Rule("JudgeBehind", "critical", f"losscast_judge_lag_seconds > {JUDGE_TOO_LATE_S:g}", "0s",
         "Verdicts come far too late: runs are not watched",
         "The oldest sample that is not judged has waited for {{ $value | humanizeDuration }}.", "15m"),
    Rule("JudgeFailing", "warning", "losscast_judge_failing == 1", "3m", "Something can't be judged",
         "The judge's process is gone, or a run can't be read or written; the page names it."),
    Rule("StoreDiskLow", "warning", f"losscast_store_free_bytes < {DISK_WARNING_BYTES}", "1m",
         "The store's disk is getting full",
         "{{ $value | humanize1024 }}B are left where the store lies."),
    Rule("StoreDiskLow", "critical", f"losscast_store_free_bytes < {DISK_CRITICAL_BYTES}", "0s",
         "The store's disk is full",
         "{{ $value | humanize1024 }}B are left where the store lies; samples will be refused and wait in their spools.", "15m"),
    Rule("IngestRejecting", "warning",
         'sum by (reason) (rate(losscast_samples_rejected_total{reason!="stale_attempt"}[5m])) > 0', "1m",
         "The monitor refuses events", "{{ $value | humanize }} requests a second are refused: {{ $labels.reason }}."),
    Rule("SeriesOverflow", "warning", "increase(losscast_series_dropped_total[10m]) > 0", "0s",
         "More runs than /metrics can show in full",
         "{{ $value | humanize }} series were left out of /metrics in ten minutes; verdicts of unhealthy runs come first."),
    _run("ClockSkew", "warning", "clock_skew", "5m", "A run's clock is wrong",
         f"reports times more than {SKEW_S:g} s away from the monitor's clock."),
    Rule("Watchdog", "none", "vector(1)", "0s", "Always firing",
         "Fires as long as Prometheus evaluates rules: route it to a dead man's switch."),
)  # fmt: skip


def rules(runbooks: str = RUNBOOKS) -> dict[str, Any]:
    """The rule file as plain data."""

    def one(rule: Rule) -> dict[str, Any]:
        out: dict[str, Any] = {"alert": rule.alert, "expr": rule.expr, "for": rule.wait}
        if rule.keep:
            out["keep_firing_for"] = rule.keep
        out["labels"] = {"severity": rule.severity}
        out["annotations"] = {
            "summary": rule.summary,
            "description": rule.description,
            "runbook_url": f"{runbooks}/{rule.alert}.md",
        }
        return out

    runs = [one(r) for r in RULES if "losscast_verdict" in r.expr or "losscast_run" in r.expr]
    service = [one(r) for r in RULES if "losscast_verdict" not in r.expr and "losscast_run" not in r.expr]
    return {
        "groups": [{"name": "losscast-runs", "rules": runs}, {"name": "losscast-monitor", "rules": service}]
    }


def rules_yaml(runbooks: str = RUNBOOKS) -> str:
    """The rule file for Prometheus."""
    import yaml

    head = "# Made by `losscast alert rules`. Change monitor/prometheus/alerts.py instead.\n"
    return head + yaml.safe_dump(rules(runbooks), sort_keys=False, width=1000, allow_unicode=True)
