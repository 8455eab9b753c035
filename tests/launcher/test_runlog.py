"""The run's log and lease: one writer, whoever stops, races or crashes."""

import errno
import json
import multiprocessing
import os
import random
import threading
import time
from pathlib import Path

import pytest

from infra.objects import Exists, Item, Missing
from launcher.errors import Held
from launcher.storage import runlog
from launcher.storage.runlog import Damaged, RunLog, Superseded
from launcher.storage.store import FolderStore


def log_in(folder: Path, term_s: float = 30.0) -> RunLog:
    return RunLog(FolderStore(folder), "run-a", term_s=term_s)


class Unsure(FolderStore):
    """A store whose answers get lost: every `put_new` is done and then times out."""

    def put_new(self, key: str, data: bytes) -> None:
        super().put_new(key, data)
        raise TimeoutError("no answer")


def test_the_first_taker_gets_the_run_and_the_second_is_told_who_has_it(tmp_path: Path) -> None:
    with log_in(tmp_path).take("job-1") as holding:
        assert holding.attempt == 1
        with pytest.raises(Held, match=rf"attempt 1, submission job-1, of .* \(pid {os.getpid()}\)") as error:
            log_in(tmp_path).take("job-2")
        assert error.value.exit_status == 75


def test_a_released_run_can_be_taken_at_once(tmp_path: Path) -> None:
    log_in(tmp_path).take("job-1").release()
    assert log_in(tmp_path).take("job-2", wait=False).attempt == 2


def test_a_rerun_of_the_same_submission_waits_and_takes_over(tmp_path: Path) -> None:
    first = log_in(tmp_path, 0.6).take("job-1")
    first._stop.set()  # dies without a word
    said: list[str] = []
    began = time.monotonic()
    with log_in(tmp_path, 0.6).take("job-1", say=said.append) as second:
        assert second.attempt == 2 and time.monotonic() - began > 0.3
    assert len(said) == 1 and "waiting for attempt 1" in said[0]


def test_a_renewed_lease_outlives_its_term(tmp_path: Path) -> None:
    with log_in(tmp_path, 0.4).take("job-1") as holding:
        time.sleep(0.8)
        assert holding.valid
        with pytest.raises(Held):
            log_in(tmp_path, 0.4).take("job-2")


def test_a_superseded_attempt_can_not_commit_and_nothing_is_written(tmp_path: Path) -> None:
    lost: list[str] = []
    first = log_in(tmp_path, 0.4).take("job-1", on_lost=lost.append)
    first._stop.set()
    time.sleep(0.5)
    second = log_in(tmp_path, 0.4).take("job-2")
    before = sorted(os.listdir(tmp_path / "log"))
    with pytest.raises(Superseded, match="attempt 1 of run-a was superseded by attempt 2"):
        first.commit(10, "m", "d")
    with pytest.raises(Superseded):  # one of its ranks, with a log of its own
        log_in(tmp_path).commit(1, 10, "m", "d")
    assert sorted(os.listdir(tmp_path / "log")) == before
    assert second.commit(20, "m", "d").n == 2
    second.release()


def test_a_holder_learns_that_it_was_superseded(tmp_path: Path) -> None:
    lost: list[str] = []
    first = log_in(tmp_path, 0.4).take("job-1", on_lost=lost.append)
    log_in(tmp_path)._put(1, "attempt", 2, "other", {})  # as one who saw the lease lapse would
    time.sleep(0.4)
    assert lost and "superseded by attempt 2" in lost[0] and not first.valid


def test_a_holder_that_can_not_renew_stops_itself_before_its_lease_lapses(tmp_path: Path) -> None:
    class Away(FolderStore):
        away = False

        def put(self, key: str, data: bytes) -> None:
            if self.away:
                raise OSError("storage is away")
            super().put(key, data)

    store, lost = Away(tmp_path), threading.Event()
    took = time.monotonic()
    RunLog(store, "run-a", term_s=4.0).take("job-1", on_lost=lambda why: lost.set())
    store.away = True
    assert lost.wait(60) and time.monotonic() - took < 4.0


