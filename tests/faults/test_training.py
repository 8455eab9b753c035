"""A training run that is broken in every way a process can break goes on, and ends where it would have ended anyway.

LOSSCAST_FAULTS=long kills fifty times, LOSSCAST_KILLS=N as often as that; LOSSCAST_SEED=N replays one order of kills.
"""

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.faults
pytest.importorskip("deepspeed", reason="needs torch and deepspeed: pip install 'losscast[train]'")
pytest.importorskip("ray", reason="needs ray: pip install 'losscast[train]'")

from launcher.jobs import local_ray  # noqa: E402
from launcher.training.saving import run_log  # noqa: E402
from tests.faults.training import Run, cluster, parent, spec_of, start  # noqa: E402

LONG = os.environ.get("LOSSCAST_FAULTS") == "long"
KILLS = int(os.environ.get("LOSSCAST_KILLS", "50" if LONG else "2"))
SEED = int(os.environ.get("LOSSCAST_SEED", "0"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def head(home: Path) -> Iterator[local_ray.Head]:
    with cluster(home / "ray") as head:
        yield head


@pytest.fixture(scope="module")
def calm(home: Path, head: local_ray.Head) -> Run:
    """The same run, left alone."""
    run = start(spec_of(home, "calm", steps=200 + 200 * KILLS), head)
    assert run.ended() == "SUCCEEDED", run.log()[-3000:]
    return run


def test_a_run_whose_workers_are_killed_ends_with_the_undisturbed_runs_loss(
    home: Path, head: local_ray.Head, calm: Run
) -> None:
    dice = random.Random(SEED)
    patient = f"policy: {{max_restarts: {KILLS}}}"
    run = start(spec_of(home, "killed", steps=200 + 200 * KILLS, more=patient), head)
    for kill in range(KILLS):
        run.reached(50 + 200 * kill, attempt=1 + kill)
        # the process that trains, or the actor that owns it: by turns, of either rank
        victims = run.training() if kill % 2 == 0 else run.actors()
        run.kill(dice.choice(victims))
        run.goes_on(2 + kill)
    assert run.ended() == "SUCCEEDED", run.log()[-3000:]
    assert run.losses() == pytest.approx(calm.losses(), abs=1e-6)
    said = run.log()
    assert said.count("failed at step") == KILLS and f"restarts: {KILLS} killed" in said
    assert "useful" in said and "$" not in said


def test_what_is_alive_stays_warm(home: Path, head: local_ray.Head) -> None:
    run = start(spec_of(home, "warm", steps=4000, every=20), head)
    run.reached(30, attempt=1)
    before = {parent(p) for p in run.training()}  # each rank's warm process, not the one that only stands by
    ours = os.getpriority(
        os.PRIO_PROCESS, 0
    )  # Ray would have its actors give way to everything else on the host
    assert {os.getpriority(os.PRIO_PROCESS, p) for p in run.training()} == {ours}
    run.kill(run.training()[0])
    run.goes_on(2)
    assert {parent(p) for p in run.training()} == before and before <= set(run.warm())
    run.folder.stop.touch()
    assert run.ended() == "SUCCEEDED"


def test_a_hung_rank_is_named_its_stacks_kept_and_the_run_goes_on(
    home: Path, head: local_ray.Head, calm: Run
) -> None:
    run = start(
        spec_of(home, "hung", steps=200 + 200 * KILLS),
        head,
        env={"LOSSCAST_HANG_FLOOR_S": "4", "LOSSCAST_HANG_LONG_S": "10"},
    )
    run.reached(30, attempt=1)
    run.kill(run.training()[1], signal.SIGSTOP)
    run.goes_on(2)
    assert run.ended() == "SUCCEEDED", run.log()[-3000:]
    assert run.losses() == pytest.approx(calm.losses(), abs=1e-6)
    said = run.log()
    assert "hung: rank" in said and "the others wait for rank" in said and "restarts: 1 hung" in said
    dumps = sorted((run.folder.attempt(1) / "output").glob("rank-*.stacks.txt"))
    assert len(dumps) == 2
    assert any("state T" in d.read_text() for d in dumps)
    assert any("launcher/training/loop.py" in d.read_text() for d in dumps), [d.read_text() for d in dumps]


def test_a_crash_loop_ends_with_its_first_error(home: Path, head: local_ray.Head) -> None:
    spec = spec_of(home, "loop", steps=100, every=20)
    run = start(spec, head, env={"LOSSCAST_DRILL": "crash@25"})
    assert run.ended() == "FAILED"
    said = run.log()
    assert "given up: 4 failures without a step gained" in said
    assert (
        "The first error was: raised: rank" in said
        and "DrillCrash: on purpose, at step 25, attempt 1" in said
    )
    assert [e.attempt for e in run_log(run.folder).entries() if e.kind == "attempt"] == [1, 2, 3, 4]
