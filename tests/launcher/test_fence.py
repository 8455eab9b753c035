"""What a monitor's refusal of an attempt means for the run."""

import shutil
from pathlib import Path

import pytest

from launcher.storage.runfolder import RunFolder
from launcher.training import fence
from launcher.training.saving import run_log


def test_only_the_runs_own_log_stops_it(tmp_path: Path) -> None:
    """The monitor goes by names: of two runs of one name it refuses the one with fewer attempts."""
    said, folder = list[str](), RunFolder(tmp_path / "a")
    folder.path.mkdir()
    holding = run_log(folder).take("one")
    ask = fence.Fence(folder, holding.attempt, said.append)
    assert not ask(False) and said == []
    assert not ask(True) and not ask(True)
    assert len(said) == 1 and "another run of the name a" in said[0] and "Training goes on" in said[0]
    holding.next_attempt()
    assert fence.Fence(folder, 1, said.append)(True), "attempt 2 has it"
    holding.release()


def test_a_log_that_can_not_be_read_ends_nothing_and_is_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, folder = list[str](), RunFolder(tmp_path / "a")
    folder.path.mkdir()
    with run_log(folder).take("one") as holding:
        holding.next_attempt()
        ask = fence.Fence(folder, 1, said.append)
        damaged = folder.path / "log" / "0.json"
        shutil.move(damaged, tmp_path / "away")
        assert not ask(True) and "can't be read" in said[0]
        shutil.move(tmp_path / "away", damaged)
        assert not ask(True), "not at every step"
        monkeypatch.setattr(fence, "AGAIN_S", 0.0)
        ask = fence.Fence(folder, 1, said.append)
        assert ask(True)
