"""What the world does to a run, whole: the head goes, the driver is killed, the disk fills, the storage goes away and comes
back, the monitor goes away and comes back. Real runs on a real Ray of this machine; each goes on with the very steps and
losses that it would have had.

Minutes on a busy machine. A disk of its own for one test needs root (a tmpfs is mounted), which it skips without.
"""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.faults
pytest.importorskip("deepspeed", reason="needs torch and deepspeed: pip install 'losscast[train]'")
pytest.importorskip("ray", reason="needs ray: pip install 'losscast[train]'")

from launcher.jobs import local_ray  # noqa: E402
from launcher.jobs.standing import facts_of, phase  # noqa: E402
from launcher.jobs.submit import ask_to_stop  # noqa: E402
from launcher.jobs.why import failed  # noqa: E402
from launcher.training.saving import newest_verified, run_log  # noqa: E402
from tests.faults.training import Run, cluster, command_line, spec_of, start, until  # noqa: E402
from tests.monitor.live import Service  # noqa: E402

LONG = pytest.mark.skipif(
    os.environ.get("LOSSCAST_FAULTS") != "long",
    reason="about a minute each: make faults, or LOSSCAST_FAULTS=long",
)
FOR_EVER = 200_000
"""Steps that nobody waits for: such a run is stopped once it has been seen to go on."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("world")


@pytest.fixture(scope="module")
def head(home: Path) -> Iterator[local_ray.Head]:
    with cluster(home / "ray", cpus=4) as head:
        yield head


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False)


def driver_of(run: Run) -> int:
    """The process that drives the newest attempt, as the log names it."""
    newest = run_log(run.folder).newest_attempt()
    assert newest is not None
    return int(newest.fields["pid"])


def stopped_well(run: Run) -> None:
    """Ask it to stop; what it has trained is one line of steps, and what was trained twice came out the same."""
    ask_to_stop(run.folder)
    assert run.ended() == "SUCCEEDED", run.log()[-3000:]
    same_line(run)
    kept = newest_verified(run.folder, pytest.fail)
    assert kept is not None and kept.step == max(run.losses())


def same_line(run: Run) -> None:
    heading, *rows = run.folder.whole_curve()
    made = [int(r[heading.index("step")]) for r in rows]
    assert made == list(range(1, len(rows) + 1))
    attempts = run.folder.attempts()
    losses = [{int(r["step"]): float(r["loss"]) for r in run.steps(k)} for k in attempts]
    for first, again in itertools.pairwise(losses):
        both = sorted(set(first) & set(again))
        assert {s: first[s] for s in both} == pytest.approx({s: again[s] for s in both}, abs=1e-6)


def test_a_driver_that_is_killed_is_begun_again_at_once(home: Path, head: local_ray.Head) -> None:
    run = start(spec_of(home, "driverless", steps=FOR_EVER, every=5000), head)
    run.reached(30, attempt=1)
    killed = time.time()
    run.kill(driver_of(run))
    run.goes_on(2)
    taken = next(e.time for e in run_log(run.folder).entries() if e.kind == "attempt" and e.attempt == 2)
    assert taken - killed < 20.0, "it waited for the lease of a holder that it knew to be dead"
    assert run.state() == "RUNNING"
    failure = json.loads((run.folder.attempt(1) / "failure.json").read_text())
    assert failure["cause"] == "killed" and "the driver" in failure["message"]
    stopped_well(run)
    assert "was ended by SIGKILL" in run.log() and "begun again" in run.log()
    lost = int(run.steps(1)[-1]["step"])
    books = json.loads((run.folder.path / "goodput.json").read_text())
    assert (
        books["steps_lost"] == lost
        and books["lost_s"] > 0
        and f"{lost} steps since the last commit" in run.log()
    )


@LONG
def test_a_full_disk_costs_checkpoints_and_nothing_else(head: local_ray.Head, disk: Path) -> None:
    run = start(spec_of(disk, "full", steps=FOR_EVER), head)
    run.reached(30, attempt=1)
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    before = last_committed(run)
    until(lambda: "training goes on: rank 0: the disk is full" in run.log(), "a word of it")
    time.sleep(28.0)  # a holder that can't renew stops itself after 24
    assert run.state() == "RUNNING" and len(run.training()) == 2, run.log()[-3000:]
    assert last_committed(run) <= before + 20 and run_log(run.folder).standing().alive
    filler.unlink()
    until(lambda: last_committed(run) > before + 100, "commits again")
    stopped_well(run)
    assert run.folder.attempts() == [1], "it was restarted"


@LONG
def test_storage_that_is_away_for_longer_than_a_lease_is_waited_for(home: Path, head: local_ray.Head) -> None:
    run = start(spec_of(home, "away", steps=FOR_EVER), head)
    run.reached(30, attempt=1)
    away = run.folder.path.with_name("elsewhere")
    run.folder.path.rename(away)
    log = away / "output" / f"{run.job.job}.log"
    until(lambda: ": stopped" in log.read_text(), "the holder to stop itself")
    time.sleep(5.0)
    assert not run.folder.path.exists(), "something was written where the storage is not"
    away.rename(run.folder.path)
    run.goes_on(2)
    stopped_well(run)
    assert run.folder.attempts() == [1, 2]


@LONG
def test_a_monitor_that_is_away_costs_a_run_nothing_and_misses_nothing(
    home: Path, head: local_ray.Head, tmp_path: Path
) -> None:
    service = Service(tmp_path / "store")
    service.start(60)
    try:
        more = f"monitor: {{url: {service.url}, token_env: LOSSCAST_TOKEN}}"
        spec = spec_of(home, "unwatched", steps=1500, more=more)
        run = start(spec, head, env={"LOSSCAST_TOKEN": service.token})
        run.reached(100, attempt=1)
        service.kill()
        run.reached(500, attempt=1)
        service.start(60)
        assert run.ended() == "SUCCEEDED", run.log()[-3000:]

        def stored() -> list[int]:
            request = urllib.request.Request(
                f"{service.url}/v1/runs/unwatched/samples",
                headers={"Authorization": f"Bearer {service.token}"},
            )
            with urllib.request.urlopen(request, timeout=30) as answer:
                return [s["step"] for s in json.loads(answer.read())["samples"]]

        until(lambda: len(stored()) == 1500, "every sample")
        assert stored() == list(range(1, 1501))
        assert run.folder.attempts() == [1], "it was restarted"
    finally:
        service.kill()


@LONG
def test_a_head_that_is_lost_frees_the_run_says_so_and_another_goes_on(home: Path, tmp_path: Path) -> None:
    spec = spec_of(home, "headless", steps=FOR_EVER)
    with cluster(tmp_path / "first") as first:
        run = start(spec, first)
        run.reached(30, attempt=1)
        raylet = next(p for p in local_ray.descendants(first.pid) if "raylet/raylet" in command_line(p))
        lost = time.monotonic()
        os.kill(raylet, signal.SIGKILL)
        until(lambda: not run_log(run.folder).standing().alive, "the run to be free")
        freed = time.monotonic() - lost
        until(lambda: phase(facts_of(run.folder)) == "failed", "the driver's last word")
        reason = failed(facts_of(run.folder), None)
        assert "its Ray cluster is gone" in reason.headline and "is committed" in reason.evidence[0]
    assert freed < 25.0, f"{freed:.0f} s: as long as a lease"
    with cluster(tmp_path / "second") as second:
        again = start(spec, second)
        again.goes_on(2)
        stopped_well(again)


def last_committed(run: Run) -> int:
    return max((e.fields["step"] for e in run_log(run.folder).commits()), default=0)
