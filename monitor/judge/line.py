"""The registered curve as the judge reads it: expected loss and its 90% band at a step.

loss, p05, p50, p95    nats per token
step, tokens           optimizer updates and training tokens seen (counts)

Between the curve's points it is linear. Outside them there is no expectation (None), never a guess.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping
from typing import Any, NamedTuple

from monitor.errors import WrongInput


class Expected(NamedTuple):
    """What the registered prediction says of one step."""

    p05: float
    p50: float
    p95: float


def check(prediction: Mapping[str, Any]) -> None:
    """Raises WrongInput unless this is a prediction: a curve, a final loss with its band, or both."""
    curve, final = prediction.get("curve"), prediction.get("final_loss")
    if curve is not None:
        Line(curve)
        if final is None:
            return
    try:
        p05, p50, p95 = (float(final[name]) for name in ("p05", "p50", "p95"))  # type: ignore[index]
    except (KeyError, TypeError, ValueError):
        raise WrongInput(
            "prediction: final_loss needs the numbers p05, p50 and p95; write it with `losscast predict -o`"
        ) from None
    if not (math.isfinite(p05 + p50 + p95) and p05 <= p50 <= p95):
        raise WrongInput(
            f"prediction: final_loss: p05 {p05:g}, p50 {p50:g}, p95 {p95:g}; need finite numbers that do not fall"
        )


class Line:
    """A prediction's curve, looked up by step, or by tokens where the samples carry them."""

    def __init__(self, curve: Mapping[str, Any]) -> None:
        try:
            self._step = [float(v) for v in curve["step"]]
            self._tokens = [float(v) for v in curve.get("tokens") or ()]
            self._p = [
                Expected(float(a), float(b), float(c))
                for a, b, c in zip(curve["p05"], curve["p50"], curve["p95"], strict=True)
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise WrongInput(
                f"prediction: curve needs equally long lists step, p05, p50, p95 of numbers ({error!r}); "
                "write it with `losscast predict -o`"
            ) from error
        if len(self._step) != len(self._p) or any(
            b <= a for a, b in zip(self._step, self._step[1:], strict=False)
        ):
            raise WrongInput("prediction: curve.step must rise and be as long as p50; it does not")
        for step, p in zip(self._step, self._p, strict=True):
            if not (math.isfinite(step + sum(p)) and p.p05 <= p.p50 <= p.p95):
                raise WrongInput(
                    f"prediction: curve at step {step:g}: p05 {p.p05:g}, p50 {p.p50:g}, p95 {p.p95:g}; need finite "
                    "numbers that do not fall; write it with `losscast predict -o`"
                )
        if len(self._tokens) != len(self._step) or any(
            b <= a for a, b in zip(self._tokens, self._tokens[1:], strict=False)
        ):
            self._tokens = []

    @property
    def first_step(self) -> float:
        return self._step[0] if self._step else 0.0

    @property
    def last_step(self) -> float:
        return self._step[-1] if self._step else 0.0

    @property
    def last_tokens(self) -> float | None:
        return self._tokens[-1] if self._tokens else None

    @property
    def final(self) -> Expected | None:
        return self._p[-1] if self._p else None

    def at(self, step: float, tokens: float | None = None) -> Expected | None:
        """The expectation at a step; by tokens where both sides know them. None outside the curve."""
        axis, where = (self._tokens, tokens) if self._tokens and tokens is not None else (self._step, step)
        i = bisect_right(axis, where)
        if i == 0:
            return None
        low = self._p[i - 1]
        if i == len(axis):
            return low if where <= axis[-1] * 1.001 else None
        high, share = self._p[i], (where - axis[i - 1]) / (axis[i] - axis[i - 1])
        return Expected(
            low.p05 + share * (high.p05 - low.p05),
            low.p50 + share * (high.p50 - low.p50),
            low.p95 + share * (high.p95 - low.p95),
        )
