"""Telling the monitor about a run, without ever making training wait for it.

`report` puts a tuple in a queue and returns, in microseconds. One thread writes the queue to a spool on disk four
times a second; another posts the spool to `POST {url}/v1/events`, oldest first, in larger requests the more waits, and
deletes what was answered 2xx. So a monitor that is down, hung or unresolvable costs disk, never a step; when it comes back the spool is
replayed. A killed process loses at most what a quarter of a second held.

No method raises for anything the monitor, the network or the disk does, and none blocks but `close`, which waits
as long as it is told. Values must be plain numbers: a GPU tensor would make the step wait for its kernel.

    answer            what is done
    2xx               delivered
    409               a newer attempt reports: these lines are dropped and counted, `superseded` is set
    413               the request is cut in two
    400, 422          the lines are dropped one by one until those that are refused are found; they are counted
    others, none      tried again, waiting up to 15 s between tries

Standard library only.
"""

import atexit
import contextlib
import gzip
import http.client
import itertools
import os
import re
import sys
import threading
import time
import urllib.parse
from collections import deque
from dataclasses import dataclass
from typing import Any

from launcher.spool import Segment, Spool
from monitor import schema

DRAIN_S = 0.25
HEARTBEAT_S = 30.0
LONGEST_WAIT_S = 15.0
MOST_SEGMENTS, MOST_BYTES = 8, 4 << 20
"""Of the spool in one request: one segment at first and after a failure, twice as many after each that was taken."""
_ATTEMPT = re.compile(rb'"attempt":(\d+)')


@dataclass(frozen=True, slots=True)
class Stats:
    """What became of everything reported. Counts of lines (samples and events)."""

    sent: int
    waiting: int
    """In the spool."""
    spool_bytes: int
    thinned: int
    """Taken out of a full spool."""
    dropped: int
    """The queue was full: the disk did not keep up."""
    refused: int
    """Refused by the monitor for good, by 400, 409 or 422."""
    damaged: int
    """Found damaged in the spool, or gone from it."""
    away: bool
    """The last request failed."""
    last_error: str | None


