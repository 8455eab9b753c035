"""What processes print is kept in the run's folder, whatever becomes of the process or the disk."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.storage.output import job_output, note_failure, rank_log
from launcher.storage.runfolder import RunFolder


def child(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=60)


def test_the_last_words_of_a_process_that_aborts_are_kept(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom launcher.storage.output import rank_output\n"
        "with rank_output(sys.argv[1], 3, 1):\n"
        "    print('from python')\n    os.write(2, b'terminate called: what(): NCCL\\n')\n    os.abort()\n"
    )
    assert child(code, str(tmp_path)).returncode < 0
    text = rank_log(RunFolder(tmp_path), 3, 1).read_text()
    assert text == "from python\nterminate called: what(): NCCL\n"


def test_rank_0_goes_on_to_where_output_went_before_and_the_others_do_not(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom launcher.storage.output import rank_output\n"
        "with rank_output(sys.argv[1], 1, int(sys.argv[2])):\n    print('hello'); os.system('echo from a child')\n"
        "print('after')\n"
    )
    assert child(code, str(tmp_path), "0").stdout == "hello\nfrom a child\nafter\n"
    assert child(code, str(tmp_path), "1").stdout == "after\n"
    assert rank_log(RunFolder(tmp_path), 1, 1).read_text() == "hello\nfrom a child\n"


def test_a_full_disk_costs_lines_and_not_the_run(tmp_path: Path) -> None:
    output = tmp_path / "attempts" / "1" / "output"
    output.mkdir(parents=True)
    (output / "rank-1.log").symlink_to("/dev/full")
    code = (
        "import sys\nfrom launcher.storage.output import rank_output\n"
        "with rank_output(sys.argv[1], 1, 1):\n    print('lost'); print('lost', file=sys.stderr); sys.stdout.flush()\n"
        "print('went on')\n"
    )
    done = child(code, str(tmp_path))
    assert done.returncode == 0 and done.stdout == "went on\n"


def test_a_folder_that_can_not_be_written_leaves_output_where_it_was(tmp_path: Path) -> None:
    (tmp_path / "attempts").write_text("a file is in the way")
    code = "import sys\nfrom launcher.storage.output import rank_output\nwith rank_output(sys.argv[1], 1, 1):\n    print('hello')\n"
    done = child(code, str(tmp_path))
    assert done.returncode == 0 and done.stdout == "hello\n" and "not kept" in done.stderr


def test_the_exception_that_ends_a_rank_is_written_down_and_goes_on(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom launcher.storage.output import rank_output\n"
        "with rank_output(sys.argv[1], 2, 1):\n    raise RuntimeError('boom')\n"
    )
    done = child(code, str(tmp_path))
    assert done.returncode == 1 and "RuntimeError: boom" in done.stderr
    error = json.loads((tmp_path / "attempts/2/output/rank-1.error.json").read_text())
    assert (error["rank"], error["type"], error["message"]) == (1, "RuntimeError", "boom")
    assert "RuntimeError: boom" in rank_log(RunFolder(tmp_path), 2, 1).read_text()


def test_a_job_leaves_how_it_ended_and_a_crash_leaves_that_open(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with job_output(folder, "a") as end:
        end.status = 75
    with pytest.raises(ZeroDivisionError), job_output(folder, "b"):
        _ = 1 // 0
    a, b = (json.loads((tmp_path / "output" / f"{name}.end.json").read_text()) for name in "ab")
    assert a["status"] == 75 and b["status"] is None and b["type"] == "ZeroDivisionError"


def test_a_job_that_is_ended_by_a_person_says_so_and_no_stack(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, time\nfrom launcher.storage.output import end_when_asked, job_output\n"
        "from launcher.storage.runfolder import RunFolder\n"
        "with job_output(RunFolder.at(sys.argv[1]), 'a-1'):\n"
        "    end_when_asked(); os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)\n"
    )
    assert child(code, str(tmp_path)).returncode == 128 + signal.SIGTERM
    said = "ended at once by a person, who stopped its job or its Ray"
    assert (tmp_path / "output" / "a-1.log").read_text() == f"losscast: {said}\n"
    end = json.loads((tmp_path / "output" / "a-1.end.json").read_text())
    assert end["message"] == said and end["status"] is None
    ray = code.replace(
        "    end_when_asked(); os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)\n",
        "    end_when_asked()\n    try: os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)\n"
        "    except SystemExit: raise SystemExit(1)  # as Ray does where its C++ waits\n",
    ).replace("a-1", "a-2")
    assert child(ray, str(tmp_path)).returncode == 1
    assert (tmp_path / "output" / "a-2.log").read_text() == f"losscast: {said}\n"


def test_what_the_driver_saw_of_a_failure_is_bounded(tmp_path: Path) -> None:
    note_failure(RunFolder(tmp_path), 4, rank=None, cause="host_lost", message="x" * 10_000, step=9)
    seen = json.loads((tmp_path / "attempts/4/failure.json").read_text())
    assert seen["cause"] == "host_lost" and seen["step"] == 9 and len(seen["message"]) <= 2000


def test_a_document_that_could_not_be_written_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    """What is left of it would keep a full disk full."""
    code = (
        "import resource, signal, sys\nfrom pathlib import Path\nfrom launcher.storage.runfolder import write_whole\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "write_whole(Path(sys.argv[1]), {'old': 1})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "try:\n    write_whole(Path(sys.argv[1]), {'new': 'x' * 100_000})\n"
        "except OSError:\n    sys.exit(7)\n"
    )
    assert child(code, str(tmp_path / "goodput.json")).returncode == 7
    assert json.loads((tmp_path / "goodput.json").read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["goodput.json"]
