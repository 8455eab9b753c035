"""Which old checkpoints may go: all but those that a resume or a rollback could still need.

A rollback goes to the newest checkpoint from before the loss went wrong, and that is known late: an alert is called some
time after its onset. So a run whose policy looks to the monitor (`policy.on_divergence`) keeps, beyond its newest `keep`:

- the newest one before the onset of any open alert about its loss, as the monitor says, for as long as it is open;
- a sparse tail: of its commits every (4 x keep)th, until the next but one such is there. Two more on the disk, and always
  one that is at least 4 x keep commits old.

What an attempt converted for itself ("universal") goes when there is a newer attempt.

Where no checkpoint lies before the onset nothing is gained, and nothing more is kept.
"""

import contextlib
import http.client
import json
import os
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from infra.objects import Store
from launcher.storage.checkpoints import manifest_key, newest_verified, parts_of
from launcher.storage.runlog import Entry, RunLog

TIMEOUT_S = 5.0
TAIL = 4
"""Commits between two of the sparse tail, over `keep`."""


def retain(
    store: Store,
    log: RunLog,
    keep: int,
    every_nth_step: int | None = None,
    just_committed: Entry | None = None,
    dry: bool = False,
    *,
    onset: int | None = None,
    tail: bool = False,
) -> list[str]:
    """Delete old checkpoints and what crashed attempts left; returns the prefixes deleted, or with `dry` those that would be.

    Kept: the newest `keep` commits, the newest that verifies, those of every nth step, and whatever the newest
    attempt is writing. Run it as an identity that may delete; the trainer's need not be.

    onset           step from which on an open alert says that the loss is wrong: the newest commit before it is kept
    tail            keep the sparse tail too
    just_committed  a commit made a moment ago by the caller, whose bytes need not be read again to know that it is whole
    """
    commits = log.commits()
    newest = log.newest_attempt()
    if not commits or newest is None:
        return []
    kept = {e.fields["manifest"] for e in commits[:keep]}
    if every_nth_step:
        kept |= {e.fields["manifest"] for e in commits if e.fields["step"] % every_nth_step == 0}
    if onset is not None:
        kept |= {e.fields["manifest"] for e in [e for e in commits if e.fields["step"] < onset][:1]}
    if tail:
        kept |= _tail(log, TAIL * keep)
    committed = {e.fields["manifest"] for e in commits}
    found = {m for item in store.list("attempts/") if (m := _manifest_over(item.key)) is not None}
    spare = {m for m in found - kept if m in committed or _attempt_of(m) < newest.attempt}
    if spare and (just_committed is None or just_committed.fields["manifest"] not in kept):
        good = newest_verified(store, log)  # reads a whole checkpoint: only where something would be deleted
        spare -= {manifest_key(good.attempt, good.step)} if good else committed
    deleted = []
    for manifest in sorted(spare):
        prefix = manifest.removesuffix(".manifest.json") + "/"
        if dry:
            deleted.append(prefix)
            continue
        store.delete(manifest)  # first, so that what is half deleted can't verify
        for item in [*store.list(prefix), *store.list(parts_of(prefix))]:
            store.delete(item.key)
        deleted.append(prefix)
    return deleted


def _manifest_over(key: str) -> str | None:
    """The manifest's key of the checkpoint that a key belongs to; None for other files of an attempt."""
    parts = key.split("/")
    if (
        len(parts) < 4
        or parts[2] not in ("checkpoints", "universal")
        or not parts[1].isdigit()
        or not parts[3].startswith("step-")
    ):
        return None
    name = parts[3] if len(parts) == 4 else parts[3].removesuffix(".parts") + ".manifest.json"
    return "/".join([*parts[:3], name]) if name.endswith(".manifest.json") else None


def _attempt_of(manifest: str) -> int:
    return int(manifest.split("/")[1])


def _tail(log: RunLog, apart: int) -> set[str]:
    """Every `apart`th commit that is less than twice as many commits old. By their place in the log, which never changes:
    what is kept now was never let go before."""
    every = [e.fields["manifest"] for e in log.entries() if e.kind == "commit"]
    return {m for n, m in enumerate(every) if n % apart == 0 and len(every) - 1 - n < 2 * apart}


