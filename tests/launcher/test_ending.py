"""How a rank's process ends: with its own status, whatever the tearing down of its Python would do."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import atexit, os, sys, threading, time
from launcher.training.ending import end_with

class Fatal:
    abort = os.abort
    def __del__(self):
        self.abort()

def main():
    global left
    left = Fatal()  # torn down with the module
    atexit.register(print, "handler")
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
    {ending}

end_with(main)
"""


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        ("return 0", 0),
        ("return 75", 75),
        ("sys.exit(3)", 3),
        ("sys.exit()", 0),
        ("sys.exit('no')", 1),
        ("raise OSError('lost')", 1),
    ],
)
def test_a_rank_ends_as_it_says_even_where_its_teardown_would_abort(ending: str, status: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(ending=ending)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=60,
    )
    assert done.returncode == status, done.stderr
    assert done.stdout.split() == ["thread", "handler"], "threads are waited for, then handlers run"
    assert ("OSError: lost" in done.stderr) == ("lost" in ending)
