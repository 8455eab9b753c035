"""Peak memory of one rank while it trains, by part, before anything runs.

    parameters    what forward and backward compute with
    gradients     kept until the optimizer has used them
    optimizer     Adam's two moments, and DeepSpeed's fp32 master copy where there is one
    buffers       what DeepSpeed holds all along: ZeRO 3's bucket, with offload a place for one gradient
    activations   what backward needs of every block, for each micro-batch in flight, and its own scratch
    logits        scores over the vocabulary, their softmax and its gradient
    gathered      ZeRO 3's whole parameters, and the buffer that the ones gathered ahead came in, which lives until the last
                  of them is used; on GPUs also the buckets that lie ready during backward
    reduce        the bucket of gradients that is sent, and its flattened copy
    step          the optimizer's share of gradients, the same in one flat fp32 piece, and scratch of Adam's update: the
                  square root of the second moment and, tensor by tensor as on CPU, its quotient

Parameters, optimizer and buffers last. On top come, one after another, backward (gradients, activations, logits, gathered), the
reduction (gradients, reduce) and the step, which begins by letting go of all gradients but its own: the peak is the largest.
On CPU memory is what was written, and gradients fill their bucket while activations go.

Bytes. ZeRO 1 divides the optimizer over dp, 2 also gradients, 3 also parameters (Rajbhandari et al. 2020,
arXiv:1910.02054, section 5). A pipeline's first stage holds pp micro-batches at once, its last stage one
(1F1B, Narayanan et al. 2021, arXiv:2104.04473). Activations are those of `launcher.workloads.gpt` with an attention
that keeps no score matrix. Not counted: the framework itself (0.3 to 1 GB a GPU) and fragmentation.
`bench/memory.py` holds the estimate against measured peaks.
"""

from dataclasses import asdict, dataclass

from launcher.runspec.accounting import gpt_parameters, parameter_count
from launcher.runspec.model import Gpt, RunSpec
from launcher.training.ds_config import accumulates_in_fp32, bucket_elements

SAVED_WIDTHS = 11
"""(tokens, width) arrays a block keeps for backward, apart from the feed-forward's: stream and its norm twice, queries,
keys and values, queries and keys turned, attention's output, its projection's input. Counted by saved-tensor hooks."""
WHOLE_WIDTHS = 4
"""Those of them that tensor parallelism leaves whole on every rank: stream and its norm, twice."""
SAVED_HIDDEN = 2
"""(tokens, hidden) arrays the feed-forward keeps: before and after the squared ReLU."""
SCRATCH_HIDDEN = 2
"""(tokens, hidden) arrays that live for a moment in the feed-forward's backward."""
LIVE_PARAMETERS = 1e9
"""ZeRO 3 keeps at most so many parameters gathered: DeepSpeed's default for stage3_max_live_parameters."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one rank of one pipeline stage."""

    stage: int
    parameters: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    gathered: float
    reduce: float
    buffers: float
    step: float
    host: float
    """In host memory, with offload."""

    @property
    def total(self) -> float:
        """Peak on the GPU (in host memory where there is none)."""
        backward = self.gradients + self.activations + self.logits + self.gathered
        return (
            self.parameters
            + self.optimizer
            + self.buffers
            + max(backward, self.gradients + self.reduce, self.step)
        )

    def to_dict(self) -> dict[str, float]:
        return {**asdict(self), "total": self.total}


