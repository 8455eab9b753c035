"""A rank's own side of the process that uploads its shards (`launcher.training.upload`): orders go in, words come out.

A process that ended, as on a host that is short of memory, is said and replaced at the next save.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.errors import one_line, say
from launcher.runspec.model import RunSpec
from launcher.storage.runfolder import RunFolder
from launcher.training.underway import Underway


class Carrier(Underway):
    """The process that uploads a rank's shards, and what it has said."""

    def __init__(
        self,
        folder: RunFolder,
        attempt: int,
        spec: RunSpec,
        rank: int,
        world: int,
        say: Callable[[str], None] = say,
    ) -> None:
        super().__init__()
        self._address, self._rank, self._say, self._closing = folder.address, rank, say, False
        self._first = {"attempt": attempt, "spec": spec.to_dict(), "rank": rank, "world": world}
        self._process = self._started()

    def _started(self) -> subprocess.Popen[bytes]:
        """A new process that knows what it is for, and a thread that hears it."""
        process = subprocess.Popen(
            [sys.executable, "-m", "launcher.training.upload", self._address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).resolve().parents[2],
        )
        with contextlib.suppress(OSError):  # it died: `_listen` says so
            _order(process, self._first)
        threading.Thread(target=self._listen, args=(process,), name="losscast-carrier", daemon=True).start()
        return process

    def carry(self, step: int, place: Path, patience_s: float, wrote_s: float = 0.0) -> None:
        """Have the files under `place`, which took `wrote_s` to write, uploaded as this rank's part of the step."""
        order = {"step": step, "place": str(place), "patience_s": patience_s, "wrote_s": wrote_s}
        why = self._revived()
        self._begin(step)
        try:
            _order(self._process, order)
        except OSError as error:
            self._died(self._process, why or f"the uploading process takes no order: {one_line(error)}")

    def _revived(self) -> str | None:
        """Start another process where the last one ended (a host short of memory kills it first). Why not, where that can't be."""
        if self._process.poll() is None:
            return None
        old = self._process
        try:
            process = self._started()
        except OSError as error:
            return f"no uploading process can be started: {one_line(error)}"
        with self._changed:
            self._process = process
        with contextlib.suppress(OSError):  # what it never took
            assert old.stdin is not None
            old.stdin.close()
        return None

    def close(self) -> None:
        self._closing = True
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _died(self, process: "subprocess.Popen[bytes]", why: str) -> None:
        """What this process had under way, if it is still the one, is not carried."""
        with self._changed:
            if process is self._process and self.busy and self.step is not None:
                self._end(self.step, why)

    def _listen(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdout is not None
        for line in process.stdout:
            try:
                answer = json.loads(line)
            except ValueError:
                print(line.decode(errors="replace"), file=sys.stderr, end="")
                continue
            with self._changed:
                if "progress" in answer:
                    self._progress = answer["progress"]
                    continue
                self._end(answer["step"], answer.get("failed"))
                self._superseded = answer.get("superseded", self._superseded)
        status = process.wait()
        if not self._closing:
            self._say(
                f"rank {self._rank}: the process that uploads checkpoints ended ({status}); the next save starts another"
            )
        self._died(process, f"the uploading process ended ({status})")


def _order(process: "subprocess.Popen[bytes]", order: dict[str, Any]) -> None:
    """Raises OSError where the process has ended."""
    assert process.stdin is not None
    process.stdin.write(json.dumps(order).encode() + b"\n")
    process.stdin.flush()
