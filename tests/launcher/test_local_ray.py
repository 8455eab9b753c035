"""The local Ray: what is said where it can't be started."""

import importlib.util
from pathlib import Path

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