def stage_parameters(spec: RunSpec) -> list[int] | None:
    """Parameters of each pipeline stage: blocks spread evenly, embedding first, head last. None where N is unknown.

    A tied head is a second copy of the embedding on the last stage.
    """
    count, pp = parameter_count(spec), spec.parallel.pp
    if count is None:
        return None
    if not isinstance(spec.workload, Gpt):
        return [-(-count // pp)] * pp
    parts = gpt_parameters(spec.workload)
    layers = spec.workload.layers
    per_layer = parts.blocks // layers
    stages = [per_layer * n for n in stage_layers(spec)]
    stages[0] += parts.embedding + parts.positions + parts.patches
    stages[-1] += parts.head or (parts.embedding if pp > 1 else 0)
    return stages


def stage_layers(spec: RunSpec) -> list[int]:
    """Blocks on each pipeline stage, the first stages taking what is left over."""
    layers = spec.workload.layers if isinstance(spec.workload, Gpt) else 0
    base, extra = divmod(layers, spec.parallel.pp)
    return [base + (stage < extra) for stage in range(spec.parallel.pp)]


def rank_memory(spec: RunSpec) -> list[Memory] | None:
    """Memory of a rank of every pipeline stage; None where the number of parameters is unknown."""
    stages = stage_parameters(spec)
    if stages is None:
        return None
    return [_stage(spec, stage, count - _split_away(spec, stage)) for stage, count in enumerate(stages)]


def _split_away(spec: RunSpec, stage: int) -> float:
    """Parameters of a stage that a rank leaves to the others of its tensor-parallel group: of the gpt's blocks; embeddings
    and readout are whole on every rank."""
    tp = spec.parallel.tp
    if isinstance(spec.workload, Gpt):
        blocks = gpt_parameters(spec.workload).blocks * stage_layers(spec)[stage] / spec.workload.layers
    else:
        blocks = (parameter_count(spec) or 0) / spec.parallel.pp
    return blocks * (1 - 1 / tp)


def _stage(spec: RunSpec, stage: int, n: float) -> Memory:
    p, bf16, gpu = spec.parallel, spec.train.precision == "bf16", spec.cluster.gpus_per_node > 0
    value = 2 if bf16 else 4
    over = {z: p.dp if p.zero >= z else 1 for z in (1, 2, 3)}
    share = 4 * n / over[1]
    parameters = value * n / over[3]
    # ZeRO 1 sums bf16 gradients into a whole fp32 copy; 2 and 3 keep their share only, and in fp32
    summed = 4 if accumulates_in_fp32(spec) else 0
    gradients = (value + summed if p.zero <= 1 else max(value, summed)) * n / over[2]
    optimizer = 8 * n / over[1] + (share if bf16 or p.zero else 0)
    largest = value * _largest_matrix(spec)
    bucket = min(bucket_elements(spec), n) * (max(value, summed) if p.zero == 1 else value)
    scratch = 1 if gpu else 2  # torch steps all tensors at once on GPUs, and reuses its scratch
    buffers = host = 0.0
    if p.zero == 0:
        step = gradients + scratch * 4 * (n if gpu else _largest_matrix(spec))
    else:
        step = (2 + scratch) * share
    if p.offload == "cpu":
        # the state, the share of gradients in fp32, and beside them of parameters (ZeRO 3: gradients) as computed with
        host, optimizer, step = optimizer + share + value * n / over[1], 0.0, gradients
        if p.zero >= 2:
            gradients = step = 0.0
        if p.zero == 2 and spec.accumulation > 1:  # what micro-batches add up is kept there
            host += value * n / over[1]
        if p.zero <= 2:  # a place on either side for a gradient on its way
            host, buffers = host + largest, largest
        if gpu:  # the update's scratch, which on CPU would come when activations are gone
            host += 2 * share
    gathered = 0.0
    if p.zero == 3:
        buffers += bucket
        gathered = min(LIVE_PARAMETERS, n) * value + bucket
    if gpu:
        gathered += {0: 0, 1: 1, 2: 3, 3: 1}[p.zero] * bucket
    reduce = {0: 0.0, 1: bucket + share, 2: 2 * bucket, 3: 2 * bucket}[p.zero]
    activations, logits = _activations(spec, stage)
    return Memory(
        stage, parameters, gradients, optimizer, activations, logits, gathered, reduce, buffers, step, host
    )


def _largest_matrix(spec: RunSpec) -> float:
    gpt = spec.workload
    if not isinstance(gpt, Gpt):
        return 0.0
    return float(max(gpt.mlp_ratio * gpt.width * gpt.width, (gpt.vocab or 0) * gpt.width))


def _activations(spec: RunSpec, stage: int) -> tuple[float, float]:
    gpt, p = spec.workload, spec.parallel
    if not isinstance(gpt, Gpt):
        return 0.0, 0.0
    tokens = spec.micro_batch * gpt.context
    unit = tokens * gpt.width * (2 if spec.train.precision == "bf16" else 4)
    layers = stage_layers(spec)[stage]
    split = SAVED_WIDTHS - WHOLE_WIDTHS + SAVED_HIDDEN * gpt.mlp_ratio
    block = unit * (WHOLE_WIDTHS + split / p.tp)
    kept = unit if p.activation_checkpointing else block
    scratch = unit * SCRATCH_HIDDEN * gpt.mlp_ratio / p.tp + (block if p.activation_checkpointing else 0)
    in_flight = min(p.pp - stage, spec.accumulation)
    logits = 0.0
    if stage == p.pp - 1:
        # scores, their log-softmax and its gradient in fp32, or with bf16 scores and copies of 12 bytes in all
        logits = tokens * (gpt.vocab or 0) * 12.0
    return layers * kept * in_flight + scratch, logits


def checkpoint_bytes(spec: RunSpec) -> float | None:
    """One checkpoint over all ranks: parameters as computed with, fp32 master copy and moments. None where N is unknown."""
    n = parameter_count(spec)
    if n is None:
        return None
    bf16 = spec.train.precision == "bf16"
    master = 4 if bf16 or spec.parallel.zero >= 1 else 0
    return float(n) * ((2 if bf16 else 4) + 8 + master)