class Reporter:
    """One attempt's voice. Start it on one rank, report every step, close it at the end."""

    def __init__(
        self,
        url: str | None,
        token: str | None,
        run: str,
        attempt: int,
        spool_dir: str | os.PathLike[str] | None,
        *,
        queue_limit: int = 100_000,
        spool_limit_bytes: int = 64 << 20,
        timeout_s: float = 5.0,
        heartbeat_s: float = HEARTBEAT_S,
        drain_s: float = DRAIN_S,
        quiet: bool = False,
    ) -> None:
        """
        url, token   of the monitor; without a url nothing is sent or kept
        spool_dir    local folder; None keeps what waits in memory
        timeout_s    of one request
        drain_s      how often the queue is written to the spool: what a killed process loses
        quiet        say nothing on stderr
        """
        self.run, self.attempt = run, attempt
        self.superseded = False
        """A newer attempt of this run reports: this one should stop."""
        self._url, self._token, self._timeout_s, self._heartbeat_s = url, token, timeout_s, heartbeat_s
        self._quiet, self._drain_s = quiet, drain_s
        self._queue: deque[tuple[Any, ...]] = deque(maxlen=queue_limit)
        self._seq = itertools.count()
        self._sent = self._dropped = self._refused = 0
        self._away, self._last_error, self._said = False, None, set()
        self._stop, self._wake, self._idle = threading.Event(), threading.Event(), threading.Event()
        self._draining = threading.Lock()
        self._closed = self._over = False
        self._last_line_s = time.monotonic()
        self._connection: http.client.HTTPConnection | None = None
        self._threads: list[threading.Thread] = []
        self._spool: Spool | None = None
        if url is None:
            return
        try:
            self._address = _address(url)
            self._spool = Spool(spool_dir, run, attempt, spool_limit_bytes)
        except Exception as error:
            self._say("start", f"the monitor will not hear of this run: {error}")
            return
        if self._spool.disk_error and spool_dir is not None:
            self._say("disk", f"spooling in memory: {spool_dir}: {self._spool.disk_error}")
        for work in (self._drain_forever, self._send_forever):
            thread = threading.Thread(target=work, name=f"losscast-{work.__name__}", daemon=True)
            self._threads.append(thread)
            thread.start()
        atexit.register(self._drain)

    def start(self, *, resume_step: int = 0, prediction: dict[str, Any] | None = None, **fields: Any) -> None:
        """Announce the attempt: `monitor.schema.run_started` names the fields."""
        self._event("run_started", {"resume_step": resume_step, "prediction": prediction, **fields})

    def report(self, *, step: int, loss: float, **fields: Any) -> None:
        """One optimizer step, `loss` in nats per token; `monitor.schema.sample` names the fields. Microseconds.

        The time is now, unless `time` is among the fields.
        """
        if self._spool is None:
            return
        queue = self._queue
        if len(queue) == queue.maxlen:
            self._dropped += 1
        queue.append((next(self._seq), step, loss, time.time(), fields))

    def event(self, name: str, **fields: Any) -> None:
        """Any other event: checkpoint, restart, announce, ...; `monitor.schema.event` names the fields."""
        self._event(name, fields)

    def close(self, reason: str | None = "finished", timeout_s: float = 10.0) -> bool:
        """Say how the run ended, wait for delivery, let go. True when everything was delivered.

        What was not stays in the spool, for the next attempt on this machine or `flush`. With reason None nothing is
        said of an end. A second call does nothing.
        """
        if self._closed:
            return self._spool is None or self._spool.waiting == 0
        self._closed = True
        if self._spool is None:
            return True
        if reason is not None:
            self._event("run_ended", {"reason": reason, **self._lost()})
        atexit.unregister(self._drain)
        until = time.monotonic() + timeout_s
        self._drain()
        self._idle.clear()
        self._stop.set()
        self._wake.set()
        self._idle.wait(max(0.0, until - time.monotonic()))
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        self._drain()
        self._over = True
        waiting = self._spool.waiting
        self._spool.close()
        if waiting:
            refused = self._spool.disk_error
            became = (
                "wait in the spool" if refused is None else f"are lost, since no disk keeps them ({refused})"
            )
            self._say("left", f"{waiting} lines could not be delivered and {became}: {self._last_error}")
        return waiting == 0

    def stats(self) -> Stats:
        """Counts so far."""
        spool = self._spool
        return Stats(
            sent=self._sent,
            waiting=(spool.waiting if spool else 0) + len(self._queue),
            spool_bytes=spool.size if spool else 0,
            thinned=spool.thinned if spool else 0,
            dropped=self._dropped,
            refused=self._refused,
            damaged=spool.damaged if spool else 0,
            away=self._away,
            last_error=self._last_error,
        )

    def _lost(self) -> dict[str, int]:
        """Counts of lines that will never be sent; none where nothing was lost."""
        spool = self._spool
        lost = {"thinned": spool.thinned, "damaged": spool.damaged, "dropped": self._dropped} if spool else {}
        return {name: count for name, count in lost.items() if count}

    def _event(self, name: str, fields: dict[str, Any]) -> None:
        if self._spool is not None:
            self._queue.append((name, time.time(), fields))

    # the first thread: queue to spool

    def _drain_forever(self) -> None:
        while not self._stop.wait(self._drain_s):
            try:
                self._drain()
                if time.monotonic() - self._last_line_s >= self._heartbeat_s:
                    self._event("heartbeat", self._lost())
            except Exception as error:  # a thread that dies would be silent for the rest of the run
                self._say("drain", f"reporting goes on after an error: {error!r}")

    def _drain(self) -> None:
        """Move the queue to the spool."""
        if self._spool is None:
            return
        with self._draining:
            lines: list[bytes] = []
            for _ in range(len(self._queue)):
                try:
                    item = self._queue.popleft()
                except IndexError:
                    break
                try:
                    lines.append(schema.encode_event(self._record(item)))
                except Exception as error:
                    self._refused += 1
                    self._say("encode", f"a report can't be put in JSON and is left out: {error}")
            if lines:
                self._last_line_s = time.monotonic()
                self._spool.append(lines)
                self._wake.set()

    def _record(self, item: tuple[Any, ...]) -> dict[str, Any]:
        if len(item) == 5:
            seq, step, loss, at, fields = item
            numbers = {"time": at, **{k: _plain(v) for k, v in fields.items()}}
            return schema.sample(self.run, self.attempt, seq, step=int(step), loss=float(loss), **numbers)
        name, at, fields = item
        return schema.event(name, self.run, self.attempt, **{"time": at, **fields})

    # the second thread: spool to monitor

    def _send_forever(self) -> None:
        wait_s, most = 0.0, 1
        while not self._over:
            taken: list[Segment] = []
            try:
                lines = self._take(most, taken)
                if not taken:
                    if self._stop.is_set():
                        self._idle.set()
                        return
                    self._wake.wait(1.0)
                    self._wake.clear()
                    continue
                if self._deliver(lines):
                    for segment in taken:
                        self._spool.drop(segment)  # type: ignore[union-attr]
                    wait_s, most = 0.0, min(2 * most, MOST_SEGMENTS)
                    continue
            except Exception as error:
                self._last_error = repr(error)
            for segment in taken:
                self._spool.put_back(segment)  # type: ignore[union-attr]
            wait_s, most = min(LONGEST_WAIT_S, max(0.5, wait_s * 2)), 1
            if self._stop.is_set():
                wait_s = min(wait_s, 1.0)
            self._sleep(wait_s)

    def _take(self, most: int, taken: list[Segment]) -> list[bytes]:
        """The lines of the oldest segments, which are put in `taken`: a spool that waits goes out in few large requests, each
        of which is a commit."""
        lines: list[bytes] = []
        size = 0
        while self._spool is not None and len(taken) < most and size < MOST_BYTES:
            found = self._spool.take()
            if found is None:
                break
            segment, more = found
            taken.append(segment)
            lines += more
            size += segment.size
            if segment.lost:
                self._say(
                    "damaged", f"{segment.path}: {segment.lost} lines were damaged or gone, and are lost"
                )
        return lines

    def _sleep(self, seconds: float) -> None:
        """Wait before the next try; closing cuts it short."""
        if self._stop.is_set():
            time.sleep(seconds)
        else:
            self._stop.wait(seconds)

    def _deliver(self, lines: list[bytes]) -> bool:
        """True when nothing in `lines` needs to be sent again."""
        status, answer = self._post(b"".join(lines))
        if 200 <= status < 300:
            if self._away:
                self._say("back", "the monitor is back", once=False)
            self._sent += len(lines)
            self._away, self._last_error = False, None
            return True
        if status in (400, 413, 422):
            if len(lines) > 1:
                half = len(lines) // 2
                return self._deliver(lines[:half]) and self._deliver(lines[half:])
            self._refused += 1
            self._say("refused", f"the monitor refused a line ({status}): {answer[:200]}")
            return True
        if status == 409:
            return self._stale(lines, answer)
        self._away = True
        self._last_error = f"{status} {answer[:200]}" if status else answer
        advice = "; is the token right?" if status in (401, 403) else ""
        self._say(f"away {status}", f"{self._url}: {self._last_error}{advice}. Spooling; training goes on.")
        return False

    def _stale(self, lines: list[bytes], answer: str) -> bool:
        """Some of these lines are of an attempt that was superseded: each attempt's are sent by themselves, to leave out those."""
        parts = [list(part) for _, part in itertools.groupby(lines, _attempt_of)]
        if len(parts) > 1:
            return all(self._deliver(part) for part in parts)
        if _attempt_of(lines[0]) == b"%d" % self.attempt:
            self.superseded = True
            self._say("stale", f"attempt {self.attempt} of {self.run} was superseded: {answer[:200]}")
        self._refused += len(lines)
        return True

    def _post(self, body: bytes) -> tuple[int, str]:
        """Status and text of the answer; 0 and the reason when there was none."""
        scheme, host, port, path = self._address
        headers = {"Content-Type": "application/x-ndjson", "Content-Encoding": "gzip"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        packed = gzip.compress(body, compresslevel=1)
        fresh = self._connection is None
        try:
            if self._connection is None:
                kind = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
                self._connection = kind(host, port, timeout=self._timeout_s)
            self._connection.request("POST", path, body=packed, headers=headers)
            response = self._connection.getresponse()
            text = response.read(65536).decode("utf-8", "replace")
            if response.will_close:
                self._disconnect()
            return response.status, text
        except Exception as error:
            self._disconnect()
            if not fresh and isinstance(
                error, (http.client.RemoteDisconnected, BrokenPipeError, ConnectionError)
            ):
                return self._post(body)  # the kept connection had gone stale: once more on a new one
            return 0, str(error) or type(error).__name__

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.close()

    def _say(self, topic: str, message: str, once: bool = True) -> None:
        """One line on stderr, once a topic until the monitor is back."""
        if self._quiet or (once and topic in self._said):
            return
        self._said = set() if topic == "back" else self._said | {topic}
        with contextlib.suppress(Exception):
            print(f"losscast reporter: {message}", file=sys.stderr, flush=True)


def _attempt_of(line: bytes) -> bytes:
    """The attempt that a line is of, in digits."""
    found = _ATTEMPT.search(line[:200])
    return b"" if found is None else found[1]


def _address(url: str) -> tuple[str, str, int, str]:
    """(scheme, host, port, path) of the ingest endpoint. Raises ValueError for what is no http(s) URL."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is no http:// or https:// address")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return parts.scheme, parts.hostname, port, parts.path.rstrip("/") + "/v1/events"


def _plain(value: Any) -> Any:
    """A number from another library (numpy, torch on CPU) as Python's own."""
    if value is None or isinstance(value, (int, float, str, bool, list, dict, tuple)):
        return value
    item = getattr(value, "item", None)
    return item() if callable(item) else str(value)
