"""Combinations of keys that run and will probably disappoint. Pure: it looks at nothing but the spec."""

import re
from collections.abc import Iterator

from launcher.runspec.accounting import parameter_count
from launcher.runspec.checks import LOOPBACK
from launcher.runspec.model import Gpt, RunSpec
from launcher.runspec.problem import Problem


def doubtful(spec: RunSpec) -> list[Problem]:
    """Every combination that runs and is probably not what was meant: advice, for `validate` and `plan` to print."""
    return [*_steps(spec), *_layout(spec), *_surroundings(spec)]


def _layout(spec: RunSpec) -> Iterator[Problem]:
    train, p = spec.train, spec.parallel
    if train.precision == "bf16" and not spec.cluster.gpus_per_node:
        yield Problem(
            ("train.precision", "cluster.gpus_per_node"),
            "bf16 on CPU is correct and many times slower than fp32. Set precision to fp32.",
        )
    elif train.precision == "bf16" and p.zero == 0 and spec.accumulation > 1:
        yield Problem(
            ("parallel.zero", "train.precision"),
            f"zero: 0 sums {spec.accumulation} micro-batches' gradients in bf16, and small ones are lost. "
            "Set zero to 1: it sums them in fp32.",
        )
    if p.pp > 1 and spec.accumulation < p.pp:
        bubble = (p.pp - 1) / (spec.accumulation + p.pp - 1)
        yield Problem(
            ("parallel.pp", "parallel.micro_batch"),
            f"{spec.accumulation} micro-batches through {p.pp} stages leave them idle {bubble:.0%} of the time. "
            "A smaller micro_batch or a larger batch helps.",
        )
    if isinstance(spec.workload, Gpt) and spec.workload.layers % p.pp:
        yield Problem(
            ("workload.layers", "parallel.pp"),
            f"{spec.workload.layers} layers over {p.pp} stages are uneven; the fullest stage sets the pace.",
        )
    fewest = spec.cluster.nodes.min * spec.cluster.gpus_per_node
    used = spec.dp_for(fewest) * p.pp * p.tp if fewest else 0
    if used < 0.75 * fewest:
        yield Problem(
            ("cluster.nodes", "train.batch_tokens"),
            f"with {spec.cluster.nodes.min} nodes, {used} of {fewest} GPUs would work: a batch of "
            f"{spec.batch_sequences} sequences divides no better. Choose a nodes.min that divides it.",
        )


def _steps(spec: RunSpec) -> Iterator[Problem]:
    train, steps = spec.train, spec.total_steps
    if train.tokens < train.batch_tokens:
        yield Problem(
            ("train.tokens", "train.batch_tokens"),
            f"{train.tokens} tokens are less than one batch of {train.batch_tokens}: the run is a single step. "
            "Counts are whole tokens: 2.5 billion is 2.5e9.",
        )
    elif spec.checkpoints.every_steps > steps and not spec.workload.is_script:
        yield Problem(
            ("checkpoints.every_steps", "train.tokens"),
            f"the run ends at step {steps}, before its first checkpoint at {spec.checkpoints.every_steps}; "
            "a failure loses all of it.",
        )
    if spec.eval is not None and spec.eval.every_steps > steps > 1:
        yield Problem(
            ("eval.every_steps", "train.tokens"),
            f"the run ends at step {steps}, before its first evaluation.",
        )
    if spec.eval is not None and spec.data is not None and spec.workload.context:
        need = spec.eval.batches * train.batch_tokens
        if need > spec.data.holdout_tokens:
            yield Problem(
                ("eval.batches", "data.holdout_tokens"),
                f"{spec.eval.batches} batches read {need} tokens and {spec.data.holdout_tokens} are held out: "
                "validation stops at what there is.",
            )
    params = parameter_count(spec)
    if params and spec.train.tokens / params < 1:
        yield Problem(
            ("train.tokens", "workload"),
            f"{spec.train.tokens:.3g} tokens for {params:.3g} parameters: fewer than one token a parameter.",
        )


def _surroundings(spec: RunSpec) -> Iterator[Problem]:
    if spec.cluster.price_per_gpu_hour and not spec.cluster.gpus_per_node:
        yield Problem(
            ("cluster.price_per_gpu_hour", "cluster.gpus_per_node"),
            "a price per GPU, and the run uses none.",
        )
    if spec.cluster.to not in ("local", "kuberay") and spec.monitor and LOOPBACK.match(spec.monitor.url):
        yield Problem(
            ("monitor.url", "cluster.to"),
            f"{spec.monitor.url} is each worker's own machine when seen from {spec.cluster.to}.",
        )
    if spec.cluster.to.startswith(("ray://", "http")):
        places = {"checkpoints.url": spec.checkpoints.url, "data.path": spec.data.path if spec.data else "/"}
        for key, url in places.items():
            if not url.startswith(("az://", "/", "~")) and url not in ("stdlib", "digits"):
                yield Problem(
                    (key, "cluster.to"),
                    f"{url!r} is relative: your machine resolves it, and the cluster at {spec.cluster.to} must have the "
                    "same folder there. Give the absolute path of a shared disk.",
                )
    for name in spec.kubernetes.env if spec.kubernetes else ():
        if re.search(r"(?i)token|secret|passw|api_?key|credential", name):
            yield Problem(
                (f"kubernetes.env.{name}",),
                "looks like a secret, and specs are kept and shared. Use a Kubernetes secret that the image's pods mount.",
            )


def not_yet(spec: RunSpec) -> list[Problem]:
    """What can be planned, and what this version of losscast refuses when it is submitted, or does not do yet."""
    found = []
    p = spec.parallel
    if spec.cluster.nodes.min < spec.cluster.nodes.max and (p.pp > 1 or p.tp > 1 or p.zero > 2):
        found.append(
            Problem(
                ("cluster.nodes", "parallel"),
                f"this version goes on with fewer nodes with ZeRO 0 to 2 and no pipeline or tensor parallel only: "
                f"it waits for all {spec.cluster.nodes.max}.",
            )
        )
    return found + refused(spec)


def refused(spec: RunSpec) -> list[Problem]:
    """What can be planned, and what `submit` refuses in this version."""
    found = []
    if spec.workload.is_script and spec.policy.on_divergence == "rollback":
        found.append(
            Problem(
                ("policy.on_divergence", "workload.entrypoint"),
                "a script picks its own batches, so losscast can leave none out; submit will refuse. "
                "Set on_divergence to recommend, or give a function that saves through its `run`.",
            )
        )
    return found
