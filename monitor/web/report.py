"""The demo's report: one HTML file that needs nothing beside it, and one picture.

The words, numbers and tables are plain HTML; only the figures need the script, which is the page's own chart
code in one piece. Everything is inline, under a content security policy that allows these inline pieces
by their hashes, so a run's name can't become code. Data is JSON with <, > and & spelled as escapes.

`data` is what `losscast demo` leaves; losses in nats per token, compute in FLOPs, times as text or seconds
since the epoch. A missing or non-finite loss is None or one of the wire's three spellings.
"""

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from monitor.schema import spell
from monitor.web.markup import Html, join, table, tag
from monitor.web.picture import report_png
from monitor.web.words import MISSING, count, duration, loss, number, short, when

__all__ = ["embed", "report_html", "report_png"]

STATIC = Path(__file__).parent / "static"
SEVERITY = {"critical": "bad", "warning": "warn", "info": "predicted"}
NOSCRIPT = tag(
    "noscript",
    tag("p", "The figure needs JavaScript; the numbers are in the text and tables.", cls="noscript"),
)


def report_html(data: dict[str, Any]) -> str:
    """The whole report as one HTML document."""
    uplot = _static("uPlot.iife.min.js")
    script = "\n".join(_room(name) for name in ("format", "fingers", "charts", "report"))
    style = "\n".join(_static(name) for name in ("uPlot.min.css", "theme.css", "report.css"))
    policy = (
        f"default-src 'none'; script-src {_hash(uplot)} {_hash(script)}; style-src {_hash(style)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    sections = (_hero, _law, _target, _drills, _alerts, _next, _footer)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
{tag("title", data["title"])}
<style>{style}</style>
</head>
<body>
{tag("main", *(section(data) for section in sections))}
<script type="application/json" id="data">{embed(data)}</script>
<script>{uplot}</script>
<script type="module">{script}</script>
</body>
</html>
"""


def embed(data: Any) -> str:
    """JSON that can stand inside a script element: nothing in it can end the element or open a comment."""
    text = json.dumps(spell(data), separators=(",", ":"), allow_nan=False, default=str)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _static(name: str) -> str:
    return (STATIC / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _room(name: str) -> str:
    """One of the page's modules as a constant of its own name, so that several can stand in one script."""
    source = re.sub(r"^import .*\n", "", _static(f"{name}.js"), flags=re.MULTILINE)
    exported = re.findall(r"^export (?:async )?(?:function|const) (\w+)", source, flags=re.MULTILINE)
    source = re.sub(r"^export ", "", source, flags=re.MULTILINE)
    return f"const {name} = (() => {{\n{source}\nreturn {{ {', '.join(exported)} }};\n}})();"


# The sections, in reading order.


def _hero(data: dict[str, Any]) -> Html:
    target, ladder = data["target"], data["ladder"]
    predicted, actual, error = target["predicted"], target.get("actual"), target.get("error_percent")
    if actual is None or error is None:
        ending: Any = "It has not finished."
        verdict: Any = "The target run left no final loss to compare with. "
    else:
        ending = join("It ended at ", tag("b", loss(actual)), ".")
        verdict = join(
            tag("strong", f"The prediction was {abs(error):.1f}% too {'high' if error > 0 else 'low'}"),
            ", and the actual loss lies ",
            tag("strong", "inside" if target["inside"] else "outside"),
            f" the predicted 90% interval of {loss(predicted['p05'])} to {loss(predicted['p95'])}. ",
        )
    largest = max((run["flops"] for run in ladder), default=0)
    source = f"It was made from {count(len(ladder), 'smaller run')}, "
    source += f"the largest with 1/{target['flops'] / largest:.1f} of its compute, " if largest else ""
    return tag(
        "header",
        tag(
            "p",
            tag("strong", data["title"]),
            *(tag("span", part) for part in (f"seed {data['seed']}", when(data["made_at"]))),
            cls="kicker",
        ),
        tag(
            "h1",
            "Before its first step, this run was predicted to end at ",
            tag("b", loss(predicted["p50"]), cls="predicted"),
            ". ",
            ending,
            cls="result",
        ),
        tag("p", verdict, source, "and hashed before the run started.", cls="lede"),
        _number_line(predicted, actual),
    )


def _number_line(predicted: dict[str, float], actual: Any) -> Html:
    """The interval, its median and the actual loss on one line; in percentages, so that it fits any width."""
    dot = number(actual)
    p05, p50, p95 = predicted["p05"], predicted["p50"], predicted["p95"]
    low, high = (min(p05, dot), max(p95, dot)) if dot is not None else (p05, p95)
    span = (high - low) or 1.0

    def at(value: float) -> str:
        return f"{20 + 60 * (value - low) / span:.2f}%"

    def line(value: float, top: int, bottom: int, kind: str) -> Html:
        return tag("line", x1=at(value), x2=at(value), y1=top, y2=bottom, cls=kind)

    parts = [
        tag("rect", x=at(p05), y=32, width=f"{60 * (p95 - p05) / span:.2f}%", height=28, rx=3, cls="band"),
        line(p05, 32, 60, "edge"),
        line(p95, 32, 60, "edge"),
        line(p50, 24, 60, "median"),
        tag("text", f"predicted {loss(p50)}", x=at(p50), y=15, text_anchor="middle", cls="t-predicted"),
    ]
    if dot is None or p05 <= dot <= p95:
        parts.append(tag("text", loss(p05), x=at(p05), y=51, dx=-9, text_anchor="end"))
        parts.append(tag("text", loss(p95), x=at(p95), y=51, dx=9))
    if dot is not None:
        parts.append(line(dot, 46, 70, "stem"))
        parts.append(tag("circle", cx=at(dot), cy=46, r=8, cls="actual"))
        parts.append(
            tag("text", f"actual {loss(dot)}", x=at(dot), y=86, text_anchor="middle", cls="t-actual")
        )
    said = f"predicted {loss(p50)}, 90% interval {loss(p05)} to {loss(p95)}, actual {loss(actual)}"
    return tag("svg", *parts, cls="line", role="img", aria_label=said)


def _law(data: dict[str, Any]) -> Html:
    law, ladder, target = data["law"], data["ladder"], data["target"]
    form = "" if law["form"] == "auto" else f" ({law['form']})"
    words = (
        f"{count(len(ladder), 'small run').capitalize()} on the same batches in the same order, one law "
        f"through them{form}, and one point read off it for the run that had not started yet."
    )
    if not law.get("identifiable", True):
        words += " At this size the law can't tell every parameter apart; the interval carries that doubt."
    rows = [
        [r["run"], short(r["params"]), short(r["tokens"]), _power(r["flops"]), loss(r["loss"])]
        for r in ladder
    ]
    name = join(tag("strong", target["run"]), " ", tag("span", "(target)", cls="muted"))
    ended = tag("strong", loss(target.get("actual")))
    rows.append([name, short(target["params"]), short(target["tokens"]), _power(target["flops"]), ended])
    key = _key(
        ("k-dot", "ladder run, by parameters"),
        ("k-median", "law"),
        ("k-band", "90% interval"),
        ("k-dot-predicted", "prediction"),
    )
    head = [("run", False), ("parameters", True), ("tokens", True), ("FLOPs", True), ("final loss", True)]
    facts = (
        tag("div", tag("dt", name), tag("dd", f"{v:.4g}" if isinstance(v, (int, float)) else v))
        for name, v in law["parameters"].items()
    )
    return tag(
        "section",
        tag("h2", "The law, and where it pointed"),
        tag("p", words),
        _figure("law", key),
        tag("dl", *facts, cls="facts"),
        table(head, rows),
    )


def _target(data: dict[str, Any]) -> Html:
    key = _key(
        ("k-raw", "loss"), ("k-actual", "smoothed"), ("k-median", "predicted"), ("k-band", "90% interval")
    )
    buttons = tag(
        "div",
        tag("button", "linear", data_scale="linear", aria_pressed="true"),
        tag("button", "log", data_scale="log", aria_pressed="false"),
        cls="buttons",
        role="group",
        aria_label="axes",
    )
    words = "The band was drawn before the run started; the monitor judged every step against it."
    raised = data["target"].get("alerts")
    if raised is not None:
        words += f" On this healthy run it raised {count(len(raised), 'alert')}."
    return tag(
        "section", tag("h2", "The target, held to its line"), tag("p", words), _figure("target", key, buttons)
    )


def _drills(data: dict[str, Any]) -> Html:
    if not data["drills"]:
        return Html()
    return tag(
        "section",
        tag("h2", "Broken on purpose"),
        tag(
            "p",
            "The target again, from the same start, each time with one fault put in. "
            "A monitor that has never been seen to fire is a hope.",
        ),
        tag("div", *(_drill(drill, index) for index, drill in enumerate(data["drills"])), cls="drills"),
    )


def _drill(drill: dict[str, Any], index: int) -> Html:
    fault, called, paged = drill["fault_step"], drill.get("called_step"), drill.get("paged_step")
    if called is None:
        badge = tag("span", "missed", cls="badge bad")
        call = join(f"Put in at step {fault:,}. ", tag("strong", "The judge did not call it.", cls="bad"))
    else:
        after = called - fault
        badge = _badge("critical" if paged is not None else drill.get("severity"))
        said = (
            "at the same step" if not after else f"{count(after, 'step')} later" if after > 0 else "before it"
        )
        call = join(
            f"Put in at step {fault:,}; called at step {called:,}, ",
            tag("strong", said),
            f", as {drill.get('alert')}.",
        )
        if paged is not None and paged != called:
            call = join(call, f" Paged at step {paged:,}, {count(paged - fault, 'step')} after the fault.")
    return tag(
        "article",
        tag("div", tag("h3", drill["name"]), badge, cls="head"),
        tag("p", drill["what"], cls="what"),
        tag("p", call, _prometheus(drill.get("prometheus")), cls="call"),
        tag("div", NOSCRIPT, cls="plot", id=f"drill-{index}"),
        cls="card drill",
    )


def _prometheus(seen: dict[str, Any] | None) -> Html:
    if seen is None:
        return Html()
    if not seen.get("fired"):
        return join(" ", tag("span", "The rules did not fire in Prometheus.", cls="bad"))
    names = ", ".join(str(name) for name in seen.get("alerts", []))
    return join(" ", tag("span", f"Fired in a real Prometheus: {names}.", cls="muted"))


def _alerts(data: dict[str, Any]) -> Html:
    raised = [(data["target"]["run"], alert) for alert in data["target"].get("alerts") or []]
    raised += [(drill["name"], alert) for drill in data["drills"] for alert in drill["alerts"]]
    rows = [
        [
            name,
            alert.get("alert"),
            _badge(alert.get("severity")),
            alert.get("since_step", MISSING),
            alert.get("step", MISSING),
            loss(alert.get("value")),
            loss(alert.get("expected")),
            "open" if alert.get("resolved_step") is None else alert["resolved_step"],
        ]
        for name, alert in raised
    ]
    if not rows:
        return Html()
    words = [("run", False), ("alert", False), ("severity", False)]
    numbers = [(name, True) for name in ("since step", "called at", "loss", "expected", "resolved")]
    said = "Only critical ones page a person. An escalation is a line of its own."
    return tag("section", tag("h2", "Every alert it raised"), tag("p", said), table(words + numbers, rows))


def _next(data: dict[str, Any]) -> Html:
    if not data["commands"]:
        return Html()
    items = (
        tag("li", tag("pre", tag("code", c["command"])), tag("p", c["what"]), cls="card")
        for c in data["commands"]
    )
    return tag("section", tag("h2", "What to try next"), tag("ul", *items, cls="next"))


def _footer(data: dict[str, Any]) -> Html:
    target = data["target"]
    rows = {
        "prediction made": when(target.get("prediction_made_at")),
        "its sha256": tag("code", target.get("prediction_digest")),
        **{str(name).replace("_", " "): value for name, value in data["machine"].items()},
        "time spent": ", ".join(f"{phase} {duration(float(s))}" for phase, s in data["seconds"].items()),
    }
    return tag(
        "footer", tag("dl", *(join(tag("dt", name), tag("dd", value)) for name, value in rows.items()))
    )


# What the sections share.


def _figure(name: str, *head: Html) -> Html:
    return tag(
        "div", tag("div", *head, cls="head"), tag("div", NOSCRIPT, cls="plot", id=name), cls="card figure"
    )


def _key(*items: tuple[str, str]) -> Html:
    return tag("ul", *(tag("li", tag("i", cls=kind), words) for kind, words in items), cls="key")


def _badge(severity: Any) -> Html:
    return tag("span", severity, cls=f"badge {SEVERITY.get(severity, '')}")


def _power(value: float) -> Html:
    digits, exponent = f"{value:.1e}".split("e")
    return join(f"{digits} \N{MULTIPLICATION SIGN} 10", tag("sup", int(exponent)))
