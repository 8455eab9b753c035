"""What a run would be, from its spec alone: steps, FLOPs, memory, hours, dollars, checkpoints.

Pure: no clock, no files, no machine, no network. What needs a law (predicted loss, compute-optimal sizes) is put in
by the command, which composes launcher and monitor.

Hours are a range, since the achieved fraction of peak FLOP/s is not known before a run: on GPUs 30% to 55% of
dense peak (MegaScale reports 55.2% on 12,288 GPUs, arXiv:2402.15627), on CPU 5e9 to 5e10 FLOP/s a rank (measured
on byte models of 0.1M to 3M parameters), and 9 to 30 ms a step that two ranks and their engine take whatever the model's size
(measured at 7,000 parameters): it is most of a tiny run. FLOPs here include attention scores, and recomputation where asked for.

Failures: a GPU fails once in 8,090 to 29,500 GPU-hours (mean time to failure 7.9 h at 1,024 GPUs, 1.8 h at 16,384:
Kokolis et al. 2024, arXiv:2410.21680).
"""

from dataclasses import dataclass
from typing import Any

from launcher.jobs.job import planned_job
from launcher.runspec.accounting import (
    CONVENTION,
    attention_flops_per_token,
    flops_per_token,
    gpt_parameters,
    parameter_count,
    total_flops,
    total_tokens,
)
from launcher.runspec.doubts import doubtful, not_yet
from launcher.runspec.gpus import gpu_named
from launcher.runspec.model import Gpt, RunSpec
from launcher.runspec.problem import Problem
from launcher.training.ds_config import deepspeed_config
from launcher.training.memory import checkpoint_bytes, rank_memory
from launcher.training.pacer import twin_of

MFU_RANGE = (0.55, 0.30)
"""Best and worst fraction of peak expected."""
CPU_FLOPS_RANGE = (5e10, 5e9)
"""FLOP/s a rank, best and worst."""
CPU_STEP_S = (0.009, 0.030)
"""Of a step beside its FLOPs, best and worst."""
GPU_HOURS_PER_FAILURE = (29_500.0, 8_090.0)


@dataclass(frozen=True, slots=True)
class Range:
    """Best and worst of an estimate."""

    low: float
    high: float

    def times(self, factor: float) -> "Range":
        return Range(self.low * factor, self.high * factor)

    def to_dict(self) -> dict[str, float]:
        return {"low": self.low, "high": self.high}


def hours(spec: RunSpec) -> Range | None:
    """Wall-clock hours of training, failures and evaluation aside. None where N or the GPU is unknown."""
    per_token = flops_per_token(spec)
    if per_token is None:
        return None
    work = per_token + attention_flops_per_token(spec)
    if spec.parallel.activation_checkpointing:
        work *= 4 / 3
    work *= total_tokens(spec)
    beside = (0.0, 0.0)
    if spec.cluster.gpus_per_node == 0:
        beside = (spec.total_steps * CPU_STEP_S[0], spec.total_steps * CPU_STEP_S[1])
        best, worst = (spec.ranks * f for f in CPU_FLOPS_RANGE)
    else:
        gpu = gpu_named(spec.cluster.gpu)
        peak = gpu and (gpu.bf16_flops if spec.train.precision == "bf16" else gpu.fp32_flops)
        if not peak:
            return None
        bubble = (spec.parallel.pp - 1) / (spec.accumulation + spec.parallel.pp - 1)
        best, worst = (peak * spec.ranks * f * (1 - bubble) for f in MFU_RANGE)
    return Range((work / best + beside[0]) / 3600, (work / worst + beside[1]) / 3600)


def money(spec: RunSpec) -> Range | None:
    """Dollars for the hours of training; None without a price."""
    time, price = hours(spec), spec.cluster.price_per_gpu_hour
    if time is None or price is None or not spec.gpus:
        return None
    return time.times(price * spec.gpus)


def failure_hours(spec: RunSpec) -> Range | None:
    """Expected hours to the first failure, worst to best; None on CPU."""
    if not spec.gpus:
        return None
    best, worst = (h / spec.gpus for h in GPU_HOURS_PER_FAILURE)
    return Range(worst, best)


def warnings(spec: RunSpec) -> list[Problem]:
    """`launcher.runspec.doubts`, and what only an estimate can tell."""
    found = [*doubtful(spec), *not_yet(spec), *_pacing(spec)]
    time, failure = hours(spec), failure_hours(spec)
    if time and failure and not spec.workload.is_script:
        every = spec.checkpoints.every_steps / spec.total_steps * time.low
        if every > failure.low and spec.checkpoints.every_steps < spec.total_steps:
            better = max(1, int(spec.total_steps * failure.low / time.low / 10))
            found.append(
                Problem(
                    ("checkpoints.every_steps", "cluster.nodes"),
                    f"a checkpoint every {every:.1f} h or more, and {spec.gpus} GPUs fail once in "
                    f"{failure.low:.1f} to {failure.high:.1f} h: some intervals would never end. "
                    f"Set every_steps to {better} or fewer.",
                )
            )
    gpu, memory = gpu_named(spec.cluster.gpu), rank_memory(spec)
    if spec.cluster.gpu and gpu is None:
        found.append(
            Problem(
                ("cluster.gpu",),
                f"{spec.cluster.gpu!r} is not known here: no hours, dollars or memory check.",
            )
        )
    if gpu and memory:
        worst = max(memory, key=lambda m: m.total)
        if worst.total > 0.92 * gpu.memory_bytes:
            found.append(
                Problem(
                    ("parallel.zero", "parallel.micro_batch", "cluster.gpu"),
                    f"a rank of stage {worst.stage} needs about {worst.total / 1e9:.1f} GB and a {gpu.name} has "
                    f"{gpu.memory_bytes / 1e9:.0f}. {_smaller(spec)}",
                )
            )
    return found


