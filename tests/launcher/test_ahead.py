"""The newest checkpoint is on a machine before a restart needs it, and is trusted no more for that."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from infra.objects import Progress, Store, quiet
from launcher.storage.ahead import LIMIT, SCRATCH, Ahead, bring_ahead
from launcher.storage.checkpoints import commit_checkpoint, newest_verified, prefix_of
from launcher.storage.remote import tidy
from launcher.storage.runlog import RunLog
from launcher.storage.store import FolderStore

NAMES = ["mp_rank_00_model_states.pt", *(f"zero_pp_rank_{r}_mp_rank_00_optim_states.pt" for r in range(4))]


class Counted(FolderStore):
    """A store that remembers what was fetched from it."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.fetched: list[str] = []
        self.meanwhile: Any = None

    def download(self, files: Mapping[str, Path], progress: Progress = quiet) -> dict[str, tuple[int, str]]:
        self.fetched += files
        if self.meanwhile is not None:
            self.meanwhile()
        return super().download(files, progress)


def content(step: int, name: str) -> bytes:
    return f"{step} {name} ".encode() * 1000


def saved(store: Store, log: RunLog, attempt: int, step: int) -> None:
    for name in NAMES:
        store.put(prefix_of(attempt, step) + name, content(step, name))
    commit_checkpoint(store, log, attempt=attempt, step=step, topology={"world": 4})


@pytest.fixture
def run(tmp_path: Path) -> tuple[Counted, RunLog]:
    store = Counted(tmp_path / "away")
    log = RunLog(store, "r")
    with log.take("job") as holding:
        for step in (10, 20):
            saved(store, log, holding.attempt, step)
    return store, log


def resumed(store: Counted, log: RunLog, here: Path) -> tuple[int, list[str]]:
    """The step that a resume on this machine takes, and the names of what it still had to fetch."""
    store.fetched.clear()
    found = newest_verified(store, log, into=here)
    assert found is not None
    return found.step, sorted(key.rsplit("/", 1)[1] for key in store.fetched)


def test_a_resume_fetches_nothing_that_was_brought_ahead(run: tuple[Counted, RunLog], tmp_path: Path) -> None:
    (store, log), here = run, tmp_path / "here"
    mine = here / prefix_of(1, 20) / NAMES[1]
    mine.parent.mkdir(parents=True)
    mine.write_bytes(content(20, NAMES[1]))  # what this host's own rank wrote
    (mine.parent / f"{SCRATCH}7").write_bytes(b"left by one that was killed")
    brought = bring_ahead(store, log, here, limit=1e9)
    assert brought.why is None and brought.size == sum(len(content(20, n)) for n in NAMES if n != NAMES[1])
    assert prefix_of(1, 20) + NAMES[1] not in store.fetched and not (here / prefix_of(1, 10)).exists()
    assert sorted(p.name for p in mine.parent.iterdir()) == sorted(NAMES)
    assert resumed(store, log, here) == (20, [])
    assert bring_ahead(store, log, here, limit=1e9).size == 0 and store.fetched == []


def test_what_was_brought_ahead_and_differs_is_found_and_fetched_again(
    run: tuple[Counted, RunLog], tmp_path: Path
) -> None:
    (store, log), here = run, tmp_path / "here"
    bring_ahead(store, log, here, limit=1e9)
    bad = here / prefix_of(1, 20) / NAMES[2]
    bad.write_bytes(b"?" + content(20, NAMES[2])[1:])
    assert resumed(store, log, here) == (20, [NAMES[2]]) and bad.read_bytes() == content(20, NAMES[2])


def test_what_is_damaged_where_it_comes_from_is_not_kept_here(
    run: tuple[Counted, RunLog], tmp_path: Path
) -> None:
    (store, log), here = run, tmp_path / "here"
    store.put(prefix_of(1, 20) + NAMES[0], b"?" + content(20, NAMES[0])[1:])
    assert bring_ahead(store, log, here, limit=1e9).why is None
    assert not (here / prefix_of(1, 20) / NAMES[0]).exists()
    assert resumed(store, log, here)[0] == 10


def test_a_resume_that_brings_the_same_file_meanwhile_is_not_written_over(
    run: tuple[Counted, RunLog], tmp_path: Path
) -> None:
    (store, log), here = run, tmp_path / "here"
    place = here / prefix_of(1, 20) / NAMES[0]

    def other() -> None:
        place.write_bytes(b"the resume's own, half of it")

    store.meanwhile = other
    bring_ahead(store, log, here, limit=1e9)
    assert place.read_bytes() == b"the resume's own, half of it"
    assert not [p for p in place.parent.iterdir() if p.name.startswith(SCRATCH)]


def test_a_checkpoint_larger_than_the_bound_is_left_for_good(
    run: tuple[Counted, RunLog], tmp_path: Path
) -> None:
    store, log = run
    brought = bring_ahead(store, log, tmp_path / "here", limit=1000)
    assert brought.for_good and LIMIT in (brought.why or "") and store.fetched == []
    assert not (tmp_path / "here").exists()


def test_nothing_is_brought_for_a_run_in_a_folder_nor_where_it_is_turned_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    near = Ahead(str(tmp_path), said.append)
    near.look()
    monkeypatch.setenv(LIMIT, "0")
    off = Ahead("az://account/container/run", said.append)
    off.look()
    assert near._process is None and off._process is None and said == []
    near.stop()


def test_the_newest_few_are_kept_here(tmp_path: Path) -> None:
    for attempt, step in ((1, 10), (1, 20), (2, 30), (2, 40)):
        (tmp_path / prefix_of(attempt, step)).mkdir(parents=True)
    tidy(tmp_path, 2)
    left = sorted(p.name for p in tmp_path.glob("attempts/*/checkpoints/*"))
    assert left == ["step-30", "step-40"] and os.listdir(tmp_path / "attempts/1/checkpoints") == []
