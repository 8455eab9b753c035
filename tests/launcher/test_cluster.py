"""What Ray's REST API answers, from a small server that answers as the dashboard does."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from launcher.errors import Failed
from launcher.jobs import cluster
from launcher.jobs.cluster import Cluster

Answers = list[tuple[int, str]]
"""(status, body) of the next requests; the last one again for those that follow."""


@pytest.fixture
def dashboard() -> Iterator[tuple[str, Answers, list[dict]]]:
    answers: Answers = [(200, "{}")]
    posted: list[dict] = []

    class Dashboard(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            status, body = answers.pop(0) if len(answers) > 1 else answers[0]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Dashboard)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", answers, posted
    server.shutdown()
    thread.join()
    server.server_close()


JOB = {"submission_id": "a-1", "entrypoint": "true"}


def test_a_head_whose_agent_is_not_up_yet_gets_the_job_a_moment_later(
    dashboard: tuple[str, Answers, list[dict]],
) -> None:
    url, answers, posted = dashboard
    answers[:] = [
        (500, "Traceback ... No available agent to submit job, please try again later."),
        (200, '{"job_id": "a-1", "submission_id": "a-1"}'),
    ]
    Cluster(url, {}).submit(JOB)
    assert posted == [JOB, JOB]


def test_it_is_not_waited_for_without_end(
    dashboard: tuple[str, Answers, list[dict]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, answers, _ = dashboard
    answers[:] = [(500, "No available agent to submit job, please try again later.")]
    monkeypatch.setattr(cluster, "AGENT_WAIT_S", 0.1)
    with pytest.raises(Failed, match="No available agent"):
        Cluster(url, {}).submit(JOB)


def test_any_other_refusal_is_told_at_once(dashboard: tuple[str, Answers, list[dict]]) -> None:
    url, answers, posted = dashboard
    answers[:] = [(500, "submission id a-1 exists")]
    with pytest.raises(Failed, match="submission id a-1 exists"):
        Cluster(url, {}).submit(JOB)
    assert len(posted) == 1
