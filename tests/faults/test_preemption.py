"""Notices that a machine will be taken away, from a local stand-in for Azure's Scheduled Events: a commit within 25 s of the
notice, or the last commit intact. Cancelled and flapping ones too; at the end the machine really goes.

One real training process, without Ray: `launcher.recovery.rank` and `launcher.recovery.preempt` as an actor would run them.
LOSSCAST_FAULTS=long serves a hundred notices.
"""

import json
import os
import random
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.faults
pytest.importorskip("deepspeed", reason="needs torch and deepspeed: pip install 'losscast[train]'")

from launcher.ports import free_port  # noqa: E402
from launcher.recovery.owning import Ownership  # noqa: E402
from launcher.recovery.preempt import Sentry  # noqa: E402
from launcher.recovery.rank import RankProcess  # noqa: E402
from launcher.storage.runfolder import RunFolder, write_whole  # noqa: E402
from launcher.training.saving import newest_verified, run_log  # noqa: E402
from tests.faults.training import spec_of, until  # noqa: E402

NOTICES = 100 if os.environ.get("LOSSCAST_FAULTS") == "long" else 10
SEED = int(os.environ.get("LOSSCAST_SEED", "0"))
WITHIN_S = 25.0


class Service:
    """What Azure's metadata service answers, under our control."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.asked = 0
        self.broken = False
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.headers.get("Metadata") != "true" or service.broken:
                    self.send_error(400 if not service.broken else 503)
                    return
                if self.path.startswith("/scheduledevents"):
                    service.asked += 1
                    body = json.dumps({"DocumentIncarnation": service.asked, "Events": service.events})
                else:
                    body = "vm_7"
                self.send_response(200)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def announce(self, number: int, resources: tuple[str, ...] = ("vm_7",)) -> None:
        self.events.append(
            {
                "EventId": f"notice-{number}", "EventType": "Preempt", "EventStatus": "Scheduled",
                "ResourceType": "VirtualMachine", "Resources": list(resources),
                "NotBefore": formatdate(time.time() + 30, usegmt=True),
            }
        )  # fmt: skip


@pytest.fixture
def service() -> Iterator[Service]:
    made = Service()
    try:
        yield made
    finally:
        made.close()


def test_every_notice_has_a_commit_in_time_and_the_last_one_costs_nothing_committed(
    tmp_path: Path, service: Service
) -> None:
    spec = spec_of(tmp_path, "spot", steps=1_000_000, every=1_000_000, dp=1)
    folder = RunFolder.of(spec.checkpoints.url, spec.name)
    folder.path.mkdir(parents=True)
    write_whole(folder.spec, spec.to_dict())
    dice = random.Random(SEED)
    owner = Ownership(folder, spec, "s", print)
    owner.take()
    rank = RankProcess({"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"})
    said: list[str] = []

    def commits() -> int:
        return sum(e.kind == "commit" for e in run_log(folder).entries())

    def train(attempt: int, step: int, path: str | None) -> threading.Thread:
        assignment = {
            "spec": spec.to_dict(), "folder": str(folder.path), "attempt": attempt, "cache": str(tmp_path / "cache"),
            "resume_step": step, "resume_from": path,
        }  # fmt: skip
        environment = {
            "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }  # fmt: skip
        thread = threading.Thread(target=rank.train, args=(assignment, environment), daemon=True)
        thread.start()
        until(lambda: rank.pulse().step > step, "a step")
        return thread

    try:
        attempt = owner.next_attempt()
        thread = train(attempt, 0, None)
        sentry = Sentry(service.url, rank.ask_to_save, said.append, gap_s=2.0)
        took = []
        for number in range(NOTICES):
            before, began = commits(), time.monotonic()
            kind = dice.choice(["true", "cancelled", "flapping", "another's", "unreadable"])
            if kind == "another's":
                service.announce(number, ("vm_8",))
                time.sleep(2.5)
                assert commits() == before, "a notice to another machine made a checkpoint"
                service.events.clear()
                continue
            if kind == "unreadable":  # no answer is no withdrawal, and no reason to stop
                service.broken = True
                time.sleep(1.5)
                service.broken = False
                began = time.monotonic()
            service.announce(number)
            if kind == "flapping":
                for flap in range(3):
                    time.sleep(dice.uniform(0.1, 1.2))
                    service.events.clear()
                    time.sleep(dice.uniform(0.1, 0.5))
                    service.announce(1000 * number + flap)
            until(lambda b=before: commits() > b, f"a commit after a {kind} notice", WITHIN_S)
            took.append(time.monotonic() - began)
            service.events.clear()  # withdrawn, or passed
            asked = service.asked
            until(lambda a=asked: service.asked > a + 1, "the withdrawal to be seen")
        assert took and max(took) <= WITHIN_S
        service.announce(-1)
        before = commits()
        until(lambda: commits() > before, "a commit before the machine goes", WITHIN_S)
        sentry.close()
        reached = rank.pulse().step
        rank.end()  # the machine is gone, in the middle of whatever it did
        thread.join(10)
        kept = newest_verified(folder, said.append)
        assert kept is not None and 0 < kept.step <= reached
        thread = train(owner.next_attempt(), kept.step, str(kept.path))
        rank.end()
        thread.join(10)
        assert any("Preempt announced" in line for line in said) and any("withdrawn" in line for line in said)
    finally:
        rank.close()
        owner.close()
