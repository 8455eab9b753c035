"""Combinations of keys that can't run.

Most of these DeepSpeed would find at engine start, on every GPU at once, or never. `impossible` is empty for every
`RunSpec` that exists. Pure: it looks at nothing but the spec. A problem names every key that takes part in it, since any
of them may be the wrong one. What runs and will probably disappoint is in `launcher.runspec.doubts`.
"""

import re
from collections.abc import Iterator

from launcher.runspec.checks_kuberay import impossible_on_kubernetes
from launcher.runspec.keys import AZ_URL
from launcher.runspec.problem import Problem
from launcher.runspec.sections import Sections
from launcher.runspec.workload import Entrypoint, Gpt

NO_BF16 = re.compile(
    r"(?i)\b(k80|m40|m60|p4|p40|p100|v100|t4|gtx|titan|rtx ?(20|5000|6000|8000)\w*|quadro)\b"
)
"""NVIDIA models before Ampere: no bfloat16 arithmetic."""
LONGEST_PACED = 57
"""Characters of a name that leave room for -pacer."""
LARGEST_LR = 1.0
"""Adam's step is about lr a weight, whatever the gradient, and weights start well below 1: above it nothing is learnt."""
LOOPBACK = re.compile(r"https?://(localhost|127\.[0-9.]+|\[::1\])([:/]|$)")


def impossible(spec: Sections) -> list[Problem]:
    """Every combination in the spec that can't run."""
    return [
        *_shape(spec),
        *_batch(spec),
        *_layout(spec),
        *_schedule(spec),
        *_places(spec),
        *_policy(spec),
        *impossible_on_kubernetes(spec),
    ]


def either(words: list[str]) -> str:
    """a, b or c."""
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]


def _divisors_near(number: int, wanted: int, count: int = 3) -> str:
    """Divisors of `number` closest to `wanted`, as words. Looks 4,096 either way."""
    near = [d for d in range(max(1, wanted - 4096), wanted + 4097) if number % d == 0]
    return either([str(d) for d in sorted(sorted(near or [1], key=lambda d: (abs(d - wanted), d))[:count])])


def _round_to(value: int, multiple: int) -> str:
    """The multiples just under and over `value`, as words."""
    under, over = value // multiple * multiple, -(-value // multiple) * multiple
    return f"{under} or {over}" if under else str(over)


def _slipped(value: float) -> str:
    """The number that was meant where a minus is missing from its exponent: 6e4 for 6e-4."""
    exponent = int(f"{value:e}".split("e")[1])
    return f" Did you mean {value / 10**exponent:g}e-{exponent}?" if exponent > 0 else ""


