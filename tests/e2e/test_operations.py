"""An engineer's day with the commands alone: a real local Ray, real training, and the run's own storage."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.e2e
pytest.importorskip("deepspeed", reason="needs torch and deepspeed: pip install 'losscast[train]'")
pytest.importorskip("ray", reason="needs ray: pip install 'losscast[train]'")

SPEC = """
name: {name}
workload: {{kind: gpt, layers: 2, width: 12, heads: 1, context: 32}}
data: {{path: stdlib, holdout_tokens: 8192}}
train: {{tokens: {tokens}, batch_tokens: 256, lr: 0.03, lr_base_width: 16}}
parallel: {{dp: {dp}, zero: 1}}
checkpoints: {{url: {runs}, every_steps: 5000}}
"""
LADDER = """
name: l
base:
  workload: {{kind: gpt, layers: 2, width: 8, heads: 1, context: 32}}
  data: {{path: stdlib, holdout_tokens: 8192}}
  train: {{tokens: 15360, batch_tokens: 256, lr: 0.03, lr_base_width: 16}}
  checkpoints: {{url: {runs}, every_steps: 5000}}
rungs:
  - {{workload: {{width: 8}}}}
  - {{workload: {{width: 12}}, data: {{path: {runs}/nowhere}}}}
  - {{workload: {{width: 16}}}}
"""


class Person:
    """Somebody with a shell, a home and a folder of runs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs = folder, folder / "runs"
        here = {"LOSSCAST_HOME": str(folder / "home"), "LOSSCAST_CACHE": str(folder / "cache")}
        self.env = {**os.environ, **here, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}

    def does(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "launcher.cli", *words]
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=240)

    def asks(self, *words: str) -> dict[str, Any]:
        done = self.does(*words, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def spec(self, name: str, *, dp: int = 1, tokens: int = 10_240) -> str:
        path = self.folder / f"{name}.yaml"
        path.write_text(SPEC.format(name=name, dp=dp, tokens=tokens, runs=self.runs))
        return str(path)

    def until(self, phase: str, run: str, seconds: float = 90) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while (said := self.asks("why", run))["phase"] != phase:
            assert time.monotonic() < end, said
            time.sleep(0.3)
        return said


@pytest.fixture(scope="module")
def person(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Person]:
    person = Person(tmp_path_factory.mktemp("operations"))
    up = person.does("ray", "up")
    assert up.returncode == 0, up.stderr
    try:
        yield person
    finally:
        person.does("ray", "down")


def test_a_run_that_can_not_be_placed_says_what_is_missing_and_is_held(person: Person) -> None:
    spec = person.spec("wide", dp=64, tokens=20_480 * 8)
    spec_text = Path(spec).read_text().replace("batch_tokens: 256", "batch_tokens: 2048")
    Path(spec).write_text(spec_text)
    assert person.does("submit", spec).returncode == 0
    end = time.monotonic() + 60
    while not (said := person.asks("why", spec)).get("missing") and time.monotonic() < end:
        time.sleep(0.3)
    assert said["phase"] == "pending" and said["ever_fits"] is False
    assert said["missing"]["CPU"] == 64 - said["total"]["CPU"]
    second = person.does("submit", spec)
    assert second.returncode == 75 and "wide" in second.stderr
    stopped = person.does("stop", spec)
    assert stopped.returncode == 0 and "had not begun" in stopped.stderr
    assert person.asks("status", spec)["phase"] == "stopped"


def test_stop_commits_resume_goes_on_and_a_killed_driver_is_told_and_closed(person: Person) -> None:
    spec = person.spec("long", tokens=10_000_000)
    handed = person.does("submit", spec)
    assert handed.returncode == 0 and "losscast stop" in handed.stderr
    person.until("running", spec)
    second = person.does("submit", spec)
    assert second.returncode == 75 and "submission long-" in second.stderr
    stopped = person.does("stop", spec)
    status = person.asks("status", spec)
    assert stopped.returncode == 0 and status["phase"] == "stopped"
    assert f"checkpoint of step {status['checkpoint_step']} is committed" in stopped.stderr
    assert status["checkpoint_step"] == status["step"] > 0

    resumed = person.does("resume", spec)
    assert resumed.returncode == 0 and f"goes on from step {status['step']}" in resumed.stderr
    person.until("running", spec)
    folder = person.runs / "long"
    with (folder / "attempts" / "2" / "curve.csv").open() as file:
        assert next(csv.DictReader(file))["step"] == str(status["step"] + 1)

    def holder(attempt: int) -> int:
        entries = [json.loads(path.read_text()) for path in (folder / "log").iterdir()]
        return next(e["pid"] for e in entries if e["kind"] == "attempt" and e["attempt"] == attempt)

    os.kill(holder(2), signal.SIGKILL)
    until = time.monotonic() + 120
    while not (folder / "attempts" / "3" / "curve.csv").exists() and time.monotonic() < until:
        time.sleep(0.2)  # it is begun again
    person.until("running", spec)
    keeper = int(Path(f"/proc/{holder(3)}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(keeper, signal.SIGSTOP)
    for pid in (holder(3), keeper):
        os.kill(pid, signal.SIGKILL)
    assert person.does("end", spec).returncode == 75
    old = time.time() - 3600  # as if the lease had lapsed
    for path in (*folder.glob("lease*"), *folder.glob("log/*.json"), *folder.glob("**/lease*")):
        os.utime(path, (old, old))
    said = person.until("failed", spec)
    assert "ended without a word" in said["reason"] and "SIGKILL" in said["reason"]
    closed = person.does("end", spec)
    assert closed.returncode == 0 and "has no monitor" in closed.stderr
    assert person.asks("status", spec)["phase"] == "ended"


def test_a_ladder_keeps_its_law_when_a_rung_fails_and_makes_only_that_one_again(person: Person) -> None:
    ladder = person.folder / "ladder.yaml"
    ladder.write_text(LADDER.format(runs=person.runs))
    law = person.folder / "new" / "law.json"
    done = person.does("ladder", str(ladder), "-o", str(law), "--json")
    assert done.returncode == 1, done.stderr
    said = json.loads(done.stdout)
    assert said["finished"] == ["l-w8", "l-w16"] and list(said["failed"]) == ["l-w12"]
    assert "nowhere" in said["failed"]["l-w12"] and json.loads(law.read_text())["digest"] == said["digest"]
    before = (person.runs / "l-w8" / "submission.json").read_text()

    (person.folder / "ladder.yaml").write_text(
        LADDER.format(runs=person.runs).replace(f"{person.runs}/nowhere", "stdlib")
    )
    again = person.does("ladder", str(ladder), "-o", str(law), "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["failed"] == {}
    assert (person.runs / "l-w8" / "submission.json").read_text() == before
    assert len((law.parent / "points.csv").read_text().splitlines()) == 4


def test_logs_outlive_the_cluster(person: Person) -> None:
    assert person.does("ray", "down").returncode == 0
    logs = person.does("logs", str(person.runs / "l-w8"))
    assert logs.returncode == 0 and "finished at step 60" in logs.stdout
    assert person.does("logs", str(person.runs / "l-w8"), "--rank", "0").returncode == 0
    assert person.asks("status", str(person.runs / "l-w8"))["phase"] == "finished"
    listed = person.does("ls", str(person.runs))
    assert listed.returncode == 0 and "l-w16: finished" in listed.stdout
