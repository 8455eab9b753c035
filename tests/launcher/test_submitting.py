"""What `submit` shows, asks and refuses before anything is sent anywhere, and what it leaves where nobody answered."""

import json
import os
import pty
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.errors import Failed, WrongInput
from launcher.jobs.owncode import refuse_uncallable
from launcher.jobs.submit import refuse_shadows, submit
from launcher.recovery import attempts, driver
from launcher.runspec.document import parse
from launcher.runspec.file import read_spec
from launcher.runspec.model import RunSpec
from launcher.storage.runfolder import RunFolder, read_json, write_whole
from launcher.storage.runlog import RunLog
from launcher.storage.store import FolderStore

SPEC = """
name: tiny
workload: {{kind: gpt, layers: 1, width: 8, heads: 1, context: 32}}
data: {{path: stdlib}}
train: {{tokens: 5120, batch_tokens: 256, lr: 0.01}}
cluster: {{to: "{to}"}}
checkpoints: {{url: {runs}}}
"""
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOSSCAST_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def spec_file(folder: Path, to: str = NOWHERE) -> str:
    (folder / "run.yaml").write_text(SPEC.format(to=to, runs=folder / "runs"))
    return str(folder / "run.yaml")


def test_without_a_terminal_a_cluster_needs_yes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", spec_file(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "Add --yes" in said and "parameters" in said and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("answer", "status", "words"),
    [("n\n", 1, "not submitted"), ("\n", 1, "not submitted"), ("y\n", 1, "no Ray cluster")],
)
def test_on_a_terminal_the_plan_is_shown_and_yes_is_waited_for(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    status: int,
    words: str,
) -> None:
    ours, theirs = pty.openpty()
    os.write(ours, answer.encode())
    with os.fdopen(theirs, "r") as terminal:
        monkeypatch.setattr("sys.stdin", terminal)
        assert main(["submit", spec_file(tmp_path)]) == status
    os.close(ours)
    said = capsys.readouterr().err
    assert said.index("20 steps") < said.index("submit it? [y/N]") < said.index(words)


def test_a_cluster_that_is_away_leaves_no_submission_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", spec_file(tmp_path), "--yes"]) == 1
    assert f"no Ray cluster answers at {NOWHERE}" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "tiny" / "submission.json").exists()


def test_a_run_that_is_held_is_refused_before_anything_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = spec_file(tmp_path)
    folder = RunFolder(tmp_path / "runs" / "tiny")
    write_whole(folder.spec, read_spec(path).to_dict())
    with RunLog(FolderStore(folder.path), "tiny").take("tiny-cafe"):
        assert main(["submit", path]) == 75
        said = capsys.readouterr().err
        assert "submission tiny-cafe" in said and f"pid {os.getpid()}" in said and "submit it?" not in said
        assert main(["resume", path]) == 75


def test_a_finished_run_and_another_model_under_its_name_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = spec_file(tmp_path)
    spec, folder = read_spec(path), RunFolder(tmp_path / "runs" / "tiny")
    write_whole(folder.spec, spec.to_dict())
    write_whole(folder.result, {"digest": spec.digest, "loss": 2.5})
    assert main(["submit", path, "--yes"]) == 2
    assert "is finished" in capsys.readouterr().err
    folder.attempt(1).mkdir(parents=True)
    folder.curve(1).write_text("run,step,tokens\ntiny,1,256\n")
    changed = Path(path).read_text().replace("width: 8", "width: 16")
    Path(path).write_text(changed)
    assert main(["submit", path, "--yes"]) == 2
    assert "began with another workload" in capsys.readouterr().err


