"""When is a training run hung, who hangs it, and what does each rank do at that moment.

Hung: no step for three times the 99th percentile of the last steps, and never before FLOOR_S. While a run starts,
validates or writes a checkpoint there is no such measure, nor while its first two steps are not made, nor where code of the
user's own runs between two steps; then only START_S and LONG_S count, since a first validation may well take a thousand steps'
time.

Nor is a group hung whose watcher, or whose host, stood still itself (a machine that sleeps, a disk that does not answer):
when it goes on every sign of life is old, and a step later it is not. So only time counts in which the watcher was awake,
and a sign that is too old has to stay the newest for a while.

Stacks come from py-spy, which reads a process from outside and so works on one that answers nothing; where it can't
(not installed, not allowed) the process is asked to print its own, which works as long as it takes signals.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from launcher.recovery.rank import Pulse

FACTOR = 3.0
CONFIRM_S = 3.0
"""How long a sign of life that is too old must stay the newest; at least the longest usual step."""
AWAKE_S = 2.0
"""A watcher that looks several times a second, and looked last longer ago than this, stood still."""
FLOOR_S = float(os.environ.get("LOSSCAST_HANG_FLOOR_S", "30"))
LONG_S = float(os.environ.get("LOSSCAST_HANG_LONG_S", "900"))
START_S = 1800.0
DOING = {"step": "made no step", "own": "told of no step"}
WAITS = re.compile(
    r"all_reduce|all_gather|reduce_scatter|barrier|broadcast|\bwait \(|_wait|synchronize|ProcessGroup|gloo|nccl",
    re.I,
)
"""Frames of a rank that only waits for others."""
DUMP_TIMEOUT_S = 10.0


def limit_s(pulse: Pulse) -> float:
    """Seconds without a sign of life from which this rank counts as hung."""
    if pulse.phase == "start":
        return START_S
    if pulse.phase != "step" or pulse.p99_s == 0.0:
        return LONG_S
    return max(FLOOR_S, FACTOR * pulse.p99_s)


class HangWatch:
    """One attempt's hang watch. Pure: time is passed in, in seconds of any clock that goes on."""

    def __init__(self) -> None:
        self._awake = 0.0
        self._looked: float | None = None
        self._old: dict[int, tuple[Pulse, float]] = {}
        """Of ranks whose sign of life is too old: the sign, and when that was seen first."""

    def awake_s(self, now: float) -> float:
        """Seconds that the watcher has been awake. Called at every look."""
        self._awake += 0.0 if self._looked is None else min(now - self._looked, AWAKE_S)
        self._looked = now
        return self._awake

    def hung(self, pulses: Mapping[int, Pulse | None], silent_s: Mapping[int, float]) -> str | None:
        """Why the group counts as hung, or None.

        pulses    by rank; None for one that did not answer
        silent_s  for those: seconds since it last did, of those that the watcher was awake
        """
        for rank, pulse in pulses.items():
            if pulse is None:
                if silent_s.get(rank, 0.0) > FLOOR_S:
                    return f"rank {rank}'s host does not answer for {silent_s[rank]:.0f} s"
            elif pulse.age_s <= limit_s(pulse):
                self._old.pop(rank, None)
            elif self._stayed_s(rank, pulse) >= max(CONFIRM_S, pulse.p99_s):
                usual = (
                    f", usually {pulse.p99_s:.2f} s at most" if pulse.phase == "step" and pulse.p99_s else ""
                )
                doing = DOING.get(pulse.phase, f"is in its {pulse.phase}")
                return f"rank {rank} {doing} for {pulse.age_s:.0f} s{usual}"
        return None

    def _stayed_s(self, rank: int, pulse: Pulse) -> float:
        """How long this sign has been known to be too old."""
        sign, since = self._old.get(rank, (pulse, self._awake))
        if (sign.step, sign.phase) != (pulse.step, pulse.phase):
            since = self._awake
        self._old[rank] = pulse, since
        return self._awake - since


def stacks(pid: int) -> str:
    """Every thread's stack of a process, as text; what hindered it, where that can't be had. Never raises."""
    state = _state(pid)
    head = f"process {pid}, state {state}\n"
    tool = shutil.which("py-spy") or str(Path(sys.executable).with_name("py-spy"))
    try:
        done = subprocess.run(
            [tool, "dump", "--nonblocking", "--pid", str(pid)],
            capture_output=True,
            text=True,
            timeout=DUMP_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return head + f"no stacks: {error}\n"
    if done.returncode != 0:
        return head + f"no stacks: {' '.join(done.stderr.split())[:300]}\n"
    return head + done.stdout


def suspects(dumps: Mapping[int, str]) -> list[int]:
    """The ranks that the others wait for: stopped ones, else those whose main thread is in no collective; those whose
    host gave no answer (an empty dump) first of all. Empty when all look alike."""
    silent = [rank for rank, dump in dumps.items() if not dump]
    stopped = [rank for rank, dump in dumps.items() if re.search(r"state [TtD]\b", dump.split("\n")[0])]
    if silent or stopped:
        return sorted({*silent, *stopped})
    busy = [
        rank for rank, dump in dumps.items() if "no stacks:" not in dump and not WAITS.search(_main(dump))
    ]
    return sorted(busy) if len(busy) < len(dumps) else []


def _main(dump: str) -> str:
    """The innermost frames of the main thread."""
    part = re.split(r"\n(?=Thread )", dump)
    main = next((p for p in part if "MainThread" in p), dump)
    return "\n".join(main.splitlines()[:6])


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "gone"
