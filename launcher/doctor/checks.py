"""Whether this machine, and the places a run needs, are fit to train: one check a question, each with its remedy.

Every check is a function that returns Findings and may hang or raise: `examine` runs them beside each other and gives
up on what has not answered in time, so that the whole answer is there within ten seconds. Nothing is changed but one
scratch key in the run's storage, which is deleted again.
"""

import ctypes
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from launcher.errors import WrongInput, one_line

State = Literal["pass", "warn", "fail", "skip"]
DEADLINE_S = 9.0
MEMORY_BYTES = 2 << 30
"""Two ranks with torch and DeepSpeed imported take about so much."""
SHM_BYTES = 64 << 20
"""NCCL and Ray keep shared memory there; a container's default of 64 MiB is what breaks them."""
SKEW_S = 2.0
RAY_WITH_AUTH = (2, 52)


@dataclass(frozen=True)
class Finding:
    """One answer. `fix` is what to do about it; empty where nothing is wrong."""

    check: str
    state: State
    said: str
    fix: str = ""

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


Check = Callable[[], list[Finding]]


def examine(checks: Mapping[str, Check], deadline_s: float = DEADLINE_S) -> list[Finding]:
    """Run every check in a thread of its own; the answers in the order of the checks.

    One that raises has failed, one that does not answer in time is a warning. Threads that hang are left behind: the
    process is about to end.
    """
    until = time.monotonic() + deadline_s
    futures: dict[str, Future[list[Finding]]] = {}
    for name, check in checks.items():
        futures[name] = Future()
        threading.Thread(target=_answer, args=(check, futures[name]), daemon=True).start()
    found = []
    for name, future in futures.items():
        try:
            found += future.result(max(0.0, until - time.monotonic()))
        except TimeoutError:
            found.append(
                Finding(
                    name,
                    "warn",
                    f"no answer within {deadline_s:.0f} s",
                    "look at it by hand, or run doctor again",
                )
            )
        except Exception as error:
            found.append(Finding(name, "fail", one_line(error), "what it says above"))
    return found


def _answer(check: Check, future: "Future[list[Finding]]") -> None:
    try:
        future.set_result(check())
    except BaseException as error:
        future.set_exception(error)


# this machine


def versions() -> list[Finding]:
    """Python and the packages that training needs, against what this losscast was made for."""
    found = [Finding("python", "pass", sys.version.split()[0])]
    wanted = _requirements()
    absent = []
    for name in ("ray", "deepspeed", "torch"):
        try:
            have = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            absent.append(name)
            continue
        fits = wanted.get(name)
        if fits is not None and not fits(have):
            found.append(
                Finding(
                    name,
                    "warn",
                    f"{have}, which this losscast was not tried with",
                    "pip install 'losscast[train]'",
                )
            )
        else:
            found.append(Finding(name, "pass", have))
    if absent:
        fix = "pip install 'losscast[train]', beside the torch build for your GPUs"
        said = f"not installed: this machine can submit to a cluster, and trains nothing itself (no {', '.join(absent)})"
        found.append(Finding("training", "warn", said, fix))
    return found


def _requirements() -> dict[str, Callable[[str], bool]]:
    """name -> does a version fit, from our own metadata; empty where that can't be read."""
    try:
        from packaging.requirements import Requirement

        lines = importlib.metadata.requires("losscast") or []
    except (ImportError, importlib.metadata.PackageNotFoundError):
        return {}
    parsed = [Requirement(line) for line in lines]
    return {
        r.name: (lambda v, r=r: r.specifier.contains(v.partition("+")[0], prereleases=True))
        for r in parsed
        if r.specifier
    }


def compiler() -> list[Finding]:
    """DeepSpeed builds its CPU and GPU operators when they are first used."""
    cc = os.environ.get("CC") or next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
    if cc is None or shutil.which(cc.split()[0]) is None:
        return [
            Finding(
                "compiler", "fail", "no C compiler on the PATH", "apt-get install build-essential, or set CC"
            )
        ]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "t.c")
        source.write_text("int main(void) { return 0; }\n")
        done = subprocess.run(
            [*cc.split(), str(source), "-o", str(Path(folder, "t"))],
            capture_output=True,
            text=True,
            timeout=8,
        )
    if done.returncode:
        return [
            Finding(
                "compiler",
                "fail",
                f"{cc} can't build a program: {one_line(done.stderr)}",
                "apt-get install build-essential",
            )
        ]
    return [Finding("compiler", "pass", f"{cc} builds")]


def memory() -> list[Finding]:
    """What a new process could take now."""
    found = re.search(r"MemAvailable:\s+(\d+)", _read("/proc/meminfo"))
    if found is None:
        return [Finding("memory", "skip", "this system does not say")]
    free = int(found[1]) * 1024
    if free < MEMORY_BYTES:
        return [
            Finding(
                "memory",
                "warn",
                f"{_size(free)} free",
                "two ranks with torch and DeepSpeed take about 2 GB: close something",
            )
        ]
    return [Finding("memory", "pass", f"{_size(free)} free")]


def clock() -> list[Finding]:
    """Whether the kernel's clock is kept by NTP: samples carry times, and tokens and TLS depend on it."""
    try:
        libc, buffer = ctypes.CDLL(None), ctypes.create_string_buffer(512)
        state = libc.adjtimex(buffer)
    except (OSError, AttributeError):
        state = -1
    if state == -1:
        return [Finding("clock", "skip", "this system does not say whether its clock is kept")]
    if state == 5:
        return [
            Finding(
                "clock",
                "warn",
                "not kept by NTP",
                "start chrony or systemd-timesyncd, unless the host keeps it",
            )
        ]
    return [Finding("clock", "pass", "kept by NTP")]


def disk(places: Mapping[str, tuple[Path, float]]) -> list[Finding]:
    """Free space; `places` is what for -> (path, bytes needed). A path that is not there yet counts by its parent."""
    found = []
    for what, (path, need) in places.items():
        there = next((p for p in (path, *path.parents) if p.exists()), Path("/"))
        usage = shutil.disk_usage(there)
        said = f"{what}: {_size(usage.free)} free at {there}"
        if usage.free < need:
            found.append(
                Finding("disk", "fail", f"{said}, {_size(need)} needed", "free some, or choose another place")
            )
        elif usage.free < 0.05 * usage.total:
            found.append(
                Finding("disk", "warn", f"{said}, less than 5%", "free some, or choose another place")
            )
        else:
            found.append(Finding("disk", "pass", said))
    return found


def shared_memory() -> list[Finding]:
    path = Path("/dev/shm")
    if not path.is_dir():
        return [Finding("shared memory", "skip", "no /dev/shm here")]
    total = shutil.disk_usage(path).total
    if total <= SHM_BYTES:
        fix = "docker run --shm-size=8g, or an emptyDir of medium Memory at /dev/shm"
        return [Finding("shared memory", "warn", f"/dev/shm holds {_size(total)}", fix)]
    return [Finding("shared memory", "pass", f"/dev/shm holds {_size(total)}")]


def shadows(folder: Path) -> list[Finding]:
    """Modules in the working directory that would be imported instead of ours."""
    from launcher.jobs.submit import refuse_shadows

    try:
        refuse_shadows(folder)
    except WrongInput as error:
        return [
            Finding("working directory", "fail", one_line(error), "rename it, or submit from another folder")
        ]
    return [Finding("working directory", "pass", "shadows nothing")]


def _size(number: float) -> str:
    from launcher.plan.text import size

    return size(number)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
