"""Whether a law speaks of this run: the same parameters, the same loss, the same tokenizer, the same schedule.

A law fitted to losses per byte says nothing of a run measured per BPE token, and one that counts no embeddings
would be asked about another N. What a law does not say of itself is taken on trust.
"""

from collections.abc import Mapping

from launcher.runspec.model import RunSpec
from launcher.runspec.problem import Problem

PARAMS = "embeddings included"
LOSS = "nats per token"


def conventions(spec: RunSpec) -> dict[str, str]:
    """What a law fitted to runs like this one should say of itself."""
    said = {"params": PARAMS, "loss": LOSS, "schedule": schedule_shape(spec)}
    if spec.data is not None:
        said["tokenizer"] = spec.data.tokenizer
    return said


def schedule_shape(spec: RunSpec) -> str:
    """The schedule's kind and end, sizes left out: `wsd, decay 20%, to 0`."""
    schedule, train = spec.train.schedule, spec.train
    if schedule.kind == "constant":
        return "constant"
    decay = (
        f", decay {100 * (schedule.decay_tokens or 0) / train.tokens:.0f}%" if schedule.kind == "wsd" else ""
    )
    return f"{schedule.kind}{decay}, to {schedule.final_lr / train.lr:.2g}"


def mismatches(spec: RunSpec, law: Mapping[str, str], where: str) -> list[Problem]:
    """Why this law can't predict this run. `law` is law.json's `conventions`, `where` its path."""
    keys = {"tokenizer": "data.tokenizer", "params": "law", "loss": "law"}
    found = []
    for name, mine in conventions(spec).items():
        theirs = law.get(name)
        if theirs is None or theirs == mine or name not in keys:
            continue
        what = {"tokenizer": "tokenizer", "params": "count of parameters", "loss": "unit of loss"}[name]
        found.append(
            Problem(
                tuple(dict.fromkeys(("law", keys[name]))),
                f"{where} was fitted with another {what}: {theirs}; this run's is {mine}. Its losses are not this run's. "
                "Use a law of your own ladder, or leave `law` out.",
            )
        )
    return found


def doubts(spec: RunSpec, law: Mapping[str, str], where: str) -> list[Problem]:
    """What makes this law's prediction of this run less than it says."""
    theirs, mine = law.get("schedule"), schedule_shape(spec)
    if theirs is None or theirs == mine:
        return []
    return [
        Problem(
            ("law", "train.schedule"),
            f"{where} was fitted to runs with the schedule {theirs}, and this run's is {mine}: it will end elsewhere, "
            "by a few percent, and the prediction does not know. Make the schedules alike.",
        )
    ]
