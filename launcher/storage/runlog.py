"""One run, one writer: the run's log decides who writes, its lease says who lives.

    log/<n>.json   n = 0, 1, 2, ...: created, never changed. Kinds: attempt (somebody takes the run), commit (a
                   checkpoint is whole), rollback (those after a step are void), damaged (one is not what was committed any more) and
                   mended (it is again), end. Each carries a nonce and a checksum of itself.
    lease/<k>.json rewritten while the holder of attempt k lives; one for each attempt, so that a renewal that was stuck
                   on its way for an hour can't overwrite the lease of somebody newer

Whoever appends has read every entry before its own and saw that the newest attempt is its own; `put_new` lets
only one writer have a number. So a holder that was stopped for an hour, or a rank whose driver died, finds its
number taken, reads on, sees the newer attempt, and gets `Superseded`. Safety rests on that alone.

The lease only tells others whether to wait. Its age is measured by the store's clock; an attempt younger than the lease's
term counts as alive before it wrote one. The holder counts on its own boot-time clock, which goes on while a
machine sleeps, and calls `on_lost` before the lease lapses when it could not renew. One thread renews and another looks at
the clock, since a store that does not answer may keep the first one for longer than the lease holds.

An entry that can't be read (a crash on a file system without links, a flipped bit) is void: it counts as an attempt of
nobody, so that it supersedes rather than be overlooked.
"""

import contextlib
import getpass
import hashlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from infra.objects import Exists, Missing, Store
from launcher.errors import Failed, Held
from launcher.storage.store import FULL

TERM_S = 30.0
AT_ONCE = 16
"""Entries that are fetched beside each other, where more than a few are new: a log of thousands, one after another, would take
longer than a lease holds."""
MANY = 4


class Superseded(Held):
    """A newer attempt holds the run: this one must stop, and can't write."""


class Damaged(Failed):
    """The log itself can't be trusted: an entry in the middle is missing."""


class Away(FileNotFoundError):
    """A log that was there is not: its disk is not mounted, or its folder was moved. An OSError: it may come back."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of the log. kind `void`: it can't be read."""

    n: int
    kind: str
    attempt: int
    nonce: str
    time: float
    fields: dict[str, Any]

    @property
    def key(self) -> str:
        return f"log/{self.n}.json"


@dataclass(frozen=True, slots=True)
class Standing:
    """Who has the run, as far as log and lease tell."""

    attempt: Entry | None
    alive: bool
    """The holder renewed its lease, or took the run, less than a term ago, and did not let go."""
    age_s: float
    """Since then."""
    released: bool = False
    """The holder let go by itself, since the run was over for it: finished, stopped or given up."""

    @property
    def submission(self) -> str | None:
        return self.attempt.fields.get("submission") if self.attempt else None

    def who(self) -> str:
        """The holder in words."""
        if self.attempt is None:
            return "nobody"
        by = self.attempt.fields
        return (
            f"attempt {self.attempt.attempt}, submission {by.get('submission')}, of {by.get('user')}@{by.get('host')} "
            f"(pid {by.get('pid')}), last heard of {self.age_s:.0f} s ago"
        )