def test_a_full_disk_costs_no_lease(tmp_path: Path) -> None:
    class Full(FolderStore):
        full = False

        def put(self, key: str, data: bytes) -> None:
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            super().put(key, data)

    store, lost = Full(tmp_path), list[str]()
    with RunLog(store, "run-a", term_s=1.0).take("job-1", on_lost=lost.append) as holding:
        store.full = True
        time.sleep(3.0)
        assert holding.valid and not lost
        with pytest.raises(Held):
            log_in(tmp_path, 1.0).take("job-2")
        store.full = False


def test_a_holder_whose_folder_is_away_stops_itself_and_leaves_nothing_in_its_place(tmp_path: Path) -> None:
    folder, lost = tmp_path / "run-a", list[str]()
    folder.mkdir()
    with RunLog(FolderStore(folder), "run-a", term_s=1.0).take("job-1", on_lost=lost.append) as holding:
        folder.rename(tmp_path / "away")
        deadline = time.monotonic() + 60
        while not lost and time.monotonic() < deadline:
            time.sleep(0.05)
        assert "lapses: " in lost[0] and "is its disk mounted?" in lost[0]
        with pytest.raises(FileNotFoundError, match="is its disk mounted"):
            holding.commit(10, "m", "d")
        assert not folder.exists()


def test_a_holder_that_stood_still_does_not_blame_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost, slept = list[str](), [0.0]
    real = runlog.boot_s
    monkeypatch.setattr(runlog, "boot_s", lambda: real() + slept[0])
    with log_in(tmp_path, 4.0).take("job-1", on_lost=lost.append):
        slept[0] = 100.0
        deadline = time.monotonic() + 60
        while not lost and time.monotonic() < deadline:
            time.sleep(0.05)
    assert "this process stood still for 100 s" in lost[0]


def test_who_let_go_because_it_could_not_go_on_did_not_end_the_run(tmp_path: Path) -> None:
    log_in(tmp_path).take("job-1").release(over=False)
    standing = log_in(tmp_path).standing()
    assert not standing.alive and not standing.released
    second = log_in(tmp_path).take("job-1", wait=False)
    second._stop.set()  # killed; somebody saw it
    assert log_in(tmp_path).standing().alive
    log_in(tmp_path).let_go(second.attempt, second.nonce)
    standing = log_in(tmp_path).standing()
    assert not standing.alive and not standing.released
    assert log_in(tmp_path).take("job-1", wait=False).attempt == 3


def test_the_next_attempt_fences_off_what_the_last_one_left_behind(tmp_path: Path) -> None:
    with log_in(tmp_path).take("job-1") as holding:
        holding.commit(10, "m", "d")
        assert holding.next_attempt() == 2
        with pytest.raises(Superseded):
            log_in(tmp_path).commit(1, 20, "m", "d")
        holding.commit(30, "m", "d")
        assert [e.fields["step"] for e in log_in(tmp_path).commits()] == [30, 10]


def test_an_answer_that_got_lost_is_read_back_as_success(tmp_path: Path) -> None:
    log = RunLog(Unsure(tmp_path), "run-a")
    with log.take("job-1") as holding:
        holding.commit(10, "m", "d")
    assert [e.kind for e in log_in(tmp_path).entries()] == ["attempt", "commit"]


def test_an_unreadable_entry_supersedes_rather_than_be_overlooked(tmp_path: Path) -> None:
    with log_in(tmp_path, 0.4).take("job-1"):
        (tmp_path / "log/1.json").write_bytes(b'{"n": 1, "kind": "att')
        with pytest.raises(Superseded, match="unreadable entry"):
            log_in(tmp_path).commit(1, 10, "m", "d")
    time.sleep(0.5)
    assert log_in(tmp_path, 0.4).take("job-2").attempt == 3, "the unreadable one may have been attempt 2"


