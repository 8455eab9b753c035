"""Only whole, verified checkpoints load, under attack: writers killed in the middle, every file damaged every way.

The writer is a stand-in for DeepSpeed's: it writes the shards of several ranks in pieces, each shard's content a
function of (attempt, step, rank), so that what is loaded can be compared with what must be there.
LOSSCAST_FAULTS=long runs more rounds; LOSSCAST_SEED=N replays one.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra.objects import Item
from launcher.storage import checkpoints, runlog
from launcher.storage import store as storage
from launcher.storage.checkpoints import commit_checkpoint, manifest_key, newest_verified, prefix_of
from launcher.storage.retention import retain
from launcher.storage.runlog import RunLog
from launcher.storage.store import FolderStore

pytestmark = pytest.mark.faults

LONG = os.environ.get("LOSSCAST_FAULTS") == "long"
KILLS = 500 if LONG else 55
RANKS = 4
TOPOLOGY = {"dp": RANKS, "pp": 1, "tp": 1, "zero": 1}
NAMES = [
    "mp_rank_00_model_states.pt",
    *(f"zero_pp_rank_{r}_mp_rank_00_optim_states.pt" for r in range(RANKS)),
]


def content(attempt: int, step: int, name: str) -> bytes:
    """What a shard must hold."""
    return hashlib.sha256(f"{attempt} {step} {name}".encode()).digest() * 600


def write_shards(folder: Path, attempt: int, step: int, pause_s: float = 0.0) -> None:
    place = folder / prefix_of(attempt, step)
    place.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        data = content(attempt, step, name)
        with open(place / name, "wb", buffering=0) as file:
            for start in range(0, len(data), 4096):
                file.write(data[start : start + 4096])
                if pause_s:
                    time.sleep(pause_s)


def save(store: FolderStore, log: RunLog, attempt: int, step: int) -> None:
    write_shards(store.root, attempt, step)
    commit_checkpoint(store, log, attempt=attempt, step=step, topology=TOPOLOGY, expected=NAMES)


def loaded(store: FolderStore, log: RunLog, said: list[str] | None = None) -> int | None:
    """The step that a resume would load, after comparing every byte with what that step must hold."""
    found = newest_verified(store, log, (said if said is not None else []).append)
    if found is None:
        return None
    assert sorted(found.files) == sorted(NAMES)
    for name in NAMES:
        assert (store.root / found.key / name).read_bytes() == content(found.attempt, found.step, name), name
    return found.step


def seeds(count: int) -> list[int]:
    replay = os.environ.get("LOSSCAST_SEED")
    return [int(replay)] if replay else list(range(count))


def test_a_writer_killed_at_any_moment_costs_at_most_what_it_had_not_committed(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    log = RunLog(store, "run-a", term_s=0.12)
    with log.take("job") as holding:
        began = time.monotonic()
        for step in (1, 2, 3):
            save(store, log, holding.attempt, step)
        a_save_s = (time.monotonic() - began) / 3
    first = acknowledged = 3
    for seed in seeds(KILLS):
        rng = random.Random(seed)
        heard, told = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                mine = RunLog(store, "run-a", term_s=0.12)
                holding = mine.take("job")
                os.write(told, b"0\n")
                step = loaded(store, mine) or 0
                while True:
                    step += 1
                    save(store, mine, holding.attempt, step)
                    os.write(told, f"{step}\n".encode())
                    if step % 3 == 0:
                        retain(store, mine, keep=2)
            finally:
                os._exit(1)
        os.close(told)
        if rng.random() < 0.9:
            os.read(heard, 2)  # it has the run: the kill falls into a save, most of the time
        time.sleep(rng.random() * 4 * a_save_s)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with os.fdopen(heard) as file:
            acknowledged = max([acknowledged, *(int(line) for line in file if line.strip())])
        step = loaded(store, log)
        assert (step or 0) >= acknowledged, f"seed {seed}: {acknowledged} was committed, {step} is loaded"
    assert acknowledged > first, "no writer ever got to work"


def three(folder: Path) -> tuple[FolderStore, RunLog]:
    """A run with commits at steps 10, 20, 30."""
    store = FolderStore(folder)
    log = RunLog(store, "run-a")
    with log.take("job") as holding:
        for step in (10, 20, 30):
            save(store, log, holding.attempt, step)
    return store, log


def _flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def _truncate(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def _empty(path: Path, rng: random.Random) -> None:
    os.truncate(path, 0)


def _delete(path: Path, rng: random.Random) -> None:
    path.unlink()


def _grow(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() + b"\0" * rng.randint(1, 9))


def _older(path: Path, rng: random.Random) -> None:
    shutil.copy(Path(str(path).replace("step-30", "step-20")), path)


def _a_folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def _a_link(path: Path, rng: random.Random) -> None:
    other = path.parents[1] / "aside"
    path.rename(other)
    path.symlink_to(other)


DAMAGES: list[Callable[[Path, random.Random], None]] = [
    _flip, _truncate, _empty, _delete, _grow, _older, _a_folder, _a_link,
]  # fmt: skip
FILES = [*(f"step-30/{name}" for name in NAMES), "step-30.manifest.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__.strip("_"))
def test_damage_to_any_file_is_found_and_named_before_anything_loads(
    tmp_path: Path, name: str, damage: Callable[[Path, random.Random], None]
) -> None:
    for seed in seeds(10 if LONG else 1):
        folder = tmp_path / str(seed)
        store, log = three(folder)
        damage(folder / "attempts/1/checkpoints" / name, random.Random(seed))
        said: list[str] = []
        if damage is _a_link and name.endswith(".json"):
            assert loaded(store, log) == 30  # the same bytes behind a link: still the committed manifest
            continue
        assert loaded(store, log, said) == 20
        assert len(said) == 1 and name in said[0]


@pytest.mark.parametrize("a", range(RANKS))
@pytest.mark.parametrize("b", range(RANKS))
def test_swapped_ranks_are_found(tmp_path: Path, a: int, b: int) -> None:
    if a >= b:
        return
    store, log = three(tmp_path)
    first, second = (tmp_path / prefix_of(1, 30) / NAMES[1 + r] for r in (a, b))
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    said: list[str] = []
    assert loaded(store, log, said) == 20 and NAMES[1 + a] in said[0]


def test_a_world_of_another_size_is_found(tmp_path: Path) -> None:
    store, log = three(tmp_path)
    extra = tmp_path / prefix_of(1, 30) / f"zero_pp_rank_{RANKS}_mp_rank_00_optim_states.pt"
    extra.write_bytes(b"of a run with more ranks")
    said: list[str] = []
    assert loaded(store, log, said) == 20 and "was never committed" in said[0]


def test_a_forged_latest_marker_changes_nothing(tmp_path: Path) -> None:
    store, log = three(tmp_path)
    write_shards(tmp_path, 1, 99)
    (tmp_path / "attempts/1/checkpoints/latest").write_text("step-99")
    assert loaded(store, log) == 30


def test_a_forged_manifest_beside_an_honest_log_is_found(tmp_path: Path) -> None:
    store, log = three(tmp_path)
    path = tmp_path / manifest_key(1, 30)
    shard = tmp_path / prefix_of(1, 30) / NAMES[0]
    shard.write_bytes(b"import os; os.system('evil')")
    body = json.loads(path.read_text())
    body["files"][NAMES[0]] = {"bytes": 28, "sha256": hashlib.sha256(shard.read_bytes()).hexdigest()}
    path.write_text(json.dumps(body, indent=1, sort_keys=True))
    said: list[str] = []
    assert loaded(store, log, said) == 20 and "not the manifest that was committed" in said[0]
    unfit: list[int] = []
    assert newest_verified(store, log, unfit=lambda e, why: unfit.append(e.fields["step"])) is not None
    assert unfit == [30]


def test_a_commit_copied_from_another_run_is_not_this_runs(tmp_path: Path) -> None:
    store, _ = three(tmp_path)
    entry = json.loads((tmp_path / "log/3.json").read_text())
    (tmp_path / "log/4.json").write_text(json.dumps({**entry, "n": 4}))  # its checksum is of n = 3
    assert loaded(store, RunLog(store, "run-a")) == 30
    assert RunLog(store, "run-a").entries()[-1].kind == "void"


# Seeded bugs: each must make at least one of the promises below fail.


class Forgetful(FolderStore):
    """A machine that loses power: what was not made durable through the store is gone."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.durable: set[str] = set()

    def settle(self, prefix: str) -> None:
        super().settle(prefix)
        self.durable |= {item.key for item in self.list(prefix)}

    def put_new(self, key: str, data: bytes) -> None:
        super().put_new(key, data)
        self.durable.add(key)

    def put(self, key: str, data: bytes) -> None:
        super().put(key, data)
        self.durable.add(key)

    def lose_power(self) -> None:
        for item in self.list("attempts/"):
            if item.key not in self.durable:
                os.truncate(self.root / item.key, 0)


