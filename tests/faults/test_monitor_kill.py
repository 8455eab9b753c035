"""P1: the monitor is killed again and again under load; what it acknowledged is there, once, as it was sent.

LOSSCAST_FAULTS=long kills a thousand times, LOSSCAST_KILLS=N as often as that.
"""

import http.client
import os
import random
import threading
import time
import zlib
from pathlib import Path

import pytest

from monitor import schema
from monitor.judge import Settings
from monitor.replay import Watch
from monitor.verdict import Sample
from tests.monitor.live import ForkedService, Service, wait_for

LONG = os.environ.get("LOSSCAST_FAULTS") == "long"
KILLS = int(os.environ.get("LOSSCAST_KILLS") or (1000 if LONG else 100))

pytestmark = pytest.mark.faults


class Sender(threading.Thread):
    """Sends one run's samples, and keeps its own record of what was acknowledged. Sends again what was not."""

    def __init__(self, service: Service, run: str, done: threading.Event) -> None:
        super().__init__(daemon=True)
        self.service, self.run_id, self.done = service, run, done
        self.acknowledged = 0
        self.sent_again = 0
        self.problems: list[str] = []

    def loss(self, seq: int) -> float:
        return (
            2.0
            + (zlib.crc32(b"%s %d" % (self.run_id.encode(), seq)) % 1000) / 1e5
            + (0.05 if seq > 3000 else 0.0)
        )

    def run(self) -> None:
        rng = random.Random(self.run_id)
        connection: http.client.HTTPConnection | None = None
        while not self.done.is_set():
            size = rng.choice((1, 7, 50, 300))
            seqs = list(range(self.acknowledged, self.acknowledged + size))
            if rng.random() < 0.2:
                seqs = list(range(max(0, seqs[0] - 20), seqs[0])) + seqs  # some that it has already
            body = b"".join(
                schema.encode_event(
                    schema.sample(self.run_id, 1, seq, step=seq + 1, loss=self.loss(seq), time=1e9 + seq)
                )
                for seq in seqs
            )
            try:
                if connection is None:
                    connection = http.client.HTTPConnection("127.0.0.1", self.service.port, timeout=5)
                connection.request(
                    "POST", "/v1/events", body, {"Authorization": f"Bearer {self.service.token}"}
                )
                answer = connection.getresponse()
                text = answer.read()
            except (OSError, http.client.HTTPException):
                connection = None
                self.sent_again += 1
                time.sleep(0.02)
                continue
            if answer.status == 200:
                self.acknowledged += size
            elif answer.status not in (429, 503):
                self.problems.append(f"{answer.status} {text[:200]!r}")


def test_killed_under_load_nothing_acknowledged_is_lost_or_counted_twice(tmp_path: Path) -> None:
    rng = random.Random(11)
    done = threading.Event()
    with ForkedService(tmp_path / "store") as service:
        senders = [Sender(service, f"run-{i}", done) for i in range(4)]
        for s in senders:
            s.start()
        ready = []
        for _ in range(KILLS):
            time.sleep(rng.uniform(0.02, 0.5))
            service.kill()
            ready.append(service.start())
        time.sleep(1.0)
        done.set()
        for s in senders:
            s.join(10)
        assert not [p for s in senders for p in s.problems]
        total = 0
        for s in senders:
            assert s.acknowledged > 100, "there was no load"
            found = (service.get(f"/v1/runs/{s.run_id}/samples") or {})["samples"]
            assert [f["step"] for f in found] == list(range(1, len(found) + 1)), "a hole, or a sample twice"
            assert len(found) >= s.acknowledged, (
                f"{s.acknowledged - len(found)} acknowledged samples are gone"
            )
            assert [f["loss"] for f in found] == [s.loss(seq) for seq in range(len(found))]
            detail = service.get(f"/v1/runs/{s.run_id}")
            assert detail["samples"] == len(found), "counted twice"
            total += s.acknowledged
        wait_for(lambda: all(_judged(service, s) for s in senders), 30)
        for s in senders:
            assert _alerts(service, s) == _unbroken(service, s), "a restart changed a verdict"
        print(
            f"{KILLS} kills, {total} acknowledged, 0 lost, 0 twice; ready again in {max(ready):.2f} s at most"
        )
        assert service.stop() == 0


def _judged(service: Service, sender: Sender) -> bool:
    found = (service.get(f"/v1/runs/{sender.run_id}/samples?from={sender.acknowledged}") or {})["samples"]
    return bool(found) and all(f["expected"] is not None for f in found)


def _alerts(service: Service, sender: Sender) -> list[tuple[object, ...]]:
    found = service.get(f"/v1/runs/{sender.run_id}")["alerts"]
    return sorted(
        (a["alert"], a["severity"], a["step"], a["since_step"], a["resolved_step"] is None) for a in found
    )


def _unbroken(service: Service, sender: Sender) -> list[tuple[object, ...]]:
    """The alerts of one judge that sees the same samples without a break."""
    watch = Watch(Settings())
    called: dict[tuple[str, int], tuple[object, ...]] = {}
    for row in service.get(f"/v1/runs/{sender.run_id}/samples")["samples"]:
        verdict = watch.observe(Sample(row["step"], row["loss"], time=row["time"], attempt=2))
        for a in verdict.closed:
            for key in [k for k in called if k[0] == a.alert]:
                called[key] = (*called[key][:4], False)
        for a in verdict.opened:
            called[a.alert, a.step] = (a.alert, a.severity, a.step, a.since_step, a.resolved_step is None)
    return sorted(called.values())
