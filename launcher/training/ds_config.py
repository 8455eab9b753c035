"""The exact DeepSpeed configuration of a run: what `plan` prints is what the workers hand to the engine.

The optimizer and the learning rate are the worker's own (AdamW with parameter groups; `launcher.runspec.schedule`), so the
configuration names neither. In DeepSpeed's words: `train_batch_size` is sequences a step over all data-parallel
replicas, `train_micro_batch_size_per_gpu` sequences a rank computes at once.

Holds for DeepSpeed 0.18 and 0.19.
"""

from typing import Any

from launcher.runspec.accounting import parameter_count
from launcher.runspec.model import RunSpec


def deepspeed_config(spec: RunSpec) -> dict[str, Any]:
    """The configuration as plain data for JSON; the same spec gives the same one."""
    p = spec.parallel
    config: dict[str, Any] = {
        # with tensor parallel DeepSpeed counts every rank as a replica here, though tp of them read the same sequences
        "train_batch_size": p.dp * p.tp * spec.micro_batch * spec.accumulation,
        "train_micro_batch_size_per_gpu": spec.micro_batch,
        "gradient_accumulation_steps": spec.accumulation,
        "gradient_clipping": spec.train.optimizer.grad_clip,
        "bf16": {"enabled": spec.train.precision == "bf16"},
        "zero_optimization": _zero(spec),
        # The worker brings torch's AdamW: with groups for weight decay and width, and without a compiler on CPU.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # A tag must be the same on every rank, or shards of two steps would make one checkpoint.
        "checkpoint": {"tag_validation": "Fail"},
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }
    if accumulates_in_fp32(spec):
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if p.tp > 1:
        config["tensor_parallel"] = _tensor_parallel(spec)
    if p.pp > 1:
        # Blocks recompute themselves (`launcher.workloads.gpt.run_block`), with and without a pipeline alike.
        config["pipeline"] = {"activation_checkpoint_interval": 0}
    return config


def _tensor_parallel(spec: RunSpec) -> dict[str, Any]:
    """AutoTP, told which matrices of the gpt are split and how: by heads and by hidden features. Embeddings stay whole."""
    column, row = {"partition_type": "column"}, {"partition_type": "row"}
    blocks = r".*blocks\.\d+\."
    return {
        "autotp_size": spec.parallel.tp,
        "partition_config": {
            "use_default_specs": False,
            "layer_specs": [
                # queries, keys and values lie one after another: each rank takes its heads of all three
                {"patterns": [rf"{blocks}qkv\.weight$"], **column, "shape": [3, -1], "partition_dim": 0},
                {"patterns": [rf"{blocks}up\.weight$"], **column},
                {"patterns": [rf"{blocks}(out|down)\.weight$"], **row},
            ],
        },
    }


def accumulates_in_fp32(spec: RunSpec) -> bool:
    """True where bf16 gradients of several micro-batches are summed in fp32; DeepSpeed can with ZeRO 1 to 3, not offloaded."""
    return spec.train.precision == "bf16" and spec.parallel.zero >= 1 and spec.parallel.offload == "none"


def _zero(spec: RunSpec) -> dict[str, Any]:
    p, gpu = spec.parallel, spec.cluster.gpus_per_node > 0
    zero: dict[str, Any] = {"stage": p.zero}
    if p.zero == 0:
        return zero
    bucket = bucket_elements(spec)
    zero["reduce_bucket_size"] = bucket
    zero["allgather_bucket_size"] = bucket
    # Overlap needs a second stream to pay; on gloo it only costs.
    zero["overlap_comm"] = gpu and p.zero >= 2
    zero["contiguous_gradients"] = True
    if p.zero == 3:
        zero["stage3_prefetch_bucket_size"] = bucket
        zero["stage3_gather_16bit_weights_on_model_save"] = False
    if p.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": gpu}
    return zero


def bucket_elements(spec: RunSpec) -> int:
    """Elements in one communication bucket: the rank's share of the model, between 2**18 and 2**27.

    DeepSpeed's default of 5e8 would hold 2 GB for a model of a megabyte.
    """
    params = parameter_count(spec)
    if params is None:
        return 1 << 27
    return max(1 << 18, min(1 << 27, params // (spec.parallel.pp * spec.parallel.tp)))
