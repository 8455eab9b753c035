"""What else the samples say: causes a verdict can support, and the smaller alerts beside the loss.

    learning rate    changed by half or more between two samples
    resumed          a new attempt started
    gradient norm    three times its own level and far outside its own spread: it often leaves before the loss does
    one rank         the largest rank's distance from the mean over ranks, far above its own level
    throughput       tokens per second under 0.7 of its own past

A cause is named only with its evidence and only when it comes shortly before or at the onset; naming is no proof.
"""

import math
from collections.abc import Iterator

from monitor.judge.track import Track
from monitor.verdict import Cause, Sample, Severity

NEAR = 100
"""Samples before the onset within which a change counts as a likely cause; a tenth of a short run."""
YOUNG = 20
"""Samples in which the learning rate may still leap to its top: the warm-up of a sparse log."""


class Evidence:
    """Remembers the last notable change of each kind: constant memory."""

    def __init__(self) -> None:
        self.norm = Track(100)
        self.spread = Track(100)
        self.rate = Track(100)
        self.number = {
            "samples": 0.0, "lr": math.nan, "lr_top": 0.0, "lr_level": 0.0, "lr_from": math.nan, "lr_to": math.nan, "lr_step": -1.0, "lr_at": -1e9,
            "resume_step": -1.0, "resume_at": -1e9, "norm_step": -1.0, "norm_at": -1e9, "norm_ratio": 0.0,
            "norm_count": 0.0, "norm_quiet": 0.0, "spread_step": -1.0, "spread_at": -1e9, "spread_ratio": 0.0,
            "spread_count": 0.0, "slow_count": 0.0, "change_step": -1.0, "change_at": -1e9,
        }  # fmt: skip
        self.change = ""

    def learn(self, sample: Sample) -> None:
        """Take in what the sample carries besides its loss. Non-finite values are passed over here."""
        n = self.number
        n["samples"] += 1.0
        lr = sample.lr
        if lr is not None and math.isfinite(lr):
            before = n["lr"]
            if before > 0 and lr > 0 and not (1 / 1.5 < lr / before < 1.5):
                n["lr_from"], n["lr_to"], n["lr_step"], n["lr_at"] = (
                    before,
                    lr,
                    float(sample.step),
                    n["samples"],
                )
            n["lr"] = lr
            # what the run has had by its schedule: reached by steps, not by a leap past all before it
            if before == before and (n["samples"] <= YOUNG or before < 1.5 * n["lr_top"]):
                n["lr_top"] = max(n["lr_top"], before)
            n["lr_level"] += max(0.02, 1.0 / n["samples"]) * (lr - n["lr_level"])
        norm = sample.grad_norm
        if norm is not None and norm > 0 and math.isfinite(norm):
            self._norm(sample.step, math.log(norm))
        elif norm is not None and not math.isfinite(norm):
            if n["norm_count"] == 0:
                n["norm_step"] = float(sample.step)
            n["norm_count"], n["norm_quiet"], n["norm_at"], n["norm_ratio"] = (
                n["norm_count"] + 1.0,
                0.0,
                n["samples"],
                math.inf,
            )
        spread = sample.spread
        if spread is not None and spread >= 0 and math.isfinite(spread):
            self._spread(sample.step, spread)
        rate = sample.tokens_per_s
        if rate is not None and rate > 0 and math.isfinite(rate):
            self._rate(math.log(rate))

    def warming_again(self) -> bool:
        """The learning rate rises by its schedule: above its recent level, not above what the run has had."""
        n = self.number
        return n["lr"] > 1.1 * n["lr_level"] and n["lr"] <= 1.05 * n["lr_top"]

    def _norm(self, step: int, log_norm: float) -> None:
        n = self.number
        z, excess = self.norm.score(log_norm), log_norm - self.norm.base
        high = self.norm.count > 30 and z > 8.0 and excess > math.log(3.0)
        n["norm_count"] = n["norm_count"] + 1.0 if high else 0.0
        if high:
            if n["samples"] - n["norm_at"] > NEAR or n["norm_count"] == 1:
                n["norm_step"] = float(step)
            n["norm_at"], n["norm_ratio"] = n["samples"], math.exp(min(excess, 50.0))
        n["norm_quiet"] = 0.0 if high else n["norm_quiet"] + 1.0
        if not high or n["norm_count"] > 200:
            self.norm.learn(log_norm, True)

    def _spread(self, step: int, spread: float) -> None:
        n = self.number
        z, level = self.spread.score(spread), max(self.spread.base, 1e-9)
        high = self.spread.count > 30 and z > 8.0 and spread > 3.0 * level
        n["spread_count"] = n["spread_count"] + 1.0 if high else 0.0
        if high:
            if n["spread_count"] == 1:
                n["spread_step"] = float(step)
            n["spread_at"], n["spread_ratio"] = n["samples"], min(spread / level, 1e6)
        else:
            self.spread.learn(spread, True)

    def _rate(self, log_rate: float) -> None:
        n = self.number
        low = self.rate.count > 30 and log_rate < self.rate.base + math.log(0.7)
        n["slow_count"] = n["slow_count"] + 1.0 if low else 0.0
        if not low:
            self.rate.learn(log_rate, True)

    def alerts(self, sample: Sample) -> Iterator[tuple[str, Severity, bool, bool, float, float]]:
        """(name, severity, call it, resolve it, value, usual) of what this sample carries besides its loss."""
        n = self.number
        if sample.spread is not None:
            on = n["spread_count"] >= 5
            yield "RankApart", "warning", on, n["spread_count"] == 0, sample.spread, self.spread.base
        if sample.tokens_per_s is not None:
            usual = math.exp(min(self.rate.base, 700.0))
            on = n["slow_count"] >= 20
            yield "ThroughputDropped", "warning", on, n["slow_count"] == 0, sample.tokens_per_s, usual
        if sample.grad_norm is not None:
            usual = math.exp(min(self.norm.base, 700.0))
            on = n["norm_count"] >= 2
            yield "GradNormHigh", "info", on, n["norm_quiet"] >= 20, sample.grad_norm, usual

    def resumed(self, step: int) -> None:
        self.number["resume_step"], self.number["resume_at"] = float(step), self.number["samples"]

    def announced(self, step: int, what: str) -> None:
        self.change = what[:80]
        self.number["change_step"], self.number["change_at"] = float(step), self.number["samples"]

    def causes(self, since: int, samples_off: float) -> tuple[Cause, ...]:
        """Likely causes of what began at step `since`, `samples_off` samples ago, each with its evidence."""
        n, found = self.number, []
        oldest = n["samples"] - samples_off - min(NEAR, 2 + 0.1 * n["samples"])
        if n["lr_at"] >= oldest and n["lr_step"] <= since + 1:
            found.append(
                Cause(
                    "learning_rate",
                    f"went from {n['lr_from']:g} to {n['lr_to']:g} at step {n['lr_step']:.0f}",
                )
            )
        if n["resume_at"] >= oldest:
            found.append(Cause("resumed", f"a new attempt went on from step {n['resume_step']:.0f}"))
        if n["change_at"] >= oldest and self.change:
            found.append(Cause("announced", f"{self.change} at step {n['change_step']:.0f}"))
        if n["norm_at"] >= oldest and 0 <= n["norm_step"] <= since + 2:
            found.append(
                Cause(
                    "gradient_norm",
                    f"not finite, first at step {n['norm_step']:.0f}"
                    if n["norm_ratio"] == math.inf
                    else f"{n['norm_ratio']:.1f} times its level, first at step {n['norm_step']:.0f}",
                    int(n["norm_step"]),
                )
            )
        if n["spread_at"] >= oldest and n["spread_step"] >= 0:
            found.append(
                Cause(
                    "one_rank",
                    f"{n['spread_ratio']:.1f} times its usual distance, at step {n['spread_step']:.0f}",
                )
            )
        return tuple(found)

    def state(self) -> dict[str, object]:
        return {
            "tracks": [t.state() for t in (self.norm, self.spread, self.rate)],
            "numbers": {
                k: None if v != v else ("Infinity" if v == math.inf else v) for k, v in self.number.items()
            },
            "change": self.change,
        }

    def load(self, state: dict) -> None:  # type: ignore[type-arg]
        for track, held in zip((self.norm, self.spread, self.rate), state["tracks"], strict=True):
            track.load(held)
        for name, value in state["numbers"].items():
            if name in self.number:
                self.number[name] = math.nan if value is None else float(value)  # float("Infinity") is one
        self.change = str(state["change"])
