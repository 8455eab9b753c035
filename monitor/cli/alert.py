"""`losscast alert`: the rules of every alert, what to do about it, one sent through as a test; and what a person says to a
live monitor of a run: its advice is seen (ack, snooze), its alerts are to be silent for a while (mute, unmute), a change is
meant (announce)."""

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

    for name, what in (
        ("ack", "a run's advice was seen; another action is news again"),
        ("snooze", "the same for a while, then the advice is shown again"),
        ("mute", "silence a run's alerts for a while; nothing is hidden on the page"),
        ("unmute", "let them sound again"),
        ("announce", "a change of data or learning rate is meant: the level is learnt anew from its step"),
    ):
        scope = "ingest and read" if name == "announce" else "operate"
        p = parts.add_parser(
            name, help=what, description=f"Tell a live monitor: {what}. The token needs the scope {scope}."
        )
        p.add_argument("run", metavar="RUN")
        if name in ("snooze", "mute"):
            p.add_argument(
                "--for", required=True, dest="how_long", metavar="TIME", help="90m, 2h, 1d; at most 30d"
            )
        if name == "mute":
            p.add_argument(
                "--alert",
                action="append",
                default=[],
                metavar="NAME",
                help="this one only; may be given again",
            )
            p.add_argument("--why", default="", metavar="TEXT", help="for those who wonder")
        if name == "announce":
            p.add_argument("--step", type=int, required=True, metavar="N", help="where it takes effect")
            p.add_argument("--what", required=True, metavar="TEXT", help="shown where the judge names causes")
        if name == "ack":
            p.add_argument("--back", action="store_true", help="take an acknowledgement or a snooze back")
        p.add_argument("--url", help="the monitor (default $LOSSCAST_URL, or http://127.0.0.1:8700)")
        p.add_argument(
            "--token-env", default="LOSSCAST_TOKEN", metavar="NAME",
            help=f"variable that holds a token with the scope {scope} (default %(default)s)",
        )  # fmt: skip
        p.set_defaults(func=say)


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
    import http.client
    import json
    import sys
    import urllib.request
    from datetime import UTC, datetime, timedelta

    from monitor.cli.watch import is_web_address
    from monitor.errors import Failed, WrongInput

    if not is_web_address(args.alertmanager):
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
    except (OSError, http.client.HTTPException) as error:
        raise Failed(f"{url}: {getattr(error, 'reason', error)}; is this an Alertmanager?") from error
    print(f"sent; look where {args.severity} alerts should arrive", file=sys.stderr)
    return 0


def say(args: argparse.Namespace) -> int:
    """Tell a live monitor what a person has decided about a run."""
    import sys

    from monitor.cli.watch import asking
    from monitor.errors import WrongInput
    from monitor.schema import is_run_id
    from monitor.service.attention import duration

    if not is_run_id(args.run):
        raise WrongInput(
            f"{args.run!r} is no run's name: small letters, digits and hyphens, as in run.yaml's `name`"
        )
    ask = asking(args)
    of = f"/v1/runs/{args.run}"
    if args.part == "announce":
        return _announce(ask, args.run, args.step, args.what)
    for_s = duration(args.how_long) if args.part in ("snooze", "mute") else None
    if args.part == "unmute" or (args.part == "ack" and args.back):
        ask(of + ("/mute" if args.part == "unmute" else "/advice"), "DELETE")
        done = "its alerts sound again" if args.part == "unmute" else "nobody has seen its advice"
    elif args.part == "mute":
        ask(f"{of}/mute", "POST", {"for_s": for_s, "alerts": args.alert, "why": args.why})
        done = f"{', '.join(args.alert) or 'all its alerts'} muted for {args.how_long}"
    else:
        advice = ask(f"{of}/advice", "POST", {} if for_s is None else {"for_s": for_s})["advice"]
        done = f"its advice ({advice['action'].replace('_', ' ')}) is " + (
            "acknowledged" if for_s is None else f"snoozed for {args.how_long}"
        )
    print(f"{args.run}: {done}", file=sys.stderr)
    return 0


def _announce(ask: Any, run: str, step: int, what: str) -> int:
    """Send the event in the name of the attempt that is listened to."""
    import sys
    import time

    from monitor.errors import WrongInput

    if step < 0:
        raise WrongInput(f"--step {step}: need the step from which the change takes effect, 0 or more")
    attempt = max(a["attempt"] for a in ask(f"/v1/runs/{run}")["attempts"])
    event = {
        "event": "announce",
        "run": run,
        "attempt": attempt,
        "time": time.time(),
        "step": step,
        "what": what,
    }
    ask("/v1/events", "POST", event)
    print(f"{run}: from step {step} on, {what!r} is no anomaly", file=sys.stderr)
    return 0
