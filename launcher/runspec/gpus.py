"""What GPUs can do, by the name people give them: peak dense FLOP/s, memory, bf16.

Peaks are the vendors' figures for dense matrices without sparsity, bf16 with fp32 accumulation, and plain fp32
(TF32 off). Memory in bytes, as sold (1 GB = 1e9 bytes).
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Gpu:
    """One model."""

    name: str
    bf16_flops: float | None
    """Peak FLOP/s; None without bf16 arithmetic."""
    fp32_flops: float
    memory_bytes: float


GPUS = (
    Gpu("B200", 2.25e15, 75e12, 180e9),
    Gpu("GB200", 2.5e15, 80e12, 186e9),
    Gpu("H200", 989e12, 67e12, 141e9),
    Gpu("H100-NVL", 835e12, 60e12, 94e9),
    Gpu("H100-PCIE", 756e12, 51e12, 80e9),
    Gpu("H100", 989e12, 67e12, 80e9),
    Gpu("H800", 989e12, 67e12, 80e9),
    Gpu("A100-40GB", 312e12, 19.5e12, 40e9),
    Gpu("A100", 312e12, 19.5e12, 80e9),
    Gpu("A800", 312e12, 19.5e12, 80e9),
    Gpu("L40S", 362e12, 91.6e12, 48e9),
    Gpu("L4", 121e12, 30e12, 24e9),
    Gpu("A10G", 70e12, 31e12, 24e9),
    Gpu("A10", 125e12, 31e12, 24e9),
    Gpu("A6000", 155e12, 38.7e12, 48e9),
    Gpu("RTX4090", 165e12, 82.6e12, 24e9),
    Gpu("RTX3090", 71e12, 35.6e12, 24e9),
    Gpu("MI300X", 1307e12, 163e12, 192e9),
    Gpu("MI250X", 383e12, 47.9e12, 128e9),
    Gpu("V100", None, 15.7e12, 32e9),
    Gpu("T4", None, 8.1e12, 16e9),
    Gpu("P100", None, 10.6e12, 16e9),
)


def gpu_named(name: str | None) -> Gpu | None:
    """The model a name means (`H100`, `NVIDIA H100 80GB HBM3`, `a100-sxm4-40gb`); None when unknown."""
    if not name:
        return None
    said = _plain(name)
    if "A100" in said and "40G" in said:
        said = "A10040GB"
    found = [g for g in GPUS if _plain(g.name) in said]
    return max(found, key=lambda g: len(g.name), default=None)


def _plain(name: str) -> str:
    return re.sub(r"[^A-Z0-9]", "", name.upper())
