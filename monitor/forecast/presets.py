"""Published laws by name, with their conventions and standard errors, so that they can be predicted from and compared.

    hoffmann   Hoffmann et al. 2022, arXiv:2203.15556, eq. 10 (appendix D.3): as printed, without standard errors. Besiroglu
               et al. found the exponents in its TeX source with more digits, 0.3392 and 0.2849, and the rounding to bias it
    hoffmann_tex  the same with the digits of its TeX source, as Besiroglu et al. give them
    epoch      Besiroglu et al. 2024, arXiv:2404.10102: the same runs read off a figure and fitted again, with standard errors
    kaplan     Kaplan et al. 2020, arXiv:2001.08361, eq. 1.3: the frontier of compute, C in PF-days there, for runs at the best
               size and at batches well below the critical one; the law of `C_min`, not that of `C` (exponent 0.057)

All on their authors' own text and tokenizers: a loss predicted from one holds for no other text. Intervals
come from the printed standard errors, taken as independent, which makes them too wide for the sum. Ranges are those of
the papers' own runs, where they say them (Hoffmann et al.: 70M to 16B parameters on 5B to 500B tokens; Kaplan et al.: 22M to 23B tokens; Besiroglu et al.: the runs they
kept of those they read off).
"""

import math
from typing import Any

import numpy as np

from monitor.errors import WrongInput
from monitor.forecast.law import PARAMETERS, Law, Member, log_loss

_PF_DAY = 8.64e19
NO_ERRORS = "published without standard errors"
"""How the reason begins that such a law gives for its interval."""

PRESETS: dict[str, dict[str, Any]] = {
    "hoffmann": {
        "form": "chinchilla",
        "values": (1.69, 406.4, 410.7, 0.34, 0.28),
        "errors": None,
        "range": {"params": (7e7, 1.6e10), "tokens": (5e9, 5e11), "flops": (6e18, 3e21)},
        "conventions": {
            "params": "embeddings included",
            "loss": "nats per token",
            "data": "MassiveText",
            "tokenizer": "SentencePiece, 32k",
            "vocabulary": "32000",
            "source": "Hoffmann et al. 2022, arXiv:2203.15556, eq. 10, as printed",
        },
    },
    "hoffmann_tex": {
        "form": "chinchilla",
        "values": (1.6934, 406.4, 410.7, 0.3392, 0.2849),
        "errors": None,
        "range": {"params": (7e7, 1.6e10), "tokens": (5e9, 5e11), "flops": (6e18, 3e21)},
        "conventions": {
            "params": "embeddings included",
            "loss": "nats per token",
            "data": "MassiveText",
            "tokenizer": "SentencePiece, 32k",
            "vocabulary": "32000",
            "source": "Hoffmann et al. 2022, arXiv:2203.15556, digits of its TeX source from Besiroglu et al. 2024, arXiv:2404.10102",
        },
    },
    "epoch": {
        "form": "chinchilla",
        "values": (1.8172, 482.01, 2085.43, 0.3478, 0.3658),
        "errors": (0.03, 124.58, 1293.23, 0.02, 0.02),
        "range": {"params": (5.7e7, 1.6e10), "tokens": (8.2e8, 3.2e11), "flops": (1.4e18, 1.3e22)},
        "conventions": {
            "params": "embeddings included",
            "loss": "nats per token",
            "data": "MassiveText, read off a figure",
            "tokenizer": "SentencePiece, 32k",
            "vocabulary": "32000",
            "source": "Besiroglu et al. 2024, arXiv:2404.10102",
        },
    },
    "kaplan": {
        "form": "frontier",
        "values": (0.0, (3.1e8 * _PF_DAY) ** 0.050, 0.050),
        "errors": None,
        "range": {"params": (8e2, 1.5e9), "tokens": (2.2e7, 2.3e10), "flops": (1e12, 1e20)},
        "conventions": {
            "params": "embeddings not counted",
            "loss": "nats per token",
            "data": "WebText2",
            "tokenizer": "GPT-2 BPE, 50k",
            "vocabulary": "50257",
            "source": "Kaplan et al. 2020, arXiv:2001.08361, eq. 1.3",
        },
    },
}


def named(text: str) -> Law:
    """A published law by its name, else the law in a file."""
    return preset(text) if text in PRESETS else Law.read(text)


def preset(name: str) -> Law:
    """A published law. Raises WrongInput, naming those there are, for another name."""
    if name not in PRESETS:
        raise WrongInput(f"preset {name!r}: there is none; choose from {', '.join(PRESETS)}")
    entry = PRESETS[name]
    values, errors = np.array(entry["values"], float), entry["errors"]
    draws = values[None]
    if errors is not None:
        # A and alpha (B and beta) move together: at the runs' centre the term itself is known far better than A.
        rng = np.random.default_rng(0)
        draws = values + rng.standard_normal((256, values.size)) * np.array(errors)
        middle = {k: math.exp(sum(map(math.log, entry["range"][k])) / 2) for k in ("params", "flops")}
        middle["tokens"] = middle["flops"] / 6 / middle["params"]
        draws[:, 1] = values[1] * middle["params"] ** (draws[:, 3] - values[3])
        draws[:, 2] = values[2] * middle["tokens"] ** (draws[:, 4] - values[4])
    names = PARAMETERS[entry["form"]]
    # corners of what was trained, each with the compute of its size and tokens: the least of it, and the most
    runs: dict[str, list[Any]] = {"run": [], "params": [], "tokens": [], "flops": [], "loss": []}
    for end, i in (("least", 0), ("most", 1)):
        params, tokens, flops = (float(entry["range"][k][i]) for k in ("params", "tokens", "flops"))
        runs["run"] += [f"{end} parameters", f"{end} tokens"]
        runs["params"] += [params, flops / 6 / tokens]
        runs["tokens"] += [flops / 6 / params, tokens]
        runs["flops"] += [flops, flops]
    at = [np.array(runs[k], dtype=float) for k in ("params", "tokens", "flops")]
    runs["loss"] = np.exp(log_loss(entry["form"], values[None], *at)[0]).tolist()
    why = "" if errors is not None else f"{NO_ERRORS}: the interval shows drift alone"
    return Law(
        name,
        (Member(entry["form"], 1.0, tuple(values.tolist()), draws),),
        0.005,
        0.13,
        runs,
        errors is not None,
        why,
        dict(zip(names, values.tolist(), strict=True)),
        dict(zip(names, errors if errors is not None else [None] * len(names), strict=True)),
        {"best_form": entry["form"], "objective": None, "rmse": None, "seconds": 0.0},
        conventions=entry["conventions"],
    )
