"""A run that torchrun started, without a driver: who holds it, and what a holder that lost it leaves alone."""

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.runspec.file import read_spec
from launcher.storage.runfolder import RunFolder
from launcher.storage.runlog import RunLog
from launcher.storage.store import FolderStore
from launcher.training import loop, saving
from launcher.training.assignment import Outcome
from tests.launcher.made_up_spec import SPEC


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunFolder]:
    """A run whose leases are short."""
    before = signal.getsignal(signal.SIGTERM)
    path = tmp_path / "run.yaml"
    path.write_text(SPEC.format(url=tmp_path / "runs"))
    spec = read_spec(path)
    monkeypatch.setattr(saving, "run_log", short)
    yield RunFolder.of(spec.checkpoints.url, spec.name)
    saving.release_held()
    signal.signal(signal.SIGTERM, before)


def short(folder: RunFolder) -> RunLog:
    return RunLog(FolderStore(folder.path), folder.name, term_s=1.0)


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_who_lost_the_run_stops_itself_and_not_the_one_who_has_it(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(assignment: Any, stop: Callable[[], bool]) -> Outcome:
        assert not stop()
        short(run)._put(1, "attempt", 2, "other", {})  # as one who saw the lease lapse would
        wait_for(stop)
        return Outcome(step=1, finished=False, val_loss=None, seconds=0.0)

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(saving, "shared_assignment", lambda spec: saving._take(spec, str(tmp_path)))
    monkeypatch.setattr(loop, "train", train)
    assert loop.main([str(tmp_path / "run.yaml")]) == 0
    assert not run.stop.exists(), "whoever has the run now would stop too"
    assert not saving.lost(), "what was let go of is not lost"
