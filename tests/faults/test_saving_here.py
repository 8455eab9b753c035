"""Saving in a run's own folder while training goes on: a checkpoint that is hashed beside the steps counts when it is whole."""

import errno
import hashlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.azurite import free_port

pytestmark = pytest.mark.faults
pytest.importorskip("torch", reason="needs torch: pip install 'losscast[train]'")

from launcher.errors import Failed  # noqa: E402
from launcher.runspec.file import read_spec  # noqa: E402
from launcher.storage import beside, checkpoints, retention  # noqa: E402
from launcher.storage.runfolder import RunFolder, write_whole  # noqa: E402
from launcher.storage.runlog import RunLog, Superseded  # noqa: E402
from launcher.storage.store import FolderStore  # noqa: E402
from launcher.training import saving, upload  # noqa: E402
from launcher.training.assignment import Assignment  # noqa: E402
from launcher.training.run import Run  # noqa: E402
from launcher.training.saving import NotWritten  # noqa: E402
from launcher.training.underway import Underway  # noqa: E402
from launcher.training.upload import Saver  # noqa: E402

SPEC = """
name: here
workload: {{kind: gpt, layers: 1, width: 16, heads: 1, context: 32}}
data: {{path: stdlib}}
train: {{tokens: 1e5, batch_tokens: 256, lr: 1e-3, schedule: {{kind: constant}}}}
checkpoints: {{url: "{url}", keep: 2}}
"""
NAMES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt")


class Writer:
    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        os.makedirs(path, exist_ok=exist_ok)

    def save(self, state: bytes, path: str) -> None:
        Path(path).write_bytes(state)


class Engine:
    """Writes shards as DeepSpeed does, without a model."""

    def __init__(self) -> None:
        self.checkpoint_engine = Writer()

    def save_checkpoint(self, folder: str, tag: str, **more: Any) -> None:
        self.checkpoint_engine.makedirs(str(Path(folder, tag)), exist_ok=True)
        for name in NAMES:
            self.checkpoint_engine.save(os.urandom(1000), str(Path(folder, tag, name)))


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def run(tmp_path: Path) -> tuple[RunFolder, Any, RunLog]:
    path = tmp_path / "run.yaml"
    path.write_text(SPEC.format(url=tmp_path / "runs"))
    spec = read_spec(path)
    folder = RunFolder.of(spec.checkpoints.url, spec.name)
    write_whole(folder.spec, spec.to_dict())
    return folder, spec, RunLog(FolderStore(folder.path), folder.name)


class Slow:
    """Hashing that waits until it may go on."""

    def __init__(self, real: Callable[..., Any]) -> None:
        self.begun, self.go, self._real = threading.Event(), threading.Event(), real

    def __call__(self, paths: list[str]) -> Any:
        self.begun.set()
        assert self.go.wait(120)
        return self._real(paths)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    """Every checkpoint counts as a large one, and is hashed as slowly as a test wants."""
    it = Slow(beside.digests)
    monkeypatch.setattr(upload, "AT_ONCE_BYTES", 0)
    monkeypatch.setattr(beside, "digests", it)
    yield it
    it.go.set()


