"""What a run's storage promises, the same for a folder and for Azure Blob."""

import hashlib
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.objects import Exists, Missing, Store
from launcher.errors import Held, WrongInput
from launcher.storage.checkpoints import (
    commit_checkpoint,
    manifest_key,
    newest_verified,
    parts_of,
    prefix_of,
)
from launcher.storage.retention import retain
from launcher.storage.runlog import Damaged, RunLog, Superseded
from launcher.storage.store import open_store
from tests.stores import BOTH, Place, make_place

NAMES = ["mp_rank_00_model_states.pt", *(f"zero_pp_rank_{r}_mp_rank_00_optim_states.pt" for r in range(2))]
TOPOLOGY = {"dp": 2, "pp": 1, "tp": 1, "zero": 1}


@pytest.fixture(params=BOTH)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return make_place(request, tmp_path / "stores")


def content(attempt: int, step: int, name: str) -> bytes:
    return hashlib.sha256(f"{attempt} {step} {name}".encode()).digest() * 100


def save(store: Store, log: RunLog, attempt: int, step: int) -> None:
    for name in NAMES:
        store.put(prefix_of(attempt, step) + name, content(attempt, step, name))
    commit_checkpoint(store, log, attempt=attempt, step=step, topology=TOPOLOGY, expected=NAMES)


def three(place: Place) -> tuple[Store, RunLog]:
    """A run with commits at steps 10, 20, 30."""
    store = place.store()
    log = RunLog(store, "run-a")
    with log.take("job") as holding:
        for step in (10, 20, 30):
            save(store, log, holding.attempt, step)
    return store, log


def test_a_key_is_created_once_and_kept_as_it_was(place: Place) -> None:
    store = place.store()
    store.put_new("log/0.json", b"one")
    with pytest.raises(Exists):
        store.put_new("log/0.json", b"two")
    with pytest.raises(Exists):  # the same bytes of somebody else are not ours
        place.store().put_new("log/0.json", b"one")
    assert store.get("log/0.json") == b"one"


def test_a_key_can_be_replaced_listed_and_deleted(place: Place) -> None:
    store = place.store()
    for key in ("b", "log/2.json", "log/10.json", "log.json"):
        store.put(key, key.encode())
    store.put("b", b"")
    assert store.get("b") == b""
    assert [(i.key, i.size) for i in store.list("log/")] == [("log/10.json", 11), ("log/2.json", 10)]
    assert [i.key for i in store.list("")] == ["b", "log.json", "log/10.json", "log/2.json"]
    store.delete("b")
    store.delete("b")
    with pytest.raises(Missing):
        store.get("b")
    assert store.list("nothing/") == []


def test_ages_are_told_by_the_places_own_clock(place: Place) -> None:
    store = place.store()
    assert store.age_s("lease") is None
    store.put("lease", b"1")
    time.sleep(1.1)
    age = store.age_s("lease")
    assert age is not None and 1.0 <= age < 60
    store.put("lease", b"2")
    again = store.age_s("lease")
    assert again is not None and again < age


@pytest.mark.parametrize("key", ["../x", "/etc/passwd", "a/../../x", "a//b", "..", "a\\..\\b"])
def test_no_key_leaves_the_store(place: Place, key: str) -> None:
    store = place.store()
    for use in (lambda: store.put(key, b""), lambda: store.get(key), lambda: store.put_new(key, b"")):
        with pytest.raises(ValueError, match="is no key"):
            use()


SIZES = {"empty": 0, "one": 1, "block": 8 << 20, "block-and-one": (8 << 20) + 1, "more": 20_000_001}


def test_files_of_every_size_come_back_as_they_went(place: Place, tmp_path: Path) -> None:
    store, rng = place.store(), random.Random(0)
    sources = {f"shards/{n}": tmp_path / "in" / n for n in (*SIZES, *(f"small-{i}" for i in range(30)))}
    (tmp_path / "in").mkdir()
    for key, path in sources.items():
        path.write_bytes(rng.randbytes(SIZES.get(key.removeprefix("shards/"), rng.randrange(5000))))
    total = sum(path.stat().st_size for path in sources.values())
    told: list[tuple[int, int]] = []
    sent = store.upload(sources, lambda done, of: told.append((done, of)))
    assert told[-1] == (total, total) and [d for d, _ in told] == sorted(d for d, _ in told)
    for key, path in sources.items():
        data = path.read_bytes()
        assert sent[key] == (len(data), hashlib.sha256(data).hexdigest()) == store.digest(key)
    targets = {key: tmp_path / "out" / path.name for key, path in sources.items()}
    assert store.download(targets) == sent
    for key, path in sources.items():
        assert targets[key].read_bytes() == path.read_bytes(), key
    assert store.get("shards/more") == sources["shards/more"].read_bytes()


