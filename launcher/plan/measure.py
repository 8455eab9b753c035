"""The measured peak memory of a run's ranks: the real engine on this machine, three steps of random tokens.

On CPU it is resident memory (VmHWM, reset once libraries are loaded) over what was resident before; on GPUs what torch's
allocator had at most. Bytes. Every rank is a process here, so the spec must fit this machine.

    python -m launcher.plan.measure SPEC.json     one rank, started by `measured_peaks`
"""

import json
import os
import subprocess
import sys
import tempfile
from typing import Any

from launcher.errors import Failed, WrongInput
from launcher.ports import free_port
from launcher.runspec.model import Gpt, RunSpec

MOST_RANKS = 8


def measured_peaks(spec: RunSpec, timeout_s: float = 300.0) -> list[int]:
    """Peak bytes of each rank. Raises WrongInput for what can't be measured on one machine, Failed when a rank fails."""
    if (
        not isinstance(spec.workload, Gpt)
        or spec.workload.patch
        or spec.ranks > MOST_RANKS
        or spec.cluster.nodes.max > 1
    ):
        raise WrongInput(
            f"--measure: only a gpt of text on one machine, with at most {MOST_RANKS} ranks, can be measured"
        )
    env = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(spec.ranks),
        "LOCAL_WORLD_SIZE": str(spec.ranks), "OMP_NUM_THREADS": "1",
        # free memory goes back to the system, or the peak would be the allocator's
        "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536",
    }  # fmt: skip
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file, tempfile.TemporaryFile("w+") as errors:
        json.dump(spec.to_dict(), file)
        file.flush()
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "launcher.plan.measure", file.name],
                env={**env, "RANK": str(r), "LOCAL_RANK": str(r)},
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            for r in range(spec.ranks)
        ]
        try:
            said = [rank.communicate(timeout=timeout_s)[0] for rank in ranks]
        except subprocess.TimeoutExpired:
            raise Failed(f"--measure: three steps took more than {timeout_s:.0f} s") from None
        finally:
            for rank in ranks:
                if rank.poll() is None:
                    rank.kill()
                    rank.wait()
        peaks = [
            int(line.split()[1]) for out in said for line in out.splitlines() if line.startswith("PEAK ")
        ]
        if len(peaks) < spec.ranks:
            errors.seek(0)
            last = [line for line in errors.read().splitlines() if line.strip()][-1:]
            raise Failed(f"--measure: a rank failed: {last[0] if last else 'without a word'}")
    return peaks


def _rank(spec: RunSpec) -> int:
    """This rank's peak over its baseline, in bytes."""
    import ctypes
    import gc

    import torch

    from launcher.training.engine import join

    join()
    torch.set_num_threads(1)
    assert isinstance(spec.workload, Gpt)
    data = spec.to_dict()
    small = {**data["workload"], "layers": spec.parallel.pp, "width": 2 * spec.workload.heads, "vocab": 256}
    _train(RunSpec.from_dict({**data, "workload": small}))  # libraries load here
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _train(spec)
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    before = _status_bytes("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # VmHWM counts from here
    _train(spec)
    return _status_bytes("VmHWM") - before


def _train(spec: RunSpec) -> None:
    import torch

    from launcher.training.engine import build_engine
    from launcher.training.layouts import layout_of

    engine = build_engine(spec)
    layout = layout_of(engine, spec.parallel.pp, spec.parallel.tp)
    draw = torch.Generator().manual_seed(0)
    vocab = spec.workload.vocab if isinstance(spec.workload, Gpt) and spec.workload.vocab else 256
    for _ in range(3):
        parts: list[Any] = []
        for _ in range(spec.accumulation):
            rows = torch.randint(0, vocab, (spec.micro_batch, spec.context + 1), generator=draw).to(
                engine.device
            )
            parts.append(((rows[:, :-1].contiguous(),), rows[:, 1:].contiguous()))
        layout.update(parts, False, lambda: None, lambda loss: None)
    engine.destroy()


def _status_bytes(field: str) -> int:
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith(field + ":"))


def main(argv: list[str]) -> Any:
    with open(argv[0]) as file:
        spec = RunSpec.from_dict(json.load(file))
    print(f"PEAK {_rank(spec)}", flush=True)
    os._exit(0)  # libraries' threads may abort a Python that tears itself down, and all was said


if __name__ == "__main__":
    main(sys.argv[1:])
