"""One run, one writer, under attack: launchers race, holders are stopped past their lease and woken.

LOSSCAST_FAULTS=long runs more rounds; LOSSCAST_SEED=N replays one.
"""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.errors import Held
from launcher.storage.runlog import RunLog, Superseded
from launcher.storage.store import FolderStore

pytestmark = pytest.mark.faults

LONG = os.environ.get("LOSSCAST_FAULTS") == "long"
RACES, STOPS = (2000, 300) if LONG else (200, 10)
WON, HELD, SUPERSEDED, OTHER = 0, 75, 76, 1


def seeds(count: int) -> list[int]:
    """Seeds to run; the one in LOSSCAST_SEED when it is set."""
    replay = os.environ.get("LOSSCAST_SEED")
    return [int(replay)] if replay else list(range(count))


def child(work: Callable[[], int]) -> int:
    """Run `work` in a process of its own; its return value is the exit status."""
    pid = os.fork()
    if pid == 0:
        status = OTHER
        try:
            status = work()
        finally:
            os._exit(status)
    return pid


def status_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_of_launchers_that_race_one_wins(tmp_path: Path) -> None:
    for seed in seeds(RACES):
        rng = random.Random(seed)
        folder = tmp_path / f"race-{seed}"
        folder.mkdir()
        go, ready = os.pipe()
        racers = rng.randint(2, 6)

        def race(name: str, delay: float, go: int = go, ready: int = ready, folder: Path = folder) -> int:
            os.close(ready)
            os.read(go, 1)  # until the parent closes its end
            time.sleep(delay)
            log = RunLog(FolderStore(folder), "run-a")
            try:
                holding = log.take(name, wait=False)
            except Held:
                return HELD
            holding.commit(10, "manifest", "digest")
            return WON

        delays = [rng.choice([0, 0, 0.001, 0.003]) for _ in range(racers)]
        pids = [child(lambda i=i, delay=delay: race(f"job-{i}", delay)) for i, delay in enumerate(delays)]
        os.close(go)
        os.close(ready)
        outcomes = sorted(status_of(pid) for pid in pids)
        assert outcomes == [WON] + [HELD] * (racers - 1), f"seed {seed}: {outcomes}"
        entries = RunLog(FolderStore(folder), "run-a").entries()
        assert [e.kind for e in entries] == ["attempt", "commit"], f"seed {seed}"


def test_a_holder_that_slept_past_its_lease_writes_nothing_when_it_wakes(tmp_path: Path) -> None:
    term_s = 0.5
    for seed in seeds(STOPS):
        rng = random.Random(seed)
        folder = tmp_path / f"stop-{seed}"
        folder.mkdir()
        pace = rng.choice([0.0, 0.002, 0.02])

        def hold(folder: Path = folder, pace: float = pace) -> int:
            holding = RunLog(FolderStore(folder), "run-a", term_s=term_s).take("old")
            step = 0
            while True:
                step += 1
                try:
                    holding.commit(step, f"old-{step}", "digest")
                except Superseded:
                    return SUPERSEDED
                time.sleep(pace)

        pid = child(hold)
        log = RunLog(FolderStore(folder), "run-a", term_s=term_s)
        while not log.commits():
            time.sleep(0.005)
        time.sleep(rng.random() * 0.1)
        os.kill(pid, signal.SIGSTOP)
        new = None
        while new is None:
            try:
                new = log.take("new", wait=False)
            except Held:  # it may be alive still
                time.sleep(0.02)
        before = len(log.entries())
        os.kill(pid, signal.SIGCONT)
        for step in range(5):
            new.commit(1000 + step, f"new-{step}", "digest")
            time.sleep(0.005)
        assert status_of(pid) == SUPERSEDED, f"seed {seed}"
        entries = log.entries()
        stale = [e for e in entries[before:] if e.attempt == 1]
        assert not stale, f"seed {seed}: {stale}"
        assert new.attempt == 2 and len(log.commits()) == before - 2 + 5  # all of its own are there
        new.release()


def test_launchers_killed_at_any_moment_leave_a_run_that_can_be_taken(tmp_path: Path) -> None:
    """kill -9 while taking, committing and renewing: the log stays readable, numbers are never given twice."""
    log = RunLog(FolderStore(tmp_path), "run-a", term_s=0.15)
    for seed in seeds(150 if LONG else 25):
        rng = random.Random(seed)

        def work() -> int:
            holding = RunLog(FolderStore(tmp_path), "run-a", term_s=0.15).take("job")
            for step in range(10_000):
                holding.commit(step, "m", "d")
            return WON

        pid = child(work)
        time.sleep(rng.random() * 0.2)
        os.kill(pid, signal.SIGKILL)
        status_of(pid)
    with log.take("job") as holding:
        entries = log.entries()
        attempts = [e.attempt for e in entries if e.kind == "attempt"]
        assert attempts == sorted(set(attempts)) and attempts[-1] == holding.attempt
        assert all(e.kind != "void" for e in entries)
        newest = 0
        for entry in entries:  # nobody wrote after it was superseded
            assert entry.attempt >= newest
            newest = max(newest, entry.attempt)
