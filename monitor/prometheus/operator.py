"""The alerts and their routing as objects of the Prometheus operator, made from the same tables as the plain files.

    python -m monitor.prometheus.operator FOLDER     writes prometheusrule.yaml and alertmanagerconfig.yaml

Rules come from `monitor.prometheus.alerts`, routing and inhibition from k8s/rules/alertmanager.example.yaml. Alertmanager adds
`namespace="losscast"` to a configuration's routes unless it runs with `alertmanagerConfigMatcherStrategy: {type: None}`;
our alerts carry no namespace, so it must (docs/azure.md, infra/azure do so).
"""

import re
import sys
from pathlib import Path
from typing import Any

from monitor.prometheus.alerts import rules

HEAD = "# Made by `make k8s-files` from {}. Change that instead.\n"
EXAMPLE = "k8s/rules/alertmanager.example.yaml"
LABELS = {"app.kubernetes.io/name": "losscast"}
MATCHER = re.compile(r"(\w+)\s*(=~|!~|!=|=)\s*\"?(.*?)\"?")


def prometheus_rule() -> dict[str, Any]:
    """Every rule, as a PrometheusRule."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "losscast", "labels": LABELS},
        "spec": {"groups": rules()["groups"]},
    }


def alertmanager_config(plain: dict[str, Any]) -> dict[str, Any]:
    """Alertmanager's own configuration, as an AlertmanagerConfig. Where alerts go is in the secret losscast-receivers: one
    key a receiver, each the URL of a webhook."""
    return {
        "apiVersion": "monitoring.coreos.com/v1alpha1",
        "kind": "AlertmanagerConfig",
        "metadata": {"name": "losscast", "labels": LABELS},
        "spec": {
            "route": _route(plain["route"]),
            "inhibitRules": [
                {
                    "sourceMatch": [_matcher(m) for m in rule["source_matchers"]],
                    "targetMatch": [_matcher(m) for m in rule["target_matchers"]],
                    **({"equal": rule["equal"]} if "equal" in rule else {}),
                }
                for rule in plain["inhibit_rules"]
            ],
            "receivers": [_receiver(r) for r in plain["receivers"]],
        },
    }


def _route(plain: dict[str, Any]) -> dict[str, Any]:
    names = {
        "group_by": "groupBy",
        "group_wait": "groupWait",
        "group_interval": "groupInterval",
        "repeat_interval": "repeatInterval",
    }
    made: dict[str, Any] = {"receiver": plain["receiver"]}
    made |= {new: plain[old] for old, new in names.items() if old in plain}
    if "matchers" in plain:
        made["matchers"] = [_matcher(m) for m in plain["matchers"]]
    if plain.get("continue"):
        made["continue"] = True
    if "routes" in plain:
        made["routes"] = [_route(r) for r in plain["routes"]]
    return made


def _matcher(text: str) -> dict[str, str]:
    found = MATCHER.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r} is no matcher")
    return {"name": found[1], "matchType": found[2], "value": found[3]}


def _receiver(plain: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {"name": plain["name"]}
    hooks = plain.get("webhook_configs")
    if hooks:
        secret = {"name": "losscast-receivers", "key": plain["name"]}
        made["webhookConfigs"] = [
            {"urlSecret": secret, "sendResolved": h.get("send_resolved", True)} for h in hooks
        ]
    return made


def files(root: Path) -> dict[str, str]:
    """Name and text of both, from a checkout at `root`."""
    import yaml

    def dump(document: dict[str, Any]) -> str:
        return yaml.safe_dump(document, sort_keys=False, width=1000, allow_unicode=True)

    plain = yaml.safe_load((root / EXAMPLE).read_text())
    return {
        "prometheusrule.yaml": HEAD.format("monitor/prometheus/alerts.py") + dump(prometheus_rule()),
        "alertmanagerconfig.yaml": HEAD.format(EXAMPLE) + dump(alertmanager_config(plain)),
    }


if __name__ == "__main__":
    for name, text in files(Path.cwd()).items():
        Path(sys.argv[1], name).write_text(text)
