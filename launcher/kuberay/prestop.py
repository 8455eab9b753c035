"""What a run's pod does when Kubernetes asks it to go: has the ranks commit a checkpoint, and waits until one is.

    python -m launcher.kuberay.prestop SECONDS

A preStop hook: the kubelet waits for it before it signals the container. It sends the pod's training processes the signal
that asks for a checkpoint (`launcher.training.warm`); one rank that was asked makes all of them commit, at their next step. The
head has no ranks: there the driver gets the same signal, and asks a rank (`launcher.recovery.driver`). Then it looks at the run's
log until a newer commit is there, so that driver and ranks outlive it. Only processes that catch the signal get it: it would end
one that does not yet. Exit status is 0 whatever happened, since the pod goes either way.

    LOSSCAST_RUN   address of the run: a folder, or az://...
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

VARIABLE = "LOSSCAST_RUN"
RANK, DRIVER = b"launcher.training.warm", b"launcher.recovery.driver"
"""In the command line of a rank's process (and of what it was forked from), and of a job's driver."""
INTERVAL_S = 1.0
PROC = Path("/proc")
"""In a pod: the run's own processes, and no others."""


def ranks(proc: Path = Path("/proc")) -> list[int]:
    """Processes of this container that train: forked from a warm one, which itself would not survive the signal."""
    commands = dict(_commands(proc))
    warm = {pid for pid, command in commands.items() if RANK in command}
    return sorted(pid for pid in warm if _parent(proc, pid) in warm)


def drivers(proc: Path = Path("/proc")) -> list[int]:
    """Processes of this container that drive a job: not the shell they are started by, nor what would begin them again
    (`launcher.recovery.keeper`)."""
    found = {pid for pid, command in _commands(proc) if DRIVER in command}
    return sorted(found - {_parent(proc, pid) for pid in found})


def listens(proc: Path, pid: int, number: int = signal.SIGUSR1) -> bool:
    """Whether a process has a handler for a signal."""
    try:
        lines = proc.joinpath(str(pid), "status").read_text().splitlines()
        caught = next(line.split()[1] for line in lines if line.startswith("SigCgt:"))
        return bool(int(caught, 16) >> (number - 1) & 1)
    except (OSError, StopIteration, IndexError, ValueError):
        return False


def _commands(proc: Path) -> Iterator[tuple[int, bytes]]:
    for entry in proc.iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):  # it ended while we looked
                yield int(entry.name), entry.joinpath("cmdline").read_bytes()


def _parent(proc: Path, pid: int) -> int:
    try:
        return int(proc.joinpath(str(pid), "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return 0


def commits(address: str) -> int:
    """How many checkpoints the run has committed."""
    from launcher.storage.remote import store_of
    from launcher.storage.runfolder import RunFolder
    from launcher.storage.runlog import RunLog

    folder = RunFolder.at(address)
    return len(RunLog(store_of(folder), folder.name).commits())


def wait_for_commit(
    seconds: float,
    count: Callable[[], int],
    *,
    proc: Path = Path("/proc"),
    kill: Callable[[int, int], None] = os.kill,
    interval_s: float = INTERVAL_S,
) -> bool:
    """Ask for a checkpoint and wait for it. True when one was committed, or when nothing here trains.

    count   commits of the run so far; an OSError is tried again
    """
    deadline = time.monotonic() + seconds
    training, driving = ranks(proc), drivers(proc)
    if not training and not driving:
        return True
    before = _tried(count)
    for pid in filter(lambda pid: listens(proc, pid), [*training, *driving]):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGUSR1)
    while time.monotonic() < deadline:
        now = _tried(count)
        if now is not None and before is not None and now > before:
            return True
        if before is None:
            before = now
        if not ranks(proc) and not drivers(proc):
            return False
        time.sleep(interval_s)
    return False


def _tried(count: Callable[[], int]) -> int | None:
    try:
        return count()
    except Exception as error:  # whatever the storage's library raises: the pod goes anyway
        print(f"losscast: the run's log can't be read: {error}", file=sys.stderr)
        return None


def main(argv: list[str]) -> int:
    try:
        seconds = float(argv[0])
    except (IndexError, ValueError):
        seconds = 60.0 if not argv else 1.0
    address = os.environ.get(VARIABLE, "")
    done = wait_for_commit(seconds, lambda: commits(address), proc=PROC)
    print(f"losscast: {'committed' if done else 'no commit'} before this pod goes", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
