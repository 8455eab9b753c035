"""A law as plain data to draw: its runs, its line with the band, what was left out, and predictions made from it.

Everything is a JSON-able number, text or None; losses in the runs' own unit (nats per token, unless `conventions` says
otherwise), flops as the runs count them. The line follows the runs' own tokens per parameter, in their median, from
the smallest run to `beyond` times the largest; a run at another ratio is off it, so each run also carries what
the law makes of it, `fitted`, at its own size and data. Pure: no clock, no files; the same law gives the same data.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from monitor.forecast.law import Law

Spot = tuple[float | None, float | None, float]
"""params, tokens, flops of a place on the line; the first two None for a law of compute alone."""


def law_view(
    law: Law, predictions: Sequence[Mapping[str, Any]] = (), *, beyond: float = 100.0, count: int = 60
) -> dict[str, Any]:
    """What a picture of the law needs.

    predictions   bodies of prediction.json; those not made from this law are passed over
    beyond        how far past the largest run the line goes, times its compute; further if a prediction lies there

    Returns `runs` (run, params, tokens, flops, loss, fitted, off: observed over fitted minus 1), `excluded` (run,
    reason, flops, loss), `line` (flops, p05, p50, p95, and `fitted_to`, the compute up to which there are runs),
    `predictions` (run, flops, p05, p50, p95), and the law's form, parameters, standard errors, digest and doubts.
    """
    largest = max(float(v) for v in law.runs["flops"])
    smallest = min(float(v) for v in law.runs["flops"])
    shown = [_predicted(body, largest) for body in predictions if body.get("law_digest") == law.digest]
    end = max([largest * beyond, *(1.25 * p["flops"] for p in shown)])
    spots = line_spots(law, np.geomspace(smallest, end, count))
    quantiles = [law.predict(*spot) for spot in spots]
    return {
        "form": law.form,
        "best_form": law.fit.get("best_form", law.form),
        "parameters": law.parameters,
        "standard_errors": law.standard_errors,
        "identifiable": law.identifiable,
        "why": law.why,
        "conventions": law.conventions,
        "digest": law.digest,
        "runs": _runs(law),
        "excluded": [dict(e) for e in law.excluded],
        "line": {
            "flops": [spot[2] for spot in spots],
            **{key: [getattr(q, key) for q in quantiles] for key in ("p05", "p50", "p95")},
            "fitted_to": largest,
        },
        "predictions": shown,
    }


def line_spots(law: Law, flops: np.ndarray) -> list[Spot]:
    """Params, tokens and flops along the runs' own ratio of tokens to parameters, for compute (n,)."""
    if any(v is None for key in ("params", "tokens") for v in law.runs[key]):
        return [(None, None, float(c)) for c in flops]
    params, tokens, own = (np.array(law.runs[k], float) for k in ("params", "tokens", "flops"))
    ratio = float(np.median(tokens / params))
    scale = float(np.median(own / (6 * params * tokens)))
    sizes = np.sqrt(flops / (6 * scale * ratio))
    return [(float(n), float(n * ratio), float(c)) for n, c in zip(sizes, flops, strict=True)]


def _runs(law: Law) -> list[dict[str, Any]]:
    keys: list[str] = ["run", "params", "tokens", "flops", "loss"]
    columns = [law.runs[key] for key in keys]
    rows = [dict(zip(keys, values, strict=True)) for values in zip(*columns, strict=True)]
    for row in rows:
        row["fitted"] = law.predict(row["params"], row["tokens"], row["flops"]).p50
        row["off"] = row["loss"] / row["fitted"] - 1
    return rows


def _predicted(body: Mapping[str, Any], largest: float) -> dict[str, Any]:
    return {
        "run": body.get("run"),
        "flops": float(body["extrapolation"]["flops_ratio"]) * largest,
        **{key: float(body["final_loss"][key]) for key in ("p05", "p50", "p95")},
    }
