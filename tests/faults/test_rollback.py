"""A run that is advised to roll back goes back by itself, twice, and then asks; what restarts and costs it tells the monitor.

The monitor is a stand-in that answers as `/v1/runs/{run}/advice` and `/verdicts` do, since when a judge calls is another
suite's matter. The run is real: Ray, DeepSpeed, its log and its data order.
"""

import gzip
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.faults
pytest.importorskip("deepspeed", reason="needs torch and deepspeed: pip install 'losscast[train]'")
pytest.importorskip("ray", reason="needs ray: pip install 'losscast[train]'")

from launcher.training.saving import run_log  # noqa: E402
from tests.faults.training import cluster, spec_of, start  # noqa: E402


class Monitor:
    """Keeps what it is sent, and calls a divergence `behind` steps after each onset."""

    def __init__(self, onsets: dict[int, int], behind: int) -> None:
        self.events: list[dict[str, Any]] = []
        self.attempt = self.step = 0
        monitor = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                for line in gzip.decompress(body).splitlines():
                    event = json.loads(line)
                    monitor.events.append(event)
                    if event["event"] == "sample":
                        monitor.attempt, monitor.step = event["attempt"], event["step"]
                self.answer({})

            def do_GET(self) -> None:
                onset = onsets.get(monitor.attempt)
                called = onset is not None and monitor.step >= onset + behind
                if self.path.endswith("/advice"):
                    advice = {
                        "action": "roll_back" if called else "continue",
                        "evidence": [f"off since {onset}"],
                    }
                    self.answer({"advice": advice})
                else:
                    alert = {"alert": "LossDiverged", "since_step": onset, "resolved_step": None}
                    self.answer({"alerts": [{**alert, "step": (onset or 0) + behind}] if called else []})

            def answer(self, document: Any) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps(document).encode())

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def monitor() -> Iterator[Monitor]:
    made = Monitor({1: 110, 2: 150, 3: 190}, behind=10)
    try:
        yield made
    finally:
        made.close()


def test_a_divergence_is_rolled_back_twice_and_then_a_person_is_asked(
    tmp_path: Path, monitor: Monitor
) -> None:
    more = f'monitor: {{url: "{monitor.url}"}}\npolicy: {{on_divergence: rollback}}'
    with cluster(tmp_path / "ray") as head:
        run = start(
            # all are kept: at a hundred steps a second three checkpoints are passed before the advice is read
            spec_of(tmp_path, "back", steps=900, every=20, keep=50, more=more),
            head,
            env={"LOSSCAST_ADVICE_POLL_S": "0.2"},
        )
        assert run.ended() == "SUCCEEDED", run.log()[-3000:]
        said = run.log()
    assert said.count("rolled back: off since") == 2, said[-3000:]
    assert "attempt 2 on 2 ranks, from step 100" in said and "attempt 3 on 2 ranks, from step 140" in said
    assert "it went back 2 times already: a person has to decide" in said
    assert "restarts: 2 rollback" in said
    entries = [e for e in run_log(run.folder).entries() if e.kind == "rollback"]
    assert [(e.fields["step"], e.fields["skip"]) for e in entries] == [(109, [110, 11]), (149, [150, 11])]
    causes = [(e["cause"], e["attempt"]) for e in monitor.events if e["event"] == "restart"]
    assert causes == [("rollback", 1), ("rollback", 2)]
    books = next(e for e in monitor.events if e["event"] == "goodput")
    assert books["gpu_seconds_useful"] > 0 and books["gpu_seconds_lost"] > 0 and books["steps_lost"] >= 20
    first = {int(r["step"]): float(r["loss"]) for r in run.steps(1)}
    second = {int(r["step"]): float(r["loss"]) for r in run.steps(2)}
    both = sorted(set(first) & set(second))
    assert [s for s in both if abs(first[s] - second[s]) > 1e-5] == [
        s for s in both if s >= 110
    ]  # other batches