def news(saver: Saver) -> list[int]:
    """What is committed next."""
    deadline, found = time.monotonic() + 120, list[int]()
    while not (found := saver.committed()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def test_a_large_checkpoint_is_hashed_and_committed_while_training_goes_on(
    run: tuple[RunFolder, Any, RunLog], slow: Slow
) -> None:
    folder, spec, log = run
    said: list[str] = []
    with log.take("job") as holding:
        saver = Saver(folder, holding.attempt, spec, 0, 1, said.append)
        assert saver.save(Engine(), 5, wait=False) and slow.begun.wait(120)
        assert saver.committed() == [] and log.commits() == [], "it counts before it was read"
        assert not saver.save(Engine(), 10, wait=False), "two at a time"
        assert saver.skipped == 1 and "step 10: no checkpoint, that of step 5 is still on its way" in said[0]
        slow.go.set()
        assert news(saver) == [5]
        assert saver.save(Engine(), 15, wait=False)
        assert saver.save(Engine(), 20, wait=True)
        assert saver.committed() == [15, 20]
        saver.close()
    assert [e.fields["step"] for e in log.commits()] == [20, 15, 5]
    assert not (folder.path / "attempts/1/checkpoints/step-5").exists(), "keep: 2"
    found = checkpoints.newest_verified(log.store, log)
    assert found is not None and found.step == 20


def test_what_is_still_hashed_when_another_takes_the_run_is_not_committed(
    run: tuple[RunFolder, Any, RunLog], slow: Slow
) -> None:
    folder, spec, log = run
    first = log.take("job")
    saver = Saver(folder, first.attempt, spec, 0, 1)
    assert saver.save(Engine(), 5, wait=False) and slow.begun.wait(120)
    first.release()
    with RunLog(log.store, log.run).take("another"):
        slow.go.set()
        with pytest.raises(Superseded):
            saver.save(Engine(), 10, wait=True)
    assert RunLog(log.store, log.run).commits() == []


def test_a_shard_that_is_gone_before_it_was_hashed_is_said_and_training_goes_on(
    run: tuple[RunFolder, Any, RunLog], slow: Slow
) -> None:
    folder, spec, log = run
    said: list[str] = []
    with log.take("job") as holding:
        saver = Saver(folder, holding.attempt, spec, 0, 1, said.append)
        assert saver.save(Engine(), 5, wait=False) and slow.begun.wait(120)
        (folder.path / "attempts/1/checkpoints/step-5" / NAMES[0]).unlink()
        slow.go.set()
        saver.close()
        assert saver.committed() == []
        assert len(said) == 1 and said[0].startswith(
            "step 5: the checkpoint was not committed, training goes on: "
        )
        assert saver.save(Engine(), 10, wait=False) and news(saver) == [10]
    found = checkpoints.newest_verified(log.store, log)
    assert found is not None and found.step == 10


def test_a_small_checkpoint_is_committed_before_the_next_step(run: tuple[RunFolder, Any, RunLog]) -> None:
    folder, spec, log = run
    with log.take("job") as holding:
        saver = Saver(folder, holding.attempt, spec, 0, 1)
        assert saver.save(Engine(), 5, wait=False)
        assert [e.fields["step"] for e in log.commits()] == [5] and saver.committed() == [5]


class Scripted(Engine):
    """Copies scripts beside a checkpoint, as DeepSpeed does, onto a disk that has just filled up."""

    def _copy_recovery_script(self, folder: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def save_checkpoint(self, folder: str, tag: str, **more: Any) -> None:
        super().save_checkpoint(folder, tag)
        self._copy_recovery_script(folder)


def test_a_script_that_deepspeed_could_not_put_beside_a_checkpoint_costs_neither_it_nor_the_run(
    run: tuple[RunFolder, Any, RunLog],
) -> None:
    folder, spec, log = run
    with log.take("job") as holding:
        saver, engine = Saver(folder, holding.attempt, spec, 0, 1), Scripted()
        assert saver.save(engine, 5, wait=False) and saver.committed() == [5]
        assert "_copy_recovery_script" not in vars(engine), "the class's own again"
    deepspeed = pytest.importorskip("deepspeed.runtime.engine", reason="needs deepspeed")
    assert hasattr(deepspeed.DeepSpeedEngine, "_copy_recovery_script"), "it has another name now"


def test_the_process_that_hashes_says_of_each_file_what_lies_there(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    for name, content in (("a", data), ("empty", b"")):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "folder").mkdir()
    asked = [str(tmp_path / name) for name in ("a", "empty", "none", "link", "a/below")]
    assert beside.digests(asked) == [
        (3_000_000, hashlib.sha256(data).hexdigest()),
        (0, hashlib.sha256().hexdigest()),
        None,
        None,
        None,
    ]
    with pytest.raises(OSError, match="the process that hashes ended"):
        beside.digests([str(tmp_path / "folder")])


def test_a_commit_reads_only_what_is_new_in_the_log(
    run: tuple[RunFolder, Any, RunLog], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, spec, log = run
    read, get = list[str](), FolderStore.get

    def counted(self: FolderStore, key: str) -> bytes:
        if threading.current_thread() is threading.main_thread():
            read.append(key)
        return get(self, key)

    with log.take("job") as holding:
        saver = Saver(folder, holding.attempt, spec, 0, 1)
        assert saver.save(Engine(), 5, wait=False)
        monkeypatch.setattr(FolderStore, "get", counted)
        assert saver.save(Engine(), 10, wait=False) and saver.save(Engine(), 15, wait=True)
    assert saver.committed() == [5, 10, 15] and "log/0.json" not in read


class Way(Underway):
    """A checkpoint that is on its way for a while."""

    def travel(self, seconds: float, moves: bool) -> None:
        began = time.monotonic()
        while (gone := time.monotonic() - began) < seconds:
            self._progress = f", {gone:.1f} of {seconds} MB" if moves else ""
            time.sleep(0.05)
        with self._changed:
            self._end(5, None)


@pytest.mark.parametrize("moves", [True, False])
def test_a_rank_that_waits_for_an_upload_shows_that_it_lives_as_long_as_bytes_move(
    monkeypatch: pytest.MonkeyPatch, moves: bool
) -> None:
    monkeypatch.setattr(upload, "LOOK_S", 0.1)
    monkeypatch.setattr(upload, "PATIENCE_S", 0.75)  # in which nothing gets on, twice
    way, beats = Way(), list[float]()
    way._begin(5)
    thread = threading.Thread(target=way.travel, args=(4.0, moves))
    thread.start()
    try:
        if moves:
            upload._all_idle(way, lambda: beats.append(time.monotonic()), must=True)
            assert len(beats) > 5 and way.outcome(5) is None
        else:
            with pytest.raises(Failed, match="step 5 is still on its way and has not got on"):
                upload._all_idle(way, lambda: beats.append(time.monotonic()), must=True)
            assert beats == []
    finally:
        thread.join()


class Slowly(Engine):
    """Takes its time to write, or only takes time."""

    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.writes = writes

    def save_checkpoint(self, folder: str, tag: str, **more: Any) -> None:
        super().save_checkpoint(folder, tag)
        for _ in range(20):
            time.sleep(0.1)
            if self.writes:
                with Path(folder, tag, NAMES[0]).open("ab") as file:
                    file.write(b"more")


@pytest.mark.parametrize("wait", [True, False])
def test_a_rank_that_writes_for_long_shows_that_it_lives_as_long_as_files_grow(
    run: tuple[RunFolder, Any, RunLog], monkeypatch: pytest.MonkeyPatch, wait: bool
) -> None:
    monkeypatch.setattr(upload, "LOOK_S", 0.1)
    folder, spec, log = run
    with log.take("job") as holding:
        saver, beats = Saver(folder, holding.attempt, spec, 0, 1), list[str]()
        assert saver.save(Slowly(True), 5, wait=wait, beat=lambda: beats.append("grows"))
        assert len(beats) > 5
        beats.clear()
        assert saver.save(Slowly(False), 10, wait=wait, beat=lambda: beats.append("stands"))
        assert len(beats) <= 1, "what it wrote at first"
        count = len(beats)
        time.sleep(0.3)
        assert len(beats) == count, "the save is over"


def test_a_script_that_saves_for_long_shows_that_it_lives(
    run: tuple[RunFolder, Any, RunLog], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "LOOK_S", 0.1)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    folder, spec, log = run
    beats = list[tuple[int, str]]()
    with log.take("job") as holding:
        assignment = Assignment(spec.to_dict(), folder.address, holding.attempt, "")
        own = Run(assignment, lambda: False, lambda: False, lambda step, phase: beats.append((step, phase)))
        own.save(Slowly(True), 5, wait=True)
        own.close(finished=False)
    assert own.saved_step == 5 and beats.count((5, "checkpoint")) > 5 and beats[-1] == (5, "step")


class Full(Writer):
    """Writes to a disk that has no room, so many times."""

    def __init__(self, times: float) -> None:
        self.times = times

    def save(self, state: bytes, path: str) -> None:
        self.times -= 1
        if self.times >= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().save(state, path)


@pytest.mark.parametrize(
    ("step", "stop", "times", "ends"),
    [
        (5, False, 2, "saved"),
        (5, False, 1e9, "passed over"),
        (5, True, 1e9, "ended"),
        (391, False, 1e9, "ended"),
    ],
    ids=["there is room again", "a wish to save", "a wish to stop", "the last step"],
)
def test_a_full_disk_ends_an_attempt_only_where_there_must_be_a_checkpoint(
    run: tuple[RunFolder, Any, RunLog],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    step: int,
    stop: bool,
    times: float,
    ends: str,
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(saving, "LAST_WAITS_S", (0.1,))
    monkeypatch.setattr(saving, "WISH_PATIENCE_S", 2.0)
    monkeypatch.setattr(saving, "LAST_PATIENCE_S", 4.0)
    folder, spec, log = run
    engine, asked = Engine(), iter([True])
    engine.checkpoint_engine = Full(times)
    with log.take("job") as holding:
        assignment = Assignment(spec.to_dict(), folder.address, holding.attempt, "")
        own = Run(assignment, lambda: stop, lambda: next(asked, False), lambda step, phase: None)
        assert own.total_steps == 391
        try:
            if ends == "ended":
                with pytest.raises(NotWritten, match="no checkpoint after 4 s"):
                    own.step(step, 1.0, engine=engine)
            else:
                assert not own.step(step, 1.0, engine=engine)
        finally:
            own.close(finished=False)
    assert (own.saved_step == step) == (ends == "saved")
    assert ("no checkpoint, training goes on: rank 0: " in capfd.readouterr().err) == (ends == "passed over")


def test_a_monitor_that_does_not_answer_holds_no_step_up(
    run: tuple[RunFolder, Any, RunLog], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "TIMEOUT_S", 8.0)
    folder, _, log = run
    with socket.create_server(("127.0.0.1", 0)) as silent, log.take("job") as holding:
        path = tmp_path / "run.yaml"
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with path.open("a") as file:
            file.write(f'monitor: {{url: "{url}"}}\npolicy: {{on_divergence: rollback}}\n')
        saver = Saver(folder, holding.attempt, read_spec(path), 0, 1)
        began = time.monotonic()
        assert saver.save(Engine(), 5, wait=False) and saver.save(Engine(), 10, wait=True)
        assert time.monotonic() - began < 8.0 and saver.committed() == [5, 10]
        saver.close()