def boot_s() -> float:
    """Seconds since this machine booted, sleep included."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class RunLog:
    """The log of one run. Keeps no thread and no lock: for one thread at a time; any number of processes may have one."""

    def __init__(self, store: Store, run: str, *, term_s: float = TERM_S) -> None:
        """term_s: how long a lease holds without renewal; everybody must use the same."""
        self.store, self.run, self.term_s = store, run, term_s
        self._entries: list[Entry] = []

    def copy(self) -> "RunLog":
        """The same log for another thread, which need not read again what was read here."""
        other = RunLog(self.store, self.run, term_s=self.term_s)
        other._entries = list(self._entries)
        return other

    def entries(self) -> list[Entry]:
        """Every entry, oldest first. Raises Damaged when one is missing between others, Away when all that were read
        before are gone: nothing may be written then, since it would not be this run's log that grows."""
        numbers = {int(name) for item in self.store.list("log/") if (name := _number(item.key)) is not None}
        if self._entries and not numbers:
            raise Away(f"{self.store.where('log')} is not there: is its disk mounted?")
        n, void = 0, [e.n for e in self._entries if e.kind == "void"]
        self._fetch(numbers)
        while True:
            if n < len(self._entries) and n not in void:
                n += 1
                continue
            try:
                entry = _read(n, self.store.get(f"log/{n}.json"))
            except Missing:
                beyond = [m for m in numbers if m > n]
                if beyond or n < len(self._entries):
                    raise Damaged(
                        f"{self.store.where(f'log/{n}.json')} is missing and {len(beyond)} later entries exist: the log "
                        f"of {self.run} was damaged. Restore the file, or start a run of another name from a checkpoint."
                    ) from None
                return list(self._entries)
            self._entries[n : n + 1] = [entry]
            n += 1

    def _fetch(self, numbers: set[int]) -> None:
        """Add what follows, where that is much, as far as the list knows it without a hole: what is beyond, `entries` looks at."""
        first = after = len(self._entries)
        while after in numbers:
            after += 1
        if after - first < MANY:
            return
        # what is missing: `entries` says what that means
        with ThreadPoolExecutor(AT_ONCE) as pool, contextlib.suppress(Missing):
            found = pool.map(lambda n: self.store.get(f"log/{n}.json"), range(first, after))
            for n, data in enumerate(found, first):  # in their order: an error leaves what came before it
                self._entries.append(_read(n, data))

    def newest_attempt(self) -> Entry | None:
        """The entry that says who may write; void counts."""
        return next((e for e in reversed(self.entries()) if e.kind in ("attempt", "void")), None)

    def commits(self) -> list[Entry]:
        """Committed checkpoints, newest first, without those that a rollback after them made void."""
        found: list[Entry] = []
        last = float("inf")
        for entry in reversed(self.entries()):
            if entry.kind == "rollback":
                last = min(last, entry.fields["step"])
            elif entry.kind == "commit" and entry.fields["step"] <= last:
                found.append(entry)
        return found

    def damaged(self) -> dict[str, str]:
        """What is wrong with checkpoints, by their manifest, as whoever resumed last found. It decides nothing: a resume looks
        for itself."""
        found, commits = dict[str, str](), list[Entry]()
        for entry in self.entries():
            if entry.kind == "commit":
                commits.append(entry)
            elif entry.kind == "damaged":
                found[str(entry.fields["manifest"])] = str(entry.fields["why"])
                for older in (c for c in commits if c.n < int(entry.fields.get("older_than", 0))):
                    found.setdefault(str(older.fields["manifest"]), "gone or damaged, as newer ones")
            elif entry.kind == "mended":
                found.pop(str(entry.fields["manifest"]), None)
        return found

    def standing(self) -> Standing:
        """Who has the run now."""
        newest = self.newest_attempt()
        if newest is None:
            return Standing(None, False, 0.0)
        ages = [self.store.age_s(newest.key)]
        key = lease_key(newest.attempt)
        lease = self._lease(key)
        if lease.get("nonce") == newest.nonce and newest.kind == "attempt":
            if lease.get("released"):
                over = bool(lease.get("over", True))
                return Standing(newest, False, self.store.age_s(key) or 0.0, released=over)
            ages.append(self.store.age_s(key))
        age = min((a for a in ages if a is not None), default=0.0)
        return Standing(newest, age < self.term_s, age)

    def take(
        self,
        submission: str,
        *,
        wait: bool = True,
        on_lost: Callable[[str], None] = lambda why: None,
        say: Callable[[str], None] = lambda message: None,
    ) -> "Holding":
        """Take the next attempt.

        submission  who asks: a rerun of the holder's own submission waits for its lease to lapse (with `wait`),
                    anybody else is refused at once
        on_lost     called once, from a thread, when this holding can't be kept: stop training

        Raises Held naming the holder.
        """
        said = False
        while True:
            standing = self.standing()
            if standing.alive:
                if not wait or standing.submission != submission:
                    raise Held(
                        f"{self.run} is held by {standing.who()}. Stop it with `losscast stop {self.run}`; if it died, "
                        f"its lease lapses within {max(0.0, self.term_s - standing.age_s):.0f} s."
                    )
                if not said:
                    say(f"waiting for {standing.who()} to lapse")
                    said = True
                time.sleep(min(1.0, self.term_s / 10))
                continue
            entries = self.entries()
            newest = standing.attempt
            if newest != next((e for e in reversed(entries) if e.kind in ("attempt", "void")), None):
                continue  # somebody took it while we looked
            attempt, nonce = next_number(entries), secrets.token_hex(16)
            if self._put(len(entries), "attempt", attempt, nonce, _holder(submission)):
                return Holding(self, submission, attempt, nonce, on_lost)

    def append(self, kind: str, attempt: int, **fields: Any) -> Entry:
        """Append an entry in the name of an attempt: by its holder, or by one of its ranks.

        Raises Superseded when the newest attempt is another.
        """
        nonce = secrets.token_hex(16)
        while True:
            entries = self.entries()
            self._check(attempt)
            if self._put(len(entries), kind, attempt, nonce, fields):
                return self._entries[len(entries)]

    def commit(self, attempt: int, step: int, manifest: str, digest: str, **more: Any) -> Entry:
        """Say that the checkpoint behind a manifest is whole. `manifest` is its key, `digest` the sha256 of its bytes."""
        return self.append("commit", attempt, step=step, manifest=manifest, manifest_sha256=digest, **more)

    def let_go(self, attempt: int, nonce: str) -> None:
        """Say of an attempt's holder, which is known to be dead, that nobody need wait for its lease to lapse."""
        lease = {"attempt": attempt, "nonce": nonce, "released": True, "over": False, "time": time.time()}
        self.store.put(lease_key(attempt), json.dumps(lease).encode())

    def _check(self, attempt: int) -> None:
        """Raises Superseded unless the newest attempt of what was read is this one."""
        newest = next((e for e in reversed(self._entries) if e.kind in ("attempt", "void")), None)
        if newest is None or newest.kind == "void" or newest.attempt != attempt:
            by = "nobody" if newest is None else f"an unreadable entry, {self.store.where(newest.key)}"
            if newest is not None and newest.kind != "void":
                by = f"attempt {newest.attempt} of {newest.fields.get('user')}@{newest.fields.get('host')}"
            raise Superseded(f"attempt {attempt} of {self.run} was superseded by {by}: nothing was written")

    def _put(self, n: int, kind: str, attempt: int, nonce: str, fields: dict[str, Any]) -> bool:
        """Create entry n; False when another has that number. After an open outcome (a timeout) it is read back."""
        body = {
            "n": n,
            "kind": kind,
            "run": self.run,
            "attempt": attempt,
            "nonce": nonce,
            "time": time.time(),
            **fields,
        }
        data = _encode(body)
        for last in (False, True):
            try:
                self.store.put_new(f"log/{n}.json", data)
            except Exists:
                pass
            except OSError:
                if last:
                    raise
            try:
                entry = _read(n, self.store.get(f"log/{n}.json"))
            except Missing:
                continue
            if entry.nonce == nonce and entry.kind == kind:
                self._entries[n:] = [entry]
                return True
            return False
        raise Failed(f"{self.store.where(f'log/{n}.json')} was written and is not there")

    def _lease(self, key: str) -> dict[str, Any]:
        try:
            lease = json.loads(self.store.get(key))
        except (Missing, ValueError):
            return {}
        return lease if isinstance(lease, dict) else {}


