"""A host is cut off, or killed, in the middle of a run over several: the others go on with the same batches, and when
there is room again the run grows back. Real raylets in network namespaces of their own.

LOSSCAST_FAULTS=long loses a host twenty times, LOSSCAST_LOSSES=N as often as that.
"""

import csv
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.faults
pytest.importorskip("deepspeed", reason="needs torch and deepspeed: pip install 'losscast[train]'")
pytest.importorskip("ray", reason="needs ray: pip install 'losscast[train]'")

from launcher.jobs.submit import ask_to_stop  # noqa: E402
from launcher.storage.runfolder import RunFolder, write_whole  # noqa: E402
from tests.faults.hosts import Hosts, hosts, refusal  # noqa: E402
from tests.faults.training import spec_of, until  # noqa: E402

WHY_NOT = refusal()
LOSSES = int(os.environ.get("LOSSCAST_LOSSES", "20" if os.environ.get("LOSSCAST_FAULTS") == "long" else "1"))
SEED = int(os.environ.get("LOSSCAST_SEED", "0"))
ELASTIC = 'cluster: {to: "http://10.213.7.1:8265", nodes: {min: 1, max: 2}}'


def steps(folder: RunFolder, attempt: int) -> list[dict[str, str]]:
    try:
        with folder.curve(attempt).open(newline="") as file:
            return [row for row in csv.DictReader(file) if row.get("time")]
    except OSError:
        return []


@pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
def test_a_lost_host_costs_steps_and_the_run_grows_back(tmp_path: Path) -> None:
    dice = random.Random(SEED)
    with hosts(tmp_path) as made:
        made.add("a", 2)
        made.add("b", 3)
        folder, driver = begin(made, tmp_path)
        log = tmp_path / "driver.log"

        def goes_on(attempt: int, at_least: int = 1) -> None:
            def step() -> bool:
                assert driver.poll() is None, log.read_text()[-3000:]
                made.look_after()
                return len(steps(folder, attempt)) >= at_least

            until(step, f"attempt {attempt}", 600)  # a raylet may take a few tries on a busy machine

        try:
            attempt, names = 1, ["a", "b"]
            for loss in range(LOSSES):
                goes_on(attempt, 60)
                gone = dice.choice(names)
                made.cut(gone) if (loss + SEED) % 2 == 0 else made.kill(gone)
                names.remove(gone)
                attempt += 1
                goes_on(attempt)
                said = log.read_text()
                assert f"attempt {attempt} on 1 of 2 ranks" in said, said[-3000:]
                names.append(f"n{loss}")
                made.add(names[-1], 10 + loss)
                attempt += 1
                goes_on(attempt)
                assert f"attempt {attempt} on 2 ranks" in log.read_text()
            goes_on(attempt, 60)
            ask_to_stop(folder)
            status = until(lambda: [s] if (s := driver.poll()) is not None else [], "the run's end", 400)
            assert status == [0], log.read_text()[-3000:]
        finally:
            if driver.poll() is None:
                os.killpg(driver.pid, signal.SIGKILL)
                driver.wait()
        said = log.read_text()
    assert f"{LOSSES} host_lost" in said or "hung" in said, said[-2000:]
    assert f"{LOSSES} resized" in said
    heading, *rows = folder.whole_curve()
    made_steps = [int(r[heading.index("step")]) for r in rows]
    assert made_steps == list(range(1, len(rows) + 1))
    # what was trained twice came out the same on as many ranks as were left: the same batches, from the same state
    for before in range(1, attempt):
        first, again = (
            {int(r["step"]): float(r["loss"]) for r in steps(folder, k)} for k in (before, before + 1)
        )
        both = sorted(set(first) & set(again))[:40]
        assert {s: first[s] for s in both} == pytest.approx({s: again[s] for s in both}, abs=1e-3)


def begin(made: Hosts, tmp_path: Path) -> "tuple[RunFolder, subprocess.Popen[bytes]]":
    """A run that is longer than anybody waits: it is stopped once it has been seen to grow back."""
    spec = spec_of(tmp_path, "wide", steps=30_000, more=ELASTIC)
    folder = RunFolder.of(spec.checkpoints.url, spec.name)
    write_whole(folder.spec, spec.to_dict())
    driver = made.run(
        "head",
        [sys.executable, "-m", "launcher.recovery.driver", str(folder.path), "wide-1"],
        tmp_path / "driver.log",
        LOSSCAST_ELASTIC_WAIT_S="10",
        LOSSCAST_HANG_FLOOR_S="10",
        PYTHONPATH=str(Path(__file__).resolve().parents[2]),
    )
    return folder, driver
