"""What a run's pod does when Kubernetes asks it to go: ask the ranks for a checkpoint, and wait until they have ended.

    python -m launcher.kuberay_prestop SECONDS

A preStop hook: the kubelet waits for it before it signals the container. It writes the notice file that the pod's ranks
look for at each step; one rank that sees it makes all of them commit and end. Exit status is 0 whatever happened,
since the pod goes either way. Standard library only: a hook that fails to import protects nothing.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

VARIABLE = "LOSSCAST_NOTICE"
OURS = (b"ray::Member", b"launcher.driver")
"""In the command line of a rank's process, and of a job's driver."""
INTERVAL_S = 0.5


def busy(proc: Path = Path("/proc")) -> bool:
    """Whether a rank or a driver still runs in this container."""
    for entry in proc.iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = entry.joinpath("cmdline").read_bytes()
            except OSError:
                continue  # it ended while we looked
            if any(name in command for name in OURS):
                return True
    return False


def wait(
    notice: Path, seconds: float, busy: Callable[[], bool] = busy, interval_s: float = INTERVAL_S
) -> bool:
    """Leave the notice and wait for the ranks to end. True when they did in time."""
    deadline = time.monotonic() + seconds
    if not busy():
        return True
    notice.parent.mkdir(parents=True, exist_ok=True)
    notice.write_text(f'{{"deadline": {time.time() + seconds:.0f}, "cause": "preempted"}}\n')
    while busy():
        if time.monotonic() > deadline:
            return False
        time.sleep(interval_s)
    return True


def main(argv: list[str]) -> int:
    seconds = float(argv[0]) if argv else 60.0
    try:
        wait(Path(os.environ.get(VARIABLE, "/tmp/losscast/notice")), seconds)
    except OSError as error:
        print(f"losscast: no checkpoint was asked for: {error}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