def test_an_upload_replaces_what_a_try_before_it_left(place: Place, tmp_path: Path) -> None:
    store, path = place.store(), tmp_path / "shard"
    for size in (100, 9_000_000, 50):
        path.write_bytes(os.urandom(size))
        store.upload({"shard": path})
        assert store.get("shard") == path.read_bytes()


def test_a_file_that_is_gone_is_missing_and_not_empty(place: Place, tmp_path: Path) -> None:
    with pytest.raises(Missing):
        place.store().download({"nothing": tmp_path / "x"})
    with pytest.raises(Missing):
        place.store().digest("nothing")


# The run's log


def test_the_second_taker_is_told_who_has_the_run(place: Place) -> None:
    with RunLog(place.store(), "run-a").take("job-1") as holding:
        assert holding.attempt == 1
        with pytest.raises(Held, match=rf"attempt 1, submission job-1, of .* \(pid {os.getpid()}\)"):
            RunLog(place.store(), "run-a").take("job-2")
    assert RunLog(place.store(), "run-a").take("job-2", wait=False).attempt == 2


def test_of_launchers_that_race_one_wins(place: Place) -> None:
    for turn in range(10):
        start, outcomes = threading.Barrier(6), list[str]()

        def race(name: str, run: str, start: threading.Barrier = start, out: list[str] = outcomes) -> None:
            log = RunLog(place.store(run), run)
            start.wait()
            try:
                log.take(name, wait=False)
                out.append("won")
            except Held:
                out.append("held")

        threads = [threading.Thread(target=race, args=(f"job-{i}", f"race-{turn}")) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == ["held"] * 5 + ["won"]
        entries = RunLog(place.store(f"race-{turn}"), f"race-{turn}").entries()
        assert [e.kind for e in entries] == ["attempt"]


def test_a_holder_that_slept_past_its_lease_writes_nothing_when_it_wakes(place: Place) -> None:
    first = RunLog(place.store(), "run-a", term_s=place.term_s).take("old")
    first.commit(10, "m", "d")
    first._stop.set()  # it sleeps: no renewal, no look at the clock
    log = RunLog(place.store(), "run-a", term_s=place.term_s)
    while log.standing().alive:
        time.sleep(0.05)
    second = log.take("new", wait=False)
    before = len(log.entries())
    with pytest.raises(Superseded, match="attempt 1 of run-a was superseded by attempt 2"):
        first.commit(20, "m", "d")
    with pytest.raises(Superseded):  # one of its ranks, with a log of its own
        RunLog(place.store(), "run-a").commit(1, 20, "m", "d")
    first._write(released=False)  # and a renewal of its, stuck on the way till now
    assert RunLog(place.store(), "run-a", term_s=place.term_s).standing().alive
    assert len(log.entries()) == before and second.commit(30, "m", "d").attempt == 2
    second.release()


def test_an_unreadable_entry_supersedes_and_a_hole_is_refused_by_name(place: Place) -> None:
    store = place.store()
    with RunLog(store, "run-a").take("job-1") as holding:
        holding.commit(10, "m", "d")
        store.put("log/2.json", b'{"n": 2, "kind": "att')
        with pytest.raises(Superseded, match="unreadable entry"):
            RunLog(store, "run-a").commit(1, 20, "m", "d")
    store.put("log/3.json", b"{}")
    store.delete("log/1.json")
    with pytest.raises(Damaged, match=r"log/1\.json is missing and 2 later entries exist"):
        RunLog(store, "run-a").entries()


# Checkpoints: damage


def _flip(store: Store, key: str) -> None:
    data = bytearray(store.get(key))
    data[len(data) // 2] ^= 1
    store.put(key, bytes(data))


def _truncate(store: Store, key: str) -> None:
    store.put(key, store.get(key)[:-1])


def _empty(store: Store, key: str) -> None:
    store.put(key, b"")


def _delete(store: Store, key: str) -> None:
    store.delete(key)


def _grow(store: Store, key: str) -> None:
    store.put(key, store.get(key) + b"\0")


def _older(store: Store, key: str) -> None:
    store.put(key, store.get(key.replace("step-30", "step-20")))


def _swap_ranks(store: Store, key: str) -> None:
    other = prefix_of(1, 30) + next(n for n in NAMES if not key.endswith(n))
    a, b = store.get(key), store.get(other)
    store.put(key, b)
    store.put(other, a)


DAMAGES: list[Callable[[Store, str], None]] = [_flip, _truncate, _empty, _delete, _grow, _older, _swap_ranks]
KEYS = [*(prefix_of(1, 30) + name for name in NAMES), manifest_key(1, 30)]


@pytest.mark.parametrize("bring", [False, True], ids=["in place", "brought"])
def test_damage_to_any_file_is_found_and_named_before_anything_loads(
    place: Place, tmp_path: Path, bring: bool
) -> None:
    store, log = three(place)
    kept = {item.key: store.get(item.key) for item in store.list("attempts/")}
    for index, key in enumerate(KEYS):
        for damage in DAMAGES:
            damage(store, key)
            said: list[str] = []
            into = tmp_path / f"{index}-{damage.__name__}" if bring else None
            found = newest_verified(store, log, said.append, into)
            case = f"{damage.__name__} {key}"
            assert found is not None and found.step == 20, case
            touched = [key, *KEYS] if damage is _swap_ranks else [key]
            assert len(said) == 1 and any(k in said[0] for k in touched) and "step 30" in said[0], case
            for item in store.list("attempts/"):
                if item.key not in kept:
                    store.delete(item.key)
            for changed in KEYS:
                store.put(changed, kept[changed])
    found = newest_verified(store, log, into=tmp_path / "here")
    assert found is not None and found.step == 30
    for name in NAMES:
        assert (tmp_path / "here" / found.key / name).read_bytes() == content(1, 30, name)


def test_strangers_forged_manifests_and_markers_change_nothing(place: Place) -> None:
    store, log = three(place)
    store.put("attempts/1/checkpoints/latest", b"step-99")
    store.put(prefix_of(1, 99) + NAMES[0], b"import os; os.system('evil')")
    found = newest_verified(store, log)
    assert found is not None and found.step == 30
    store.put(prefix_of(1, 30) + "zero_pp_rank_2_mp_rank_00_optim_states.pt", b"of a run with more ranks")
    said: list[str] = []
    found = newest_verified(store, log, said.append)
    assert found is not None and found.step == 20 and "was never committed" in said[0]


def test_what_lies_here_already_is_compared_and_only_what_differs_is_brought(
    place: Place, tmp_path: Path
) -> None:
    store, log = three(place)
    here = tmp_path / "here"
    assert newest_verified(store, log, into=here) is not None
    shards = here / prefix_of(1, 30)
    untouched = (shards / NAMES[0]).stat().st_mtime_ns
    (shards / NAMES[1]).write_bytes(content(1, 20, NAMES[1]))  # the right size
    (shards / "zero_pp_rank_9_mp_rank_00_optim_states.pt").write_bytes(b"evil")
    assert newest_verified(store, log, into=here) is not None
    assert (shards / NAMES[0]).stat().st_mtime_ns == untouched
    assert (shards / NAMES[1]).read_bytes() == content(1, 30, NAMES[1])
    assert sorted(p.name for p in shards.iterdir()) == sorted(NAMES)


def test_retention_keeps_the_last_the_nth_and_the_newest_that_verifies(place: Place) -> None:
    store = place.store()
    log = RunLog(store, "run-a")
    with log.take("job") as holding:
        for step in (10, 20, 30, 40, 50, 60):
            save(store, log, holding.attempt, step)
            store.put(parts_of(prefix_of(1, step)) + "0.json", b"{}")
    for step in (50, 60):
        _flip(store, prefix_of(1, step) + NAMES[0])
    deleted = retain(store, log, keep=2, every_nth_step=30)
    assert deleted == [prefix_of(1, 10), prefix_of(1, 20)]
    left = {item.key.split("/")[3].split(".")[0] for item in store.list("attempts/")}
    assert left == {"step-30", "step-40", "step-50", "step-60"}
    found = newest_verified(store, log)
    assert found is not None and found.step == 40
    for step in (30, 40):
        _flip(store, prefix_of(1, step) + NAMES[0])
    assert retain(store, log, keep=1) == [], "with nothing whole left nothing is deleted"


@pytest.mark.parametrize("url", ["s3://bucket/x", "az://", "az://account", "http://x/y"])
def test_what_is_no_storage_is_wrong_input_in_one_line(url: str) -> None:
    if url.startswith("az"):
        pytest.importorskip("azure.storage.blob", reason="needs azure: pip install 'losscast[azure]'")
    with pytest.raises(WrongInput) as error:
        open_store(url)
    assert url in str(error.value) and "\n" not in str(error.value)
