"""The local Ray: what is said where it can't be started."""

import importlib.util
import subprocess
import sys
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
