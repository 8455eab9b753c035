"""The carrier of checkpoints: what it takes of a host that trains, and what its own end costs."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest

from launcher.runspec.file import read_spec
from launcher.runspec.model import RunSpec
from launcher.storage.runfolder import RunFolder
from launcher.storage.runlog import Holding, RunLog
from launcher.storage.store import FolderStore
from launcher.training import upload
from launcher.training.upload import Carrier, Saver, staging
from tests.launcher.made_up_spec import SPEC

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a thread's own priority is Linux'")


class Upload:
    """A carriage that only looks at the priority of the threads it starts."""

    def __init__(self) -> None:
        self.niceness = list[int]()

    def carry(self, order: dict[str, Any]) -> None:
        with ThreadPoolExecutor(2) as pool:
            looked = pool.submit(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
            self.niceness.append(looked.result())


def test_an_upload_beside_training_gives_way_and_one_that_is_waited_for_does_not() -> None:
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    carriage = Upload()
    for patience_s in (0.0, 900.0, 0.0, 900.0):
        with ThreadPoolExecutor(1) as thread:
            thread.submit(upload._carry, cast(upload.Carriage, carriage), {"patience_s": patience_s}).result()
    assert carriage.niceness == [upload.LEISURE, ours, upload.LEISURE, ours]
    assert os.getpriority(os.PRIO_PROCESS, 0) == ours


@pytest.fixture
def held(tmp_path: Path) -> Iterator[tuple[RunFolder, RunSpec, Holding]]:
    """A run whose shards are carried, to a folder."""
    path = tmp_path / "run.yaml"
    path.write_text(SPEC.format(url=tmp_path / "runs"))
    spec = read_spec(path)
    folder = RunFolder.of(spec.checkpoints.url, spec.name)
    with RunLog(FolderStore(folder.path), spec.name).take("job") as holding:
        yield folder, spec, holding


def shards(folder: RunFolder, step: int) -> Path:
    place = staging(folder, 1, 0, step)
    place.mkdir(parents=True)
    (place / "shard").write_bytes(b"s" * 1000)
    return place


def end(carrier: Carrier) -> None:
    """As a host does that has no memory left; returns when it is known."""
    os.kill(carrier._process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while carrier._process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_carrier_that_died_between_saves_is_said_and_the_next_save_starts_another(
    held: tuple[RunFolder, RunSpec, Holding],
) -> None:
    folder, spec, holding = held
    said = list[str]()
    carrier = Carrier(folder, 1, spec, 0, 1, said.append)
    try:
        for step in (5, 10, 15):
            carrier.carry(step, shards(folder, step), patience_s=60.0)
            assert carrier.idle(60.0)
            assert carrier.outcome(step) is None
            end(carrier)
        assert [step for step, _ in carrier.news()] == [5, 10, 15]
    finally:
        carrier.close()
    assert [e.fields["step"] for e in holding.log.commits()] == [15, 10, 5]
    assert len(said) >= 2 and said[0].startswith("rank 0: the process that uploads checkpoints ended (-9)")


def test_an_order_that_no_process_takes_ends_its_step_with_why(
    held: tuple[RunFolder, RunSpec, Holding], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, spec, _ = held
    carrier = Carrier(folder, 1, spec, 0, 1, lambda message: None)
    try:
        end(carrier)
        with monkeypatch.context() as m:
            m.setattr(sys, "executable", "/nowhere/python")
            carrier.carry(5, shards(folder, 5), patience_s=0.0)
            assert carrier.idle(10.0)
        why = carrier.outcome(5)
        assert why is not None and why.startswith("no uploading process can be started: ")
        with monkeypatch.context() as m:  # it dies as the order is written
            m.setattr(carrier, "_revived", lambda: None)
            carrier.carry(10, shards(folder, 10), patience_s=0.0)
            assert carrier.idle(10.0)
        why = carrier.outcome(10)
        assert why is not None and "Broken pipe" in why
        carrier.carry(15, shards(folder, 15), patience_s=60.0)
        assert carrier.idle(60.0)
        assert carrier.outcome(15) is None
    finally:
        carrier.close()


def test_what_an_attempt_before_was_asked_on_this_host_does_not_stop_the_next_one(
    held: tuple[RunFolder, RunSpec, Holding], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver that resumes a run at az:// may be on another host than rank 0, where the wish became a file."""
    monkeypatch.setenv("LOSSCAST_WORK", str(tmp_path / "work"))
    here, spec, _ = held
    away = RunFolder.at("az://account/runs/team/here")
    for folder in (here, away):
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.stop.touch()
        saver = Saver(folder, 1, spec, rank=1, world=2)
        saver.close()
    assert not away.stop.exists()
    assert here.stop.exists(), "a folder that all hosts share: whoever asked asked this attempt"