def test_a_run_that_never_made_a_step_may_be_mended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever mistyped a path mends it and submits again, under the same name."""
    path = spec_file(tmp_path)
    folder = RunFolder(tmp_path / "runs" / "tiny")
    write_whole(folder.spec, {**read_spec(path).to_dict(), "data": {"path": "/mistyped"}})
    folder.attempt(1).mkdir(parents=True)
    assert main(["submit", path, "--yes"]) == 1
    assert "no Ray cluster" in capsys.readouterr().err


@pytest.mark.parametrize("there", ["launcher.py", "monitor/__init__.py", "infra.abi3.so"])
def test_a_working_directory_that_shadows_us_is_refused(
    tmp_path: Path, there: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / there
    path.parent.mkdir(exist_ok=True)
    path.write_text("")
    with pytest.raises(WrongInput, match="imported instead"):
        refuse_shadows(tmp_path)
    assert main(["submit", spec_file(tmp_path), "--yes"]) == 2
    assert there in capsys.readouterr().err


def test_a_folder_of_data_named_like_us_shadows_nothing(tmp_path: Path) -> None:
    (tmp_path / "monitor").mkdir()
    (tmp_path / "monitor" / "notes.txt").write_text("")
    refuse_shadows(tmp_path)


def test_dry_run_shows_the_plan_and_touches_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", spec_file(tmp_path), "--dry-run"]) == 0
    assert "20 steps" in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_who_will_watch_is_said_and_a_token_that_is_not_there_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOSSCAST_TOKEN", raising=False)
    run = spec_file(tmp_path)
    assert main(["submit", run, "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert "monitor      none" in said and "LOSSCAST_TOKEN" not in said
    with open(run, "a") as file:
        file.write("monitor: {url: 'http://watch.lab:8700'}\n")
    assert main(["submit", run, "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert "monitor      http://watch.lab:8700" in said
    assert "LOSSCAST_TOKEN is not set here" in said and "ingest:" in said
    monkeypatch.setenv("LOSSCAST_TOKEN", "it is")
    assert main(["submit", run, "--dry-run"]) == 0
    assert "LOSSCAST_TOKEN" not in capsys.readouterr().err


def test_another_place_is_asked_instead_of_the_specs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", spec_file(tmp_path), "--to", "http://127.0.0.1:8", "--yes"]) == 1
    said = capsys.readouterr().err
    assert "127.0.0.1:8" in said and NOWHERE not in said


OWN = """
import os
def main(run, width, depth=2): ...
def loose(**kwargs): ...
from os import getcwd
"""


@pytest.mark.parametrize(
    ("entrypoint", "args", "words"),
    [
        ("own:main", "{width: 3}", ""),
        ("own:loose", "{anything: 3}", ""),
        ("own:getcwd", "{}", ""),
        ("json:dumps", "{}", ""),
        ("own:mian", "{}", "own.py has no function mian. It has main, loose."),
        ("own:main", "{widht: 3}", "widht: main takes width, depth"),
        ("own:main", "{depth: 3}", "main needs width as well"),
        ("missing:main", "{}", "there is no module missing in "),
        ("missing.py", "[]", "there is no script missing.py in "),
        ("torn.py", "[]", "torn.py:1:"),
        ("torn:main", "{}", "no Python that can be run"),
    ],
)
def test_an_entrypoint_that_can_not_be_called_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entrypoint: str, args: str, words: str
) -> None:
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "torn.py").write_text("def main(:\n")
    monkeypatch.chdir(tmp_path)
    spec = RunSpec.from_dict(
        {
            "name": "own",
            "workload": {"entrypoint": entrypoint, "args": parse(args, "args").data},
            "train": {"tokens": 100, "batch_tokens": 10, "lr": 1e-3},
        }
    )
    if not words:
        refuse_uncallable(spec, tmp_path)
        return
    with pytest.raises(WrongInput, match=re.escape(words)):
        refuse_uncallable(spec, tmp_path)


def test_what_only_the_cluster_has_is_not_asked_for_here(tmp_path: Path) -> None:
    data = {
        "name": "own",
        "workload": {"entrypoint": "installed_there:main"},
        "train": {"tokens": 100, "batch_tokens": 10, "lr": 1e-3},
        "cluster": {"to": "http://ray:8265"},
    }
    refuse_uncallable(RunSpec.from_dict(data), tmp_path)


def test_a_module_named_monitor_where_python_m_starts_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "monitor.py").write_text("")
    path = spec_file(tmp_path)
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-m", "launcher.cli", "submit", path, "--dry-run"],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root},
    )  # fmt: skip
    assert done.returncode == 2 and "monitor.py: a module of this name" in done.stderr


@pytest.mark.parametrize("taken", [True, False])
def test_a_submission_whose_answer_is_lost_counts_if_the_job_is_there(tmp_path: Path, taken: bool) -> None:
    """A job that trains while its run says that it has none could be neither followed nor stopped."""
    asked = list[str]()

    class Dashboard(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body["submission_id"])
            self.connection.close()  # and no answer

        def do_GET(self) -> None:
            known = taken and asked and self.path == f"/api/jobs/{asked[0]}"
            job = {"submission_id": asked[0], "status": "PENDING", "entrypoint": "x", "type": "SUBMISSION"}
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(json.dumps(job).encode() if known else b"Job does not exist")

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Dashboard)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        spec = read_spec(spec_file(tmp_path, url))
        folder = RunFolder.of(spec.checkpoints.url, spec.name)
        if taken:
            done = submit(spec, url, {})
            kept = read_json(folder.path / "submission.json")
            assert kept is not None and [done.job] == asked == [kept["job"]]
        else:
            with pytest.raises(Failed):
                submit(spec, url, {})
            assert read_json(folder.path / "submission.json") is None
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_driver_whose_disk_is_away_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty mount point has no spec, and is no wrong input: that would end the job for good."""
    monkeypatch.setattr(attempts, "STORAGE_PATIENCE_S", 0.0)
    monkeypatch.setattr(attempts, "STORAGE_WAITS_S", (0.01,))
    (tmp_path / "mount").mkdir()
    with pytest.raises(FileNotFoundError, match="is its disk mounted"):
        driver.drive(RunFolder(tmp_path / "mount"), "tiny-1", lambda lost: None)
