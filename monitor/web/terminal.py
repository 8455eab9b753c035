"""The terminal view: frames of text, 80 by 24 or whatever the terminal has. Pure: answers in, lines out.

Nothing a client sent reaches the terminal unless it prints: control characters would be commands to it.
"""

import textwrap
import time
from collections.abc import Sequence
from typing import Any

from monitor.web.braille import Cell, clean, fit, paint, plot
from monitor.web.words import MISSING, duration, loss, number

STATES = {
    "warming_up": ("warming up", "dim"),
    "healthy": ("on its line", "green"),
    "off_line": ("off its line", "yellow"),
    "diverged": ("diverged", "red"),
    "above": ("above its line", "yellow"),
    "below": ("below its line", "yellow"),
    "non_finite": ("not a number", "red"),
    "spike": ("spike", "blue"),
    "stalled": ("stalled", "red"),
    "jump_after_resume": ("jumped", "yellow"),
    "plateau": ("no longer falls", "yellow"),
    "validation_apart": ("validation apart", "yellow"),
    "rank_apart": ("one rank apart", "yellow"),
    "grad_norm_high": ("norm high", "blue"),
}
TONES = {"critical": "red", "warning": "yellow", "info": "blue"}
LEAST_PLOT = 5
"""Lines. A curve in fewer shows nothing."""
GONE = ("diverged", "non_finite")
ACTIONS = {"roll_back": "roll back", "lower_lr": "lower the lr"}


def runs_frame(
    runs: Sequence[dict[str, Any]],
    *,
    width: int = 80,
    height: int = 24,
    color: bool = False,
    now: float | None = None,
) -> list[str]:
    """Every run, the most urgent first."""
    moment = time.time() if now is None else now
    ordered = sorted(runs, key=order)
    wrong = sum(urgency(r) < 2 for r in runs)
    running = sum(r.get("phase") == "running" for r in runs)
    summary: list[Cell] = [
        ("losscast  ", "bold"),
        (f"{len(runs)} {'run' if len(runs) == 1 else 'runs'}, {running} running, ", ""),
        (
            f"{wrong} off {'its' if wrong == 1 else 'their'} line or worse" if wrong else "none off its line",
            "red" if wrong else "green",
        ),
        (time.strftime("  %H:%M:%S", time.localtime(moment)), "dim"),
    ]
    name_width = max(10, width - 66)
    head = ("", "state", "run", "step", "loss", "ends at", "advice", "miss")
    lines = [paint(summary, width, color), "", _row(head, ["dim"] * 8, name_width, width, color)]
    room = height - len(lines) - 1
    for r in ordered[:room]:
        word, tone = _state(r)
        advice, ended = r.get("advice") or {}, r.get("phase") == "ended"
        miss = None if ended else number(advice.get("p_miss"))
        cells = (
            "!" if urgency(r) == 0 else "",
            word,
            clean(r.get("run")),
            f"{r['step']:,}" if r.get("step") is not None else MISSING,
            loss(r.get("loss")),
            loss(r.get("loss") if ended else (_end(r) or {}).get("p50")),
            clean(r.get("end_reason") or "ended") if ended else _action(advice),
            "" if miss is None else f"{100 * miss:.0f}%",
        )
        alarm = tone if tone == "red" else ""
        lines.append(_row(cells, ["red", tone, "bold", "", alarm, "", "", ""], name_width, width, color))
    if len(ordered) > room:
        lines.append(paint([(f"  and {len(ordered) - room} more", "dim")], width, color))
    if not runs:
        lines.append("  No run has reported yet.")
    return lines[:height]


def run_frame(
    run: dict[str, Any],
    samples: Sequence[dict[str, Any]],
    *,
    width: int = 80,
    height: int = 24,
    color: bool = False,
    now: float | None = None,
) -> list[str]:
    """One run: its figures, its loss in the band, its advice, its alerts. The advice is told whole, since what to do is in
    it: older alerts give way to it, then the curve."""
    moment = time.time() if now is None else now
    word, tone = _state(run)
    last = run.get("last_time")
    title: list[Cell] = [(clean(run.get("run")) + "  ", "bold"), (word, tone)]
    if run.get("team"):
        title.append((f"  {clean(run['team'])}", "dim"))
    if (run.get("attempt") or 1) > 1:
        title.append((f"  attempt {run['attempt']}", "dim"))
    if last is not None:
        heard = "last step" if run.get("step") is not None else "last heard"
        title.append((f"  {heard} {duration(max(0.0, moment - last))} ago", "dim"))
    lines = [paint(title, width, color), paint([("  ".join(_figures(run, width)), "")], width, color)]
    counsel = _counsel(run, width, max(2, height - len(lines)))
    tail: list[list[Cell]] = [[(line, "")] for line in counsel]
    left = height - len(lines) - len(counsel)
    alerts = sorted(
        run.get("alerts") or [], key=lambda a: (a.get("resolved_step") is not None, -(a.get("step") or 0))
    )
    shown = min(len(alerts), 4, max(1, left - LEAST_PLOT - 1))
    tail += [_alert(alert) for alert in alerts[:shown]]
    if len(alerts) > shown:
        tail.append([(f"and {len(alerts) - shown} more", "dim")])
    curve = (run.get("prediction") or {}).get("curve")
    room = height - len(lines) - len(tail)
    if room >= LEAST_PLOT:
        lines += plot(curve, samples, width=width, height=room, color=color)
    lines += [paint(cells, width, color) for cells in tail]
    return lines[:height]


