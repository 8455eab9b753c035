"""The pacer of a run: a small twin on the very same batches, so that the judge can take their noise off the run's loss.

    twin_of(spec)    the twin's own spec, or in a sentence why there is none: a pure function of the run's spec

Same data, seed, batch, schedule and steps; another shape, and places of its own. Chosen so, of all shapes with the
run's head size, context and vocabulary (shallower and narrower, whatever keeps the run's proportions best):

size    a tenth of the run's training FLOPs a token, and at most a fifth (`SHARE`): batch noise is shared at 0.94 to
        0.98 with a run of a third to a fifteenth of the parameters (measured on tiny byte models), and less beyond
ranks   the fewest, in data parallel alone, at which the twin is faster than the run (`AHEAD`): what lags is no control.
        Its GPU-hours hardly depend on their number
memory  ZeRO's stage is raised, and activations are recomputed, until a rank fits where the GPU is known

There is none where it can't pay: without a monitor, on fewer than `STEPS` steps (a control is used from its 201st sample
on), or where no shape is small enough, as with a vocabulary whose embedding is most of the model.

FLOPs are those of `launcher.runspec.accounting`, attention scores included.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from launcher.errors import WrongInput
from launcher.runspec.accounting import attention_flops_per_token, flops_per_token
from launcher.runspec.gpus import gpu_named
from launcher.runspec.model import Gpt, RunSpec
from launcher.training.memory import rank_memory

SHARE = (1 / 15, 1 / 10, 1 / 5)
"""Of the run's FLOPs a token that a twin may cost: the least it should, what is aimed at, the most."""
AHEAD = 0.8
"""A twin's step takes at most this share of the run's time for one, by its FLOPs."""
STEPS = 400
"""A shorter run is over before its control has said much."""
FITS = 0.92
"""Of a GPU's memory that an estimate may fill."""
SUFFIX = "-pacer"
LEAST_HEAD = 4
"""Features of a head, at least."""


@dataclass(frozen=True)
class Twin:
    """A run's pacer, or why it has none."""

    spec: RunSpec | None
    why: str = ""
    """In a sentence, where there is none."""
    share: float = 0.0
    """Of the run's training FLOPs."""
    speed: float = 0.0
    """How many times faster than the run it should be, by FLOPs and ranks."""


def pacer_name(run: str) -> str:
    """The name of a run's pacer."""
    return run + SUFFIX


def step_flops(spec: RunSpec) -> float | None:
    """FLOPs a token, scores and recomputation included; None where the parameters are unknown."""
    per_token = flops_per_token(spec)
    if per_token is None:
        return None
    return (per_token + attention_flops_per_token(spec)) * (
        4 / 3 if spec.parallel.activation_checkpointing else 1
    )


def twin_of(spec: RunSpec) -> Twin:
    """The pacer that a spec asks for."""
    if spec.policy.pacer == "off":
        return Twin(None, "none was asked for")
    if spec.monitor is None:
        return Twin(None, "nobody would look at it: the spec names no monitor")
    if spec.total_steps < STEPS:
        return Twin(
            None, f"the run has {spec.total_steps} steps, and a control of fewer than {STEPS} says too little"
        )
    gpt, mine = spec.workload, step_flops(spec)
    if not isinstance(gpt, Gpt) or mine is None:
        return Twin(None, "only losscast's own gpt can be made smaller")
    found = list(_shapes(spec, gpt, mine))
    if not found:
        return Twin(
            None,
            "no smaller shape costs a fifth of the run or less: most of it is embeddings, which a twin needs too",
        )
    _, shape, share = min(found, key=lambda each: each[0])
    try:
        return _placed(spec, shape, share, mine)
    except WrongInput as error:  # a combination of keys that suits the run alone
        return Twin(None, f"its pacer's spec would be impossible: {error}")