def _promise_damage(folder: Path) -> None:
    store, log = three(folder)
    _flip(folder / prefix_of(1, 30) / NAMES[2], random.Random(0))
    assert loaded(store, log) == 20


def _promise_manifest(folder: Path) -> None:
    test_a_forged_manifest_beside_an_honest_log_is_found(folder)


def _promise_strangers(folder: Path) -> None:
    test_a_world_of_another_size_is_found(folder)


def _promise_power(folder: Path) -> None:
    store = Forgetful(folder)
    log = RunLog(store, "run-a")
    with log.take("job") as holding:
        save(store, log, holding.attempt, 10)
    store.lose_power()
    assert loaded(store, log) == 10


def _promise_superseded(folder: Path) -> None:
    store = FolderStore(folder)
    old, new = RunLog(store, "run-a"), RunLog(store, "run-a")
    old.take("job").release()
    with new.take("job-2"):
        write_shards(folder, 1, 10)
        with pytest.raises(runlog.Superseded):
            commit_checkpoint(store, old, attempt=1, step=10, topology=TOPOLOGY)
        assert new.commits() == []


def _promise_one_winner(folder: Path) -> None:
    store = FolderStore(folder)
    with RunLog(store, "run-a").take("job"), pytest.raises(runlog.Held):
        RunLog(store, "run-a").take("job-2", wait=False)


