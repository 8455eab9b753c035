"""The sections of run.yaml as types: everything a person may write about one run, and the sizes that follow from it.

Counts (`tokens`, `batch_tokens`, `warmup_tokens`, ...) are whole numbers and may be written 2.5e9. A *sequence*
is `context` tokens. `micro_batch` counts sequences a rank computes at once; `batch_tokens` counts the tokens of
one optimizer step over all ranks. Learning rates are absolute, `final_lr` too.

Types check one key at a time; whether the keys can run together is for `launcher.runspec.checks`.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from launcher.runspec.cluster import Cluster, Kubernetes
from launcher.runspec.keys import NAME, Natural, Part, Positive, Ranks, Rate, Text, as_tuple, no_flag, whole
from launcher.runspec.workload import Workload, which_workload


class Data(Part):
    """What the run reads. The order of sequences is a function of `train.seed` and the sequence's index alone."""

    path: Text
    """A folder or az://account/container/prefix that `losscast data prepare` made; `stdlib`: the Python standard library's
    own source; `digits`: scikit-learn's images with captions, for a workload with `patch`."""
    tokenizer: Text = "bytes"
    """`bytes`, or the path of a Hugging Face tokenizer.json."""
    holdout_tokens: Natural = 131_072
    """Read at most, of the held-out 64th of the data, by the validation that ends the run."""


class Schedule(Part):
    """The learning rate over the run. Spans are in tokens, so that they mean the same at any batch size."""

    kind: Literal["wsd", "cosine", "linear", "constant"] = "cosine"
    """wsd: warm up, hold, decay linearly over `decay_tokens`; cosine and linear decay from warm-up to the end."""
    warmup_tokens: Natural = 0
    """Linear from zero."""
    decay_tokens: Natural | None = None
    """Length of the decay, for wsd only; default a fifth of `train.tokens`."""
    final_lr: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Learning rate of the last step: absolute, like `train.lr`."""


class Optimizer(Part):
    """AdamW."""

    betas: Annotated[tuple[float, float], BeforeValidator(as_tuple)] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: Rate = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    """Decoupled; on hidden matrices only, never on embeddings."""
    grad_clip: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Largest gradient norm; 0 turns clipping off."""


class Train(Part):
    """How much to train, and how."""

    tokens: Positive
    """Tokens to see; the last batch is always whole, so a run may see up to a batch more."""
    batch_tokens: Positive
    """Tokens of one optimizer step, over all ranks."""
    lr: Rate
    """Peak learning rate."""
    lr_base_width: Positive | None = None
    """When set, hidden matrices learn at lr * lr_base_width / width, so that one lr fits a whole ladder of widths."""
    schedule: Schedule = Schedule()
    """The learning rate over the run."""
    optimizer: Optimizer = Optimizer()
    """AdamW's settings."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of computation; master weights are fp32 either way. Default bf16 with GPUs, fp32 without."""
    seed: Natural = 0
    """Of initialisation and of the data order."""


class Eval(Part):
    """Validation loss on the held-out slice: the same batches every time."""

    every_steps: Positive
    """Optimizer steps between evaluations; the last step is always evaluated."""
    batches: Positive = 32
    """Of `batch_tokens` each."""


class Parallel(Part):
    """How one model is laid out over the GPUs: dp x pp x tp ranks."""

    dp: Ranks = 1
    """Data-parallel replicas of each pipeline stage."""
    pp: Ranks = 1
    """Pipeline stages; 1 turns the pipeline off."""
    tp: Ranks = 1
    """Tensor-parallel ranks a layer is split over."""
    zero: Annotated[Literal[0, 1, 2, 3], BeforeValidator(no_flag)] = 1
    """What ZeRO shards over dp: 1 optimizer states, 2 also gradients, 3 also parameters."""
    micro_batch: Positive | None = None
    """Sequences a rank computes at once; default the largest that divides the batch and stays under 16,384 tokens."""
    offload: Literal["none", "cpu"] = "none"
    """Keep optimizer states in host memory."""
    activation_checkpointing: bool = False
    """Keep each block's input only and compute the rest again: a third more FLOPs, far less memory."""


class Checkpoints(Part):
    """Where checkpoints and the run's log go: one folder or prefix, the run's name is added to it."""

    url: Text = "./runs"
    """A folder, or az://account/container/prefix."""
    every_steps: Positive = 500
    """Optimizer steps between checkpoints; the last step always makes one."""
    keep: Positive = 3
    """Newest committed ones that retention leaves."""


class Monitor(Part):
    """Where samples go."""

    url: Annotated[str, Field(pattern=r"^https?://[^\s/]+(/\S*)?$")]
    """Of `losscast monitor serve`."""
    token_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] = "LOSSCAST_TOKEN"
    """Name of the environment variable that holds the bearer token. Never the token."""