@dataclass(frozen=True, slots=True)
class Onsets:
    """Since when a run's loss is wrong, by its monitor."""

    url: str
    """Of the run there."""
    token: str

    @classmethod
    def of(cls, spec: Mapping[str, Any], name: str) -> "Onsets | None":
        """None for a run that nobody rolls back because of what a monitor says. `spec` as in spec.json."""
        monitor = spec.get("monitor")
        if not monitor or (spec.get("policy") or {}).get("on_divergence", "observe") == "observe":
            return None
        url = f"{monitor['url'].rstrip('/')}/v1/runs/{urllib.parse.quote(name)}"
        return cls(url, os.environ.get(monitor.get("token_env") or "", ""))

    def earliest(self) -> int | None:
        """First step at which an open alert says that the loss is wrong, or the one after the step that the monitor
        advises to go back to, whichever is earlier. None where all is well. Raises OSError when it can't be asked."""
        alerts = self._ask("/verdicts").get("alerts")
        found = [
            a["since_step"]
            for a in (alerts if isinstance(alerts, list) else [])
            if isinstance(a, dict)
            and str(a.get("alert")).startswith("Loss")
            and a.get("resolved_step") is None
            and isinstance(a.get("since_step"), int)
        ]
        if found:
            advice = self._ask("/advice").get("advice")
            back = advice.get("roll_back_to") if isinstance(advice, dict) else None
            found += [back + 1] if isinstance(back, int) else []
        return min(found, default=None)

    def _ask(self, what: str) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        try:
            with urllib.request.urlopen(
                urllib.request.Request(self.url + what, headers=headers), timeout=TIMEOUT_S
            ) as answer:
                said = json.loads(answer.read(8 << 20))
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return {}  # it knows no such run
            raise
        except (ValueError, http.client.HTTPException) as error:
            raise OSError(f"{self.url}{what}: no answer of a monitor: {error}") from error
        if not isinstance(said, dict):
            raise OSError(f"{self.url}{what}: no answer of a monitor")
        return said


class Retention:
    """What one attempt lets go of after its commits, in a folder, where the trainer may delete."""

    def __init__(self, spec: Mapping[str, Any], name: str) -> None:
        self._keep, self._onsets = int(spec["checkpoints"]["keep"]), Onsets.of(spec, name)
        self._onset: int | None = None
        """As the monitor said last: while it can't be asked, that stands."""
        self._due: tuple[Store, RunLog, Entry] | None = None
        self._busy, self._changed = False, threading.Condition()

    def beside(self, store: Store, log: RunLog, entry: Entry) -> None:
        """`after`, without a wait for the monitor: where one is asked a thread does it, and what it can't let go of stays until the
        next commit. Raises OSError only where nobody is asked."""
        if self._onsets is None:
            self.after(store, log, entry)
            return
        with self._changed:
            # of several that wait the newest: it lets go of all that may go
            self._due = store, log.copy(), entry
            if not self._busy:
                self._busy = True
                threading.Thread(target=self._work, name="losscast-retention", daemon=True).start()

    def idle(self, timeout_s: float) -> bool:
        """True when nothing that `beside` was told of is left to do; waits for that so long."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._busy, timeout_s)

    def _work(self) -> None:
        while True:
            with self._changed:
                due, self._due = self._due, None
                if due is None:
                    self._busy = False
                    self._changed.notify_all()
                    return
            with contextlib.suppress(Exception):  # whatever it is: it is tried again after the next commit
                self.after(*due)

    def after(self, store: Store, log: RunLog, entry: Entry) -> list[str]:
        """Let go of what may go, `entry` having been committed a moment ago."""
        if self._onsets is not None:
            with contextlib.suppress(OSError):
                self._onset = self._onsets.earliest()
        return retain(
            store, log, self._keep, just_committed=entry, onset=self._onset, tail=self._onsets is not None
        )