def _promise_put_once(folder: Path) -> None:
    store = FolderStore(folder)
    store.put_new("log/0.json", b"first")
    with pytest.raises(storage.Exists):
        store.put_new("log/0.json", b"second")
    assert store.get("log/0.json") == b"first"


def _promise_uncommitted(folder: Path) -> None:
    store, log = three(folder)
    write_shards(folder, 1, 40)
    assert loaded(store, log) == 30


def _promise_missing_rank(folder: Path) -> None:
    store = FolderStore(folder)
    log = RunLog(store, "run-a")
    with log.take("job"):
        write_shards(folder, 1, 10)
        (folder / prefix_of(1, 10) / NAMES[3]).unlink()
        with pytest.raises(Exception, match=NAMES[3]):
            commit_checkpoint(store, log, attempt=1, step=10, topology=TOPOLOGY, expected=NAMES)


def _promise_retention(folder: Path) -> None:
    store, log = three(folder)
    _flip(folder / prefix_of(1, 30) / NAMES[0], random.Random(0))
    retain(store, log, keep=1)
    assert loaded(store, log) == 20


def _promise_void(folder: Path) -> None:
    log = RunLog(FolderStore(folder), "run-a")
    with log.take("job"):
        (folder / "log/1.json").write_bytes(b"{")
        with pytest.raises(runlog.Superseded):
            RunLog(FolderStore(folder), "run-a").commit(1, 10, "m", "d")


PROMISES = [
    _promise_damage, _promise_manifest, _promise_strangers, _promise_power, _promise_superseded, _promise_one_winner,
    _promise_put_once, _promise_uncommitted, _promise_missing_rank, _promise_retention, _promise_void,
]  # fmt: skip