class Policy(Part):
    """What may be done about a run without asking."""

    max_restarts: Natural = 10
    """Restarts after failures before the run is given up."""
    on_divergence: Literal["observe", "recommend", "rollback"] = "observe"
    """recommend: say what to do; rollback: go back to the last good checkpoint by itself."""
    target_loss: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Nats per token: the final loss the run is for."""
    pacer: Literal["off", "auto"] = "off"
    """auto: a small twin on the very same batches, as a control."""
    paces: Annotated[str, Field(pattern=NAME)] | None = None
    """Of a pacer's own spec, which `submit` makes: the run that it is the pacer of, and with which it ends."""


class Sections(Part):
    """One run as its keys say, each sound by itself. Whether they can run together is not known yet."""

    name: Annotated[str, Field(pattern=NAME)]
    """The run's name: lower-case letters, digits, hyphens."""
    team: Annotated[str, Field(pattern=NAME)] | None = None
    """One of the monitor's configured teams, for routing alerts."""
    workload: Workload
    """What is trained."""
    data: Data | None = None
    """What it reads."""
    train: Train
    """How much, and how."""
    eval: Eval | None = None
    """Validation on the way; none without it, apart from the last step."""
    parallel: Parallel = Parallel()
    """How the model is laid out over GPUs."""
    cluster: Cluster = Cluster()
    """Where it runs."""
    kubernetes: Kubernetes | None = None
    """With `to: kuberay`."""
    checkpoints: Checkpoints = Checkpoints()
    """Where the run is kept."""
    law: Text | None = None
    """Path of a law.json: the prediction is made from it, registered and hashed at submit."""
    monitor: Monitor | None = None
    """Where samples go; nowhere without it."""
    policy: Policy = Policy()
    """What may be done without asking."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_that_depend(cls, value: Any) -> Any:
        """Write down what follows from other keys, so that the digest covers it: precision, vocab, decay_tokens."""
        if not isinstance(value, dict):
            return value
        value = dict(value)
        cluster, train, workload = (value.get(k) for k in ("cluster", "train", "workload"))
        if isinstance(train, dict):
            train = dict(train)
            if "precision" not in train:
                gpus = cluster.get("gpus_per_node") if isinstance(cluster, dict) else 0
                train["precision"] = "bf16" if gpus else "fp32"
            schedule, tokens = train.get("schedule"), whole(train.get("tokens"))
            if isinstance(schedule, dict) and schedule.get("kind") == "wsd" and isinstance(tokens, int):
                train["schedule"] = {"decay_tokens": tokens // 5, **schedule}
            value["train"] = train
        data = value.get("data")
        tokenizer = data.get("tokenizer", "bytes") if isinstance(data, dict) else None
        if (
            isinstance(workload, dict)
            and which_workload(workload) == "gpt"
            and workload.get("vocab") is None
            and tokenizer == "bytes"
        ):
            value["workload"] = {**workload, "vocab": 256}
        return value

    @property
    def context(self) -> int:
        """Tokens in a sequence; 1 for a user's own workload that states none."""
        return self.workload.context or 1

    @property
    def ranks(self) -> int:
        """Processes that train, dp x pp x tp."""
        return self.parallel.dp * self.parallel.pp * self.parallel.tp

    @property
    def gpus(self) -> int:
        """GPUs at full strength; 0 on CPU."""
        return self.cluster.nodes.max * self.cluster.gpus_per_node

    def dp_for(self, gpus: int) -> int:
        """Replicas an elastic run goes on with on so many GPUs: the most that fit and divide the batch. At least 1."""
        most = max(1, gpus // (self.parallel.pp * self.parallel.tp))
        return max(dp for dp in range(1, most + 1) if self.batch_sequences % dp == 0)

    @property
    def batch_sequences(self) -> int:
        """Sequences of one optimizer step over all ranks."""
        return self.train.batch_tokens // self.context

    @property
    def micro_batch(self) -> int:
        """Sequences a rank computes at once: as written, or derived.

        Derived: the largest divisor of the rank's share of a batch that stays within 16,384 tokens, and with a
        pipeline leaves at least four micro-batches a stage where the batch allows, to keep its stages busy.
        """
        if self.parallel.micro_batch is not None:
            return self.parallel.micro_batch
        share = max(1, self.batch_sequences // self.parallel.dp)
        most = max(1, 16_384 // self.context)
        if self.parallel.pp > 1:
            most = max(1, min(most, share // (4 * self.parallel.pp)))
        return max(n for n in range(1, min(most, share) + 1) if share % n == 0)

    @property
    def accumulation(self) -> int:
        """Micro-batches a rank computes for one optimizer step."""
        return max(1, self.batch_sequences // (self.parallel.dp * self.micro_batch))

    @property
    def total_steps(self) -> int:
        """Optimizer steps, the last batch whole."""
        return -(-self.train.tokens // self.train.batch_tokens)

    @property
    def warmup_steps(self) -> float:
        """Optimizer steps of warm-up, a fraction allowed."""
        return self.train.schedule.warmup_tokens / self.train.batch_tokens
