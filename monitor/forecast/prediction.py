"""Prediction: the loss a run should end at, and the loss it should show on the way, written down before it starts.

    prediction.json   final_loss and curve with quantiles p05, p50, p95, nats per token; the schedule assumed; the
                      law's digest; when it was made; its own digest

The quantiles of `curve` are of the mean training loss at a step: what many runs of this setting would average to.
One step of one run scatters about it by `step_sd` more. A registered prediction is never overwritten.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from monitor.errors import WrongInput, unwritable
from monitor.forecast import curve as curves_of
from monitor.forecast.anneal import Schedule, own_shape, predicted
from monitor.forecast.law import Law, Quantiles, digest_of, read_json
from monitor.forecast.task import metric_quantiles

VERSION = 1
WIDE = 0.15
"""Width of a 90% interval, as a share of the loss, from which on a run is called not identifiable."""


@dataclass(frozen=True)
class Prediction:
    """What was predicted for one run. `body` is prediction.json without its digest."""

    body: dict[str, Any]

    @property
    def final_loss(self) -> Quantiles:
        """Validation loss at the end of the run."""
        return Quantiles(**self.body["final_loss"])

    @property
    def curve(self) -> dict[str, list[float]] | None:
        """step, tokens, p05, p50, p95 of equal length; None when the law knows no curve."""
        return self.body["curve"]

    @property
    def digest(self) -> str:
        """sha256 of prediction.json without its digest."""
        return digest_of(self.body)

    def to_dict(self) -> dict[str, Any]:
        """prediction.json, its digest included."""
        return {**self.body, "digest": self.digest}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "prediction.json") -> "Prediction":
        """The prediction in a read document. Raises WrongInput when it is none or does not match its digest."""
        if not isinstance(data, Mapping) or "final_loss" not in data or "digest" not in data:
            raise WrongInput(
                f"{source}: is no prediction.json; make one with `losscast predict law.json ... -o prediction.json`"
            )
        body = {k: v for k, v in data.items() if k != "digest"}
        if digest_of(body) != data["digest"]:
            raise WrongInput(
                f"{source}: does not match its digest: it was changed after it was made; predict again"
            )
        return cls(body)

    @classmethod
    def read(cls, path: str | Path) -> "Prediction":
        """The prediction in a file."""
        return cls.from_dict(
            read_json(path, "a prediction.json (`losscast predict ... -o prediction.json` makes one)"),
            str(path),
        )

    def write(self, path: str | Path) -> None:
        """Write prediction.json; the file must not exist. Raises WrongInput when it does."""
        import json

        path, body = Path(path), self.to_dict()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "x", encoding="utf-8") as out:
                json.dump(body, out, allow_nan=False)
                out.write("\n")
        except OSError as error:
            if path.exists() and not path.is_dir():
                raise WrongInput(
                    f"{path}: exists, and a prediction is never overwritten; write the new one to another file"
                ) from None
            raise unwritable(path, error) from None


def predict(
    law: Law,
    *,
    params: float | None = None,
    tokens: float | None = None,
    flops: float | None = None,
    batch_tokens: float | None = None,
    schedule: Schedule | str | None = None,
    made_at: float | None = None,
) -> Prediction:
    """The prediction of a run of `params` and `tokens`, its batch (tokens a step) the fitted runs' unless said otherwise.

    schedule  as `anneal.Schedule.parse` takes it; the fitted runs' own shape, stretched, when left out
    made_at   seconds since the epoch; now when left out
    """
    if batch_tokens is not None and not (batch_tokens > 0 and math.isfinite(batch_tokens)):
        raise WrongInput(f"--batch-tokens {batch_tokens:g}: must be a finite number above 0")
    final = law.predict(params, tokens, flops)
    compute = flops if flops is not None else law.flops_of(params, tokens)
    borrowed = (law.curve or {}).get("borrowed")
    anneal = (law.curve or {}).get("anneal")
    plan = Schedule.parse(schedule) if isinstance(schedule, str) else schedule
    if batch_tokens is None and borrowed is not None and borrowed["same_batch"]:
        batch_tokens = borrowed["batch_tokens"]
    line = None
    if tokens is not None and batch_tokens is not None and law.curve is not None:
        total = max(1, round(tokens / batch_tokens))
        steps = curves_of.curve_steps(total)
        if anneal is not None and (law.form == "curve" or plan is not None or borrowed is None):
            final, values = _annealed(law, anneal, plan, steps, total, params, final)
        elif borrowed is not None:
            values = curves_of.borrowed(borrowed, steps / total, compute, (final.p05, final.p50, final.p95))
        else:
            values = None
        if values is not None:
            line = {"step": [int(s) for s in steps], "tokens": (steps * batch_tokens).tolist()}
            line |= {k: [float(f"{v:.7g}") for v in values[k]] for k in ("p05", "p50", "p95")}
    step_sd = None
    if line is not None and batch_tokens is not None and borrowed is not None and borrowed["unit_sd"] > 0:
        step_sd = borrowed["unit_sd"] / math.sqrt(batch_tokens)
    largest = law.range()["flops"][1]
    why = "; ".join(filter(None, [law.why, "" if law.task else _too_wide(final)]))
    body = {
        "losscast_prediction": VERSION,
        "final_loss": final.to_dict(),
        "metric": metric_quantiles(law.task, *law.log_draws(params, tokens, flops)) if law.task else None,
        "identifiable": law.identifiable and not why,
        "why": why,
        "in_range": law.covers(params, tokens, compute),
        "extrapolation": {"flops_ratio": compute / largest},
        "curve": line,
        "step_sd": step_sd,
        "params": params,
        "tokens": tokens,
        "batch_tokens": batch_tokens,
        "schedule": _described(plan, line, anneal),
        "law_digest": law.digest,
        "made_at": time.time() if made_at is None else made_at,
    }
    return Prediction(body)


def _too_wide(final: Quantiles) -> str:
    """Words for an interval that tells little; empty for one that tells something."""
    width = (final.p95 - final.p05) / final.p50
    return (
        f"the 90% interval is {width:.0%} of the loss wide: the runs do not tell a run so far off"
        if width > WIDE
        else ""
    )


def _annealed(
    law: Law,
    anneal: dict[str, Any],
    plan: Schedule | None,
    steps: np.ndarray,
    total: int,
    params: float | None,
    final: Quantiles,
) -> tuple[Quantiles, dict[str, np.ndarray]]:
    """Final loss and curve under a schedule. A law of final losses keeps its level: the schedule moves it by a ratio."""
    own = own_shape(anneal, total)
    if law.form == "curve":
        middle, sd = predicted(anneal, plan or own, steps, total, params)
        relative = sd / middle
    else:  # read as a ratio to the end under the fitted runs' schedule, which is the law's final loss
        share, sd = predicted(anneal, plan or own, steps, total, params, over=own)
        middle = share * final.p50
        relative = np.hypot(sd / share, math.log(final.p95 / final.p05) / 2 / 1.645)
    low, high = middle * np.exp(-1.645 * relative), middle * np.exp(1.645 * relative)
    values = {"p05": low, "p50": middle, "p95": high}
    return Quantiles(float(low[-1]), float(middle[-1]), float(high[-1])), values


def _described(plan: Schedule | None, line: dict[str, Any] | None, anneal: dict[str, Any] | None) -> Any:
    """The schedule assumed, in words or figures, and whether it could be honoured."""
    if plan is None:
        return "that of the fitted runs" if line else None
    notes = []
    if anneal is not None and anneal["shapes"] < 2:
        notes.append("the fitted runs share one shape of schedule, so what another does rests on priors")
    if plan.kind == "file" and line is not None:
        end, total = plan.rows[-1][0], line["step"][-1]
        if end < 0.999 * total:
            notes.append(
                f"the schedule's last row is step {end:g} and the run has {total}: its last rate goes on"
            )
        elif end > 1.001 * total:
            notes.append(f"the run ends at step {total}, before the schedule's last row, step {end:g}")
    return {**plan.to_dict(), "honoured": bool(line) and anneal is not None, "note": "; ".join(notes)}
