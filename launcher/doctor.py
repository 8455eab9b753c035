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
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from launcher.errors import WrongInput
from launcher.spec import RunSpec

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
            found.append(Finding(name, "fail", _line(error), "what it says above"))
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
                f"{cc} can't build a program: {_line(done.stderr)}",
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
    from launcher.submit import refuse_shadows

    try:
        refuse_shadows(folder)
    except WrongInput as error:
        return [
            Finding("working directory", "fail", _line(error), "rename it, or submit from another folder")
        ]
    return [Finding("working directory", "pass", "shadows nothing")]


def gpus(spec: RunSpec | None) -> list[Finding]:
    """What nvidia-smi sees, against what the spec counts on where it runs on this machine."""
    wanted = spec.cluster.gpus_per_node if spec is not None and spec.cluster.to == "local" else 0
    smi = shutil.which("nvidia-smi")
    if smi is None:
        if wanted:
            fix = "install the driver, or set cluster.gpus_per_node to 0"
            return [Finding("gpus", "fail", f"the spec wants {wanted} here, and there is no nvidia-smi", fix)]
        return [Finding("gpus", "skip", "no nvidia-smi: no NVIDIA GPU is looked at")]
    fields = "index,name,memory.total,memory.used,driver_version,ecc.errors.uncorrected.volatile.total"
    done = subprocess.run(
        [smi, f"--query-gpu={fields}", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        timeout=8,
    )
    if done.returncode:
        why = _line(done.stdout or done.stderr)
        return [
            Finding(
                "gpus",
                "fail",
                f"nvidia-smi: {why}",
                "is the driver the kernel's own? reboot, or reinstall it",
            )
        ]
    rows = [[p.strip() for p in line.split(",")] for line in done.stdout.strip().splitlines()]
    return gpu_findings(rows, wanted, spec.cluster.gpu if spec else None)


def gpu_findings(rows: Sequence[Sequence[str]], wanted: int, named: str | None) -> list[Finding]:
    """nvidia-smi's rows (index, name, MiB in all, MiB used, driver, uncorrected ECC errors) as findings. Pure."""
    from launcher.gpus import gpu_named

    if not rows:
        state: State = "fail" if wanted else "skip"
        return [Finding("gpus", state, "none", "set cluster.gpus_per_node to 0" if wanted else "")]
    names = sorted({r[1] for r in rows})
    found = [Finding("gpus", "pass", f"{len(rows)} x {', '.join(names)}, driver {rows[0][4]}")]
    if wanted > len(rows):
        found.append(
            Finding(
                "gpus",
                "fail",
                f"the spec wants {wanted} and {len(rows)} are here",
                "set cluster.gpus_per_node",
            )
        )
    expected = gpu_named(named)
    if expected is not None and all(gpu_named(n) != expected for n in names):
        found.append(Finding("gpus", "warn", f"cluster.gpu says {named}", f"set cluster.gpu to {names[0]}"))
    for index, _, total, used, _, ecc in (r[:6] for r in rows):
        if ecc.isdigit() and int(ecc):
            fix = "drain this machine; nvidia-smi -q -d ECC tells more"
            found.append(Finding("gpus", "fail", f"GPU {index} has {ecc} uncorrected memory errors", fix))
        if total.isdigit() and used.isdigit() and int(used) > 0.1 * int(total):
            fix = "nvidia-smi names the processes; end what is left of an old run"
            found.append(
                Finding("gpus", "warn", f"GPU {index}: {used} of {total} MiB are in use already", fix)
            )
    return found


def all_reduce() -> list[Finding]:
    """NCCL between the GPUs of this machine, in processes of their own."""
    if shutil.which("nvidia-smi") is None:
        return [Finding("all-reduce", "skip", "no GPU")]
    if importlib.util.find_spec("torch") is None:
        return [Finding("all-reduce", "skip", "torch is not installed")]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "launcher.doctor_nccl"],
            capture_output=True,
            text=True,
            timeout=DEADLINE_S - 0.5,
        )
    except subprocess.TimeoutExpired:
        fix = "NCCL_DEBUG=INFO python -m launcher.doctor_nccl shows where it hangs"
        return [Finding("all-reduce", "warn", f"not done within {DEADLINE_S - 0.5:.1f} s", fix)]
    said = done.stdout.strip().splitlines()
    if done.returncode or not said:
        why = _line((done.stderr.strip().splitlines() or ["it said nothing"])[-1])
        return [
            Finding("all-reduce", "fail", why, "NCCL_DEBUG=INFO python -m launcher.doctor_nccl shows more")
        ]
    if said[-1].startswith("skipped"):
        fix = "install the torch build for this driver (pytorch.org), and look at CUDA_VISIBLE_DEVICES"
        return [Finding("all-reduce", "warn", said[-1], fix)]
    return [Finding("all-reduce", "pass", said[-1])]


