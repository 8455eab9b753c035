"""What `losscast ladder` shows: the rungs and their price before, their progress while they train."""

import shutil
import time
from collections.abc import Callable
from typing import Any

BAR = 20
QUIET_S = 30.0
"""Between two lines that say the same states, where there is no terminal."""


class Display:
    """The whole ladder's progress: a block that is redrawn on a terminal, elsewhere a line when something changed."""

    def __init__(self, name: str, out: Any, now: Callable[[], float] = time.monotonic) -> None:
        self._name, self._out, self._now = name, out, now
        self._drawn, self._said, self._said_at = 0, "", -QUIET_S
        self._began, self._done_at_start = now(), -1.0

    def show(self, rungs: list[Any]) -> None:
        """The rungs as they stand."""
        head = self.headline(rungs)
        if not self._out.isatty():
            states = head.partition(",  ")[0]
            if states != self._said or self._now() - self._said_at > QUIET_S:
                self._said, self._said_at = states, self._now()
                print(head, file=self._out, flush=True)
            return
        wide = max(len(r.spec.name) for r in rungs)
        lines = [head, *(f"  {r.spec.name:<{wide}}  {rung_line(r)}" for r in rungs)]
        up = f"\x1b[{self._drawn}F" if self._drawn else ""
        columns = shutil.get_terminal_size().columns
        self._out.write(up + "".join(f"\x1b[2K{text[: columns - 1]}\n" for text in lines))
        self._out.flush()
        self._drawn = len(lines)

    def headline(self, rungs: list[Any]) -> str:
        """One line for all of them; shares of work are by 6ND, or by steps where N is not known."""
        from launcher.runspec.accounting import total_flops

        work = [total_flops(r.spec) or float(r.spec.total_steps) for r in rungs]
        parts = [1.0 if r.state == "finished" else min(1.0, r.step / r.spec.total_steps) for r in rungs]
        done = sum(w * p for w, p in zip(work, parts, strict=True)) / sum(work)
        if self._done_at_start < 0:
            self._done_at_start = done
        gone, gained = self._now() - self._began, done - self._done_at_start
        lost = sum(
            w * (1 - p) for w, p, r in zip(work, parts, rungs, strict=True) if r.state == "failed"
        ) / sum(work)
        states = [r.state for r in rungs]
        counts = ", ".join(
            f"{states.count(s)} {s}" for s in ("finished", "running", "waiting", "failed") if states.count(s)
        )
        left = ""
        if gained > 0.02 and gone > 10:
            minutes = max(0.0, gone * (1 - lost - done) / gained) / 60
            left = f", about {minutes:.0f} min left" if minutes >= 1.5 else ", about a minute left"
        return f"{self._name}: {counts},  {100 * done:.0f}%{left}"

    def close(self) -> None:
        self._out.flush()


def rung_line(rung: Any) -> str:
    """One rung in a line: its state, and how far it is, or what it ended with."""
    total = rung.spec.total_steps
    if rung.state == "finished":
        from launcher.jobs.climbing import result_of

        loss = result_of(rung)["loss"]
        return f"finished  loss {loss:.4f}" if isinstance(loss, float) else "finished"
    if rung.state == "running":
        full = int(BAR * min(1.0, rung.step / total))
        return f"running   [{'#' * full}{'.' * (BAR - full)}] {rung.step} of {total}"
    return f"{rung.state:<9} {rung.why}".rstrip()


def priced(name: str, plans: list[dict[str, Any]]) -> str:
    """What a ladder will be and cost, a rung a line. Pure: `launcher.plan.plan.make_plan`'s data in."""
    wide = max(len(p["run"]) for p in plans)
    rows = [f"{name}: {len(plans)} run{'s' if len(plans) > 1 else ''} to {plans[0]['to']}"]
    for p in plans:
        size = f"{p['params']:>14,} parameters" if p["params"] else f"{'unknown':>14} parameters"
        on = f"{p['gpus']} GPUs" if p["gpus"] else f"{p['ranks']} ranks"
        rows.append(f"  {p['run']:<{wide}}{size}  {p['tokens']:>16,} tokens  {p['steps']:>8,} steps  {on}")
    hours, dollars = _in_all(plans, "hours"), _in_all(plans, "dollars")
    if hours:
        factor, unit = (60, "minutes") if hours[1] < 2 else (1, "hours")
        rows.append(f"  {hours[0] * factor:.3g} to {hours[1] * factor:.3g} {unit}, one after another")
    if dollars:
        rows.append(f"  $ {dollars[0]:,.2f} to {dollars[1]:,.2f} in all")
    elif any(p["gpus"] for p in plans):
        rows.append("  $ unknown: set cluster.gpu and cluster.price_per_gpu_hour")
    return "\n".join(rows)


def _in_all(plans: list[dict[str, Any]], key: str) -> tuple[float, float] | None:
    """The sum of a range over all plans, None where one of them does not have it."""
    if not all(p[key] for p in plans):
        return None
    return sum(p[key]["low"] for p in plans), sum(p[key]["high"] for p in plans)
