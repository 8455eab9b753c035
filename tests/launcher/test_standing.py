"""One word for where a run stands, and the commands that read it from the run's own storage."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.cli import main
from launcher.cli.finding import remember
from launcher.errors import WrongInput
from launcher.jobs import standing
from launcher.jobs.facts import CAUSES, exposition
from launcher.jobs.standing import facts_of, phase
from launcher.jobs.why import failed, kept, no_room, vanished
from launcher.recovery.goodput import Ledger
from launcher.recovery.lifeline import ClusterLost
from launcher.runspec.model import RunSpec
from launcher.storage.checkpoints import MOST_BOOKED, commit_checkpoint, prefix_of
from launcher.storage.output import note_end, note_failure
from launcher.storage.runfolder import RunFolder, write_whole
from launcher.storage.runlog import RunLog
from launcher.storage.store import FolderStore
from launcher.training.saving import newest_verified

SPEC = RunSpec.from_dict(
    {
        "name": "tiny",
        "workload": {"kind": "gpt", "layers": 1, "width": 8, "heads": 1, "context": 32},
        "data": {"path": "stdlib"},
        "train": {"tokens": 5120, "batch_tokens": 256, "lr": 0.01},
    }
)
JOB = "tiny-00"


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOSSCAST_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


class Made:
    """A run's folder in the state that a real one would be left in."""

    def __init__(self, root: Path) -> None:
        self.folder = RunFolder(root / "runs" / "tiny")
        self.log = RunLog(FolderStore(self.folder.path), "tiny")
        write_whole(self.folder.spec, SPEC.to_dict())

    def submitted(self, ago_s: float = 1.0) -> "Made":
        document = {
            "run": "tiny",
            "job": JOB,
            "dashboard": "http://127.0.0.1:9",
            "folder": str(self.folder.path),
        }
        write_whole(self.folder.path / "submission.json", {**document, "time": time.time() - ago_s})
        return self

    def steps(self, attempt: int, count: int) -> "Made":
        path = self.folder.curve(attempt)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("run,step,tokens\n" + "".join(f"tiny,{i},{i * 256}\n" for i in range(1, count + 1)))
        return self

    def ended(self, status: int | None) -> "Made":
        write_whole(self.folder.path / "output" / f"{JOB}.end.json", {"submission": JOB, "status": status})
        return self

    def lapsed(self) -> "Made":
        """As if nothing of it had been written for an hour."""
        old = time.time() - 3600
        for path in self.folder.path.rglob("*"):
            os.utime(path, (old, old))
        return self

    def phase(self, job_state: str | None = None) -> str:
        return phase(facts_of(self.folder), job_state)


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path)


def vanish(made: Made, steps: int = 7) -> Made:
    """Taken, trained a little, and then silence."""
    made.submitted(ago_s=3700)
    holding = made.log.take(JOB)
    made.steps(holding.attempt, steps)
    holding._stop.set()
    holding._thread.join()
    return made.lapsed()


def test_a_run_goes_from_pending_over_running_to_finished(made: Made) -> None:
    assert made.submitted().phase("PENDING") == "pending"
    with made.log.take(JOB) as holding:
        assert made.phase("RUNNING") == "pending"
        made.folder.attempt(holding.attempt).mkdir(parents=True)
        assert made.phase("RUNNING") == "starting"
        made.steps(holding.attempt, 3)
        assert made.phase("RUNNING") == "running"
        holding.commit(3, "attempts/1/checkpoints/step-3.manifest.json", "0" * 64)
    assert made.phase() == "stopped"
    assert made.ended(0).phase() == "stopped"
    assert facts_of(made.folder).committed is not None
    write_whole(made.folder.result, {"digest": SPEC.digest, "loss": 2.5})
    assert made.phase() == "finished"


