"""The Grafana dashboard, generated: `python -m monitor.prometheus.dashboard > k8s/dashboard/losscast.json`.

One table of panels in code, so that names, units and links agree everywhere; a test holds the file to it. It reads
only what `/metrics` exports. Variables: the Prometheus datasource, cluster, team, run, and where the page and the
runbooks are served, for the links. A cluster label is what Prometheus adds; without one the variable matches all.
"""

import json
import sys
from typing import Any

Json = dict[str, Any]

SOURCE = {"type": "prometheus", "uid": "${datasource}"}
RUN = 'cluster=~"$cluster", run=~"$run"'
GLOBAL = 'cluster=~"$cluster"'
PAGE = "${page}/?run=${__field.labels.run}"

BLUE, ORANGE, GREEN, INK = "#0072B2", "#D55E00", "#009E73", "#8C8C8C"
"""Okabe and Ito's colours: the same as the page's, and told apart by the colour-blind."""

STATES = {
    "non_finite": "#8B1A00", "diverged": ORANGE, "stalled": ORANGE, "silent": ORANGE, "will_miss": ORANGE, "off_line": "#E69F00",
    "above": "#E69F00", "below": "#CC79A7", "jump_after_resume": "#CC79A7", "rank_apart": "#E69F00",
    "validation_apart": "#E69F00", "plateau": "#E69F00", "grad_norm_high": "#56B4E9", "spike": "#56B4E9",
    "warming_up": INK, "healthy": GREEN,
}  # fmt: skip
"""Worst first: of a run in two states the first one is shown."""


