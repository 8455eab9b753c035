"""Seeded bugs of the store on Azure Blob: each must break at least one promise, or the suite would not notice it."""

import hashlib
import os
import random
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra.objects import Exists
from launcher.storage import checkpoints, runlog
from launcher.storage.checkpoints import commit_checkpoint, newest_verified, prefix_of
from launcher.storage.retention import retain
from launcher.storage.runlog import RunLog, Superseded
from tests.azurite import ACCOUNT, Azurite, needs_azurite
from tests.faulty_proxy import FaultyProxy

pytestmark = pytest.mark.faults
needs_azurite()

from infra import blob, moving, tries  # noqa: E402
from infra.blob import BlobStore  # noqa: E402

NAMES = ["a.pt", "b.pt"]


class Given:
    """What a promise is tried with."""

    def __init__(self, azurite: Azurite, folder: Path) -> None:
        self.azurite, self.folder, self.prefix = azurite, folder, f"bug-{secrets.token_hex(6)}"

    def store(self, url: str | None = None, **more: Any) -> BlobStore:
        return self.azurite.store("runs", self.prefix, url, **more)

    def committed(self, steps: tuple[int, ...] = (10, 20)) -> tuple[BlobStore, RunLog]:
        store = self.store()
        log = RunLog(store, "run-a")
        with log.take("job") as holding:
            for step in steps:
                for name in NAMES:
                    store.put(prefix_of(1, step) + name, f"{step} {name}".encode() * 9)
                commit_checkpoint(
                    store, log, attempt=holding.attempt, step=step, topology={"world": 1}, expected=NAMES
                )
        return store, log


def _created_once(given: Given) -> None:
    given.store().put_new("log/0.json", b"one")
    with pytest.raises(Exists):
        given.store().put_new("log/0.json", b"two")
    assert given.store().get("log/0.json") == b"one"


def _own_answer_lost(given: Given) -> None:
    turn: list[str] = []

    def fate(method: str, path: str) -> str:
        turn.append(method)
        return "lost" if turn == ["PUT"] else "pass"

    with FaultyProxy(given.azurite.port, fate) as proxy:
        given.store(proxy.url(ACCOUNT)).put_new("log/0.json", b"ours")


def _passing_trouble(given: Given) -> None:
    turn: list[str] = []

    def fate(method: str, path: str) -> str:
        turn.append(method)
        return ("503", "cut-down", "409")[len(turn) - 1] if len(turn) < 4 else "pass"

    given.store().put("key", b"0123456789")
    with FaultyProxy(given.azurite.port, fate) as proxy:
        assert given.store(proxy.url(ACCOUNT)).get("key") == b"0123456789"


def _limit_kept(given: Given) -> None:
    with FaultyProxy(given.azurite.port, lambda method, path: "503") as proxy:
        done = threading.Event()

        def ask() -> None:
            with pytest.raises(TimeoutError):
                given.store(proxy.url(ACCOUNT), limit_s=1.0).get("key")
            done.set()

        threading.Thread(target=ask, daemon=True).start()
        assert done.wait(8), "it asks on and on"


def _whole_files(given: Given) -> None:
    source = given.folder / "source"
    source.write_bytes(random.Random(0).randbytes(20_000_001))
    sent = given.store().upload({"big": source})
    digest = (20_000_001, hashlib.sha256(source.read_bytes()).hexdigest())
    assert sent["big"] == digest == given.store().digest("big")
    assert given.store().download({"big": given.folder / "target"})["big"] == digest
    assert (given.folder / "target").read_bytes() == source.read_bytes()


def _out_of_turn(given: Given) -> None:
    """The second block comes after the third."""
    data = random.Random(0).randbytes(300)
    one = moving._Arriving("key", given.folder / "target", size=300)
    done = [one.took(at, data[at : at + 100]) for at in (0, 200, 100)]
    assert done == [False, False, True]
    assert one.digest == (300, hashlib.sha256(data).hexdigest())


def _damage(given: Given) -> None:
    store, log = given.committed()
    store.put(prefix_of(1, 20) + NAMES[1], f"10 {NAMES[1]}".encode() * 9)  # of another step, the right size
    found = newest_verified(store, log, into=given.folder)
    assert found is not None and found.step == 10


def _what_lies_here(given: Given) -> None:
    store, log = given.committed()
    place = given.folder / prefix_of(1, 20)
    place.mkdir(parents=True)
    (place / NAMES[0]).write_bytes(f"10 {NAMES[0]}".encode() * 9)
    (place / "stranger.pt").write_bytes(b"evil")
    found = newest_verified(store, log, into=given.folder)
    assert found is not None and found.step == 20 and sorted(os.listdir(place)) == NAMES
    assert (place / NAMES[0]).read_bytes() == f"20 {NAMES[0]}".encode() * 9


def _clock(given: Given) -> None:
    hole = threading.Event()
    with FaultyProxy(given.azurite.port, lambda m, p: "hole" if hole.is_set() else "pass") as proxy:
        lost = threading.Event()
        log = RunLog(given.store(proxy.url(ACCOUNT), limit_s=30), "run-a", term_s=3.0)
        holding = log.take("job", on_lost=lambda why: lost.set())
        hole.set()
        assert lost.wait(3.0)
        holding._stop.set()
        proxy.closing.set()