def _shapes(spec: RunSpec, gpt: Gpt, mine: float) -> Iterator[tuple[float, Gpt, float]]:
    """Shapes within SHARE: how far each is from what is wanted, the shape, and its share of the run's FLOPs."""
    head = gpt.width // gpt.heads
    widths = [(n * head, n) for n in range(1, gpt.heads + 1)]
    widths += [(w, 1) for w in range(LEAST_HEAD, head, 2)]
    least, aim, most = SHARE
    for width, heads in widths:
        for layers in _depths(spec, gpt, width, heads, mine * aim):
            shape = gpt.model_copy(update={"width": width, "heads": heads, "layers": layers})
            share = _cost(spec, shape) / mine
            if share > most:
                continue
            odd = abs(math.log((width / layers) / (gpt.width / gpt.layers)))
            narrow = math.log(head * heads / width)  # heads that are smaller than the run's
            beyond = (
                10.0 if share < least else 0.0
            )  # smaller than it need be: only where nothing else is there
            yield abs(math.log(share / aim)) + 0.3 * odd + 0.3 * narrow + beyond, shape, share


def _depths(spec: RunSpec, gpt: Gpt, width: int, heads: int, wanted: float) -> list[int]:
    """Numbers of layers at which a width costs about what is wanted."""
    one, two = (
        _cost(spec, gpt.model_copy(update={"width": width, "heads": heads, "layers": n})) for n in (1, 2)
    )
    near = 1 + int((wanted - one) / (two - one))
    return [n for n in (near, near + 1) if 1 <= n <= gpt.layers] or ([1] if near < 1 else [])


def _cost(spec: RunSpec, shape: Gpt) -> float:
    found = step_flops(spec.model_copy(update={"workload": shape}))
    assert found is not None  # a gpt's parameters are known
    return found


def _placed(spec: RunSpec, shape: Gpt, share: float, mine: float) -> Twin:
    """The twin on the fewest ranks at which it is ahead and fits; on the most there are where it never is."""
    bubble = (spec.parallel.pp - 1) / (spec.accumulation + spec.parallel.pp - 1)
    pace = mine / (spec.ranks * (1 - bubble))
    whole = max(1, spec.cluster.gpus_per_node)
    counts = [
        dp
        for dp in range(1, spec.ranks + 1)
        if spec.batch_sequences % dp == 0 and (dp <= whole or not spec.gpus or dp % whole == 0)
    ]
    ahead = [dp for dp in counts if pace * dp * AHEAD >= share * mine]
    best: Twin | None = None
    for dp in ahead or counts[-1:]:
        for zero, again in ((min(1, spec.parallel.zero), False), (2, False), (2, True), (3, True)):
            twin = _made(spec, shape, dp, zero, again)
            cost = step_flops(twin)
            assert cost is not None
            if not _fits(twin):
                continue
            made = Twin(twin, "", cost / mine, pace * dp / cost)
            if made.speed >= 1 / AHEAD:
                return made
            best = made if best is None or made.speed > best.speed else best
            break  # the next layout only slows it down
    return best or Twin(None, "its pacer fits no GPU's memory at any layout")


def _fits(twin: RunSpec) -> bool:
    gpu, memory = gpu_named(twin.cluster.gpu), rank_memory(twin)
    if gpu is None or memory is None:
        return True
    return max(m.total for m in memory) <= FITS * gpu.memory_bytes


def _made(spec: RunSpec, shape: Gpt, dp: int, zero: int, again: bool) -> RunSpec:
    """The twin's spec on `dp` ranks."""
    body = spec.to_dict()
    per_node = min(dp, spec.cluster.gpus_per_node)
    body |= {
        "name": pacer_name(spec.name),
        "workload": shape.model_dump(mode="json"),
        "eval": None,
        "law": None,
        "parallel": {"dp": dp, "zero": zero, "activation_checkpointing": again},
        "policy": {
            "max_restarts": min(3, spec.policy.max_restarts),
            "on_divergence": "observe",
            "pacer": "off",
            "paces": spec.name,
        },
    }
    if body["kubernetes"]:
        body["kubernetes"]["shared_memory_gib"] = None  # was for all of a node's GPUs
    body["cluster"] |= {"nodes": -(-dp // per_node) if per_node else 1, "gpus_per_node": per_node}
    return RunSpec.from_dict(body)


def control_of(spec: RunSpec) -> str | None:
    """The run that the judge should hold this one against; None without a pacer."""
    return None if twin_of(spec).spec is None else pacer_name(spec.name)
