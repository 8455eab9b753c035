"""Saving while the storage is slow, away, or somebody else's: training goes on, nothing half saved counts."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.azurite import ACCOUNT, KEY, Azurite, Entra, free_port, needs_azurite

pytestmark = pytest.mark.faults
pytest.importorskip("torch", reason="needs torch: pip install 'losscast[train]'")
needs_azurite()

from launcher.errors import Failed  # noqa: E402
from launcher.runspec.file import read_spec  # noqa: E402
from launcher.storage.ahead import TOO_LARGE, Ahead  # noqa: E402
from launcher.storage.checkpoints import commit_checkpoint, newest_verified, prefix_of  # noqa: E402
from launcher.storage.remote import at_hand, within_reach  # noqa: E402
from launcher.storage.retention import retain  # noqa: E402
from launcher.storage.runfolder import RunFolder  # noqa: E402
from launcher.storage.runlog import RunLog, Superseded  # noqa: E402
from launcher.training import upload  # noqa: E402
from launcher.training.upload import Saver  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
SPEC = """
name: {name}
workload: {{kind: gpt, layers: 1, width: 16, heads: 1, context: 32}}
data: {{path: stdlib}}
train: {{tokens: 1e5, batch_tokens: 256, lr: 1e-3, schedule: {{kind: constant}}}}
checkpoints: {{url: "az://{account}/runs/team"}}
"""


class Writer:
    """What DeepSpeed's engine writes its files with."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        os.makedirs(path, exist_ok=exist_ok)

    def save(self, state: bytes, path: str) -> None:
        Path(path).write_bytes(state)


class Engine:
    """Writes shards as DeepSpeed does, without a model."""

    def __init__(self, size: int = 200_000) -> None:
        self.size, self.checkpoint_engine = size, Writer()

    def save_checkpoint(self, folder: str, tag: str, **more: Any) -> None:
        place = Path(folder, tag)
        self.checkpoint_engine.makedirs(str(place), exist_ok=True)
        for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
            self.checkpoint_engine.save(os.urandom(self.size), str(place / name))


@pytest.fixture(scope="module")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    import torch.distributed as dist

    folder = tmp_path_factory.mktemp("azurite-tls")
    with (
        Azurite(folder, oauth=True) as service,
        Entra(service.certificate) as entra,
        pytest.MonkeyPatch.context() as m,
    ):
        service.create("runs")
        for key, value in entra.environment.items():
            m.setenv(key, value)
        m.setenv("LOSSCAST_AZ_ENDPOINT", service.endpoint)
        m.setenv("LOSSCAST_WORK", str(folder / "work"))
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
        try:
            yield service
        finally:
            dist.destroy_process_group()


@pytest.fixture
def run(azurite: Azurite, tmp_path: Path, request: pytest.FixtureRequest) -> tuple[RunFolder, Any, RunLog]:
    from infra.blob import BlobStore

    name = f"run-{abs(hash(request.node.name)) % 10**8}"
    path = tmp_path / "run.yaml"
    path.write_text(SPEC.format(name=name, account=ACCOUNT))
    spec = read_spec(path)
    store = BlobStore(azurite.url, "runs", f"team/{name}", KEY)
    return RunFolder.of(spec.checkpoints.url, name), spec, RunLog(store, name)


