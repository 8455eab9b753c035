"""The protocol on Azure Blob while the way there breaks: answers late, lost, cut, refused, or never coming.

LOSSCAST_FAULTS=long runs more rounds; LOSSCAST_SEED=N replays one.
"""

import hashlib
import os
import random
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra.objects import Exists, Missing, Store
from launcher.errors import Held
from launcher.storage.checkpoints import commit_checkpoint, newest_verified, prefix_of
from launcher.storage.runlog import RunLog, Superseded
from tests.azurite import ACCOUNT, Azurite
from tests.faulty_proxy import FATES, FaultyProxy

pytestmark = pytest.mark.faults

LONG = os.environ.get("LOSSCAST_FAULTS") == "long"
ROUNDS = 40 if LONG else 1
LIMIT_S = 2.0
SLACK_S = 4.0
"""What a loaded machine may add to a time limit."""


STARTS_AZURITE = """
import sys, time
from pathlib import Path
from tests.azurite import Azurite
with Azurite(Path(sys.argv[1])) as service:
    print(service.pid, flush=True)
    time.sleep(600)
"""


def test_an_azurite_whose_tests_were_killed_does_not_stay_behind(azurite: Azurite, tmp_path: Path) -> None:
    tests = subprocess.Popen(
        [sys.executable, "-c", STARTS_AZURITE, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert tests.stdout is not None
    proc = Path(f"/proc/{int(tests.stdout.readline())}/stat")
    assert proc.exists()
    tests.kill()
    tests.wait()
    deadline = time.monotonic() + 60
    while proc.exists() and proc.read_text().rsplit(") ", 1)[1][0] != "Z":
        assert time.monotonic() < deadline, "it stays behind"
        time.sleep(0.05)


def seeds() -> list[int]:
    replay = os.environ.get("LOSSCAST_SEED")
    return [int(replay)] if replay else list(range(ROUNDS))


def at_random(seed: int, rate: float, fates: tuple[str, ...] = FATES) -> Callable[[str, str], str]:
    """A fate for `rate` of all requests, in an order that the seed names."""
    rng, lock = random.Random(seed), threading.Lock()

    def fate(method: str, path: str) -> str:
        with lock:
            return rng.choice(fates) if rng.random() < rate else "pass"

    return fate


def through(azurite: Azurite, proxy: FaultyProxy, prefix: str, **more: Any) -> Store:
    return azurite.store("runs", prefix, proxy.url(ACCOUNT), **more)


@pytest.mark.parametrize("seed", seeds())
def test_with_answers_lost_on_the_way_no_superseded_attempt_ever_writes(azurite: Azurite, seed: int) -> None:
    """Four launchers, each certain that the others are dead, on a way that breaks every third request."""
    prefix = f"race-{secrets.token_hex(6)}"
    acknowledged: list[tuple[int, int]] = []
    with FaultyProxy(azurite.port, at_random(seed, 0.3), late_s=0.05) as proxy:

        def launcher(name: str, rng: random.Random) -> None:
            log = RunLog(through(azurite, proxy, prefix, limit_s=60), "run-a", term_s=0.0)
            for _ in range(3):
                try:
                    attempt = take(log, name)
                    for step in range(rng.randint(1, 4)):
                        entry = log.commit(attempt, step, name, "d")
                        acknowledged.append((entry.n, attempt))
                except Superseded:
                    continue

        threads = [
            threading.Thread(target=launcher, args=(f"job-{i}", random.Random(seed * 10 + i)))
            for i in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(proxy.seen[fate] for fate in FATES) > 20, "the way was too good"
    entries = RunLog(azurite.store("runs", prefix), "run-a").entries()
    newest = 0
    for entry in entries:
        if entry.kind == "attempt":
            assert entry.attempt == newest + 1, "every attempt has a number of its own"
            newest = entry.attempt
        assert entry.attempt == newest, "nobody writes after it was superseded"
    assert len({e.nonce for e in entries}) == len(entries), "nothing is written twice"
    kept = {(e.n, e.attempt) for e in entries if e.kind == "commit"}
    assert set(acknowledged) <= kept and len(acknowledged) == len(set(acknowledged)) > 5


def test_a_lease_lost_to_an_outage_is_taken_over_and_the_first_writes_no_more(azurite: Azurite) -> None:
    """The holder's way breaks for longer than its term: it stops by its own clock, another goes on, and it is refused
    when its way is good again; then it may take the run anew, from what the other left."""
    prefix, away = f"over-{secrets.token_hex(6)}", threading.Event()
    term_s = 4.0
    with FaultyProxy(azurite.port, lambda m, p: "503" if away.is_set() else "pass") as proxy:
        mine = RunLog(through(azurite, proxy, prefix, limit_s=60), "run-a", term_s=term_s)
        lost, why = threading.Event(), list[str]()
        first = mine.take("job-1", on_lost=lambda said: (why.append(said), lost.set())[1])
        first.commit(10, "m-10", "d")
        away.set()
        assert lost.wait(60) and not first.valid
        theirs = RunLog(azurite.store("runs", prefix), "run-a", term_s=term_s)
        deadline = time.monotonic() + 60
        while theirs.standing().alive:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        second = theirs.take("job-2")
        second.commit(20, "m-20", "d")
        away.clear()
        with pytest.raises(Superseded):
            first.commit(30, "m-30", "d")
        first.release()
        assert RunLog(theirs.store, "run-a", term_s=term_s).standing().submission == "job-2"
        second.release()
        with mine.take("job-1") as again:
            again.commit(40, "m-40", "d")
            assert again.attempt == 3
    assert "lapses" in why[0] and len(why) == 1
    commits = [(e.attempt, e.fields["step"]) for e in theirs.commits()]
    assert commits == [(3, 40), (2, 20), (1, 10)]


def take(log: RunLog, name: str) -> int:
    """Take the run and keep no lease: everybody looks dead at once."""
    holding = log.take(name)
    holding._stop.set()
    return holding.attempt


@pytest.mark.parametrize("seed", seeds())
def test_of_launchers_that_race_over_a_bad_way_one_wins(azurite: Azurite, seed: int) -> None:
    prefix, outcomes = f"win-{secrets.token_hex(6)}", list[str]()
    with FaultyProxy(azurite.port, at_random(seed, 0.25), late_s=0.05) as proxy:
        start = threading.Barrier(4)

        def race(name: str) -> None:
            log = RunLog(through(azurite, proxy, prefix, limit_s=60), "run-a")
            start.wait()
            try:
                log.take(name, wait=False)
                outcomes.append("won")
            except Held:
                outcomes.append("held")

        threads = [threading.Thread(target=race, args=(f"job-{i}",)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(outcomes) == ["held"] * 3 + ["won"], f"seed {seed}"


@pytest.mark.parametrize("seed", seeds())
def test_shards_arrive_whole_over_a_bad_way(azurite: Azurite, tmp_path: Path, seed: int) -> None:
    rng, prefix = random.Random(seed), f"move-{secrets.token_hex(6)}"
    sizes = [0, 1, 70_000, (8 << 20) + 5, 20_000_000, *(rng.randrange(200_000) for _ in range(12))]
    (tmp_path / "in").mkdir()
    names = [f"shard-{i}" for i in range(len(sizes))]
    for name, size in zip(names, sizes, strict=True):
        (tmp_path / "in" / name).write_bytes(rng.randbytes(size))
    home = prefix_of(1, 10)
    with FaultyProxy(azurite.port, at_random(seed, 0.2), late_s=0.05) as proxy:
        store = through(azurite, proxy, prefix, limit_s=60)
        log = RunLog(store, "run-a")
        with log.take("job") as holding:
            sent = store.upload({home + name: tmp_path / "in" / name for name in names})
            digests = {name: sent[home + name] for name in names}
            commit_checkpoint(
                store,
                log,
                attempt=holding.attempt,
                step=10,
                topology={"world": 1},
                digests=digests,
                expected=digests,
            )
        found = newest_verified(store, log, into=tmp_path / "out")
        assert proxy.seen["cut-up"] + proxy.seen["cut-down"] > 0
    assert found is not None
    direct = azurite.store("runs", prefix)
    for name in names:
        data = (tmp_path / "in" / name).read_bytes()
        assert (tmp_path / "out" / found.key / name).read_bytes() == data
        assert direct.digest(home + name) == (len(data), hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize("fate", ["hole", "503", "refused", "lost", "cut-down", "412"])
def test_no_operation_outlasts_its_time_limit_and_each_error_is_one_line(
    azurite: Azurite, tmp_path: Path, fate: str
) -> None:
    direct = azurite.store("runs", f"limit-{secrets.token_hex(6)}")
    direct.put("key", b"0123456789")
    (tmp_path / "big").write_bytes(bytes(20_000_000))
    with FaultyProxy(azurite.port, lambda method, path: fate) as proxy:
        store = through(azurite, proxy, direct.prefix, limit_s=LIMIT_S)
        operations: dict[str, Callable[[], object]] = {
            "get": lambda: store.get("key"),
            "put": lambda: store.put("other", b"x"),
            "put_new": lambda: store.put_new("new", b"x"),
            "list": lambda: store.list(""),
            "age_s": lambda: store.age_s("key"),
            "digest": lambda: store.digest("key"),
            "upload": lambda: store.upload({"big": tmp_path / "big"}),
            "download": lambda: store.download({"key": tmp_path / "key"}),
        }
        chosen = list(operations) if fate == "hole" or LONG else ["get", "put_new", "upload"]
        for name in chosen:
            took, said = timed(operations[name])
            if took >= 2 * LIMIT_S + SLACK_S:  # a machine that stood still does not do so twice
                took, said = timed(operations[name])
            assert took < 2 * LIMIT_S + SLACK_S, f"{name} took {took:.1f} s"
            if said is None:  # an answer cut short only harms what has a body to cut
                assert fate in ("cut-down",) and name in ("put_new", "put", "upload", "age_s"), name
            else:
                assert "\n" not in said and len(said) < 600, said


def timed(operation: Callable[[], object]) -> tuple[float, str | None]:
    """Seconds it took, and its error."""
    began, said = time.monotonic(), None
    try:
        operation()
    except (OSError, Exists) as error:
        said = str(error)
    return time.monotonic() - began, said


def test_an_open_outcome_is_settled_by_reading_back(azurite: Azurite) -> None:
    """The first try is done and its answer lost: the second one's conflict is our own doing."""
    prefix, turn = f"own-{secrets.token_hex(6)}", list[str]()

    def fate(method: str, path: str) -> str:
        if method == "PUT":
            turn.append(path)
            return "lost" if len(turn) == 1 else "pass"
        return "pass"

    with FaultyProxy(azurite.port, fate) as proxy:
        store = through(azurite, proxy, prefix)
        store.put_new("log/0.json", b"ours, nonce 1")
        assert len(turn) == 2
        with pytest.raises(Exists):
            store.put_new("log/0.json", b"ours, nonce 2")
        assert store.get("log/0.json") == b"ours, nonce 1"


def test_a_conflict_about_nothing_is_tried_again(azurite: Azurite) -> None:
    turn: list[str] = []

    def fate(method: str, path: str) -> str:
        turn.append(method)
        return "412" if len(turn) == 1 else "409" if len(turn) == 3 else "pass"

    with FaultyProxy(azurite.port, fate) as proxy:
        store = through(azurite, proxy, f"void-{secrets.token_hex(6)}")
        store.put_new("log/0.json", b"x")
        assert store.get("log/0.json") == b"x"
        with pytest.raises(Missing):
            store.get("log/1.json")


def test_a_holder_cut_off_stops_itself_before_its_lease_lapses_and_writes_nothing_later(
    azurite: Azurite,
) -> None:
    """A black hole keeps every request of the holder: the store does not even say no. Then the way is there again."""
    prefix, hole, term_s = f"hole-{secrets.token_hex(6)}", threading.Event(), 5.0
    with FaultyProxy(azurite.port, lambda method, path: "hole" if hole.is_set() else "pass") as proxy:
        lost, stopped_at = threading.Event(), list[float]()

        def on_lost(why: str) -> None:
            stopped_at.append(time.monotonic())
            lost.set()

        first = RunLog(through(azurite, proxy, prefix, limit_s=20), "run-a", term_s=term_s).take(
            "job-1", on_lost=on_lost
        )
        first.commit(10, "m", "d")
        hole.set()
        cut = time.monotonic()
        assert lost.wait(term_s), "it goes on training on a lease that lapsed"
        assert stopped_at[0] - cut < term_s and not first.valid
        log = RunLog(azurite.store("runs", prefix), "run-a", term_s=term_s)
        while True:
            try:
                second = log.take("job-2", wait=False)
                break
            except Held:
                time.sleep(0.1)
        assert time.monotonic() >= stopped_at[0], "two held the run at once"
        hole.clear()
        with pytest.raises(Superseded):
            first.commit(20, "m", "d")
        second.commit(30, "m", "d")
        entries = log.entries()
        assert [(e.kind, e.attempt) for e in entries] == [
            ("attempt", 1),
            ("commit", 1),
            ("attempt", 2),
            ("commit", 2),
        ]
        second.release()
        proxy.closing.set()
