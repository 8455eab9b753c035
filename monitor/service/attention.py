"""What people said of a run's alerts and advice: muted for a while, acknowledged, snoozed.

One small file beside the store, replaced as a whole under a lock, so that the command line works beside a live service,
which reads it again when it has changed. Times are seconds since the epoch, by this machine's clock.

A mute ends by itself; it silences the run's pages and hides nothing: the page, the API and `losscast_verdict` say on what
is so. An acknowledgement holds for the advice as it was: another action is news again. So is it with a snooze, until
its time has come.
"""

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from monitor.errors import Failed, WrongInput
from monitor.prometheus.alerts import RULES
from monitor.schema import is_run_id
from monitor.service.tokens import Stamp, locked, say_unreadable, stamp_of, write_whole

FILE = "attention.json"
MOST_S = 30 * 86400.0
"""A mute that nobody remembers is worse than a page."""
MAX_RUNS = 10_000
RUN_ALERTS = frozenset(r.alert for r in RULES if "losscast_verdict" in r.expr or "losscast_run" in r.expr)
EVERY = "all"


@dataclass(frozen=True, slots=True)
class Mute:
    """One run's alerts are silent until `until`: those named, or all."""

    until: float
    alerts: tuple[str, ...] = ()
    by: str = ""
    why: str = ""
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class Seen:
    """Somebody has seen the advice `action`, for good or until `until`."""

    action: str
    by: str = ""
    at: float = 0.0
    until: float | None = None


@dataclass(slots=True)
class Said:
    """All that was said."""

    mutes: dict[str, Mute] = field(default_factory=dict)
    seen: dict[str, Seen] = field(default_factory=dict)

    def muted(self, run: str, now: float) -> Mute | None:
        """The run's mute, while it lasts."""
        found = self.mutes.get(run)
        return found if found is not None and found.until > now else None

    def seen_of(self, run: str, action: str, now: float) -> Seen | None:
        """Who has seen this very advice, while that holds."""
        found = self.seen.get(run)
        if found is None or found.action != action or (found.until is not None and found.until <= now):
            return None
        return found


class Attention:
    """Of one store. Safe to share between threads."""

    def __init__(self, folder: Path):
        self.path = folder / FILE
        self._lock = threading.Lock()
        self._stamp: Stamp | None = None
        self._said = Said()

    def mute(
        self, run: str, for_s: float, now: float, *, alerts: tuple[str, ...] = (), by: str = "", why: str = ""
    ) -> Mute:
        """Silence a run's alerts. Raises WrongInput."""
        _check(run, for_s)
        for alert in alerts:
            if alert not in RUN_ALERTS:
                raise WrongInput(
                    f"{alert[:64]!r}: no alert of a run; there are {', '.join(sorted(RUN_ALERTS))}"
                )
        made = Mute(round(now + for_s, 3), tuple(sorted(set(alerts))), by[:64], why[:300], round(now, 3))
        with self._changing(now) as said:
            if run not in said.mutes and len(said.mutes) >= MAX_RUNS:
                raise WrongInput(f"{len(said.mutes)} runs are muted already; unmute some")
            said.mutes[run] = made
        return made

    def unmute(self, run: str, now: float) -> bool:
        """Let a run's alerts sound again. Whether it was muted."""
        with self._changing(now) as said:
            return said.mutes.pop(run, None) is not None

    def see(self, run: str, action: str, now: float, *, for_s: float | None = None, by: str = "") -> Seen:
        """Acknowledge the advice, or with `for_s` snooze it. Raises WrongInput."""
        _check(run, 60.0 if for_s is None else for_s)
        until = None if for_s is None else round(now + for_s, 3)
        made = Seen(action[:32], by[:64], round(now, 3), until)
        with self._changing(now) as said:
            if run not in said.seen and len(said.seen) >= MAX_RUNS:
                del said.seen[next(iter(said.seen))]
            said.seen[run] = made
        return made

    def unsee(self, run: str, now: float) -> bool:
        """Take an acknowledgement back. Whether there was one."""
        with self._changing(now) as said:
            return said.seen.pop(run, None) is not None

    def forget(self, runs: set[str], now: float) -> None:
        """These runs are no more."""
        self._refresh()
        if runs & {*self._said.mutes, *self._said.seen}:
            with self._changing(now) as said:
                for run in runs:
                    said.mutes.pop(run, None)
                    said.seen.pop(run, None)

    def said(self) -> Said:
        """All that was said until now: asked for once where many runs are shown, since it looks at the file."""
        self._refresh()
        return self._said

    def mutes(self, now: float) -> dict[str, Mute]:
        """All mutes that last."""
        return {run: mute for run, mute in self.said().mutes.items() if mute.until > now}

    @contextlib.contextmanager
    def _changing(self, now: float) -> Iterator[Said]:
        folder = self.path.parent
        try:
            with locked(folder / (FILE + ".lock")):
                said = _read(self.path)
                said.mutes = {run: mute for run, mute in said.mutes.items() if mute.until > now}
                yield said
                body = {
                    "mutes": {run: asdict(mute) for run, mute in said.mutes.items()},
                    "seen": {run: asdict(seen) for run, seen in said.seen.items()},
                }
                write_whole(self.path, json.dumps(body, indent=1).encode())
        except OSError as error:
            raise Failed(f"{self.path}: {error.strerror or error}") from error

    def _refresh(self) -> None:
        """Read the file again if it was replaced. A damaged one mutes nobody."""
        stamp = stamp_of(self.path)
        if stamp == self._stamp:
            return
        with self._lock:
            if stamp == self._stamp:
                return
            try:
                self._said = _read(self.path)
            except Failed as error:
                self._said = Said()
                say_unreadable(error, "nothing is muted")
            self._stamp = stamp


def shown(mute: Mute | None) -> dict[str, Any] | None:
    """A mute as the API gives it."""
    return None if mute is None else asdict(mute)


def _check(run: str, for_s: float) -> None:
    if not is_run_id(run):
        raise WrongInput(f"{run[:80]!r} is no run's name")
    if not 0 < for_s <= MOST_S:
        raise WrongInput(f"{for_s:g} s: need more than nothing and at most {MOST_S / 86400:g} days")


def _read(path: Path) -> Said:
    try:
        text = path.read_text()
    except FileNotFoundError:
        return Said()
    except OSError as error:
        raise Failed(f"{path}: {error.strerror}") from error
    try:
        found = json.loads(text)
        mutes = {run: Mute(**{**m, "alerts": tuple(m["alerts"])}) for run, m in found["mutes"].items()}
        return Said(mutes, {run: Seen(**s) for run, s in found["seen"].items()})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Failed(f"{path}: damaged ({error}); move it away: nothing is muted then") from error


_UNITS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def duration(text: str) -> float:
    """Seconds of `90m`, `2h`, `1d`. Raises WrongInput."""
    number = text.rstrip("abcdefghijklmnopqrstuvwxyz")
    unit = text[len(number) :]
    try:
        seconds = float(number) * _UNITS[unit]
    except (ValueError, KeyError):
        raise WrongInput(f"--for {text[:20]}: need a number with s, m, h or d, such as 90m or 2h") from None
    if not 0 < seconds <= MOST_S:
        raise WrongInput(f"--for {text[:20]}: give more than nothing and at most {MOST_S / 86400:g}d")
    return seconds
