"""`losscast alert rules | runbook | test`: the rules of every alert, what to do about it, and one sent through as a test."""

import argparse
from typing import Any


def register(commands: Any) -> None:
    """Add `alert` to the command."""
    top = commands.add_parser("alert", help="the alerts and their Prometheus rules", description="Alerts.")
    parts = top.add_subparsers(dest="part", metavar="PART", required=True)
    p = parts.add_parser("rules", help="print the rule file for Prometheus 2.42 and later")
    p.add_argument(
        "--runbooks", metavar="URL",
        help="where your runbook pages are (default: the monitor's own, at the address of `monitor serve --url`)",
    )  # fmt: skip
    p.set_defaults(func=rules)
    p = parts.add_parser("runbook", help="print what to do about an alert; without a name, list them")
    p.add_argument("name", nargs="?", metavar="ALERT")
    p.set_defaults(func=runbook)
    p = parts.add_parser("test", help="send a test alert through Alertmanager, to see whom it reaches")
    p.add_argument(
        "--alertmanager", default="http://127.0.0.1:9093", metavar="URL", help="default %(default)s"
    )
    p.add_argument("--severity", default="critical", choices=("info", "warning", "critical"))
    p.add_argument("--team", default="", help="to test the routing by team")
    p.set_defaults(func=test)


def rules(args: argparse.Namespace) -> int:
    """Print the rule file."""
    from monitor.prometheus.alerts import RUNBOOKS, rules_yaml

    print(rules_yaml((args.runbooks or RUNBOOKS).rstrip("/")), end="")
    return 0


def runbook(args: argparse.Namespace) -> int:
    """Print a runbook."""
    from monitor.errors import WrongInput
    from monitor.web.runbook import texts

    if args.name is None:
        print("\n".join(texts()))
        return 0
    found = {name.lower(): text for name, text in texts().items()}.get(args.name.lower())
    if found is None:
        raise WrongInput(f"{args.name!r}: no alert of this name; there are {', '.join(texts())}")
    print(found, end="")
    return 0


def test(args: argparse.Namespace) -> int:
    """Hand Alertmanager an alert that resolves by itself after two minutes."""
    import json
    import sys
    import urllib.request
    from datetime import UTC, datetime, timedelta

    from monitor.errors import Failed, WrongInput

    if not args.alertmanager.startswith(("http://", "https://")):
        raise WrongInput(f"--alertmanager {args.alertmanager}: give http://HOST:PORT")
    labels = {
        "alertname": "LosscastTest",
        "severity": args.severity,
        "run": "losscast-test",
        "team": args.team,
    }
    now = datetime.now(UTC)
    alert = {
        "labels": {name: value for name, value in labels.items() if value},
        "annotations": {
            "summary": "A test of losscast's alerts: nothing is wrong",
            "description": "Somebody ran `losscast alert test`. It resolves by itself in two minutes.",
        },
        "startsAt": now.isoformat(),
        "endsAt": (now + timedelta(minutes=2)).isoformat(),
    }
    url = args.alertmanager.rstrip("/") + "/api/v2/alerts"
    request = urllib.request.Request(
        url, data=json.dumps([alert]).encode(), headers={"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=10):
            pass
    except OSError as error:
        raise Failed(f"{url}: {getattr(error, 'reason', error)}; is this an Alertmanager?") from error
    print(f"sent; look where {args.severity} alerts should arrive", file=sys.stderr)
    return 0
