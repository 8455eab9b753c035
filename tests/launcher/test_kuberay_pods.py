"""What runs inside a run's pods: the entrypoint that may start twice, and the hook that has a checkpoint committed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.kuberay_entry import final, main, prepare
from launcher.kuberay_prestop import driver_lives, ranks, wait_for_commit
from launcher.runfolder import read_json, write_whole
from launcher.specfile import read_spec

ROOT = Path(__file__).parents[2]


def body(tmp_path: Path, **more: Any) -> dict[str, Any]:
    spec = read_spec(ROOT / "examples/gpt-tiny.yaml").to_dict()
    spec["checkpoints"] = {**spec["checkpoints"], "url": str(tmp_path)}
    return {"spec": spec, "prediction": None, "submission": "gpt-tiny-00", **more}


def test_the_entrypoint_writes_what_the_job_carries_into_the_runs_folder(tmp_path: Path) -> None:
    prediction = {"digest": "sha256:7", "final_loss": {"p50": 2.0}}
    folder, submission, status = prepare(body(tmp_path, prediction=prediction))
    assert (submission, status) == ("gpt-tiny-00", None)
    assert read_json(folder.prediction) == prediction and read_json(folder.spec)["name"] == "gpt-tiny"


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (None, None),
        ({"status": None}, None),  # it crashed, or its machine went
        ({"status": 1, "type": "ConnectionError"}, None),  # from outside: a new cluster may help
        ({"status": 1}, 1),  # given up: restarts are counted already
        ({"status": 2}, 2),
        ({"status": 75}, 75),
        ({"status": 0}, 0),
        ("damaged", None),
    ],
)
def test_a_retry_tries_only_what_may_help(tmp_path: Path, end: Any, expected: int | None) -> None:
    assert final(end) == expected
    folder, _, _ = prepare(body(tmp_path))
    write_whole(folder.path / "output/gpt-tiny-00.end.json", end)
    assert prepare(body(tmp_path))[2] == expected
    assert prepare(body(tmp_path, submission="gpt-tiny-01"))[2] is None  # somebody's new submission tries


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    folder, _, _ = prepare(body(tmp_path))
    write_whole(folder.result, {"digest": read_spec_digest(tmp_path), "loss": 2.0})
    assert prepare(body(tmp_path, submission="another"))[2] == 0


def read_spec_digest(tmp_path: Path) -> str:
    from launcher.spec import RunSpec

    return RunSpec.from_dict(body(tmp_path)["spec"]).digest


def test_a_job_that_carries_no_run_says_so_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.json"
    for text in ("", "{}", "[]", json.dumps({"spec": {"name": "A b"}, "submission": "x"})):
        path.write_text(text)
        assert main([str(path)]) == 2
        assert "losscast: " in capsys.readouterr().out
    assert main([]) == 2


def test_the_entrypoint_becomes_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen = tmp_path / "run.json", []
    path.write_text(json.dumps(body(tmp_path)))
    monkeypatch.setattr(os, "execv", lambda program, arguments: seen.append(arguments))
    main([str(path)])
    assert seen[0][1:] == ["-m", "launcher.driver", str(tmp_path / "gpt-tiny"), "gpt-tiny-00"]


def processes(tmp_path: Path, *rows: tuple[int, int, str]) -> Path:
    """A /proc of (pid, parent, command line)."""
    for pid, parent, command in rows:
        folder = tmp_path / "proc" / str(pid)
        folder.mkdir(parents=True, exist_ok=True)
        folder.joinpath("cmdline").write_bytes(command.replace(" ", "\0").encode())
        folder.joinpath("stat").write_text(f"{pid} (a ) b) S {parent} 0 0")
    return tmp_path / "proc"


def test_only_what_trains_is_signalled_and_a_new_commit_ends_the_wait(tmp_path: Path) -> None:
    proc = processes(
        tmp_path, (10, 1, "ray::Member"), (11, 10, "python -m launcher.warm 3 4"), (12, 11, "python -m launcher.warm 3 4"),
        (13, 12, "python -c data_loader"),
    )  # fmt: skip
    assert ranks(proc) == [12] and not driver_lives(proc)
    sent: list[tuple[int, int]] = []
    counts = iter([4, 4, 5])
    assert wait_for_commit(60, lambda: next(counts), proc=proc, kill=lambda *a: sent.append(a), interval_s=0)
    assert sent == [(12, signal.SIGUSR1)], "the process it was forked from would die of it"


def test_the_head_waits_for_the_commit_and_signals_nobody(tmp_path: Path) -> None:
    proc = processes(tmp_path, (5, 1, "python -m launcher.driver az://a/b/c/run run-00"))
    counts = iter([0, 1])
    assert wait_for_commit(
        60, lambda: next(counts), proc=proc, kill=lambda *a: pytest.fail("signalled"), interval_s=0
    )


def test_a_pod_that_trains_nothing_goes_at_once_and_a_storage_that_is_away_holds_it_no_longer_than_it_may(
    tmp_path: Path,
) -> None:
    def away() -> int:
        raise OSError("no route to host")

    assert wait_for_commit(60, away, proc=processes(tmp_path, (7, 1, "sleep 100")))
    proc = processes(tmp_path, (5, 1, "python -m launcher.driver /runs/a a-00"))
    assert not wait_for_commit(0.05, away, proc=proc, interval_s=0.01)


def test_the_hook_itself_never_fails(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launcher.kuberay_prestop", "1"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0