def dashboard() -> Json:
    """The whole dashboard as Grafana imports it."""
    panels: list[Json] = []
    top = 0
    for title, folded, row in ROWS:
        line = {"id": len(panels) + 1, "type": "row", "title": title, "collapsed": folded, "panels": []}
        line["gridPos"] = {"h": 1, "w": 24, "x": 0, "y": top}
        panels.append(line)
        top += 1
        left, tallest = 0, 0
        first = len(panels) + 1
        placed: list[Json] = []
        for offset, panel in enumerate(row):
            width, height = panel["gridPos"]["w"], panel["gridPos"]["h"]
            if left + width > 24:
                left, top, tallest = 0, top + tallest, 0
            placed.append({"id": first + offset + (100 if folded else 0), **panel})
            placed[-1]["gridPos"] = {"h": height, "w": width, "x": left, "y": top}
            left, tallest = left + width, max(tallest, height)
        top += tallest
        (line["panels"] if folded else panels).extend(placed)
    return {
        "uid": "losscast",
        "title": "losscast",
        "description": "Runs against their predictions: who is off the line, since when, and what it costs to go on.",
        "tags": ["losscast", "training"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-12h", "to": "now"},
        "timepicker": {},
        "templating": {"list": variables()},
        "annotations": {"list": [alerts_annotation()]},
        "links": [
            {
                "title": "losscast page",
                "type": "link",
                "url": "${page}/",
                "targetBlank": True,
                "icon": "external link",
            }
        ],
        "panels": panels,
    }


def variables() -> list[Json]:
    """Datasource, cluster, team, run; then the two addresses that links start with.

    Few series carry a team, so a team chooses runs: All of them is the list of its runs, and not any run.
    """

    def query(name: str, label: str, expression: str, everything: str | None = ".*") -> Json:
        return {
            "name": name, "label": label, "type": "query", "datasource": SOURCE, "definition": expression,
            "query": {"query": expression, "refId": name}, "refresh": 2, "sort": 1, "multi": True,
            "includeAll": True, "allValue": everything, "current": {"text": ["All"], "value": ["$__all"]},
        }  # fmt: skip

    def address(name: str, label: str, value: str) -> Json:
        return {
            "name": name, "label": label, "type": "textbox", "query": value,
            "current": {"text": value, "value": value}, "options": [{"text": value, "value": value}],
        }  # fmt: skip

    return [
        {
            "name": "datasource",
            "label": "Datasource",
            "type": "datasource",
            "query": "prometheus",
            "current": {},
        },
        query("cluster", "Cluster", "label_values(losscast_build_info, cluster)"),
        query("team", "Team", f"label_values(losscast_run_info{{{GLOBAL}}}, team)"),
        query("run", "Run", f'label_values(losscast_run_info{{{GLOBAL}, team=~"$team"}}, run)', None),
        address("page", "Page", "http://127.0.0.1:8700"),
        address("runbooks", "Runbooks", "http://127.0.0.1:8700/runbooks"),
    ]


def alerts_annotation() -> Json:
    """Marks on every graph where an alert of the runs in view fires."""
    return {
        "name": "alerts",
        "datasource": SOURCE,
        "enable": True,
        "iconColor": ORANGE,
        "expr": f'ALERTS{{alertstate="firing", severity=~"critical|warning", {RUN}}}',
        "titleFormat": "{{alertname}}",
        "textFormat": "{{run}}",
        "step": "60s",
    }


def series(*pairs: tuple[str, str]) -> list[Json]:
    """Targets from (expression, legend)."""
    return [
        {
            "refId": chr(ord("A") + i),
            "datasource": SOURCE,
            "expr": expr,
            "legendFormat": legend,
            "range": True,
        }
        for i, (expr, legend) in enumerate(pairs)
    ]


def graph(
    title: str,
    targets: list[Json],
    unit: str,
    *,
    w: int = 12,
    h: int = 8,
    about: str = "",
    custom: Json | None = None,
    overrides: list[Json] | None = None,
) -> Json:
    """A time series with links from each series to its run on the page."""
    defaults = {
        "unit": unit,
        "custom": {
            "lineWidth": 1,
            "fillOpacity": 0,
            "showPoints": "never",
            "spanNulls": False,
            **(custom or {}),
        },
        "links": [{"title": "Open ${__field.labels.run}", "url": PAGE, "targetBlank": True}],
    }
    return {
        "type": "timeseries", "title": title, "description": about, "datasource": SOURCE, "targets": targets,
        "gridPos": {"w": w, "h": h}, "fieldConfig": {"defaults": defaults, "overrides": overrides or []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi", "sort": "desc"}},
    }  # fmt: skip


def stat(title: str, expr: str, unit: str, *, bad_from: float | None = None, about: str = "") -> Json:
    """One number; from `bad_from` on it is orange."""
    steps: list[Json] = [{"color": GREEN if bad_from is not None else BLUE, "value": None}]
    if bad_from is not None:
        steps.append({"color": ORANGE, "value": bad_from})
    return {
        "type": "stat", "title": title, "description": about, "datasource": SOURCE,
        "targets": [{"refId": "A", "datasource": SOURCE, "expr": expr, "instant": True}], "gridPos": {"w": 4, "h": 4},
        "fieldConfig": {"defaults": {"unit": unit, "thresholds": {"mode": "absolute", "steps": steps}}, "overrides": []},
        "options": {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value", "graphMode": "none"},
    }  # fmt: skip


def override(series_pattern: str, **properties: Any) -> Json:
    """Properties of the series whose names match."""
    return {
        "matcher": {"id": "byRegexp", "options": series_pattern},
        "properties": [{"id": name.replace("__", "."), "value": value} for name, value in properties.items()],
    }


def state_timeline() -> Json:
    """What the judge held of each run, as a band of colours."""
    numbered = list(STATES)
    expr = " or ".join(
        f'(max by (run) (losscast_verdict{{{RUN}, state="{state}"}}) == 1) * {i}'
        for i, state in enumerate(numbered)
    )
    mapping = {
        str(i): {"text": s.replace("_", " "), "color": STATES[s], "index": i} for i, s in enumerate(numbered)
    }
    return {
        "type": "state-timeline", "title": "What the judge held", "datasource": SOURCE, "targets": series((expr, "{{run}}")),
        "description": "The verdict on each run over time.", "gridPos": {"w": 24, "h": 8},
        "fieldConfig": {
            "defaults": {"custom": {"fillOpacity": 85, "lineWidth": 0}, "mappings": [{"type": "value", "options": mapping}],
                         "links": [{"title": "Open ${__field.labels.run}", "url": PAGE, "targetBlank": True}]},
            "overrides": [],
        },
        "options": {"showValue": "never", "mergeValues": True, "rowHeight": 0.8, "legend": {"displayMode": "list", "placement": "bottom"}},
    }  # fmt: skip


def firing_table() -> Json:
    """Alerts that fire now, with a link to each one's runbook and run."""
    kept = ("alertname", "run", "team", "severity")
    return {
        "type": "table", "title": "Firing now", "description": "Each row links to its runbook and to the run.", "datasource": SOURCE,
        "targets": [{"refId": "A", "datasource": SOURCE, "instant": True, "format": "table",
                     "expr": f'ALERTS{{alertstate="firing", severity=~"critical|warning|info", {RUN}}}'}],
        "gridPos": {"w": 24, "h": 6},
        "transformations": [{"id": "filterFieldsByName", "options": {"include": {"names": list(kept)}}}],
        "fieldConfig": {"defaults": {}, "overrides": [
            {"matcher": {"id": "byName", "options": "alertname"}, "properties": [
                {"id": "links", "value": [{"title": "Runbook", "url": "${runbooks}/${__value.raw}.md", "targetBlank": True}]}]},
            {"matcher": {"id": "byName", "options": "run"}, "properties": [
                {"id": "links", "value": [{"title": "Open on the page", "url": "${page}/?run=${__value.raw}", "targetBlank": True}]}]},
        ]},
        "options": {"showHeader": True},
    }  # fmt: skip


def per_run(metric: str) -> str:
    return f"losscast_{metric}{{{RUN}}}"


def quantile(metric: str, q: str) -> str:
    return f'losscast_{metric}{{{RUN}, quantile="{q}"}}'


LOSS = {
    **graph(
        "$run: loss in its predicted band",
        series(
            (per_run("run_loss"), "loss"),
            (per_run("run_predicted_loss"), "predicted"),
            (per_run("run_band_lower"), "band, lower"),
            (per_run("run_band_upper"), "band, upper"),
        ),
        "none",
        h=9,
        about="Nats per token. Every step's sample is on the page.",
        overrides=[
            override("loss", color={"mode": "fixed", "fixedColor": "text"}, custom__lineWidth=2),
            override(
                "predicted",
                color={"mode": "fixed", "fixedColor": BLUE},
                custom__lineStyle={"fill": "dash", "dash": [8, 6]},
            ),
            override("band, lower", color={"mode": "fixed", "fixedColor": BLUE}, custom__lineWidth=0),
            override(
                "band, upper",
                color={"mode": "fixed", "fixedColor": BLUE},
                custom__lineWidth=0,
                custom__fillBelowTo="band, lower",
                custom__fillOpacity=15,
            ),
        ],
    ),
    "repeat": "run",
    "repeatDirection": "h",
    "maxPerRow": 2,
}
"""One panel a run: a band can be filled only down to a series whose name is known."""

ROWS: tuple[tuple[str, bool, list[Json]], ...] = (
    (
        "What needs a person",
        False,
        [
            stat("Runs", f"count(losscast_run_info{{{RUN}}}) or vector(0)", "none"),
            stat(
                "Diverged or not a number",
                f'sum(max by (run) (losscast_verdict{{{RUN}, state=~"diverged|non_finite|stalled"}})) or vector(0)',
                "none",
                bad_from=1,
                about="Runs whose verdict pages a person.",
            ),
            stat(
                "Off their line",
                f'sum(max by (run) (losscast_verdict{{{RUN}, state=~"off_line|above|below"}})) or vector(0)',
                "none",
                bad_from=1,
            ),
            stat(
                "Oldest step of a running run",
                f"max(time() - {per_run('run_last_step_timestamp_seconds')})",
                "s",
                bad_from=900,
            ),
            stat(
                "Advised to stop",
                f'sum(losscast_advice{{{RUN}, action="stop"}}) or vector(0)',
                "none",
                bad_from=1,
            ),
            stat("Monitors up", f"count(losscast_build_info{{{GLOBAL}}}) or vector(0)", "none"),
            firing_table(),
            state_timeline(),
        ],
    ),
    (
        "Loss",
        False,
        [
            LOSS,
            graph(
                "Distance from the line",
                series((per_run("run_loss_gap_sigma"), "{{run}}")),
                "none",
                about="In standard deviations of one step. Single steps mean little; the judge weighs many.",
            ),
            graph(
                "Predicted final loss",
                series(
                    (quantile("run_predicted_final_loss", "0.5"), "{{run}}"),
                    (quantile("run_predicted_final_loss", "0.05"), "{{run}} 5%"),
                    (quantile("run_predicted_final_loss", "0.95"), "{{run}} 95%"),
                ),
                "none",
                about="Nats per token, as the run goes on.",
                overrides=[override(".* (5|95)%", custom__lineStyle={"fill": "dash", "dash": [4, 6]})],
            ),
        ],
    ),
    (
        "Speed",
        False,
        [
            graph("Tokens a second", series((per_run("run_tokens_per_second"), "{{run}}")), "short", w=8),
            graph(
                "Model FLOPs utilisation", series((per_run("run_mfu_ratio"), "{{run}}")), "percentunit", w=8
            ),
            graph(
                "Goodput",
                series((per_run("run_goodput_ratio"), "{{run}}")),
                "percentunit",
                w=8,
                about="Share of the time that went into steps that were kept.",
            ),
            graph(
                "Seconds a step",
                series(
                    (quantile("run_step_seconds", "0.5"), "{{run}}"),
                    (quantile("run_step_seconds", "0.99"), "{{run}} 99%"),
                ),
                "s",
                w=8,
            ),
            graph("Step", series((per_run("run_step"), "{{run}}")), "short", w=8),
            graph(
                "Since the last step",
                series((f"time() - {per_run('run_last_step_timestamp_seconds')}", "{{run}}")),
                "s",
                w=8,
            ),
        ],
    ),
    (
        "The monitor itself",
        True,
        [
            graph(
                "Samples received",
                series((f"sum by (run) (rate(losscast_samples_received_total{{{RUN}}}[5m]))", "{{run}}")),
                "cps",
                w=8,
                custom={"stacking": {"mode": "normal"}, "fillOpacity": 20},
            ),
            graph(
                "Samples rejected",
                series(
                    (f"sum by (reason) (rate(losscast_samples_rejected_total{{{GLOBAL}}}[5m]))", "{{reason}}")
                ),
                "cps",
                w=8,
            ),
            graph(
                "Samples that were no number",
                series(
                    (
                        f"sum by (run, kind) (increase(losscast_samples_nonfinite_total{{{RUN}}}[5m]))",
                        "{{run}} {{kind}}",
                    )
                ),
                "short",
                w=8,
            ),
            graph(
                "Commit duration",
                series(
                    (
                        "histogram_quantile(0.99, sum by (le) "
                        f"(rate(losscast_ingest_commit_duration_seconds_bucket{{{GLOBAL}}}[5m])))",
                        "99%",
                    ),
                    (
                        "histogram_quantile(0.5, sum by (le) "
                        f"(rate(losscast_ingest_commit_duration_seconds_bucket{{{GLOBAL}}}[5m])))",
                        "median",
                    ),
                ),
                "s",
                w=8,
            ),
            graph(
                "Store",
                series(
                    (f"losscast_store_size_bytes{{{GLOBAL}}}", "size"),
                    (f"losscast_store_free_bytes{{{GLOBAL}}}", "free on disk"),
                ),
                "bytes",
                w=8,
            ),
            graph(
                "Series dropped at the cap",
                series((f"increase(losscast_series_dropped_total{{{GLOBAL}}}[15m])", "dropped")),
                "short",
                w=8,
            ),
        ],
    ),
)


def render() -> str:
    """The file's text."""
    return json.dumps(dashboard(), indent=2) + "\n"


if __name__ == "__main__":
    sys.stdout.write(render())