@pytest.mark.parametrize("reads", range(12))
def test_whoever_is_told_that_a_run_ended_is_told_of_its_last_checkpoint(
    made: Made, monkeypatch: pytest.MonkeyPatch, reads: int
) -> None:
    """It ends after any number of the reads that its facts are made of: a stop that waits once said that nothing was kept."""
    left = [reads]

    def read(original: Any) -> Any:
        def reading(*given: Any, **named: Any) -> Any:
            left[0] -= 1
            if left[0] == -1:
                made.steps(holding.attempt, 3)
                holding.commit(3, "attempts/1/checkpoints/step-3.manifest.json", "0" * 64)
                holding.release()
                made.ended(0)
            return original(*given, **named)

        return reading

    made.submitted()
    holding = made.log.take(JOB)
    made.steps(holding.attempt, 2)
    for name in ("standing", "commits", "damaged", "entries"):
        monkeypatch.setattr(RunLog, name, read(getattr(RunLog, name)))
    for name in ("read_json", "last_step", "_end_of"):
        monkeypatch.setattr(f"launcher.jobs.standing.{name}", read(getattr(standing, name)))
    facts = facts_of(made.folder)
    assert left[0] < 0 or reads > 8, "fewer reads than this: the test is out of date"
    if phase(facts) == "stopped":
        assert facts.committed is not None and facts.committed.fields["step"] == 3 and facts.step == 3
    else:
        assert phase(facts) == "running"
    if left[0] >= 0:
        holding.release()


def saved(made: Made, attempt: int, step: int) -> Path:
    """A committed checkpoint; the path of its only shard."""
    shard = made.folder.path / prefix_of(attempt, step) / "shard.pt"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(bytes(100) + str(step).encode())
    commit_checkpoint(made.log.store, made.log, attempt=attempt, step=step, topology={"world": 1})
    return shard


