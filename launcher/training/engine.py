"""The DeepSpeed engine of one rank: model, optimizer and how they are sharded, from the spec alone.

The optimizer is torch's AdamW, given to DeepSpeed as it is: every topology then updates with the same arithmetic,
on CPU and on GPU, and nothing has to be compiled before the first step. The learning rate is set by the training
loop at every step (`set_lr`), from `launcher.runspec.schedule`, so that DeepSpeed holds no schedule state of its own.
"""

import os
from typing import Any

import torch

from launcher.errors import WrongInput
from launcher.runspec.model import Gpt, RunSpec
from launcher.training.ds_config import deepspeed_config
from launcher.training.memory import stage_layers
from launcher.workloads.gpt import GPT, GPTShape, rotary_table


def join(backend: str | None = None) -> None:
    """Join the process group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe. Idempotent."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if not torch.cuda.is_available():
        # The shared-memory op serves DeepSpeed's inference collectives only; building it costs a minute of
        # compiler on a new machine, and training never calls it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend=backend or ("nccl" if torch.cuda.is_available() else "gloo"), verbose=False
    )


def shape_of(workload: Gpt) -> GPTShape:
    """The sizes of the model that a spec's workload describes."""
    return GPTShape(
        layers=workload.layers,
        width=workload.width,
        heads=workload.heads,
        context=workload.context,
        vocab=workload.vocab or 256,
        mlp_ratio=workload.mlp_ratio,
        positions=workload.positions,
        tied=workload.tied,
        patch_values=workload.patch**2 if workload.patch else 0,
    )


def build_model(spec: RunSpec, whole: bool = False) -> Any:
    """The workload's module, its parameters drawn from `train.seed`. With a pipeline it is this rank's stage, with ZeRO 3 this
    rank's shard of every parameter; `whole` builds all of the model even so, for DeepSpeed to shard afterwards."""
    workload, p = spec.workload, spec.parallel
    if not isinstance(workload, Gpt):
        raise WrongInput(
            "workload: an entrypoint builds its own model, and losscast has none for it here. "
            "Set workload.kind to gpt, or run the entrypoint."
        )
    shape = shape_of(workload)
    if p.pp > 1:
        from launcher.workloads.gpt_pipe import PipedGPT

        return PipedGPT(shape, stage_layers(spec), p.activation_checkpointing, spec.train.seed)
    if p.zero == 3 and not whole:
        return _sharded(shape, spec)
    model = GPT(shape, recompute=p.activation_checkpointing)
    model.initialise(spec.train.seed)
    return model


def _sharded(shape: GPTShape, spec: RunSpec) -> GPT:
    """The model in shards from the start: a host never holds more than its ranks' shares and one matrix a rank, so that what
    several hosts hold together can be built. The same numbers as of the whole model."""
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path=deepspeed_config(spec)):
        model = GPT(shape, recompute=spec.parallel.activation_checkpointing)
    # positions were counted in the model's precision in there, which in bf16 can't tell 256 from 257
    model.rotary = rotary_table(shape.context, shape.width // shape.heads)
    model.initialise(spec.train.seed, lambda p: deepspeed.zero.GatheredParameters([p], modifier_rank=0))
    return model


def build_engine(spec: RunSpec, universal: bool = False, whole: bool = False) -> Any:
    """A DeepSpeed engine over the model (`whole`: see `build_model`), ready to train, or with `universal` to load a checkpoint
    of another layout first. The process group must have been joined."""
    import deepspeed

    model = build_model(spec, whole)
    optimizer = spec.train.optimizer
    groups = model.groups(spec.train.lr_base_width, optimizer.weight_decay)
    for group in groups:
        group["lr"] = spec.train.lr * group["lr_scale"]
    adamw = torch.optim.AdamW(groups, betas=optimizer.betas, eps=optimizer.eps)
    if spec.parallel.tp > 1 and tuple(int(n) for n in deepspeed.__version__.split(".")[:2]) < (0, 19):
        raise WrongInput(
            f"parallel.tp: {spec.parallel.tp}: needs DeepSpeed 0.19, whose AutoTP is told which matrices to split; "
            f"this is {deepspeed.__version__}. Install a newer one, or set tp to 1."
        )
    config = deepspeed_config(spec)
    if universal:
        config["checkpoint"] = {**config["checkpoint"], "load_universal": True}
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=adamw, config=config)
    if spec.parallel.zero == 0 and spec.train.precision == "fp32":
        _keep_norm(engine)
    return engine


def _keep_norm(engine: Any) -> None:
    """Have a plain fp32 engine remember the norm it clips by: it computes one, and drops it."""
    from deepspeed.runtime.utils import clip_grad_norm_

    def clip() -> None:
        engine._global_grad_norm = clip_grad_norm_(
            engine.module.parameters(), max_norm=engine.gradient_clipping(), mpu=engine.mpu
        )

    engine.clip_fp32_gradients = clip


def set_lr(engine: Any, lr: float) -> None:
    """Use base learning rate `lr` in the next update, each group at its own scale."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def grad_norm(engine: Any) -> float | None:
    """Norm of the last update's gradient before clipping; None where DeepSpeed did not compute one."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)
