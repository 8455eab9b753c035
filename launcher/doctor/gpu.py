"""Doctor's questions about the GPUs of this machine: which they are, whether they are sound, whether they talk to each other."""

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Sequence

from launcher.doctor.checks import DEADLINE_S, Finding, State
from launcher.errors import one_line
from launcher.runspec.model import RunSpec


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
        why = one_line(done.stdout or done.stderr)
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
    from launcher.runspec.gpus import gpu_named

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
            [sys.executable, "-m", "launcher.doctor.nccl"],
            capture_output=True,
            text=True,
            timeout=DEADLINE_S - 0.5,
        )
    except subprocess.TimeoutExpired:
        fix = "NCCL_DEBUG=INFO python -m launcher.doctor.nccl shows where it hangs"
        return [Finding("all-reduce", "warn", f"not done within {DEADLINE_S - 0.5:.1f} s", fix)]
    said = done.stdout.strip().splitlines()
    if done.returncode or not said:
        why = one_line((done.stderr.strip().splitlines() or ["it said nothing"])[-1])
        return [
            Finding("all-reduce", "fail", why, "NCCL_DEBUG=INFO python -m launcher.doctor.nccl shows more")
        ]
    if said[-1].startswith("skipped"):
        fix = "install the torch build for this driver (pytorch.org), and look at CUDA_VISIBLE_DEVICES"
        return [Finding("all-reduce", "warn", said[-1], fix)]
    return [Finding("all-reduce", "pass", said[-1])]