def test_a_newest_checkpoint_that_a_resume_found_damaged_is_shown_so_until_it_is_mended_or_another_is_there(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    with made.submitted().log.take(JOB) as holding:
        shards = [saved(made, holding.attempt, step) for step in (10, 20)]
        made.steps(holding.attempt, 25)
    made.ended(1)

    def status() -> dict[str, Any]:
        assert main(["status", str(made.folder.path), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    def resumed() -> int:
        with made.log.take(JOB) as again:
            found = newest_verified(made.folder, lambda line: None, attempt=again.attempt)
        assert found is not None
        return found.step

    assert status()["checkpoint_step"] == 20 and status()["damaged"] == []
    good = shards[1].read_bytes()
    shards[1].write_bytes(b"?" + good[1:])
    assert resumed() == 10
    told = status()
    assert told["checkpoint_step"] == 10 and told["damaged"][0]["step"] == 20
    assert str(shards[1]) in told["damaged"][0]["why"]
    assert main(["status", str(made.folder.path)]) == 0
    assert "checkpoint at 10, that of step 20 is damaged (" in capsys.readouterr().out
    assert main(["why", str(made.folder.path)]) == 0
    said = capsys.readouterr().out
    assert "step 10 is committed; that of step 20 is damaged" in said and str(shards[1]) in said
    entries = len(made.log.entries())
    assert resumed() == 10 and len(made.log.entries()) == entries + 1, (
        "an attempt, and nothing that was known"
    )
    shards[1].write_bytes(good)
    assert resumed() == 20 and status()["checkpoint_step"] == 20 and status()["damaged"] == []
    shards[1].unlink()
    assert resumed() == 10 and "missing" in status()["damaged"][0]["why"]
    with made.log.take(JOB) as holding:
        saved(made, holding.attempt, 30)
    assert status()["checkpoint_step"] == 30 and status()["damaged"] == []


def test_a_run_of_which_nothing_verifies_has_no_checkpoint_and_a_log_that_is_not_flooded(made: Made) -> None:
    with made.submitted().log.take(JOB) as holding:
        for step in range(1, 31):
            saved(made, holding.attempt, step).unlink()
        entries = len(made.log.entries())
        assert newest_verified(made.folder, lambda line: None, attempt=holding.attempt) is None
        assert newest_verified(made.folder, lambda line: None, attempt=holding.attempt) is None
    facts = facts_of(made.folder)
    assert len(made.log.entries()) == entries + MOST_BOOKED
    assert facts.committed is None and len(facts.damaged) == 30
    assert kept(facts).startswith(
        "no other is committed; that of step 30 is damaged ("
    ) and "29 more" in kept(facts)


def test_a_job_that_a_person_ended_is_stopped_before_its_lease_has_lapsed(made: Made) -> None:
    from launcher.jobs.submit import note_stopped, read_submission

    job = read_submission(made.submitted().folder)
    assert job is not None
    with made.log.take(JOB):
        assert made.phase("RUNNING") == "pending"
        note_stopped(made.folder, job)
        assert made.phase("STOPPED") == made.phase() == "stopped"


@pytest.mark.parametrize(
    ("status", "word"), [(0, "stopped"), (1, "failed"), (2, "failed"), (75, "failed"), (None, "failed")]
)
def test_a_job_that_says_how_it_ended_is_believed(made: Made, status: int | None, word: str) -> None:
    assert made.submitted(ago_s=500).ended(status).phase() == word


@pytest.mark.parametrize(
    ("state", "word"),
    [("FAILED", "failed"), ("STOPPED", "stopped"), ("PENDING", "pending"), (None, "vanished")],
)
def test_where_storage_is_silent_ray_is_asked(made: Made, state: str | None, word: str) -> None:
    assert made.submitted(ago_s=500).phase(state) == word


def test_silence_after_steps_is_a_run_that_vanished(made: Made) -> None:
    assert vanish(made).phase() == "vanished"
    assert made.phase("RUNNING") == "vanished"


def test_end_closes_a_vanished_run_once_and_shuts_its_holder_out(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    from launcher.storage.runlog import Superseded

    zombie = RunLog(FolderStore(made.folder.path), "tiny")
    holding = zombie.take(JOB)
    holding._stop.set()
    holding._thread.join()
    made.submitted(ago_s=3700).steps(1, 7).lapsed()
    assert main(["end", str(made.folder.path)]) == 0
    assert made.phase() == "ended"
    with pytest.raises(Superseded):
        holding.commit(7, "attempts/1/checkpoints/step-7.manifest.json", "0" * 64)
    assert main(["why", str(made.folder.path)]) == 0
    assert "ended" in capsys.readouterr().out


def test_a_run_that_lives_is_not_closed(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    made.submitted()
    with made.log.take(JOB):
        assert main(["end", str(made.folder.path)]) == 75
    assert f"submission {JOB}" in capsys.readouterr().err
    assert not any(e.kind == "end" for e in made.log.entries())


def test_why_of_a_vanished_run_says_who_held_it_and_since_when(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    vanish(made)
    assert main(["why", str(made.folder.path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["phase"] == "vanished" and said["holder"]["pid"] == os.getpid()
    assert abs(said["since"] - (time.time() - 3600)) < 60
    assert "losscast resume" in said["advice"][0]


def test_why_of_a_failed_run_is_the_first_error_of_the_first_rank_with_its_log(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    made.submitted(ago_s=50)
    for attempt in (1, 2):
        with made.log.take(JOB) as holding:
            assert holding.attempt == attempt
        output = made.folder.attempt(attempt) / "output"
        made.steps(attempt, 5)
        for rank, at, message in ((1, 100.0, "the cause"), (0, 100.4, "connection closed by peer")):
            error = {"rank": rank, "attempt": attempt, "type": "RuntimeError", "message": message, "time": at}
            write_whole(output / f"rank-{rank}.error.json", {**error, "trace": []})
            (output / f"rank-{rank}.log").write_text(f"line of rank {rank}\n")
        note_failure(made.folder, attempt, rank=0, cause="raised", message="connection closed", step=5)
    made.ended(1)
    assert main(["why", str(made.folder.path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("tiny: failed: rank 1 of attempt 1 failed at step 5: RuntimeError: the cause")
    assert (
        "line of rank 1" in out and "line of rank 0" not in out and "tried 2 times; the same each time" in out
    )


def test_a_rank_that_was_killed_goes_before_those_that_complain(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    made.submitted(ago_s=50)
    with made.log.take(JOB):
        pass
    made.steps(1, 5).ended(1)
    error = {"rank": 0, "attempt": 1, "type": "RuntimeError", "message": "connection closed", "time": 1.0}
    write_whole(made.folder.attempt(1) / "output" / "rank-0.error.json", error)
    note_failure(made.folder, 1, rank=1, cause="killed", message="SIGKILL", step=5)
    assert main(["why", str(made.folder.path)]) == 0
    assert "rank 1 of attempt 1 was killed at step 5: SIGKILL" in capsys.readouterr().out


def test_a_driver_that_was_killed_is_not_blamed_on_a_failure_that_was_gone_on_from(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    made.submitted(ago_s=50)
    for attempt in (1, 2):
        with made.log.take(JOB):
            pass
        made.steps(attempt, 20 * attempt)
    note_failure(made.folder, 1, rank=1, cause="killed", message="SIGKILL", step=20)
    reason = failed(facts_of(made.folder), {"status": "FAILED", "message": "failed with exit code 137"})
    assert reason.headline.startswith("its driver was ended without a word") and "137" in reason.headline
    assert "the last step seen is 40" in reason.evidence[0] and "mended" not in reason.advice[0]


def test_a_crash_loop_is_told_from_what_failed_before_it(made: Made) -> None:
    made.submitted(ago_s=50)
    for attempt, (step, message) in enumerate(((20, "old"), (50, "loop"), (50, "echo"), (50, "last")), 1):
        with made.log.take(JOB):
            pass
        made.steps(attempt, step)
        note_failure(made.folder, attempt, rank=0, cause="raised", message=message, step=step)
    made.ended(1)
    reason = failed(facts_of(made.folder), None)
    assert reason.headline == "rank 0 of attempt 2 failed at step 50: loop"
    assert reason.evidence[-2:] == (
        "tried 3 times; last: last",
        "1 failures before it had been gone on from",
    )


def test_a_run_whose_cluster_is_gone_says_so_and_what_is_safe(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    made.submitted(ago_s=50)
    holding = made.log.take(JOB)
    holding.commit(15, "m", "d")
    holding.release(over=False)
    made.steps(1, 20)
    note_end(made.folder, JOB, 1, ClusterLost("its Ray cluster is gone: nothing answers"))
    assert main(["why", str(made.folder.path)]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("tiny: failed: its Ray cluster is gone: nothing answers")
    assert "the checkpoint of step 15 is committed; the last step seen is 20" in said.out
    assert said.err.strip() == "next: losscast resume tiny"


def test_a_silent_driver_whose_job_still_runs_is_not_resumed_beside_it(made: Made) -> None:
    vanish(made)
    reason = vanished(facts_of(made.folder), "RUNNING")
    assert not any(a.startswith("losscast resume") for a in reason.advice)
    assert any("losscast stop --now tiny" in a for a in reason.advice)
    now = time.time()
    os.utime(made.folder.curve(1), (now, now))
    assert any("its ranks still make steps" in e for e in vanished(facts_of(made.folder), "RUNNING").evidence)


def test_a_disk_without_room_for_a_checkpoint_is_said(made: Made) -> None:
    assert no_room(made.folder, 1000) is None
    said = no_room(made.folder, 1 << 62)
    assert said is not None and "no checkpoint can be written" in said[0] and "make room" in said[1]


def test_a_folder_that_went_missing_is_not_taken_for_a_run_that_never_was(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    remember("tiny", made.folder.address)
    folder = made.folder.path
    assert main(["status", "tiny"]) == 0
    folder.rename(folder.with_name("away"))
    assert main(["status", "tiny"]) == 1
    assert "is not here now: is its disk mounted" in capsys.readouterr().err
    folder.mkdir()  # an empty mount point
    assert main(["status", str(folder)]) == 1
    assert "is its disk mounted" in capsys.readouterr().err


def test_logs_are_read_from_storage_by_rank_attempt_and_tail(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    made.submitted()
    folder = made.folder
    for attempt in (1, 2):
        path = folder.attempt(attempt) / "output" / "rank-0.log"
        path.parent.mkdir(parents=True)
        path.write_text("".join(f"attempt {attempt} line {i}\n" for i in range(30_000)))
    (folder.path / "output").mkdir()
    (folder.path / "output" / f"{JOB}.log").write_bytes(b"\x1b[36m(Member)\x1b[0m hello\n")
    where = str(folder.path)
    assert main(["logs", where]) == 0
    assert capsys.readouterr().out == "(Member) hello\n"
    assert main(["logs", where, "--rank", "0", "--tail", "2"]) == 0
    assert capsys.readouterr().out == "attempt 2 line 29998\nattempt 2 line 29999\n"
    assert main(["logs", where, "--attempt", "1", "--tail", "20000"]) == 0
    assert capsys.readouterr().out.startswith("attempt 1 line 10000\n")
    assert main(["logs", where, "--rank", "3"]) == 2
    assert "attempts/2/output/rank-0.log" in capsys.readouterr().err
    (folder.attempt(2) / "output" / "rank-1.log").write_text("")
    assert main(["logs", where, "--rank", "1"]) == 0
    assert "rank-1.log is empty: nothing was printed" in capsys.readouterr().err


def test_ls_says_which_run_can_not_be_read_and_lists_the_others(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    made.submitted(ago_s=500).ended(1)
    broken = made.folder.path.parent / "broken"
    broken.mkdir()
    (broken / "spec.json").write_text("{")
    assert main(["ls", str(made.folder.path.parent)]) == 1
    said = capsys.readouterr()
    assert said.out == "tiny: failed, step 0 of 20\n" and "broken: can't be read" in said.err


@pytest.mark.parametrize("command", ["status", "why", "logs", "stop", "resume", "end"])
@pytest.mark.parametrize("run", ["nobody-knows", "nowhere/run.yaml", "."])
def test_a_run_that_is_none_is_wrong_input_in_one_line(
    command: str, run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, run]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_run_is_found_by_name_below_runs(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    made.submitted(ago_s=500).ended(1)
    assert main(["status", "tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["phase"] == "failed"


def test_a_damaged_document_is_named(made: Made) -> None:
    made.submitted()
    (made.folder.path / "submission.json").write_text("{")
    with pytest.raises(WrongInput, match=r"submission\.json"):
        facts_of(made.folder)


def test_launcher_metrics_are_counted_from_what_runs_left(made: Made, tmp_path: Path) -> None:
    made.submitted(ago_s=60)
    lines = [{"outcome": "accepted"}, {"outcome": "held"}, {"outcome": "accepted"}, {"outcome": "unheard of"}]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"outc'
    (made.folder.path / "submissions.jsonl").write_text(text)
    with made.log.take(JOB):
        path = made.folder.curve(1)
        path.parent.mkdir(parents=True)
        began = json.loads((made.folder.path / "submission.json").read_text())["time"]
        path.write_text(f"run,step,tokens,time\ntiny,1,256,{began + 10:.3f}\n")
        made.log.commit(1, 1, "m", "0" * 64, seconds={"write": 0.5, "commit": 0.25, "rubbish": "x"})
        note_failure(made.folder, 1, rank=0, cause="killed", message="x", step=1)
        ledger = Ledger(useful_s=90.0, lost_s=-1e-13, idle_s=10.5)
        ledger.write(made.folder.path / "goodput.json")
        out = tmp_path / "losscast.prom"
        assert main(["ls", str(made.folder.path.parent), "--textfile", str(out)]) == 0
    seen: dict[str, Any] = dict(
        line.rsplit(" ", 1) for line in out.read_text().splitlines() if not line.startswith("#")
    )
    assert float(seen['losscast_submissions_total{outcome="accepted"}']) == 2
    assert float(seen['losscast_submissions_total{outcome="held"}']) == 1
    assert float(seen['losscast_time_to_first_step_seconds{run="tiny"}']) == pytest.approx(10, abs=1)
    assert float(seen['losscast_restarts_total{cause="killed",run="tiny"}']) == 1
    assert float(seen['losscast_lease_held{run="tiny"}']) == 1
    gpu = {
        s: float(seen[f'losscast_gpu_seconds_total{{run="tiny",state="{s}"}}'])
        for s in ("useful", "lost", "idle")
    }
    assert gpu == {"useful": 90.0, "lost": 0.0, "idle": 10.5}
    took = {k.split('stage="')[1][:-2]: float(v) for k, v in seen.items() if "checkpoint_duration" in k}
    assert took == {"write": 0.5, "commit": 0.25}
    assert float(seen['losscast_checkpoint_last_commit_timestamp_seconds{run="tiny"}']) == pytest.approx(
        time.time(), abs=60
    )


@pytest.mark.parametrize("books", ["[]", "{", '{"useful_s": "much"}', "null"])
def test_books_that_can_not_be_read_cost_their_own_series_alone(
    made: Made, tmp_path: Path, books: str
) -> None:
    made.submitted()
    (made.folder.path / "goodput.json").write_text(books)
    text = exposition([(facts_of(made.folder), "pending")]).decode()
    assert 'losscast_lease_held{run="tiny"} 0.0' in text and "gpu_seconds_total{" not in text


def test_hundreds_of_runs_stay_below_the_promised_number_of_series(made: Made) -> None:
    made.submitted()
    Ledger(useful_s=1.0).write(made.folder.path / "goodput.json")
    for attempt in range(1, 5):
        note_failure(made.folder, attempt, rank=0, cause=CAUSES[attempt], message="x", step=1)
    one = facts_of(made.folder)
    lines = exposition([(one, "running")] * 400).decode().splitlines()
    assert 1000 < len([line for line in lines if not line.startswith("#")]) <= 2000