# the places a run needs


def ray_findings(spec: RunSpec | None, local: Any, settings: Mapping[str, str]) -> list[Finding]:
    """The cluster: that it answers, that it takes our token, and that it takes nobody without one.

    local   the local Ray's Head, None while it is down
    """
    from launcher.cluster import Cluster
    from launcher.errors import Failed

    to = spec.cluster.to if spec is not None else "local"
    if to == "kuberay":
        return [Finding("ray", "skip", "kuberay makes its own for each run")]
    if to == "local" and local is None:
        return [
            Finding(
                "ray", "pass", "no local Ray runs; submit starts one, with token authentication, on loopback"
            )
        ]
    address, env = (local.dashboard, local.environment()) if to == "local" else (to, settings)
    cluster = Cluster(address, env)
    try:
        version, resources = cluster.version(5.0), cluster.resources()
    except Failed as error:
        return [
            Finding(
                "ray",
                "fail",
                _line(error),
                "is the address the dashboard's, and RAY_AUTH_TOKEN_PATH its token's?",
            )
        ]
    told = ", ".join(f"{resources[k]:g} {k}" for k in ("CPU", "GPU") if k in resources)
    found = [Finding("ray", "pass", f"{version} at {cluster.address}: {told}")]
    if tuple(int(p) for p in re.findall(r"\d+", version)[:2]) < RAY_WITH_AUTH:
        found.append(Finding("ray", "fail", f"{version} knows no authentication", "upgrade to 2.52 or newer"))
    try:
        Cluster(cluster.address, {}).get("/api/jobs/", 5.0)
    except Failed:
        found.append(Finding("ray auth", "pass", "refuses whoever has no token"))
    else:
        loopback = re.match(r"https?://(127\.|localhost|\[::1\])", cluster.address)
        fix = "start every node with RAY_AUTH_MODE=token (docs/azure.md), or keep it on loopback"
        state: State = "warn" if loopback else "fail"
        found.append(Finding("ray auth", state, "runs the code of anyone who reaches it", fix))
    return found


def storage(url: str) -> list[Finding]:
    """Write, the lease's put-if-absent, read and delete, on one scratch key."""
    from launcher.storage import Exists, Missing, open_store

    fix = (
        "give this identity the role Storage Blob Data Contributor on the container"
        if url.startswith("az://")
        else ("choose a folder that you may write")
    )
    store, key = open_store(url), f".doctor-{secrets.token_hex(6)}/probe"
    done, began = [], time.monotonic()
    try:
        store.put_new(key, b"one")
        done.append("write")
        try:
            store.put_new(key, b"two")
        except Exists:
            done.append("lease")
        else:
            return [
                Finding(
                    "storage",
                    "fail",
                    f"{url}: a key could be created twice: two runs could both own one",
                    "use another storage",
                )
            ]
        if store.get(key) != b"one":
            return [
                Finding(
                    "storage",
                    "fail",
                    f"{url}: what was written reads back as something else",
                    "use another storage",
                )
            ]
        done.append("read")
        store.delete(key)
        try:
            store.get(key)
            return [
                Finding(
                    "storage", "fail", f"{url}: a deleted key is still there", "retention needs to delete"
                )
            ]
        except Missing:
            done.append("delete")
    except Exception as error:
        after = f" after {', '.join(done)}" if done else ""
        return [Finding("storage", "fail", f"{url}: {_line(error)}{after}", fix)]
    return [
        Finding("storage", "pass", f"{url}: {', '.join(done)} in {1000 * (time.monotonic() - began):.0f} ms")
    ]


def _size(number: float) -> str:
    from launcher.plantext import size

    return size(number)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _line(error: Any) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