def wait_for(what: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_save_due_while_another_is_under_way_is_skipped_said_and_counted(
    azurite: Azurite, run: tuple[RunFolder, Any, RunLog]
) -> None:
    folder, spec, log = run
    said: list[str] = []
    with log.take("job") as holding:
        saver = Saver(folder, holding.attempt, spec, 0, 1, said.append)
        try:
            assert saver.save(Engine(), 5, wait=True) and saver.committed() == [5]
            os.kill(azurite.pid, signal.SIGSTOP)  # storage answers nothing
            try:
                began = time.monotonic()
                assert saver.save(Engine(), 10, wait=False)
                assert not saver.save(Engine(), 15, wait=False)
                assert not saver.save(Engine(), 20, wait=False)
                assert saver.committed() == [] and time.monotonic() - began < 60, (
                    "training waited for storage"
                )
            finally:
                os.kill(azurite.pid, signal.SIGCONT)
            assert saver.skipped == 2 and len(said) == 1
            assert "step 15: no checkpoint, that of step 10 is still on its way" in said[0]
            assert saver.save(Engine(), 25, wait=True)
            assert saver.committed() == [10, 25]
        finally:
            saver.close()
    assert [e.fields["step"] for e in log.commits()] == [25, 10, 5]


def test_who_lost_the_run_saves_nothing_and_is_told(run: tuple[RunFolder, Any, RunLog]) -> None:
    folder, spec, log = run
    first = log.take("job")
    saver = Saver(folder, first.attempt, spec, 0, 1)
    try:
        assert saver.save(Engine(), 5, wait=True)
        first.release()
        with RunLog(log.store, log.run).take("another"), pytest.raises(Superseded):
            saver.save(Engine(), 10, wait=True)
    finally:
        saver.close()
    assert [e.fields["step"] for e in log.commits()] == [5]


def test_a_storage_that_refuses_is_said_in_one_line_and_training_goes_on(
    azurite: Azurite, run: tuple[RunFolder, Any, RunLog], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, spec, log = run
    monkeypatch.setenv("AZURE_FEDERATED_TOKEN_FILE", "/nowhere")
    said: list[str] = []
    with log.take("job") as holding:
        saver = Saver(folder, holding.attempt, spec, 0, 1, said.append)
        try:
            assert saver.save(Engine(), 5, wait=False)
            wait_for(lambda: saver.committed() == [] and said)
            assert len(said) == 1 and "\n" not in said[0]
            assert said[0].startswith("step 5: the checkpoint was not committed, training goes on: ")
        finally:
            saver.close()
    assert log.commits() == []


def test_training_goes_on_while_storage_is_away_and_uploads_catch_up(
    azurite: Azurite, run: tuple[RunFolder, Any, RunLog], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Away for longer than a request is tried: the save is given up and said, and one after it is committed."""
    folder, spec, log = run
    monkeypatch.setenv("LOSSCAST_AZ_LIMIT_S", "3")
    said: list[str] = []
    with log.take("job") as holding:
        saver = Saver(folder, holding.attempt, spec, 0, 1, said.append)
        told: list[int] = []  # what the monitor hears, and its CheckpointOverdue counts from
        try:
            assert saver.save(Engine(), 5, wait=True)
            told += saver.committed()
            os.kill(azurite.pid, signal.SIGSTOP)
            try:
                assert saver.save(Engine(), 10, wait=False)
                for _ in range(1200):  # steps of a training that waits for nothing
                    told += saver.committed()
                    if said:
                        break
                    time.sleep(0.05)
            finally:
                os.kill(azurite.pid, signal.SIGCONT)
            assert told == [5], "a commit was told that is none"
            assert len(said) == 1 and "\n" not in said[0]
            assert said[0].startswith("step 10: the checkpoint was not committed, training goes on: ")
            assert saver.save(Engine(), 15, wait=True)
            told += saver.committed()
        finally:
            saver.close()
    assert told == [5, 15]
    assert [e.fields["step"] for e in log.commits()] == [15, 5]
    assert newest_verified(log.store, log) is not None


def test_the_last_save_outlasts_an_outage(
    azurite: Azurite, run: tuple[RunFolder, Any, RunLog], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, spec, log = run
    monkeypatch.setenv("LOSSCAST_AZ_LIMIT_S", "2")
    with log.take("job") as holding:
        saver = Saver(folder, holding.attempt, spec, 0, 1)
        os.kill(azurite.pid, signal.SIGSTOP)
        back = threading.Timer(
            8.0, os.kill, (azurite.pid, signal.SIGCONT)
        )  # four times what a request is tried
        back.start()
        try:
            assert saver.save(Engine(), 5, wait=True)
        finally:
            back.join()
            saver.close()
    assert [e.fields["step"] for e in log.commits()] == [5]


def test_a_save_that_somebody_asked_for_holds_training_up_only_as_long_as_it_gets_on(
    azurite: Azurite, run: tuple[RunFolder, Any, RunLog], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "WISH_PATIENCE_S", 3.0)
    folder, spec, log = run
    said: list[str] = []
    with log.take("job") as holding:
        saver = Saver(folder, holding.attempt, spec, 0, 1, said.append)
        try:
            assert saver.save(Engine(), 5, wait=True)
            os.kill(azurite.pid, signal.SIGSTOP)
            try:
                began = time.monotonic()
                assert not saver.save(Engine(), 10, wait=True, must=False)
                assert not saver.save(Engine(), 15, wait=True, must=False)
                assert time.monotonic() - began < 60
            finally:
                os.kill(azurite.pid, signal.SIGCONT)
            assert "step 10: no checkpoint, training goes on: " in said[0]
            assert "step 15: no checkpoint, that of step 10 is still on its way" in said[1]
            assert saver.save(Engine(), 20, wait=True)
            assert saver.committed() == [5, 10, 20]
        finally:
            saver.close()


def test_a_full_staging_disk_costs_a_checkpoint_and_tears_nothing(
    run: tuple[RunFolder, Any, RunLog], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, spec, log = run
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("no small file system can be mounted here: needs root")
    said: list[str] = []
    try:
        monkeypatch.setenv("LOSSCAST_WORK", str(small))
        folder = RunFolder.of(spec.checkpoints.url, spec.name)
        with log.take("job") as holding:
            saver = Saver(folder, holding.attempt, spec, 0, 1, said.append)
            try:
                assert saver.save(Engine(), 5, wait=True)
                assert not saver.save(Engine(size=2_000_000), 10, wait=False)
                assert len(said) == 1 and "No space left on device" in said[0] and "\n" not in said[0]
                assert "training goes on" in said[0]
                assert saver.save(Engine(), 15, wait=True), "what was written by half still fills the disk"
                assert saver.committed() == [5, 15]
            finally:
                saver.close()
        found = newest_verified(log.store, log)
        assert found is not None and found.step == 15
        assert not any("step-10" in item.key for item in log.store.list("attempts/"))
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_a_converted_checkpoint_reaches_every_host_and_is_compared_there(
    run: tuple[RunFolder, Any, RunLog], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the driver's machine converted is brought by a host that never saw it, in folders within folders."""
    _, spec, log = run
    monkeypatch.setenv("LOSSCAST_WORK", str(tmp_path / "driver"))
    here = RunFolder.of(spec.checkpoints.url, spec.name)
    with log.take("job") as holding:
        path = here.attempt(holding.attempt) / "universal" / "step-20"
        names = [
            "zero/blocks.0.weight/fp32.pt",
            "zero/blocks.0.weight/exp_avg.pt",
            "mp_rank_00_model_states.pt",
        ]
        for name in names:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(name.encode() * 100)
        within_reach(here, path, holding.attempt)
        assert at_hand(here, path, holding.attempt) == path
        monkeypatch.setenv("LOSSCAST_WORK", str(tmp_path / "other"))
        there = RunFolder.of(spec.checkpoints.url, spec.name)
        brought = at_hand(there, path, holding.attempt)
        assert brought.is_relative_to(tmp_path / "other")
        assert {n: (brought / n).read_bytes() for n in names} == {n: n.encode() * 100 for n in names}
        assert log.commits() == [], "a resume would take it"
        log.store.put(f"attempts/1/universal/step-20/{names[0]}", names[1].encode() * 100)
        monkeypatch.setenv("LOSSCAST_WORK", str(tmp_path / "third"))
        with pytest.raises(Failed, match="loaded"):
            at_hand(RunFolder.of(spec.checkpoints.url, spec.name), path, holding.attempt)
        commit_checkpoint(log.store, log, attempt=1, step=30, topology={}, digests=put_shard(log, 1, 30))
        assert retain(log.store, log, keep=1) == [], "its own attempt may still load it"
        holding.next_attempt()
        commit_checkpoint(log.store, log, attempt=2, step=40, topology={}, digests=put_shard(log, 2, 40))
        assert "attempts/1/universal/step-20/" in retain(log.store, log, keep=2)
        assert not [i for i in log.store.list("attempts/") if "universal" in i.key]


def test_a_machine_without_the_newest_checkpoint_has_it_before_a_restart_asks(
    run: tuple[RunFolder, Any, RunLog], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head of a cluster, where no rank trains: a process of its own brings what ranks elsewhere wrote."""
    _, spec, log = run
    with log.take("job") as holding:
        for step in (10, 20, 30):
            commit_checkpoint(
                log.store,
                log,
                attempt=holding.attempt,
                step=step,
                topology={},
                digests=put_shard(log, holding.attempt, step),
            )
    monkeypatch.setenv("LOSSCAST_WORK", str(tmp_path / "head"))
    here = RunFolder.of(spec.checkpoints.url, spec.name)
    for old in (10, 20):
        (here.path / prefix_of(1, old)).mkdir(parents=True)
    said: list[str] = []
    ahead = Ahead(here.address, said.append, keep=2)
    shard = here.path / prefix_of(1, 30) / "shard"
    try:
        ahead.look()
        process = ahead._process
        assert process is not None
        ahead.look()
        assert ahead._process is process, "one at a time"
        assert process.wait(60) == 0 and shard.read_bytes() == b"s" and said == []
        assert sorted(p.name for p in shard.parent.parent.iterdir()) == ["step-20", "step-30"]
        before = shard.stat().st_mtime_ns
        assert newest_verified(log.store, log, into=here.path) is not None
        assert shard.stat().st_mtime_ns == before
        monkeypatch.setenv("LOSSCAST_AHEAD_GB", "1e-10")
        ahead.look()
        assert ahead._process is not None and ahead._process.wait(60) == TOO_LARGE
        gone = ahead._process
        ahead.look()
        assert ahead._process is gone, "a checkpoint that is too large is not tried again"
    finally:
        ahead.stop()


def put_shard(log: RunLog, attempt: int, step: int) -> dict[str, tuple[int, str]]:
    log.store.put(prefix_of(attempt, step) + "shard", b"s")
    return {"shard": log.store.digest(prefix_of(attempt, step) + "shard")}


TRAINER = """
import sys
from launcher.storage.runfolder import RunFolder
from launcher.runspec.file import read_spec
from launcher.training.upload import Carrier
spec = read_spec(sys.argv[1])
carrier = Carrier(RunFolder.of(spec.checkpoints.url, spec.name), 1, spec, 0, 1)
print(carrier._process.pid, flush=True)
import time; time.sleep(600)
"""


def test_a_carrier_ends_with_its_trainer(run: tuple[RunFolder, Any, RunLog], tmp_path: Path) -> None:
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(tmp_path / "run.yaml")],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert trainer.stdout is not None
    carrier = int(trainer.stdout.readline())
    assert alive(carrier)
    trainer.kill()
    trainer.wait()
    wait_for(lambda: not alive(carrier), 20)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