def _late_renewal(given: Given) -> None:
    term_s = 4.0
    first = RunLog(given.store(), "run-a", term_s=term_s).take("old")
    first._stop.set()
    log = RunLog(given.store(), "run-a", term_s=term_s)
    while log.standing().alive:
        time.sleep(0.1)
    with log.take("new"):
        time.sleep(term_s + 1)  # from here on only the lease says that it lives
        for _ in range(5):
            first._write(released=True)
            assert RunLog(given.store(), "run-a", term_s=term_s).standing().alive
        with pytest.raises(Superseded):
            first.commit(10, "m", "d")


def _retention(given: Given) -> None:
    store, log = given.committed((10, 20, 30))
    store.put(prefix_of(1, 30) + NAMES[0], b"")
    retain(store, log, keep=1)
    found = newest_verified(store, log)
    assert found is not None and found.step == 20


PROMISES = [
    _created_once, _own_answer_lost, _passing_trouble, _limit_kept, _whole_files, _out_of_turn, _damage, _what_lies_here,
    _clock,
    _late_renewal, _retention,
]  # fmt: skip
TRIED, WRITE, BRING = tries.tried, moving.write_at, checkpoints.bring


def _no_condition(self: BlobStore, key: str, data: bytes) -> None:
    self.put(key, data)


def _no_read_back(self: BlobStore, key: str, data: bytes) -> None:
    try:
        tries.tried(
            "create", lambda t: self._blob(key).upload_blob(data, overwrite=False, **t), limit_s=self.limit_s
        )
    except tries.Conflict:
        raise Exists(key) from None


def _once(what: str, once: Any, **more: Any) -> Any:
    return once({"connection_timeout": 5, "read_timeout": 5})


def _for_ever(what: str, once: Any, **more: Any) -> Any:
    return TRIED(what, once, **{**more, "limit_s": 30.0})


def _at_the_start(descriptor: int, data: bytes, offset: int) -> None:
    WRITE(descriptor, data, offset % (16 << 20))


def _hash_as_it_comes(self: Any, offset: int, data: bytes) -> bool:
    with self.lock:
        self.sha.update(data)
        self.hashed += len(data)
        if self.hashed == self.size:
            self.digest = self.size, self.sha.hexdigest()
        return self.hashed == self.size


def _believe(store: Any, entry: Any, run: str, into: Path, progress: Any = None) -> Any:
    said, wrong = checkpoints.declared(store, entry, run)
    if said is not None:
        store.download({said.key + name: into / said.key / name for name in said.files})
    return said, wrong


def _keep_what_is_here(store: Any, entry: Any, run: str, into: Path, progress: Any = None) -> Any:
    said, wrong = checkpoints.declared(store, entry, run)
    if said is None or (into / said.key).is_dir():
        return said, wrong
    return BRING(store, entry, run, into)


def _by_age(store: Any, log: RunLog, keep: int) -> list[str]:
    for entry in log.commits()[keep:]:
        for item in store.list(entry.fields["manifest"].removesuffix(".manifest.json")):
            store.delete(item.key)
    return []


BUGS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "create without a condition": lambda m: m.setattr(BlobStore, "put_new", _no_condition),
    "a conflict is somebody else, always": lambda m: m.setattr(BlobStore, "put_new", _no_read_back),
    "try once": lambda m: m.setattr(blob, "tried", _once),
    "try for ever": lambda m: m.setattr(blob, "tried", _for_ever),
    "blocks at the wrong place": lambda m: m.setattr(moving, "write_at", _at_the_start),
    "hash blocks in the order they come": lambda m: m.setattr(moving._Arriving, "took", _hash_as_it_comes),
    "load what was brought unseen": lambda m: m.setattr(checkpoints, "bring", _believe),
    "trust what lies here": lambda m: m.setattr(checkpoints, "bring", _keep_what_is_here),
    "no clock beside the renewals": lambda m: m.setattr(runlog.Holding, "_watch", lambda self: None),
    "one lease for all attempts": lambda m: m.setattr(runlog, "lease_key", lambda attempt: "lease.json"),
    "delete by age alone": lambda m: m.setitem(globals(), "retain", _by_age),
}
CAUGHT_BY: dict[str, Callable[[Given], None]] = {
    "create without a condition": _created_once,
    "a conflict is somebody else, always": _own_answer_lost,
    "try once": _passing_trouble,
    "try for ever": _limit_kept,
    "blocks at the wrong place": _whole_files,
    "hash blocks in the order they come": _out_of_turn,
    "load what was brought unseen": _damage,
    "trust what lies here": _what_lies_here,
    "no clock beside the renewals": _clock,
    "one lease for all attempts": _late_renewal,
    "delete by age alone": _retention,
}


@pytest.mark.parametrize("promise", PROMISES, ids=lambda f: f.__name__.strip("_"))
def test_every_promise_is_kept_without_a_bug(
    azurite: Azurite, tmp_path: Path, promise: Callable[[Given], None]
) -> None:
    promise(Given(azurite, tmp_path))


@pytest.mark.parametrize("bug", BUGS)
def test_every_seeded_bug_is_caught(
    azurite: Azurite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bug: str
) -> None:
    BUGS[bug](monkeypatch)
    with pytest.raises((Exception, pytest.fail.Exception)):
        CAUGHT_BY[bug](Given(azurite, tmp_path))