class Holding:
    """The right to write a run, kept alive by a thread until `release`. A context manager."""

    def __init__(
        self, log: RunLog, submission: str, attempt: int, nonce: str, on_lost: Callable[[str], None]
    ) -> None:
        self.log, self.submission, self.attempt, self.nonce = log, submission, attempt, nonce
        self.lost: str | None = None
        """Why the run is no longer ours, once it is not."""
        self.committed = 0, 0
        """Attempt and step of the newest commit, as the lease's thread last saw the log: a quarter of a term ago at most."""
        self._on_lost, self._stop, self._lock = on_lost, threading.Event(), threading.Lock()
        self._losing = threading.Lock()
        self._until = boot_s() + log.term_s * 0.8
        self._counter = 0
        self._why = "the store does not answer"
        own = log.copy()  # two threads; and to read a long log again may take longer than the lease holds
        with contextlib.suppress(OSError):
            self._renew()
        self._thread = threading.Thread(target=self._keep, args=(own,), name="losscast-lease", daemon=True)
        self._thread.start()
        threading.Thread(target=self._watch, name="losscast-lease-clock", daemon=True).start()

    @property
    def valid(self) -> bool:
        """True while the lease certainly holds. A commit needs no look at this: the log decides."""
        return self.lost is None and boot_s() < self._until

    def commit(self, step: int, manifest: str, digest: str) -> Entry:
        """`RunLog.commit` in the name of this attempt."""
        return self.log.commit(self.attempt, step, manifest, digest)

    def append(self, kind: str, **fields: Any) -> Entry:
        """`RunLog.append` in the name of this attempt."""
        return self.log.append(kind, self.attempt, **fields)

    def next_attempt(self) -> int:
        """Go on as a new attempt, so that nothing the last one left behind can write. Raises Superseded."""
        with self._lock:
            while True:
                entries = self.log.entries()
                self.log._check(self.attempt)
                attempt, nonce = next_number(entries), secrets.token_hex(16)
                if self.log._put(len(entries), "attempt", attempt, nonce, _holder(self.submission)):
                    self.attempt, self.nonce = attempt, nonce
                    break
            with contextlib.suppress(OSError):
                self._renew()
        return self.attempt

    def release(self, *, over: bool = True) -> None:
        """Let go: the next one need not wait. Never raises.

        over  the run is over for this holder. False: it can't go on, and another start of the same submission may
        """
        self._stop.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(self.log.term_s)
        if self.lost is None:
            with contextlib.suppress(OSError):
                self._write(released=True, over=over)

    def __enter__(self) -> "Holding":
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def _keep(self, log: RunLog) -> None:
        while not self._stop.wait(max(0.0, min(log.term_s / 4, self._until - boot_s()))):
            try:
                with self._lock:
                    newest = log.newest_attempt()
                    if newest is None:  # ours was there
                        raise Away(f"{log.store.where('log')} is not there: is its disk mounted?")
                    if newest.nonce != self.nonce:
                        self._lose(f"attempt {self.attempt} was superseded by attempt {newest.attempt}")
                        return
                    commit = next((e for e in reversed(log._entries) if e.kind == "commit"), None)
                    if commit is not None:
                        self.committed = commit.attempt, int(commit.fields["step"])
                    if boot_s() < self._until:
                        self._renew()
            except Damaged as error:
                self._lose(str(error))
                return
            except OSError as error:
                self._why = str(error)
            if self.lost is not None:
                return

    def _watch(self) -> None:
        """Looks at the clock and at nothing else."""
        looked = boot_s()
        while not self._stop.wait(max(0.005, min(self.log.term_s / 20, self._until - boot_s()))):
            now = boot_s()
            still, looked = now - looked, now
            if self.lost is None and now >= self._until:
                # no look for a quarter of a term: it was this process that stood, and not the store
                stood = (
                    f"this process stood still for {still:.0f} s: was it stopped, or did its machine sleep?"
                )
                why = stood if still > self.log.term_s / 4 else self._why
                self._lose(f"the lease of attempt {self.attempt} lapses: {why}")
            if self.lost is not None:
                return

    def _renew(self) -> None:
        began = boot_s()
        try:
            self._write(released=False)
        except OSError as error:
            # a full disk has no room for a new file, and needs none to make the old one young again
            if error.errno not in FULL or not self.log.store.touch(lease_key(self.attempt)):
                raise
        self._until = began + self.log.term_s * 0.8  # stop before others may think us dead

    def _write(self, released: bool, over: bool = True) -> None:
        self._counter += 1
        lease = {
            "attempt": self.attempt, "nonce": self.nonce, "released": released, "renewals": self._counter,
            "time": time.time(), "term_s": self.log.term_s, **({} if over else {"over": False}),
        }  # fmt: skip
        self.log.store.put(lease_key(self.attempt), json.dumps(lease).encode())

    def _lose(self, why: str) -> None:
        with self._losing:
            if self.lost is not None:
                return
            self.lost = why
        self._on_lost(why)


