"""A run on fewer hosts than asked: the same batch in tokens on fewer replicas, from a checkpoint of another layout.

The data order knows nothing of ranks, so what a smaller run reads, and in which order, is what the whole one would
have read: only who computes which sequences changes. Sharded optimizer states are another matter: ZeRO 1 to 3 write one
shard a rank, and a run of another size reads them through DeepSpeed's universal form, made once per resume.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from launcher.errors import Failed
from launcher.runspec.model import RunSpec

CONVERT_TIMEOUT_S = 3600.0


def fitted(spec: RunSpec, ranks: int) -> RunSpec:
    """The spec as it trains on at most so many ranks: fewer replicas, the same batch. The spec itself where all fit.

    Raises ValueError where not even one replica fits.
    """
    if ranks >= spec.ranks:
        return spec
    model = spec.parallel.pp * spec.parallel.tp
    if ranks < model:
        raise ValueError(f"one replica takes pp x tp = {model} ranks and {ranks} are there")
    dp = spec.dp_for(ranks)
    share = spec.batch_sequences // dp
    most = spec.parallel.micro_batch
    micro = None if most is None else max(n for n in range(1, min(most, share) + 1) if share % n == 0)
    data = spec.to_dict()
    data["parallel"] = {**data["parallel"], "dp": dp, "micro_batch": micro}
    if spec.cluster.gpus_per_node:  # so many GPUs as there are ranks, on however many hosts
        count = dp * model
        data["cluster"] = {**data["cluster"], "nodes": {"min": count, "max": count}, "gpus_per_node": 1}
        if spec.cluster.to == "local":
            data["cluster"] |= {"nodes": {"min": 1, "max": 1}, "gpus_per_node": count}
    return RunSpec.from_dict(data)


def fewest_ranks(spec: RunSpec) -> int:
    """Ranks below which an elastic run waits: those of nodes.min, and at least one replica. All, where shards can't be
    read by fewer ranks exactly."""
    nodes = spec.cluster.nodes
    if not resizes(spec):
        return spec.ranks
    return max(spec.parallel.pp * spec.parallel.tp, -(-spec.ranks * nodes.min // nodes.max))


def resizes(spec: RunSpec) -> bool:
    """True where a checkpoint of so many ranks gives the same losses on fewer, as was tried: not with ZeRO 3, whose
    universal form came back 0.05 nats off (DeepSpeed 0.19.8), and not with pipelines or tensor parallel, untried."""
    p = spec.parallel
    return p.zero < 3 and p.pp == 1 and p.tp == 1


def layout(spec: RunSpec) -> dict[str, int]:
    """The sizes that decide who can read whose shards."""
    p = spec.parallel
    return {"dp": p.dp, "pp": p.pp, "tp": p.tp, "zero": p.zero}


def needs_universal(written: Mapping[str, Any], spec: RunSpec) -> bool:
    """True where a checkpoint of layout `written` can't be read by this spec's ranks as it is.

    Without ZeRO every replica holds everything, and any number of replicas reads it.
    """
    now = layout(spec)
    differ = {k for k, v in now.items() if written.get(k, v) != v}
    return bool(differ - {"dp"}) or ("dp" in differ and now["zero"] > 0)


def to_universal(checkpoint: Path, target: Path, say: Callable[[str], None]) -> Path:
    """Convert a verified checkpoint into DeepSpeed's universal form under `target`; returns its path.

    A conversion that is whole already is used again. Raises Failed with the converter's last words.
    """
    place = target / checkpoint.name
    if (target / "latest_universal").exists():
        return place
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    say(f"converting {checkpoint.name} to another layout")
    try:
        done = subprocess.run(
            [
                sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state",
                "--input_folder", str(checkpoint), "--output_folder", str(place),
                "--num_extract_workers", "1", "--num_merge_workers", "1",
            ],
            capture_output=True, text=True, timeout=CONVERT_TIMEOUT_S,
            env={**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Failed(f"{checkpoint}: converting it took more than {CONVERT_TIMEOUT_S:.0f} s") from None
    if done.returncode != 0:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        raise Failed(f"{checkpoint}: could not be converted: {last[0] if last else 'no message'}")
    (target / "latest_universal").write_text(checkpoint.name)
    return place
