"""A machine is told that it will be taken away: commit what there is before that.

Azure announces evictions, reboots and redeployments of a machine on its metadata address (Scheduled Events, version
2020-07-01): 30 s ahead for a spot machine, minutes ahead otherwise. A notice may be cancelled, repeated or come back.
So a notice asks the ranks for a checkpoint at their next step and lets them go on: a cancelled one then costs one
checkpoint, and a true one at most the steps since. A notice far ahead is answered twice: now, and shortly before its
time. Events are never acknowledged, since that would bring them forward.

    LOSSCAST_SCHEDULED_EVENTS   URL to ask instead of Azure's own; `off` never asks
    LOSSCAST_HOST_NAME          this machine's name in the events, instead of the one the metadata tell

Only a machine whose firmware says that it is Azure's is asked without the variable.
"""

import contextlib
import json
import os
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

METADATA = "http://169.254.169.254/metadata"
EVENTS_PATH = "/scheduledevents?api-version=2020-07-01"
NAME_PATH = "/instance/compute/name?api-version=2021-02-01&format=text"
AZURE_TAG = "7783-7084-3265-9085-8269-3286-77"
"""The chassis asset tag of every virtual machine on Azure."""
TAKES_AWAY = frozenset({"Preempt", "Terminate", "Redeploy", "Reboot"})
"""Event types after which the processes are gone. Freeze only pauses the machine for seconds."""
POLL_S = 1.0
TIMEOUT_S = 2.0
GAP_S = 10.0
"""At least this long between two checkpoints that notices ask for: flapping must not turn into saving all day."""
LAST_CALL_S = 30.0
"""A notice further ahead than twice this is answered again this long before its time."""


@dataclass(frozen=True)
class Notice:
    """This machine is to be taken away."""

    id: str
    kind: str
    not_before: float | None
    """Seconds since the epoch; None when it may happen at any moment."""


def read_notices(document: Any, host: str | None) -> dict[str, Notice]:
    """The notices about `host` in an answer of the Scheduled Events service, by id. Without a host's name all count.

    What can't be understood is left out: a strange answer must not end a training run.
    """
    found: dict[str, Notice] = {}
    events = document.get("Events") if isinstance(document, dict) else None
    for event in events if isinstance(events, list) else []:
        if not isinstance(event, dict) or event.get("EventType") not in TAKES_AWAY:
            continue
        if event.get("EventStatus") not in ("Scheduled", "Started"):
            continue
        resources = event.get("Resources")
        if host and isinstance(resources, list) and resources and host not in resources:
            continue
        at = None
        with contextlib.suppress(TypeError, ValueError):
            at = parsedate_to_datetime(event["NotBefore"]).timestamp() if event.get("NotBefore") else None
        notice = Notice(str(event.get("EventId")), str(event["EventType"]), at)
        found[notice.id] = notice
    return found


class Watch:
    """Decides when notices call for a checkpoint. Pure: time is passed in, in seconds since the epoch."""

    def __init__(self, gap_s: float = GAP_S) -> None:
        self._gap_s = gap_s
        self.open: dict[str, Notice] = {}
        self._owed = False
        self._last_call: set[str] = set()
        self._asked = float("-inf")

    def update(self, notices: Mapping[str, Notice], now: float) -> list[str]:
        """Take the newest notices. Returns what to say: news about notices, for people."""
        said = [f"{n.kind} announced ({n.id})" for n in notices.values() if n.id not in self.open]
        said += [f"{n.kind} withdrawn ({n.id})" for n in self.open.values() if n.id not in notices]
        if any(i not in self.open for i in notices):
            self._owed = True
        for notice in notices.values():
            left = None if notice.not_before is None else notice.not_before - now
            first = self.open.get(notice.id)
            if left is None or notice.id in self._last_call:
                continue
            if first is None and left <= 2 * LAST_CALL_S:
                self._last_call.add(notice.id)
            elif left <= LAST_CALL_S:
                self._last_call.add(notice.id)
                self._owed = True
        self._last_call &= set(notices)
        self.open = dict(notices)
        if not notices:
            self._owed = False
        return said

    def save_now(self, now: float) -> bool:
        """True when the ranks should commit now; then it counts as asked."""
        if not self._owed or now - self._asked < self._gap_s:
            return False
        self._owed, self._asked = False, now
        return True


def source() -> str | None:
    """Base URL of the service to ask; None where there is none."""
    said = os.environ.get("LOSSCAST_SCHEDULED_EVENTS", "")
    if said:
        return None if said == "off" else said.rstrip("/")
    with contextlib.suppress(OSError):
        if Path("/sys/class/dmi/id/chassis_asset_tag").read_text().strip() == AZURE_TAG:
            return METADATA
    return None


def _get(url: str) -> bytes:
    """GET with the header the service wants, and never through a proxy."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, headers={"Metadata": "true"}), timeout=TIMEOUT_S) as answer:
        return answer.read(1 << 20)


class Sentry:
    """A thread that asks the service once a second and calls `save` when a checkpoint is due. Never raises."""

    def __init__(
        self, base: str, save: Callable[[], None], say: Callable[[str], None], gap_s: float = GAP_S
    ) -> None:
        self._base, self._save, self._say = base, save, say
        self._watch, self._stop = Watch(gap_s), threading.Event()
        self._host = os.environ.get("LOSSCAST_HOST_NAME")
        self.last: Notice | None = None
        """The newest notice that has not been withdrawn."""
        self._thread = threading.Thread(target=self._run, name="losscast-notices", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        away = False
        while not self._stop.is_set():
            try:
                if self._host is None:
                    self._host = _get(self._base + NAME_PATH).decode().strip()
                notices = read_notices(json.loads(_get(self._base + EVENTS_PATH)), self._host)
                away = False
            except (OSError, ValueError) as error:
                if not away:
                    self._say(f"scheduled events can't be read, and are tried again: {error}")
                away = True  # no news is no withdrawal: what was announced stays announced
                notices = self._watch.open
            for line in self._watch.update(notices, time.time()):
                self._say(f"this machine ({self._host}): {line}")
            self.last = next(iter(self._watch.open.values()), None)
            if self._watch.save_now(time.time()):
                self._save()
            self._stop.wait(POLL_S)

    def close(self) -> None:
        self._stop.set()
        self._thread.join(2 * TIMEOUT_S)
