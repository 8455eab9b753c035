"""Only whole, verified checkpoints load: damage of every kind is found, named, and gone around."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.errors import Failed
from launcher.storage.checkpoints import (
    commit_checkpoint,
    manifest_key,
    newest_verified,
    prefix_of,
    topology_of,
    why_not,
)
from launcher.storage.retention import retain
from launcher.storage.runlog import RunLog, Superseded
from launcher.storage.store import FolderStore

TOPOLOGY = topology_of(2, 1, 1, 1)
RANKS = [f"zero_pp_rank_{r}_mp_rank_00_optim_states.pt" for r in range(2)]
FILES = ["mp_rank_00_model_states.pt", *RANKS]


def write(folder: Path, attempt: int, step: int) -> Path:
    place = folder / prefix_of(attempt, step)
    place.mkdir(parents=True)
    for i, name in enumerate(FILES):
        (place / name).write_bytes(f"{attempt} {step} {name}".encode() * (50 + i))
    return place


def run_in(folder: Path, steps: tuple[int, ...] = (10, 20, 30)) -> tuple[FolderStore, RunLog]:
    store = FolderStore(folder)
    log = RunLog(store, "run-a")
    with log.take("job-1") as holding:
        for step in steps:
            write(folder, 1, step)
            commit_checkpoint(
                store, log, attempt=holding.attempt, step=step, topology=TOPOLOGY, expected=FILES
            )
    return store, log


def test_the_newest_committed_checkpoint_is_found_whole(tmp_path: Path) -> None:
    found = newest_verified(*run_in(tmp_path))
    assert found is not None and (found.step, found.attempt) == (30, 1)
    assert sorted(found.files) == sorted(FILES) and found.topology == TOPOLOGY


def test_what_was_never_committed_is_not_there(tmp_path: Path) -> None:
    store, log = run_in(tmp_path)
    write(tmp_path, 1, 40)
    found = newest_verified(store, log)
    assert found is not None and found.step == 30


Damage = Callable[[Path, Path], None]


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def _link(path: Path) -> None:
    target = path.with_name("elsewhere")
    path.rename(target.parent.parent / "elsewhere")
    path.symlink_to(target.parent.parent / "elsewhere")


@pytest.mark.parametrize(
    ("name", "damage"),
    [(FILES[0], _flip), (FILES[1], _truncate), (FILES[2], _grow), (FILES[0], Path.unlink), (FILES[1], _link)],
)
def test_a_damaged_file_is_named_and_the_checkpoint_before_it_taken(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    store, log = run_in(tmp_path)
    damage(tmp_path / prefix_of(1, 30) / name)
    said: list[str] = []
    found = newest_verified(store, log, said.append)
    assert found is not None and found.step == 20
    assert len(said) == 1 and name in said[0] and "step 30" in said[0]


def _swap_ranks(place: Path, manifest: Path) -> None:
    a, b = (place / name for name in RANKS)
    a.rename(place / "t")
    b.rename(a)
    (place / "t").rename(b)


def _forged_manifest(place: Path, manifest: Path) -> None:
    (place / RANKS[0]).write_bytes(b"evil")
    body = json.loads(manifest.read_text())
    body["files"][RANKS[0]] = {"bytes": 4, "sha256": "00"}
    manifest.write_text(json.dumps(body))


def _stale_manifest(place: Path, manifest: Path) -> None:
    shutil.copy(manifest.with_name("step-20.manifest.json"), manifest)


def _no_manifest(place: Path, manifest: Path) -> None:
    manifest.unlink()


def _a_stranger(place: Path, manifest: Path) -> None:
    (place / "zero_pp_rank_2_mp_rank_00_optim_states.pt").write_bytes(b"evil")


def _all_of_another_step(place: Path, manifest: Path) -> None:
    shutil.rmtree(place)
    shutil.copytree(place.with_name("step-20"), place)


@pytest.mark.parametrize(
    "damage",
    [_swap_ranks, _forged_manifest, _stale_manifest, _no_manifest, _a_stranger, _all_of_another_step],
    ids=lambda f: f.__name__,
)
def test_a_checkpoint_that_is_not_the_committed_one_is_refused(tmp_path: Path, damage: Damage) -> None:
    store, log = run_in(tmp_path)
    damage(tmp_path / prefix_of(1, 30), tmp_path / manifest_key(1, 30))
    said: list[str] = []
    found = newest_verified(store, log, said.append)
    assert found is not None and found.step == 20 and "step-30" in said[0]


def test_with_nothing_whole_left_there_is_no_checkpoint(tmp_path: Path) -> None:
    store, log = run_in(tmp_path, (10,))
    _flip(tmp_path / prefix_of(1, 10) / FILES[0])
    assert newest_verified(store, log) is None


def test_a_missing_rank_is_not_committed(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    log = RunLog(store, "run-a")
    with log.take("job-1"):
        (write(tmp_path, 1, 10) / RANKS[1]).unlink()
        with pytest.raises(Failed, match=RANKS[1]):
            commit_checkpoint(store, log, attempt=1, step=10, topology=TOPOLOGY, expected=FILES)
        assert log.commits() == []


def test_committing_the_same_files_again_changes_nothing(tmp_path: Path) -> None:
    store, log = run_in(tmp_path, (10,))
    again = commit_checkpoint(store, log, attempt=1, step=10, topology=TOPOLOGY)
    assert again.n == 1 and len(log.entries()) == 2


def test_a_superseded_attempt_leaves_files_and_no_commit(tmp_path: Path) -> None:
    store, log = run_in(tmp_path, (10,))
    with log.take("job-2"):
        write(tmp_path, 1, 99)
        with pytest.raises(Superseded):
            commit_checkpoint(store, RunLog(store, "run-a"), attempt=1, step=99, topology=TOPOLOGY)
    found = newest_verified(store, log)
    assert found is not None and found.step == 10


def test_what_ranks_hashed_on_the_way_is_not_read_again_and_must_have_its_size(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    log = RunLog(store, "run-a")
    with log.take("job-1"):
        write(tmp_path, 1, 10)
        digests = {name: store.digest(prefix_of(1, 10) + name) for name in FILES}
        wrong = {**digests, FILES[1]: (3, digests[FILES[1]][1])}
        with pytest.raises(Failed, match=f"{FILES[1]} has .* bytes, its writer says 3"):
            commit_checkpoint(store, log, attempt=1, step=10, topology=TOPOLOGY, digests=wrong)
        commit_checkpoint(store, log, attempt=1, step=10, topology=TOPOLOGY, digests=digests)
    found = newest_verified(store, log)
    assert found is not None and found.files[FILES[0]]["sha256"] == digests[FILES[0]][1]


def test_a_checkpoint_of_another_layout_is_told_apart_before_it_is_loaded(tmp_path: Path) -> None:
    found = newest_verified(*run_in(tmp_path))
    assert found is not None
    assert why_not(found, topology_of(2, 1, 1, 1)) is None
    assert why_not(found, topology_of(4, 1, 1, 2)) == (
        "step 30 was written with dp 2, zero 1 and this run has dp 4, zero 2: convert it to a universal checkpoint"
    )


def test_retention_keeps_the_last_ones_and_the_newest_that_verifies(tmp_path: Path) -> None:
    store, log = run_in(tmp_path, (10, 20, 30, 40, 50))
    for step in (40, 50):
        _flip(tmp_path / prefix_of(1, step) / FILES[0])
    deleted = retain(store, log, keep=2)
    assert deleted == [prefix_of(1, 10), prefix_of(1, 20)]
    found = newest_verified(store, log)
    assert found is not None and found.step == 30


def test_with_nothing_whole_left_retention_deletes_no_checkpoint(tmp_path: Path) -> None:
    store, log = run_in(tmp_path, (10, 20, 30))
    for step in (10, 20, 30):
        _flip(tmp_path / prefix_of(1, step) / FILES[0])
    assert retain(store, log, keep=1) == []


def test_retention_reads_nothing_again_after_a_commit_of_its_callers(tmp_path: Path) -> None:
    class Counting(FolderStore):
        read = 0

        def digest(self, key: str) -> tuple[int, str]:
            self.read += 1
            return super().digest(key)

    run_in(tmp_path, (10, 20, 30))
    store = Counting(tmp_path)
    log = RunLog(store, "run-a")
    assert retain(store, log, keep=2, just_committed=log.commits()[0]) == [prefix_of(1, 10)]
    assert store.read == 0


def test_retention_keeps_every_nth_and_clears_what_a_crashed_attempt_left(tmp_path: Path) -> None:
    store, log = run_in(tmp_path, (10, 20, 30, 40))
    write(tmp_path, 1, 45)
    with log.take("job-2"):
        write(tmp_path, 2, 50)
        (tmp_path / "attempts/1/curve.csv").write_text("kept")
        retain(store, log, keep=1, every_nth_step=20)
    left = sorted(p.name for p in tmp_path.glob("attempts/*/checkpoints/step-*") if p.is_dir())
    assert left == ["step-20", "step-40", "step-45", "step-50"] or left == ["step-20", "step-40", "step-50"]
    assert (tmp_path / "attempts/1/curve.csv").exists()
