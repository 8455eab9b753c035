"""The local Ray: what is said where it can't be started."""

import importlib.util
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import Failed
from launcher.jobs import local_ray


def test_a_machine_without_ray_is_told_what_to_install_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Failed, match=r"pip install 'losscast\[train\]'"):
        local_ray.start(tmp_path / "ray", cpus=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("slow_s", "started"), [(0.0, 2), (60.0, 1)])
def test_one_that_ended_by_itself_is_started_once_more_only_where_it_was_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow_s: float, started: int
) -> None:
    """On a busy machine a part of Ray's that gives up on the others after 30 s takes the whole cluster with it."""
    real, commands = subprocess.Popen, list[Any]()

    def dies(command: Any, **how: Any) -> Any:
        commands.append(command)
        return real([sys.executable, "-c", "print('gave up'); raise SystemExit(1)"], **how)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(local_ray.subprocess, "Popen", dies)
    monkeypatch.setattr(local_ray, "SLOW_S", slow_s)
    with pytest.raises(Failed, match="gave up"):
        local_ray.start(tmp_path / "ray", cpus=2)
    assert len(commands) == started
    assert commands[0] != commands[-1] or started == 1, "on ports of its own"


def test_one_head_is_started_however_many_ask_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second one would take the first one's place in `head.json`, and nobody would know how to end that."""
    heads, found = list[local_ray.Head](), list[local_ray.Head]()

    def start(home: Path, cpus: int) -> local_ray.Head:
        time.sleep(0.2)
        heads.append(local_ray.Head(1, f"127.0.0.1:{len(heads)}", "", ""))
        return heads[-1]

    monkeypatch.setattr(local_ray, "running", lambda home: heads[-1] if heads else None)
    monkeypatch.setattr(local_ray, "start", start)
    threads = [
        threading.Thread(target=lambda: found.append(local_ray.running_or_started(tmp_path / "ray")))
        for _ in range(4)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(heads) == 1 and found == heads * 4