def _figures(run: dict[str, Any], width: int) -> list[str]:
    """Step, loss, what was expected where there is room, and the predicted end."""
    tokens, total = number(run.get("tokens")), number(run.get("total_tokens"))
    done = f" ({100 * tokens / total:.0f}%)" if tokens is not None and total else ""
    figures = [
        f"step {run['step']:,}{done}" if run.get("step") is not None else "no step yet",
        f"loss {loss(run.get('loss'))}",
    ]
    final = _end(run)
    if run.get("phase") == "ended":
        figures[1] = f"ended at {loss(run.get('loss'))}"
        predicted = run.get("predicted_final") or (run.get("prediction") or {}).get("final_loss")
        if predicted:
            figures.append(
                f"predicted {loss(predicted['p50'])} ({loss(predicted['p05'])} to {loss(predicted['p95'])})"
            )
    elif final:
        figures.append(f"ends at {loss(final['p50'])} ({loss(final['p05'])} to {loss(final['p95'])})")
    if run.get("expected") is not None:
        with_it = [*figures[:2], f"expected {loss(run['expected'])}", *figures[2:]]
        return with_it if len("  ".join(with_it)) <= width else figures
    return figures


def _counsel(run: dict[str, Any], width: int, most: int) -> list[str]:
    """The advice and its evidence, in as many lines as they need and `most` at most. A run that has ended has nothing to go on
    with."""
    advice = run.get("advice") or {}
    if not advice:
        return []
    if run.get("phase") == "ended" and advice.get("action") == "continue":
        why = f": {clean(run['end_reason'])}" if run.get("end_reason") else ""
        return textwrap.wrap(f"the run has ended{why}", width, max_lines=most, placeholder=" ...")
    miss = number(advice.get("p_miss"))
    said = f"advice: {_action(advice)}" + ("" if miss is None else f", {100 * miss:.0f}% likely to miss")
    words = "; ".join([said, *(clean(e) for e in advice.get("evidence") or [])])
    return textwrap.wrap(words, width, max_lines=most, placeholder=" ...")


def _alert(alert: dict[str, Any]) -> list[Cell]:
    ended = alert.get("resolved_step")
    said = f"step {alert.get('step'):,}, since {alert.get('since_step'):,}: {loss(alert.get('value'))}"
    if alert.get("expected") is not None:
        said += f", expected {loss(alert['expected'])}"
    if ended is not None:
        return [(f"{fit(clean(alert.get('alert')), 20)} {said}, resolved at {ended:,}", "dim")]
    return [(fit(clean(alert.get("alert")), 20) + " ", TONES.get(str(alert.get("severity")), "")), (said, "")]


def open_alerts(run: dict[str, Any]) -> list[str]:
    """Severities of the alerts that stand."""
    return [a.get("severity", "") for a in run.get("alerts") or [] if a.get("resolved_step") is None]


def order(run: dict[str, Any]) -> tuple[Any, ...]:
    """For sorting, the most urgent first. A loss gone wrong before a run that stands still: after an outage many do."""
    return urgency(run), run.get("state") == "stalled", -(run.get("last_time") or 0), str(run.get("run"))


def urgency(run: dict[str, Any]) -> int:
    """0 a page, 1 a warning, 2 running, 3 waiting, 4 ended."""
    severities, tone = open_alerts(run), STATES.get(str(run.get("state")), ("", ""))[1]
    if run.get("phase") == "ended":
        return 4
    if "critical" in severities or tone == "red":
        return 0
    if "warning" in severities or tone == "yellow":
        return 1
    return 2 if run.get("phase") == "running" else 3


def _state(run: dict[str, Any]) -> Cell:
    word, tone = STATES.get(str(run.get("state")), (clean(run.get("state")).replace("_", " "), ""))
    if tone not in ("red", "yellow", "blue") and run.get("phase") in ("ended", "waiting"):
        return run["phase"], "dim"
    return word, tone


def _end(run: dict[str, Any]) -> dict[str, Any] | None:
    """Where a run is heading: by the judge, else by its prediction; nothing where the judge says that it has no end."""
    advice = run.get("advice") or {}
    if advice.get("final_loss") or (run.get("state") in GONE and "final_loss" in advice):
        return advice["final_loss"]
    return run.get("predicted_final") or (run.get("prediction") or {}).get("final_loss")


def _row(cells: Sequence[str], tones: Sequence[str], name_width: int, width: int, color: bool) -> str:
    """One line of the list of runs; numbers to the right."""
    widths = (1, 14, name_width, 9, 8, 8, 12, 5)
    right = (False, False, False, True, True, True, False, True)
    gaps = (" ", " ", " ", " ", " ", "  ", " ", "")
    return paint(
        [(fit(c, w, r) + g, t) for c, w, r, g, t in zip(cells, widths, right, gaps, tones, strict=True)],
        width,
        color,
    )


def _action(advice: dict[str, Any]) -> str:
    action = clean(advice.get("action"))
    return ACTIONS.get(action, action)