def lease_key(attempt: int) -> str:
    return f"lease/{attempt}.json"


def next_number(entries: list[Entry]) -> int:
    """The number of the attempt after these; an unreadable entry may have been one."""
    return 1 + max((e.attempt for e in entries), default=0) + sum(e.kind == "void" for e in entries)


def _holder(submission: str) -> dict[str, Any]:
    return {"submission": submission, "host": socket.gethostname(), "pid": os.getpid(), "user": _user()}


def _number(key: str) -> str | None:
    name = key.removeprefix("log/").removesuffix(".json")
    return name if name.isdigit() and key == f"log/{name}.json" else None


def _encode(body: dict[str, Any]) -> bytes:
    """The entry's bytes, its own sha256 last."""
    text = json.dumps(body, sort_keys=True)
    sealed = {**body, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    return json.dumps(sealed, indent=1).encode() + b"\n"


def _read(n: int, data: bytes) -> Entry:
    """The entry in the bytes, or a void one."""
    try:
        body = json.loads(data)
        said = body.pop("sha256")
        if said != hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest() or body["n"] != n:
            raise ValueError("it does not match its checksum")
        known = {k: body.pop(k) for k in ("n", "kind", "attempt", "nonce", "time")}
        return Entry(**known, fields=body)
    except (ValueError, KeyError, TypeError, AttributeError):
        return Entry(n, "void", 0, "", 0.0, {"bytes": len(data)})


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return str(os.getuid())
