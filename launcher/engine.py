"""The DeepSpeed engine of one rank: model, optimizer and how they are sharded, from the spec alone.

The optimizer is torch's AdamW, given to DeepSpeed as it is: every topology then updates with the same arithmetic,
on CPU and on GPU, and nothing has to be compiled before the first step. The learning rate is set by the training
loop at every step (`set_lr`), from `launcher.schedule`, so that DeepSpeed holds no schedule state of its own.
"""

import os
from typing import Any

import torch

from launcher.ds_config import deepspeed_config
from launcher.errors import WrongInput
from launcher.spec import Gpt, RunSpec
from launcher.workloads.gpt import GPT, GPTShape


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


def build_model(spec: RunSpec) -> GPT:
    """The workload's module, its parameters drawn from `train.seed`. Raises WrongInput for what can't be built here."""
    workload = spec.workload
    if not isinstance(workload, Gpt):
        raise WrongInput(
            "workload: only `kind: gpt` can be trained so far; an entrypoint can't. Set workload.kind to gpt."
        )
    if spec.parallel.pp > 1 or spec.parallel.tp > 1:
        raise WrongInput(
            f"parallel: pp: {spec.parallel.pp}, tp: {spec.parallel.tp}: pipeline and tensor parallel can't be trained "
            f"so far. Set both to 1; dp and zero work."
        )
    model = GPT(
        GPTShape(
            layers=workload.layers,
            width=workload.width,
            heads=workload.heads,
            context=workload.context,
            vocab=workload.vocab or 256,
            mlp_ratio=workload.mlp_ratio,
            positions=workload.positions,
            tied=workload.tied,
        )
    )
    model.initialise(spec.train.seed)
    return model


def build_engine(spec: RunSpec) -> Any:
    """A DeepSpeed engine over the model, ready to train. The process group must have been joined."""
    import deepspeed

    model = build_model(spec)
    optimizer = spec.train.optimizer
    groups = model.parameter_groups(spec.train.lr_base_width, optimizer.weight_decay)
    for group in groups:
        group["lr"] = spec.train.lr * group["lr_scale"]
    adamw = torch.optim.AdamW(groups, betas=optimizer.betas, eps=optimizer.eps)
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=adamw, config=deepspeed_config(spec))
    return engine


def set_lr(engine: Any, lr: float) -> None:
    """Use base learning rate `lr` in the next update, each group at its own scale."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def grad_norm(engine: Any) -> float | None:
    """Norm of the last update's gradient before clipping; None where DeepSpeed did not compute one."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)
