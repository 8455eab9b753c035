"""What runs inside a run's pods: the entrypoint that may start twice, and the hook that has a checkpoint committed."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.kuberay import entry as kuberay_entry
from launcher.kuberay import prestop as kuberay_prestop
from launcher.kuberay.entry import drive, final, main, prepare
from launcher.kuberay.prestop import drivers, listens, ranks, wait_for_commit
from launcher.runspec.file import read_spec
from launcher.storage.runfolder import read_json, write_whole

ROOT = Path(__file__).parents[2]


def body(tmp_path: Path, **more: Any) -> dict[str, Any]:
    spec = read_spec(ROOT / "examples/gpt-tiny.yaml").to_dict()
    spec["checkpoints"] = {**spec["checkpoints"], "url": str(tmp_path)}
    return {"spec": spec, "prediction": None, "submission": "gpt-tiny-00", **more}


def test_the_entrypoint_writes_what_the_job_carries_into_the_runs_folder(tmp_path: Path) -> None:
    prediction = {"digest": "sha256:7", "final_loss": {"p50": 2.0}}
    folder, submission, status = prepare(body(tmp_path, prediction=prediction))
    assert (submission, status) == ("gpt-tiny-00", None)
    assert read_json(folder.prediction) == prediction and (read_json(folder.spec) or {})["name"] == "gpt-tiny"


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
    from launcher.runspec.model import RunSpec

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


def test_the_entrypoint_starts_the_driver_of_the_runs_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / "run.json", []
    path.write_text(json.dumps(body(tmp_path)))
    monkeypatch.setattr(kuberay_entry, "drive", lambda command, *rest: seen.append(command) or 7)
    assert main([str(path)]) == 7
    assert seen[0][1:] == ["-m", "launcher.recovery.driver", str(tmp_path / "gpt-tiny"), "gpt-tiny-00"]


def test_what_the_job_prints_is_copied_while_it_runs_and_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run at az://, its store a folder here: the copy is there before the driver has ended, and whole after it."""
    from launcher.storage import remote
    from launcher.storage.runfolder import RunFolder
    from launcher.storage.store import FolderStore

    store = FolderStore(tmp_path / "store")
    monkeypatch.setattr(remote, "store_of", lambda folder: store)
    folder = RunFolder(tmp_path / "work", "az://account/runs/r")
    script = (
        "import pathlib, sys, time; f = pathlib.Path(sys.argv[1], 'output'); f.mkdir(parents=True); "
        "log = f / 's.log'; log.write_text('begins\\n'); "
        "copy = pathlib.Path(sys.argv[2], 'output', 's.log'); t = time.monotonic()\n"
        "while not copy.exists() and time.monotonic() - t < 20: time.sleep(0.02)\n"
        "log.open('a').write(f'copied while it ran: {copy.exists()}\\n'); (f / 's.end.json').write_text('{}'); sys.exit(3)"
    )
    command = [sys.executable, "-c", script, str(folder.path), str(tmp_path / "store")]
    assert drive(command, folder, "s", copy_s=0.05) == 3
    assert (
        store.get("output/s.log") == b"begins\ncopied while it ran: True\n"
        and store.get("output/s.end.json") == b"{}"
    )


def test_a_storage_that_is_away_costs_the_copy_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launcher.storage import remote
    from launcher.storage.runfolder import RunFolder

    def away(folder: Any) -> Any:
        raise OSError("no route to host")

    monkeypatch.setattr(remote, "store_of", away)
    folder = RunFolder(tmp_path, "az://account/runs/r")
    (tmp_path / "output").mkdir()
    (tmp_path / "output/s.log").write_text("x")
    assert drive([sys.executable, "-c", "pass"], folder, "s", copy_s=0.01) == 0


def test_a_signal_reaches_the_driver(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from launcher.kuberay.entry import drive; from launcher.storage.runfolder import RunFolder; "
        "child = 'import signal, time, sys; signal.signal(signal.SIGTERM, lambda *a: sys.exit(42)); print(1, flush=True); time.sleep(30)'; "
        "sys.exit(drive([sys.executable, '-c', child], RunFolder(Path(sys.argv[1])), 's'))"
    )
    entry = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
    assert entry.stdout is not None and entry.stdout.readline() == b"1\n"
    entry.terminate()
    assert entry.wait(20) == 42