@pytest.mark.parametrize("at", [3, 40, 90, 150])
def test_a_flipped_bit_in_an_entry_is_noticed(tmp_path: Path, at: int) -> None:
    log_in(tmp_path).take("job-1").release()
    path = tmp_path / "log/0.json"
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    assert [e.kind for e in log_in(tmp_path).entries()] == ["void"]


def test_a_hole_in_the_log_is_refused_by_name(tmp_path: Path) -> None:
    with log_in(tmp_path).take("job-1") as holding:
        for step in range(3):
            holding.commit(step, "m", "d")
    (tmp_path / "log/1.json").unlink()
    with pytest.raises(Damaged, match=r"log/1\.json is missing and 2 later entries exist"):
        log_in(tmp_path).entries()


def _race(folder: str, name: str, start: float, results: "multiprocessing.Queue[str]") -> None:
    time.sleep(max(0.0, start - time.time()))
    try:
        log_in(Path(folder)).take(name, wait=False)
        results.put("won")
    except Held:
        results.put("held")
    results.close()
    results.join_thread()
    os._exit(0)


def test_of_many_launchers_that_race_one_wins_and_the_others_are_held(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    start = time.time() + 0.3
    racers = [
        context.Process(target=_race, args=(str(tmp_path), f"job-{i}", start, results)) for i in range(8)
    ]
    for racer in racers:
        racer.start()
    outcomes = [results.get(timeout=20) for _ in racers]
    for racer in racers:
        racer.join(10)
    assert sorted(outcomes) == ["held"] * 7 + ["won"]
    assert [e.kind for e in log_in(tmp_path).entries()] == ["attempt"]


def test_put_new_creates_once_and_leaves_no_scratch(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.put_new("log/0.json", b"one")
    with pytest.raises(Exists):
        store.put_new("log/0.json", b"two")
    assert store.get("log/0.json") == b"one" and os.listdir(tmp_path / "log") == ["0.json"]


@pytest.mark.parametrize("key", ["../x", "/etc/passwd", "a/../../x", "a//b", ".."])
def test_a_key_never_leaves_the_folder(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError):
        FolderStore(tmp_path).put(key, b"")


class Far(FolderStore):
    """A store that is a while away; knows how many entries were fetched, and how many of them beside each other."""

    def __init__(self, root: Path, latency_s: float) -> None:
        super().__init__(root)
        self.latency_s, self.fetched = latency_s, list[str]()
        self.now = self.most = 0
        self._count = threading.Lock()

    def get(self, key: str) -> bytes:
        with self._count:
            self.fetched.append(key)
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(self.latency_s)
        with self._count:
            self.now -= 1
        return super().get(key)


def long_log(folder: Path, entries: int) -> None:
    """A run that was taken once and has committed much since."""
    log = log_in(folder)
    with log.take("job-1"):
        for n in range(1, entries):  # as `commit` would, which looks at the folder each time
            assert log._put(
                n, "commit", 1, f"nonce-{n}", {"step": n, "manifest": "m", "manifest_sha256": "d"}
            )


def test_a_lease_is_kept_though_the_log_is_long_and_its_store_far(tmp_path: Path) -> None:
    long_log(tmp_path, 400)
    store, lost = Far(tmp_path, latency_s=0.05), list[str]()  # 20 s, one after another
    with RunLog(store, "run-a", term_s=8.0).take("job-2", on_lost=lost.append) as holding:
        before = len(store.fetched)
        time.sleep(5.0)  # two renewals
        assert holding.valid and not lost and holding.committed == (1, 399)
        assert len(store.fetched) - before < 20, "its thread reads again what was read"
    assert 4 < store.most <= runlog.AT_ONCE


def test_a_log_that_is_fetched_many_at_a_time_is_read_as_one_that_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long_log(tmp_path, 40)
    (tmp_path / "log/7.json").write_bytes(b"{")
    many = log_in(tmp_path).entries()
    with monkeypatch.context() as m:
        m.setattr(runlog, "MANY", 10**9)
        assert log_in(tmp_path).entries() == many and len(many) == 40 and many[7].kind == "void"
    (tmp_path / "log/30.json").unlink()
    log = log_in(tmp_path)
    with pytest.raises(Damaged, match=r"log/30\.json is missing and 9 later entries exist"):
        log.entries()
    assert log._entries == many[:30]


def test_what_was_fetched_before_an_outage_is_not_fetched_again(tmp_path: Path) -> None:
    class Failing(Far):
        def get(self, key: str) -> bytes:
            if key == "log/25.json" and self.latency_s:
                raise OSError("storage is away")
            return super().get(key)

    long_log(tmp_path, 40)
    store = Failing(tmp_path, latency_s=0.001)
    log = RunLog(store, "run-a")
    with pytest.raises(OSError, match="away"):
        log.entries()
    store.latency_s, store.fetched = 0.0, []
    assert len(log.entries()) == 40 and "log/24.json" not in store.fetched


def test_entries_are_what_a_person_can_read(tmp_path: Path) -> None:
    with log_in(tmp_path).take("job-1") as holding:
        holding.commit(500, "attempts/1/checkpoints/step-500.manifest.json", "ab" * 32)
    entry = json.loads((tmp_path / "log/1.json").read_text())
    assert entry["kind"] == "commit" and entry["step"] == 500 and entry["attempt"] == 1


class Flaky:
    """A store in memory whose answers time out: before the effect, or after it."""

    def __init__(self, seed: int, rate: float) -> None:
        self.rng, self.rate, self.data, self.lock = (
            random.Random(seed),
            rate,
            dict[str, bytes](),
            threading.Lock(),
        )

    def _fate(self) -> str:
        with self.lock:
            x = self.rng.random()
        return "before" if x < self.rate / 2 else "after" if x < self.rate else "fine"

    def put_new(self, key: str, data: bytes) -> None:
        fate = self._fate()
        if fate == "before":
            raise TimeoutError
        with self.lock:
            if key in self.data:
                raise Exists(key)
            self.data[key] = data
        if fate == "after":
            raise TimeoutError

    def put(self, key: str, data: bytes) -> None:
        with self.lock:
            self.data[key] = data

    def get(self, key: str) -> bytes:
        with self.lock:
            if key not in self.data:
                raise Missing(key)
            return self.data[key]

    def list(self, prefix: str) -> list[Item]:
        with self.lock:
            return [Item(k, len(v)) for k, v in sorted(self.data.items()) if k.startswith(prefix)]

    def age_s(self, key: str) -> float | None:
        return 1e9 if key in self.data else None  # everybody seems dead: takeovers all the time

    def where(self, key: str) -> str:
        return key


@pytest.mark.parametrize("seed", range(6))
def test_with_answers_lost_and_everybody_taking_over_no_superseded_attempt_ever_writes(seed: int) -> None:
    store = Flaky(seed, rate=0.3)
    acknowledged: list[tuple[int, int]] = []

    def launcher(name: str, rng: random.Random) -> None:
        log, tries = RunLog(store, "run-a", term_s=0.0), 0  # type: ignore[arg-type]
        while tries < 6 or len(acknowledged) <= 5:  # how many get through is the scheduler's choice
            tries += 1
            try:
                attempt = log.take(name).attempt
                for step in range(rng.randint(1, 6)):
                    entry = log.commit(attempt, step, name, "d")
                    acknowledged.append((entry.n, attempt))
            except (Superseded, TimeoutError):
                continue

    threads = [
        threading.Thread(target=launcher, args=(f"job-{i}", random.Random(seed * 10 + i))) for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    entries = RunLog(store, "run-a").entries()  # type: ignore[arg-type]
    newest = 0
    for entry in entries:
        if entry.kind == "attempt":
            assert entry.attempt == newest + 1, "every attempt has a number of its own"
            newest = entry.attempt
        assert entry.attempt == newest, "nobody writes after it was superseded"
    assert len({e.nonce for e in entries}) == len(entries), "nothing is written twice"
    kept = {(e.n, e.attempt) for e in entries if e.kind == "commit"}
    assert set(acknowledged) <= kept and len(acknowledged) == len(set(acknowledged))
    assert len(acknowledged) > 5