def _pacing(spec: RunSpec) -> list[Problem]:
    """What is to be known of a pacer before the run is handed in."""
    if spec.policy.pacer == "off":
        return []
    twin = twin_of(spec)
    if twin.spec is None:
        return [Problem(("policy.pacer",), f"no pacer is started: {twin.why}.")]
    if spec.cluster.to == "kuberay":
        text = (
            "no pacer is started together with the run on Kubernetes, where its pods could take the room that the run "
            "waits for. Once the run trains: losscast submit RUN --pacer"
        )
        return [Problem(("policy.pacer", "cluster.to"), text)]
    if twin.speed < 1:
        text = f"the pacer is {twin.speed:.2g} times as fast as the run, and one that lags is no control."
        return [Problem(("policy.pacer",), text)]
    return []


def _smaller(spec: RunSpec) -> str:
    p = spec.parallel
    ways = []
    if p.pp == 1 and p.zero < 3:
        ways.append(f"zero: {p.zero + 1}")
    if not p.activation_checkpointing:
        ways.append("activation_checkpointing: true")
    if spec.micro_batch > 1:
        ways.append(f"micro_batch: {spec.micro_batch // 2}")
    return f"Try {' or '.join(ways)}." if ways else "Use more GPUs a replica."


def planned_manifests(spec: RunSpec) -> list[dict[str, Any]] | None:
    """The Kubernetes objects that `submit` would create, short of a prediction. None where no kuberay is asked for."""
    if spec.cluster.to != "kuberay":
        return None
    from launcher.kuberay.manifests import manifests

    return manifests(spec)


def planned_pacer(spec: RunSpec) -> dict[str, Any] | None:
    """The run's pacer and what it costs; with `why` alone where one was asked for and there is none. None: not asked for."""
    if spec.policy.pacer == "off":
        return None
    twin = twin_of(spec)
    if twin.spec is None:
        return {"run": None, "why": twin.why}
    time, cost = hours(twin.spec), money(twin.spec)
    shape = twin.spec.workload
    return {
        "run": twin.spec.name,
        "why": None,
        "params": parameter_count(twin.spec),
        "shape": {k: getattr(shape, k) for k in ("layers", "width", "heads")},
        "flops": total_flops(twin.spec),
        "attention_flops": attention_flops_per_token(twin.spec) * total_tokens(twin.spec),
        "share": twin.share,
        "speed": twin.speed,
        "ranks": twin.spec.ranks,
        "gpus": twin.spec.gpus,
        "hours": time.to_dict() if time else None,
        "dollars": cost.to_dict() if cost else None,
    }


def make_plan(spec: RunSpec) -> dict[str, Any]:
    """Everything about the run that follows from its spec, as plain data for JSON.

    FLOPs, bytes and counts are plain numbers; what can't be known is None. `prediction`, `optimal` and
    `measured_peak_bytes` (one a rank) are None here and filled in by the command; `job` is what Ray's Jobs API would be
    sent, and `manifests` what Kubernetes would be: one of the two is None.
    """
    n, flops = parameter_count(spec), total_flops(spec)
    memory, time, cost, failure = rank_memory(spec), hours(spec), money(spec), failure_hours(spec)
    gpu = gpu_named(spec.cluster.gpu)
    parts, known = None, spec.workload.context is not None
    if isinstance(spec.workload, Gpt):
        counts = gpt_parameters(spec.workload)
        parts = {
            k: getattr(counts, k) for k in ("embedding", "positions", "patches", "attention", "mlp", "head")
        }
    return {
        "run": spec.name,
        "spec_digest": spec.digest,
        "to": spec.cluster.to,
        "params": n,
        "params_by_part": parts,
        "tokens": total_tokens(spec),
        "tokens_per_param": total_tokens(spec) / n if n else None,
        "steps": spec.total_steps,
        "batch": {
            "tokens": spec.train.batch_tokens,
            "sequences": spec.batch_sequences if known else None,
            "micro_batch": spec.micro_batch if known else None,
            "accumulation": spec.accumulation if known else None,
        },
        "ranks": spec.ranks,
        "gpus": spec.gpus,
        "flops": flops,
        "attention_flops": attention_flops_per_token(spec) * total_tokens(spec),
        "conventions": CONVENTION,
        "deepspeed": deepspeed_config(spec),
        "memory": [m.to_dict() for m in memory] if memory else None,
        "activations_known": isinstance(spec.workload, Gpt),
        "measured_peak_bytes": None,
        "gpu_memory_bytes": gpu.memory_bytes if gpu else None,
        "hours": time.to_dict() if time else None,
        "dollars": cost.to_dict() if cost else None,
        "hours_to_failure": failure.to_dict() if failure else None,
        "checkpoint": {
            "bytes": checkpoint_bytes(spec),
            "count": None
            if spec.workload.is_script
            else -(-spec.total_steps // spec.checkpoints.every_steps),
            "kept_bytes": (checkpoint_bytes(spec) or 0) * spec.checkpoints.keep or None,
            "url": spec.checkpoints.url,
        },
        "prediction": None,
        "optimal": None,
        "pacer": planned_pacer(spec),
        "monitor": None
        if spec.monitor is None
        else {"url": spec.monitor.url, "token_env": spec.monitor.token_env},
        "job": planned_job(spec),
        "manifests": planned_manifests(spec),
        "warnings": [{"keys": list(p.keys), "message": p.message} for p in warnings(spec)],
    }