def _overwrite(self: FolderStore, key: str, data: bytes) -> None:
    path = self.path(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _unverified(store: Any, log: RunLog, say: Any = None) -> Any:
    for entry in log.commits():
        body = json.loads(store.get(entry.fields["manifest"]))
        prefix = entry.fields["manifest"].removesuffix(".manifest.json") + "/"
        return checkpoints.Checkpoint(
            "run-a", entry.attempt, body["step"], prefix, body["files"], {}, {}, None, 0
        )


def _newest_folder(store: Any, log: RunLog, say: Any = None) -> Any:
    """Trusts whatever lies there, as a loader that follows `latest` does."""
    steps = sorted((store.root / "attempts/1/checkpoints").glob("step-*/"), key=lambda p: int(p.name[5:]))
    files = {p.name: {} for p in steps[-1].iterdir()}
    prefix = f"attempts/1/checkpoints/{steps[-1].name}/"
    return checkpoints.Checkpoint("run-a", 1, int(steps[-1].name[5:]), prefix, files, {}, {}, None, 0)


def _only_sizes(store: Any, keys: list[str]) -> list[tuple[int, str]]:
    manifest = json.loads(store.get(keys[0].rsplit("/", 1)[0] + ".manifest.json"))["files"]
    return [(0, manifest[key.rsplit("/", 1)[1]]["sha256"]) for key in keys]


class _NoHash:
    """Instead of sha256: equal for everything."""

    def __init__(self, data: bytes = b"") -> None:
        pass

    def hexdigest(self) -> str:
        return "same"


def _known_only(self: FolderStore, prefix: str) -> list[Item]:
    return [item for item in REAL_LIST(self, prefix) if f"rank_{RANKS}_" not in item.key]


REAL_LIST = FolderStore.list
REAL_READ = runlog._read


def _guess(n: int, data: bytes) -> runlog.Entry:
    entry = REAL_READ(n, data)
    return runlog.Entry(n, "note", 0, "", 0.0, {}) if entry.kind == "void" else entry


def _keep_only(store: Any, log: RunLog, keep: int, every_nth_step: int | None = None) -> list[str]:
    for entry in log.commits()[keep:]:
        for item in store.list(entry.fields["manifest"].removesuffix(".manifest.json")):
            store.delete(item.key)
    return []


def _expect_nothing(*args: Any, **more: Any) -> Any:
    return REAL_COMMIT(*args, **{**more, "expected": ()})


REAL_COMMIT = commit_checkpoint


BUGS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "load before verifying": lambda m: m.setitem(globals(), "newest_verified", _unverified),
    "load the newest folder": lambda m: m.setitem(globals(), "newest_verified", _newest_folder),
    "compare sizes only": lambda m: _patched_check(m),
    "skip the manifest's digest": lambda m: m.setattr(checkpoints.hashlib, "sha256", _NoHash),
    "let strangers in": lambda m: m.setattr(FolderStore, "list", _known_only),
    "drop the fsync of shards": lambda m: m.setattr(Forgetful, "settle", lambda self, prefix: None),
    "ignore the attempt": lambda m: m.setattr(RunLog, "_check", lambda self, attempt: None),
    "overwrite entries": lambda m: m.setattr(FolderStore, "put_new", _overwrite),
    "ignore the lease": lambda m: m.setattr(
        RunLog, "standing", lambda self: runlog.Standing(self.newest_attempt(), False, 99.0)
    ),
    "commit without every rank": lambda m: m.setitem(globals(), "commit_checkpoint", _expect_nothing),
    "delete by age alone": lambda m: m.setitem(globals(), "retain", _keep_only),
    "pass over unreadable entries": lambda m: m.setattr(runlog, "_read", _guess),
}


def _patched_check(m: pytest.MonkeyPatch) -> None:
    real = checkpoints.check

    def check(store: Any, entry: Any, run: str) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(checkpoints, "_digests", _only_sizes)
            return real(store, entry, run)

    m.setattr(checkpoints, "check", check)


@pytest.mark.parametrize("bug", [None, *BUGS])
def test_every_seeded_bug_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bug: str | None) -> None:
    if bug is not None:
        BUGS[bug](monkeypatch)
    broken = []
    for promise in PROMISES:
        folder = tmp_path / promise.__name__
        folder.mkdir()
        try:
            promise(folder)
        except (Exception, pytest.fail.Exception) as error:
            broken.append((promise.__name__, error))
    if bug is None:
        assert not broken
    else:
        assert broken, f"nothing noticed: {bug}"
