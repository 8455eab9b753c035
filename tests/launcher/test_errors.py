"""Errors of others become one line of ours, and a cluster that is not there, or not one, is told in words."""

import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from launcher.cli import main
from launcher.errors import Failed, one_line
from launcher.runspec.model import RunSpec
from launcher.storage.runfolder import write_whole


@pytest.mark.parametrize(
    ("said", "first", "line"),
    [
        (Failed("a\n  b\tc \n"), False, "a b c"),
        (Failed("\n  a  b \ntrace"), True, "a b"),
        (TimeoutError(), False, "TimeoutError"),
        (TimeoutError(" \n"), True, "TimeoutError"),
        ("", False, ""),
        ("x" * 20, False, "x" * 6 + " ..."),
    ],
)
def test_an_error_is_one_line_and_never_an_empty_one(said: object, first: bool, line: str) -> None:
    assert one_line(said, 10, first=first) == line


class Dashboard:
    """What listens where a cluster should: answers everything with one status and body."""

    def __init__(self, status: int, body: bytes) -> None:
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "Dashboard":
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def pending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A run `tiny` that was handed in a moment ago to the cluster at an address."""
    monkeypatch.setenv("LOSSCAST_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.chdir(tmp_path)

    def make(address: str) -> None:
        gpt = {"kind": "gpt", "layers": 1, "width": 8, "heads": 1, "context": 32}
        train = {"tokens": 5120, "batch_tokens": 256, "lr": 0.01}
        spec = {"name": "tiny", "workload": gpt, "data": {"path": "stdlib"}, "train": train}
        more = {"cluster": {"to": address}, "checkpoints": {"url": str(tmp_path / "runs")}}
        folder = tmp_path / "runs" / "tiny"
        write_whole(folder / "spec.json", RunSpec.from_dict({**spec, **more}).to_dict())
        job = {"run": "tiny", "job": "tiny-00", "dashboard": address, "folder": str(folder)}
        write_whole(folder / "submission.json", {**job, "time": time.time()})

    return make


COMMANDS = (
    ("status", "tiny"),
    ("why", "tiny"),
    ("logs", "tiny"),
    ("stop", "tiny"),
    ("resume", "tiny", "--yes"),
)
SILENT = [
    (401, b"Unauthorized: bad token", "refuses our token (401). Set RAY_AUTH_MODE=token"),
    (200, b"<html>hello</html>", "not as a Ray dashboard does"),
    (200, b"[1]", "not as a Ray dashboard does"),
    (200, b"5", "not as a Ray dashboard does"),
    (200, b'{"jobs": []}', "not as a Ray dashboard does"),
    (500, b"Traceback:\n  boom", "500 Traceback: boom"),
]


@pytest.mark.parametrize(("status", "body", "words"), SILENT)
def test_a_cluster_that_does_not_answer_as_one_is_told_by_every_command(
    pending: Callable[[str], None], capsys: pytest.CaptureFixture[str], status: int, body: bytes, words: str
) -> None:
    with Dashboard(status, body) as found:
        for command in COMMANDS:
            pending(found.url)
            assert main(list(command)) == (0 if command[0] in ("status", "why") else 1), command
            out, err = capsys.readouterr()
            assert words in out + err, command
            assert "unknown to the cluster" not in out + err, "nobody asked it successfully"


def test_ray_that_died_while_a_run_is_pending_is_told_with_what_to_do(
    pending: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its port takes no connection any more."""
    with Dashboard(200, b"") as gone:
        address = gone.url
    for command in COMMANDS:
        pending(address)
        assert main(list(command)) == (0 if command[0] in ("status", "why") else 1), command
        out, err = capsys.readouterr()
        assert f"no Ray cluster answers at {address}: " in out + err, command
        assert "Connection refused" in out + err, command
        if command[0] == "why":
            assert "`losscast resume tiny` if it is gone for good" in err
        if command[0] == "stop":
            assert "Nothing was ended" in err


def test_a_cluster_that_was_restarted_knows_the_job_no_more(
    pending: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with Dashboard(404, b"Job tiny-00 does not exist") as found:
        pending(found.url)
        assert main(["status", "tiny"]) == 0
        assert "job tiny-00: unknown to the cluster" in capsys.readouterr().out
        assert main(["why", "tiny"]) == 0
        out, err = capsys.readouterr()
        assert (
            "knows nothing of job tiny-00: it may have been restarted" in out
            and "losscast resume tiny" in err
        )
        assert main(["stop", "tiny"]) == 0
        assert main(["status", "tiny"]) == 0
        assert capsys.readouterr().out.startswith("tiny: stopped")


@pytest.mark.parametrize("command", [("stop", "tiny", "--timeout"), ("janitor", "runs", "--every")])
@pytest.mark.parametrize("span", ["0", "-3", "nan", "inf", "soon"])
def test_a_span_that_is_none_is_refused_before_anything_is_done(
    pending: Callable[[str], None], capsys: pytest.CaptureFixture[str], command: tuple[str, ...], span: str
) -> None:
    pending("http://127.0.0.1:9")
    with pytest.raises(SystemExit) as ended:
        main([*command, span])
    assert ended.value.code == 2 and "above 0" in capsys.readouterr().err
    assert not Path("runs/tiny/stop").exists()
