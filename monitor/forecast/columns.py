"""What people call their columns, and the units they write beside the name.

A unit in brackets after a name, or after an underscore or `in`, multiplies the values: `Model Size (B)`, `params_b` and
`params in billions` hold billions, `FLOPs (1E21)` units of 1e21, `loss (bits)` a loss that is counted in nats from here on.
"""

import math
import re

NAMES: dict[str, tuple[str, ...]] = {
    "run": ("run", "run_id", "run_name", "name", "model", "id"),
    "params": (
        "params",
        "n",
        "num_params",
        "n_params",
        "parameters",
        "model_size",
        "param_count",
        "model_params",
        "size",
        "num_parameters",
        "parameter_count",
        "non_embedding_params",
        "params_no_embedding",
        "total_params",
        "nparams",
        "non_embedding_parameters",
    ),
    "tokens": (
        "tokens",
        "d",
        "num_tokens",
        "n_tokens",
        "train_tokens",
        "training_tokens",
        "pretraining_data_size",
        "total_tokens",
        "tokens_seen",
        "token_count",
        "dataset_tokens",
        "tokens_trained",
        "ntokens",
        "dataset_size",
    ),
    "loss": ("loss", "final_loss", "train_loss", "training_loss", "l"),
    "flops": (
        "flops",
        "c",
        "compute",
        "flop",
        "training_flops",
        "training_flop",
        "train_flops",
        "total_flops",
    ),
    "step": ("step", "steps", "iteration", "iter", "global_step", "trainer_global_step", "_step"),
    "lr": ("lr", "learning_rate"),
    "val_loss": ("val_loss", "validation_loss", "eval_loss", "valid_loss", "final_val_loss"),
    "grad_norm": ("grad_norm", "gradient_norm"),
    "attempt": ("attempt",),
}
"""Our name for a column, and what else it is called; the first that the file has is taken, exact spelling first."""
FINAL_LOSS = (
    *("loss", "final_loss", *NAMES["val_loss"]),
    *(name for name in NAMES["loss"] if name not in ("loss", "final_loss")),
    *("cross_entropy", "cross_entropy_loss", "ce_loss", "nll", "test_loss", "final_train_loss"),
)
"""What a finished run's loss is called; one of validation before one of training."""
ALMOST = {
    "perplexity": "A perplexity's natural logarithm is a loss: write that into a column 'loss'.",
    "ppl": "A perplexity's natural logarithm is a loss: write that into a column 'loss'.",
    "bpb": "Bits per byte can be fitted as a loss: say --columns loss=bpb.",
    "bits_per_byte": "Bits per byte can be fitted as a loss: say --columns loss=bits_per_byte.",
}
"""Columns that are no loss and yet hold one, and what to do with them."""


_BRACKET = re.compile(r"\s*[(\[]\s*([^)\]]+?)\s*[)\]]\s*$")
_SCALES = {"k": 1e3, "m": 1e6, "mn": 1e6, "b": 1e9, "bn": 1e9, "g": 1e9, "t": 1e12, "tn": 1e12, "p": 1e15}
_SCALES |= {"thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
_PLAIN = {"count", "number", "total", "#", "nat", "nats/token", "nats per token", "nats_per_token"}
_BITS = {"bit", "bits/token", "bits per token", "bits_per_token"}
_COUNTED = {name for key in ("params", "tokens", "flops") for name in NAMES[key]}
_LOSSES = {*FINAL_LOSS, *NAMES["loss"]}
_POWER = re.compile(r"[x\u00d7*]?\s*10\s*(?:\^|\*\*)\s*(\d+)")
_SUFFIX = re.compile(r"(.+?)_(?:in_)?([a-z]+?)s?")


def scale_of(name: str) -> tuple[str, float]:
    """A column's plain name in lower case with `_` for blanks and slashes, and what its values are to be multiplied by.

    A bracket that is no unit stays in the name, so that two columns never become one by accident.
    """
    scale, plain = 1.0, name.strip()
    found = _BRACKET.search(plain)
    if found:
        known = _unit(found.group(1).lower())
        if known is not None:
            scale, plain = known, plain[: found.start()]
    plain = re.sub(r"[\s\-/]+", "_", plain.strip().lower())
    if found is None:
        plain, scale = _suffix(plain)
    return plain, scale


def _unit(text: str) -> float | None:
    """What a bracket's unit multiplies by; None when it is none."""
    words = [w for w in text.split() if w not in ("of", "params", "parameters", "tokens", "flop", "flops")]
    text = " ".join(words)
    for unit in (text, text.removesuffix("s")):
        if unit in _SCALES:
            return _SCALES[unit]
        if unit in _PLAIN or not unit:
            return 1.0
        if unit in _BITS:
            return math.log(2)
    power = _POWER.fullmatch(text)
    try:
        value = 10.0 ** int(power[1]) if power else float(text)
    except (ValueError, OverflowError):
        return None
    return value if value > 0 and math.isfinite(value) else None


def _suffix(plain: str) -> tuple[str, float]:
    """`params_b` and `loss_bits` without their unit, and what it multiplies by: only after names that have one."""
    if plain in ("bits_per_token", "nats_per_token"):
        return "loss", math.log(2) if plain.startswith("bits") else 1.0
    found = _SUFFIX.fullmatch(plain.removesuffix("_per_token"))
    if found:
        base, unit = found[1], found[2]
        if base in _LOSSES and unit in ("bit", "nat"):
            return base, math.log(2) if unit == "bit" else 1.0
        if base in _COUNTED and unit in _SCALES:
            return base, _SCALES[unit]
    return plain, 1.0
