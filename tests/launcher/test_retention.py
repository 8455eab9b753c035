"""Retention beside a monitor: what a rollback would go back to stays, while an alert is open and before one is."""

import http.server
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.storage import retention as retention_of_a_run
from launcher.storage.checkpoints import commit_checkpoint, prefix_of
from launcher.storage.retention import Onsets, Retention, retain
from launcher.storage.runlog import RunLog
from launcher.storage.store import FolderStore


def add(folder: Path, log: RunLog, step: int, attempt: int = 1) -> Any:
    place = folder / prefix_of(attempt, step)
    place.mkdir(parents=True)
    (place / "shard").write_text(str(step))
    return commit_checkpoint(log.store, log, attempt=attempt, step=step, topology={"world": 1})


def kept(log: RunLog) -> list[int]:
    return sorted(int(e.fields["step"]) for e in log.commits() if log.store.list(str(e.fields["manifest"])))


class Monitor:
    """Answers as the service does, with what a test wants it to say."""

    def __init__(self) -> None:
        self.alerts: list[dict[str, Any]] = []
        self.advice: dict[str, Any] | None = None
        self.status, self.asked = 200, list[str]()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                outer.asked.append(self.path)
                body = (
                    {"alerts": outer.alerts} if self.path.endswith("/verdicts") else {"advice": outer.advice}
                )
                data = json.dumps(body).encode()
                self.send_response(outer.status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def monitor() -> Iterator[Monitor]:
    it = Monitor()
    yield it
    it.close()


def spec(monitor: Any, keep: int = 1, on_divergence: str = "rollback") -> dict[str, Any]:
    return {
        "checkpoints": {"keep": keep},
        "monitor": {"url": monitor.url, "token_env": "LOSSCAST_TOKEN"},
        "policy": {"on_divergence": on_divergence},
    }


def diverged(since: int) -> dict[str, Any]:
    return {"alert": "LossDiverged", "since_step": since, "step": since + 9, "resolved_step": None}


def test_what_a_rollback_would_go_back_to_stays_while_its_alert_is_open(
    tmp_path: Path, monitor: Monitor
) -> None:
    log = RunLog(FolderStore(tmp_path), "run-a")
    with log.take("job"):
        retention = Retention(spec(monitor), "run-a")
        for step in range(10, 60, 10):  # onset 48 is called at 57: 40 is what it would go back to
            monitor.alerts = [diverged(48)] if step == 50 else []
            retention.after(log.store, log, add(tmp_path, log, step))
        assert {40, 50} <= set(kept(log))
        for step in range(60, 200, 10):
            retention.after(log.store, log, add(tmp_path, log, step))
            assert 40 in kept(log), f"gone after step {step}, with the alert open"
        monitor.alerts = [{**diverged(48), "resolved_step": 190}]
        retention.after(log.store, log, add(tmp_path, log, 200))
        assert 40 not in kept(log)


def test_what_the_advice_names_stays_though_the_alert_says_later(tmp_path: Path, monitor: Monitor) -> None:
    log = RunLog(FolderStore(tmp_path), "run-a")
    with log.take("job"):
        for step in (10, 20, 30):
            last = add(tmp_path, log, step)
        monitor.alerts, monitor.advice = [diverged(25)], {"action": "roll_back", "roll_back_to": 10}
        Retention(spec(monitor), "run-a").after(log.store, log, last)
    assert kept(log) == [10, 30]


def test_a_monitor_that_went_away_takes_nothing_back(tmp_path: Path, monitor: Monitor) -> None:
    log = RunLog(FolderStore(tmp_path), "run-a")
    with log.take("job"):
        retention = Retention(spec(monitor), "run-a")
        for step in range(10, 50, 10):
            add(tmp_path, log, step)
        monitor.alerts = [diverged(35)]
        retention.after(log.store, log, add(tmp_path, log, 50))
        monitor.status = 500
        for step in range(60, 160, 10):
            retention.after(log.store, log, add(tmp_path, log, step))
    assert 30 in kept(log)


def test_an_alert_called_late_finds_an_older_checkpoint(tmp_path: Path, monitor: Monitor) -> None:
    log = RunLog(FolderStore(tmp_path), "run-a")
    with log.take("job"):
        retention = Retention(spec(monitor, keep=2), "run-a")
        for n in range(1, 60):
            retention.after(log.store, log, add(tmp_path, log, n))
            left = kept(log)
            assert {n, max(1, n - 1)} <= set(left) and len(left) <= 4
            if n > 8:
                assert left[0] <= n - 8, "4 x keep commits back there is one"


@pytest.mark.parametrize("policy", ["observe", "rollback"])
def test_a_run_that_only_observes_keeps_no_more_than_it_says(
    tmp_path: Path, monitor: Monitor, policy: str
) -> None:
    monitor.alerts = [diverged(25)]
    log = RunLog(FolderStore(tmp_path), "run-a")
    with log.take("job"):
        retention = Retention(spec(monitor, on_divergence=policy), "run-a")
        for step in (10, 20, 30, 40):
            retention.after(log.store, log, add(tmp_path, log, step))
    assert kept(log) == ([40] if policy == "observe" else [10, 20, 40])
    assert bool(monitor.asked) == (policy == "rollback")


def test_a_run_the_monitor_does_not_know_has_no_onset(monitor: Monitor) -> None:
    onsets = Onsets.of(spec(monitor), "run-a")
    assert onsets is not None
    monitor.status = 404
    assert onsets.earliest() is None
    monitor.status = 503
    with pytest.raises(OSError, match="503"):
        onsets.earliest()


def test_an_onset_before_every_checkpoint_keeps_nothing_more(tmp_path: Path) -> None:
    log = RunLog(FolderStore(tmp_path), "run-a")
    with log.take("job"):
        for step in (10, 20, 30):
            add(tmp_path, log, step)
        retain(log.store, log, keep=1, onset=5)
    assert kept(log) == [30]


def test_what_goes_beside_training_is_what_would_have_gone_before_the_next_step(
    tmp_path: Path, monitor: Monitor
) -> None:
    left = list[list[int]]()
    for name in ("at once", "beside"):
        folder = tmp_path / name
        log = RunLog(FolderStore(folder), "run-a")
        with log.take("job"):
            retention = Retention(spec(monitor), "run-a")
            let_go = retention.after if name == "at once" else retention.beside
            monitor.alerts = []
            for step in range(10, 160, 10):
                monitor.alerts = [diverged(35)] if step >= 40 else []
                let_go(log.store, log, add(folder, log, step))
            assert retention.idle(60.0)
        left.append(kept(log))
    assert left[0] == left[1] and 30 in left[0] and len(left[0]) < 6


def test_nothing_waits_for_a_monitor_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention_of_a_run, "TIMEOUT_S", 3.0)
    log = RunLog(FolderStore(tmp_path), "run-a")
    with socket.create_server(("127.0.0.1", 0)) as silent, log.take("job"):
        said = spec(monitor=SimpleNamespace(url=f"http://127.0.0.1:{silent.getsockname()[1]}"))
        retention, took = Retention(said, "run-a"), list[float]()
        for step in range(10, 50, 10):
            entry, began = add(tmp_path, log, step), time.monotonic()
            retention.beside(log.store, log, entry)
            took.append(time.monotonic() - began)
        assert sum(took) < 3.0
        assert retention.idle(60.0)
    assert kept(log) == [10, 40], "and what may go goes all the same"