def _shape(spec: Sections) -> Iterator[Problem]:
    gpt = spec.workload
    if not isinstance(gpt, Gpt):
        if spec.train.lr_base_width is not None:
            yield Problem(
                ("train.lr_base_width", "workload.entrypoint"),
                "scales rates by the built-in gpt's width, and this run trains a model of its own. "
                "Leave lr_base_width out.",
            )
        if gpt.args and gpt.is_script != isinstance(gpt.args, tuple):
            takes = "a script takes a list, as on a command line: args: [--epochs, 3]"
            yield Problem(
                ("workload.args", "workload.entrypoint"),
                takes + "." if gpt.is_script else "a function takes a mapping: args: {epochs: 3}.",
            )
        return
    if gpt.width % gpt.heads:
        yield Problem(
            ("workload.width", "workload.heads"),
            f"width {gpt.width} does not divide into {gpt.heads} heads. "
            f"Set heads to {_divisors_near(gpt.width, gpt.heads)}, or width to "
            f"{_round_to(gpt.width, gpt.heads)}.",
        )
    elif gpt.positions == "rotary" and gpt.width == gpt.heads:
        yield Problem(
            ("workload.width", "workload.heads", "workload.positions"),
            "rotary positions turn features in pairs, and a head has one. Use fewer heads, or set positions to learned.",
        )
    if spec.data is None:
        yield Problem(
            ("workload.kind", "data"),
            "a gpt reads data. Add data: {path: ./corpus} (or stdlib).",
        )
    elif (spec.data.path == "digits") != (gpt.patch is not None):
        yield Problem(
            ("data.path", "workload.patch"),
            "digits are images, and this model reads text alone. Set workload.patch to 2, or data.path to a corpus."
            if gpt.patch is None
            else f"patch is for images, and {spec.data.path} is text. Leave patch out, or set data.path to digits.",
        )
    elif gpt.patch is not None and gpt.context <= (8 // gpt.patch) ** 2:
        yield Problem(
            ("workload.context", "workload.patch"),
            f"an image takes {(8 // gpt.patch) ** 2} positions, and context {gpt.context} leaves none for text. "
            f"Set context to {(8 // gpt.patch) ** 2 + 32}.",
        )
    elif spec.data.path in ("stdlib", "digits") and spec.data.tokenizer != "bytes":
        yield Problem(
            ("data.path", "data.tokenizer"),
            f"{spec.data.path} is read as bytes, and the tokenizer is {spec.data.tokenizer}. Set tokenizer to bytes.",
        )
    elif gpt.vocab is None:
        yield Problem(
            ("workload.vocab", "data.tokenizer"),
            f"the size of {spec.data.tokenizer}'s vocabulary is not known here. Set workload.vocab to it.",
        )
    elif spec.data.tokenizer == "bytes" and gpt.vocab < 256:
        yield Problem(
            ("workload.vocab", "data.tokenizer"),
            f"bytes are 256 tokens, and vocab is {gpt.vocab}. Set vocab to 256 or more, or leave it out.",
        )


def _batch(spec: Sections) -> Iterator[Problem]:
    batch, context, dp = (
        spec.train.batch_tokens,
        spec.workload.context,
        spec.parallel.dp,
    )
    if context is None:
        return
    if batch % context:
        yield Problem(
            ("train.batch_tokens", "workload.context"),
            f"a batch of {batch} tokens is not a whole number of sequences of {context}. "
            f"Set batch_tokens to {_round_to(batch, context * dp)}.",
        )
        return
    sequences = batch // context
    if sequences % dp:
        yield Problem(
            ("train.batch_tokens", "workload.context", "parallel.dp"),
            f"{sequences} sequences a step do not divide over {dp} data-parallel replicas. "
            f"Set batch_tokens to {_round_to(batch, context * dp)}, or dp to {_divisors_near(sequences, dp)}.",
        )
        return
    micro = spec.parallel.micro_batch
    if micro is not None and (sequences // dp) % micro:
        share = sequences // dp
        yield Problem(
            (
                "parallel.micro_batch",
                "parallel.dp",
                "train.batch_tokens",
                "workload.context",
            ),
            f"each replica computes {share} sequences a step, not a whole number of micro-batches of {micro}. "
            f"Set micro_batch to {_divisors_near(share, micro)}, or batch_tokens to "
            f"{_round_to(batch, context * dp * micro)}.",
        )


def _layout(spec: Sections) -> Iterator[Problem]:
    p, gpt, cluster = spec.parallel, spec.workload, spec.cluster
    if p.pp > 1 and p.zero >= 2:
        yield Problem(
            ("parallel.zero", "parallel.pp"),
            f"zero: {p.zero} can't run with pp: {p.pp}: DeepSpeed's pipeline supports ZeRO 0 and 1. "
            "Set zero to 1, or pp to 1.",
        )
    if p.tp > 1 and p.pp > 1:
        yield Problem(
            ("parallel.tp", "parallel.pp"),
            f"tp: {p.tp} can't run with pp: {p.pp}: DeepSpeed's automatic tensor parallelism knows no "
            "pipeline. Set one of them to 1.",
        )
    if p.tp > 1 and p.zero == 3:
        yield Problem(
            ("parallel.tp", "parallel.zero"),
            f"tp: {p.tp} can't run with zero: 3: DeepSpeed's automatic tensor parallelism supports ZeRO 0 to 2. "
            "Set zero to 2, or tp to 1.",
        )
    if p.offload == "cpu" and p.zero == 0:
        yield Problem(
            ("parallel.offload", "parallel.zero"),
            "offload moves what ZeRO shards, and zero: 0 shards nothing. Set zero to 1, or offload to none.",
        )
    if isinstance(gpt, Gpt):
        if p.pp > gpt.layers:
            yield Problem(
                ("parallel.pp", "workload.layers"),
                f"{gpt.layers} layers can't fill {p.pp} pipeline stages. Set pp to at most {gpt.layers}.",
            )
        if p.tp > 1 and gpt.heads % p.tp:
            yield Problem(
                ("parallel.tp", "workload.heads"),
                f"{gpt.heads} heads do not divide over tp: {p.tp}. "
                f"Set tp to {_divisors_near(gpt.heads, p.tp)}.",
            )
    nodes = cluster.nodes
    if nodes.min > nodes.max:
        yield Problem(
            ("cluster.nodes.min", "cluster.nodes.max"),
            f"min {nodes.min} is above max {nodes.max}. Swap them.",
        )
    elif cluster.gpus_per_node:
        yield from _ranks(spec)
    if cluster.to == "local" and nodes.max > 1:
        yield Problem(
            ("cluster.to", "cluster.nodes"),
            f"local is this one machine, and nodes is {nodes.max}. Set nodes to 1, or `to` to a Ray cluster.",
        )
    if spec.train.precision == "bf16" and cluster.gpu and NO_BF16.search(cluster.gpu):
        yield Problem(
            ("train.precision", "cluster.gpu"),
            f"{cluster.gpu} has no bf16 arithmetic (NVIDIA has it since Ampere). Set precision to fp32.",
        )


def _ranks(spec: Sections) -> Iterator[Problem]:
    p, cluster = spec.parallel, spec.cluster
    keys = (
        "parallel.dp",
        "parallel.pp",
        "parallel.tp",
        "cluster.nodes",
        "cluster.gpus_per_node",
    )
    model, gpus = p.pp * p.tp, spec.gpus
    if spec.ranks != gpus:
        instead = (
            f"Set dp to {gpus // model}."
            if gpus % model == 0
            else f"pp x tp = {model} does not divide {gpus}: change pp, tp or the number of GPUs."
        )
        yield Problem(
            keys,
            f"dp {p.dp} x pp {p.pp} x tp {p.tp} = {spec.ranks} ranks, and {cluster.nodes.max} x "
            f"{cluster.gpus_per_node} = {gpus} GPUs. {instead}",
        )
        return
    least = cluster.nodes.min * cluster.gpus_per_node
    if least < model:
        yield Problem(
            ("cluster.nodes.min", "parallel.pp", "parallel.tp"),
            f"one replica takes pp x tp = {model} GPUs, and the fewest nodes have {least}. "
            f"Set nodes.min to {-(-model // cluster.gpus_per_node)} or more, or make pp x tp smaller.",
        )


def _schedule(spec: Sections) -> Iterator[Problem]:
    train, schedule = spec.train, spec.train.schedule
    decay = schedule.decay_tokens
    if schedule.warmup_tokens > train.tokens:
        yield Problem(
            ("train.schedule.warmup_tokens", "train.tokens"),
            f"the warm-up of {schedule.warmup_tokens} tokens outlasts the run's {train.tokens}. "
            f"1% of the run would be {max(1, train.tokens // 100)}.",
        )
    elif schedule.kind == "wsd" and decay is not None and schedule.warmup_tokens + decay > train.tokens:
        yield Problem(
            (
                "train.schedule.warmup_tokens",
                "train.schedule.decay_tokens",
                "train.tokens",
            ),
            f"warm-up {schedule.warmup_tokens} and decay {decay} do not fit into {train.tokens} tokens. "
            f"Set decay_tokens to at most {train.tokens - schedule.warmup_tokens}.",
        )
    if schedule.kind != "wsd" and decay is not None:
        yield Problem(
            ("train.schedule.decay_tokens", "train.schedule.kind"),
            f"decay_tokens is for kind: wsd; {schedule.kind} "
            + ("never decays" if schedule.kind == "constant" else "decays from the warm-up to the end")
            + ". Leave it out, or set kind to wsd.",
        )
    if isinstance(spec.workload, Gpt) and train.lr > LARGEST_LR:
        yield Problem(
            ("train.lr",),
            f"Adam moves every weight by about lr a step, and {train.lr:g} is far more than the weights are."
            f"{_slipped(train.lr)} Rates that train are near 1e-3.",
        )
    if schedule.final_lr > train.lr:
        yield Problem(
            ("train.schedule.final_lr", "train.lr"),
            f"final_lr {schedule.final_lr:g} is above lr {train.lr:g}; it is an absolute rate, not a fraction. "
            f"A tenth of the peak is {train.lr / 10:g}.",
        )
    if schedule.kind == "constant" and schedule.final_lr:
        yield Problem(
            ("train.schedule.final_lr", "train.schedule.kind"),
            f"a constant schedule ends at lr, not at {schedule.final_lr:g}. Leave final_lr out, or set kind to "
            "linear, cosine or wsd.",
        )
    for index, beta in enumerate(train.optimizer.betas):
        if not 0 <= beta < 1:
            yield Problem(
                (f"train.optimizer.betas.{index}",),
                f"need 0 <= beta < 1; got {beta:g}. Adam's usual pair is [0.9, 0.95].",
            )


def _places(spec: Sections) -> Iterator[Problem]:
    remote = spec.cluster.to == "kuberay"
    if remote and spec.kubernetes is None:
        yield Problem(
            ("cluster.to", "kubernetes"),
            "a RayJob needs to know its image. Add kubernetes: {image: registry/name:tag}.",
        )
    if not remote and spec.kubernetes is not None:
        yield Problem(
            ("kubernetes", "cluster.to"),
            f"the kubernetes section is read with `to: kuberay` only, and `to` is {spec.cluster.to}. Remove it, or set "
            "`to` to kuberay.",
        )
    urls = [("checkpoints.url", spec.checkpoints.url)]
    if spec.data is not None:
        urls.append(("data.path", spec.data.path))
    for key, url in urls:
        if "://" in url and not url.startswith("az://"):
            scheme = url.split("://")[0]
            yield Problem(
                (key,),
                f"no storage is called {scheme}://. Use a folder, or az://account/container/prefix.",
            )
        elif url.startswith("az://") and not AZ_URL.fullmatch(url):
            yield Problem(
                (key,),
                f"{url!r} is not az://account/container/prefix: account is 3 to 24 lower-case letters and digits, "
                "container 3 to 63 of them and hyphens.",
            )
        elif remote and not url.startswith(("az://", "/")) and url not in ("stdlib", "digits"):
            if key == "data.path" and spec.kubernetes and spec.kubernetes.working_dir:
                continue  # travels with the working directory
            yield Problem(
                (key, "cluster.to"),
                f"{url!r} is a folder here, and a pod on the cluster can't see it. "
                "Use az://account/container/prefix, or the absolute path of a mounted volume.",
            )
    if spec.monitor is not None and "@" in spec.monitor.url.split("://")[1].split("/")[0]:
        yield Problem(
            ("monitor.url",),
            "holds a user or a password, and specs are kept and shared. Put the token into the environment variable "
            f"{spec.monitor.token_env}.",
        )
    if remote and spec.monitor is not None and LOOPBACK.match(spec.monitor.url):
        yield Problem(
            ("monitor.url", "cluster.to"),
            f"{spec.monitor.url} is the pod itself when seen from the cluster. "
            "Use the monitor's service, such as http://losscast-monitor.losscast:8700.",
        )


def _policy(spec: Sections) -> Iterator[Problem]:
    policy = spec.policy
    if policy.on_divergence != "observe" and spec.monitor is None:
        yield Problem(
            ("policy.on_divergence", "monitor"),
            f"{policy.on_divergence} acts on what the monitor says, and none is given. "
            "Add monitor: {url: http://127.0.0.1:8700}, or set on_divergence to observe.",
        )
    if policy.pacer == "auto" and isinstance(spec.workload, Entrypoint):
        yield Problem(
            ("policy.pacer", "workload.entrypoint"),
            "a pacer is a smaller twin, and losscast can shrink only its own gpt. Set pacer to off.",
        )
    if policy.pacer == "auto" and len(spec.name) > LONGEST_PACED:
        yield Problem(
            ("policy.pacer", "name"),
            f"the pacer's name is the run's with -pacer behind it, 63 characters at most, and {spec.name} has "
            f"{len(spec.name)}. Give the run a name of at most {LONGEST_PACED}, or set pacer to off.",
        )
    if policy.paces is not None and (policy.pacer == "auto" or policy.paces == spec.name):
        yield Problem(
            ("policy.paces", "policy.pacer" if policy.pacer == "auto" else "name"),
            "a pacer has no pacer, and is not its own. Leave paces out: it is for the spec that losscast makes of a twin.",
        )
    if spec.eval is not None and spec.data is not None and spec.data.holdout_tokens < spec.context:
        yield Problem(
            ("eval", "data.holdout_tokens"),
            f"validation needs at least one sequence of {spec.context} held-out tokens; holdout_tokens is "
            f"{spec.data.holdout_tokens}. Raise it, or remove eval.",
        )