def processes(tmp_path: Path, *rows: tuple[int, int, str], deaf: bool = False) -> Path:
    """A /proc of (pid, parent, command line); deaf ones handle no signal."""
    for pid, parent, command in rows:
        folder = tmp_path / "proc" / str(pid)
        folder.mkdir(parents=True, exist_ok=True)
        folder.joinpath("cmdline").write_bytes(command.replace(" ", "\0").encode())
        folder.joinpath("stat").write_text(f"{pid} (a ) b) S {parent} 0 0")
        folder.joinpath("status").write_text(
            f"Name:\ta\nSigCgt:\t{'0' * 16 if deaf else '0000000000000a00'}\n"
        )
    return tmp_path / "proc"


def test_only_what_trains_is_signalled_and_a_new_commit_ends_the_wait(tmp_path: Path) -> None:
    proc = processes(
        tmp_path, (10, 1, "ray::Member"), (11, 10, "python -m launcher.training.warm 3 4"), (12, 11, "python -m launcher.training.warm 3 4"),
        (13, 12, "python -c data_loader"),
    )  # fmt: skip
    assert ranks(proc) == [12] and not drivers(proc)
    sent: list[tuple[int, int]] = []
    counts = iter([4, 4, 5])
    assert wait_for_commit(60, lambda: next(counts), proc=proc, kill=lambda *a: sent.append(a), interval_s=0)
    assert sent == [(12, signal.SIGUSR1)], "the process it was forked from would die of it"


def test_the_heads_driver_is_asked_and_waited_for(tmp_path: Path) -> None:
    command = "python -m launcher.recovery.driver az://a/b/c/run run-00"
    proc = processes(tmp_path, (3, 1, f"sh -c {command}"), (4, 3, command), (5, 4, command))
    sent: list[tuple[int, int]] = []
    counts = iter([0, 1])
    assert wait_for_commit(60, lambda: next(counts), proc=proc, kill=lambda *a: sent.append(a), interval_s=0)
    assert sent == [(5, signal.SIGUSR1)]


def test_what_does_not_handle_the_signal_yet_is_not_killed_by_it(tmp_path: Path) -> None:
    proc = processes(tmp_path, (5, 1, "python -m launcher.recovery.driver /runs/a a-00"), deaf=True)
    assert not wait_for_commit(
        0.05, lambda: 0, proc=proc, kill=lambda *a: pytest.fail("signalled"), interval_s=0.01
    )


def test_a_handler_is_seen_in_a_real_process() -> None:
    code = "import signal, sys; {}print(1, flush=True); sys.stdin.read()"
    for given, expected in (("", False), ("signal.signal(signal.SIGUSR1, print); ", True)):
        child = subprocess.Popen(
            [sys.executable, "-c", code.format(given)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert child.stdout is not None and child.stdout.readline() == b"1\n"
        assert listens(Path("/proc"), child.pid) is expected
        child.communicate()
    assert not listens(Path("/proc"), 2**22 + 1)


def test_a_pod_that_trains_nothing_goes_at_once_and_a_storage_that_is_away_holds_it_no_longer_than_it_may(
    tmp_path: Path,
) -> None:
    def away() -> int:
        raise OSError("no route to host")

    assert wait_for_commit(60, away, proc=processes(tmp_path, (7, 1, "sleep 100")))
    proc = processes(tmp_path, (5, 1, "python -m launcher.recovery.driver /runs/a a-00"))
    assert not wait_for_commit(0.05, away, proc=proc, interval_s=0.01)


def test_the_hook_itself_never_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a /proc of its own: on this machine others may train."""
    proc = processes(tmp_path, (5, 1, "python -m launcher.recovery.driver az://a/b/c/run run-00"))
    monkeypatch.setattr(kuberay_prestop, "PROC", proc)
    monkeypatch.delenv("LOSSCAST_RUN", raising=False)
    assert kuberay_prestop.main(["0.05"]) == 0 and kuberay_prestop.main(["soon"]) == 0
    assert "no commit" in capsys.readouterr().err
