"""A driver that is killed is begun again, one that was asked to end is not; a cluster that is gone is noticed."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.recovery.keeper import Killed
from launcher.recovery.lifeline import Lifeline
from launcher.recovery.owning import bury
from launcher.runspec.file import read_spec
from launcher.storage.runfolder import RunFolder, read_json
from launcher.storage.runlog import RunLog
from launcher.storage.store import FolderStore

PROGRAM = """
import os, signal, sys, time
from launcher.recovery import keeper
keeper.WAITS_S = (0.0, 0.0, 0.0)

def work(died):
    with open("lives", "a") as file:
        print(os.getpid(), died and died.number, file=file)
    lives = len(open("lives").readlines())
    {body}

def given_up(died):
    open("given-up", "w").write(str(died))

sys.exit(keeper.kept(work, given_up))
"""


def begin(folder: Path, body: str) -> "subprocess.Popen[bytes]":
    (folder / "program.py").write_text(PROGRAM.format(body=body))
    here = str(Path(__file__).resolve().parents[2])
    return subprocess.Popen(
        [sys.executable, "program.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": here},
        start_new_session=True,
    )


def lives(folder: Path, count: int) -> list[list[str]]:
    def lines() -> list[list[str]]:
        path = folder / "lives"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    within(lambda: len(lines()) >= count)
    return lines()


def within(what: Callable[[], bool], patience_s: float = 60.0) -> None:
    deadline = time.monotonic() + patience_s
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_killed_driver_is_begun_again_and_told_what_ended_the_one_before(tmp_path: Path) -> None:
    body = "return 7 if lives == 2 else time.sleep(600)"
    process = begin(tmp_path, body)
    ((first, _),) = lives(tmp_path, 1)
    os.kill(int(first), signal.SIGKILL)
    assert process.wait(60) == 7
    assert [number for _, number in lives(tmp_path, 2)] == ["None", "9"]


def test_one_that_is_killed_again_and_again_is_given_up(tmp_path: Path) -> None:
    process = begin(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    assert process.wait(60) == 137
    assert len(lives(tmp_path, 4)) == 4 and "was ended by SIGKILL" in (tmp_path / "given-up").read_text()


@pytest.mark.parametrize("group", [True, False])
def test_one_that_is_asked_to_end_is_not_begun_again(tmp_path: Path, group: bool) -> None:
    process = begin(tmp_path, "time.sleep(600)")
    lives(tmp_path, 1)
    (os.killpg if group else os.kill)(process.pid, signal.SIGTERM)
    assert process.wait(60) in (143, -signal.SIGTERM)
    assert len(lives(tmp_path, 1)) == 1


def test_a_driver_ends_with_what_keeps_it(tmp_path: Path) -> None:
    process = begin(tmp_path, "time.sleep(600)")
    ((child, _),) = lives(tmp_path, 1)
    process.kill()
    process.wait()

    def gone() -> bool:
        try:
            return Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True

    within(gone)


def test_what_a_dead_driver_held_is_free_at_once_and_anothers_is_not(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "name: tiny\nworkload: {kind: gpt, layers: 1, width: 16, heads: 1, context: 32}\ndata: {path: stdlib}\n"
        "train: {tokens: 1e5, batch_tokens: 256, lr: 1e-3, schedule: {kind: constant}}\n"
        f"checkpoints: {{url: {tmp_path / 'runs'}}}\n"
    )
    spec = read_spec(path)
    folder = RunFolder.of(spec.checkpoints.url, spec.name)
    log = RunLog(FolderStore(folder.path), spec.name)
    holding = log.take("s-1")
    holding._stop.set()
    bury(folder, spec, "s-2", Killed(os.getpid(), signal.SIGKILL))
    bury(folder, spec, "s-1", Killed(os.getpid() + 1, signal.SIGKILL))
    assert log.standing().alive
    bury(folder, spec, "s-1", Killed(os.getpid(), signal.SIGKILL))
    assert not log.standing().alive and not log.standing().released
    noted = read_json(folder.attempt(1) / "failure.json")
    assert noted is not None and noted["cause"] == "killed" and "SIGKILL" in noted["message"]


def listener() -> tuple[socket.socket, str]:
    made = socket.create_server(("127.0.0.1", 0))
    return made, f"127.0.0.1:{made.getsockname()[1]}"


def test_a_raylet_that_refuses_is_gone_and_a_silent_head_gets_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("launcher.recovery.lifeline.KNOCK_S", 0.05)
    (head, head_at), (raylet, raylet_at) = listener(), listener()
    said, heard = list[str](), threading.Event()

    def lost(why: str) -> None:
        said.append(why)
        heard.set()

    line = Lifeline(head_at, raylet_at, lost, patience_s=1.0)
    assert not heard.wait(0.5)
    head.close()
    assert not heard.wait(0.3), "a head may be replaced"
    head = socket.create_server(("127.0.0.1", int(head_at.rpartition(":")[2])))
    assert not heard.wait(1.2)
    raylet.close()
    assert heard.wait(30) and f"nothing answers at the raylet's {raylet_at}" in said[0]
    line.close()
    heard.clear()
    line = Lifeline(head_at, None, lost, patience_s=0.5)
    head.close()
    assert heard.wait(30) and "has not answered for" in said[1]
    line.close()
