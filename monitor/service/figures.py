"""A run as /metrics shows it in full: what the store knows of it and what the judge says, put into the exporter's `Figures`."""

from typing import Any

from monitor.service.exporter import Figures
from monitor.service.goodput import goodput
from monitor.store.facts import RunFacts


def fill(facts: RunFacts, last: dict[str, Any], f: Figures) -> None:
    """Set what is asked only of runs that are shown in full. `last`: the judge's newest verdict, {} without any."""
    advice = last.get("advice") or {}
    outside = last.get("outside", (0, 0))
    f.phase = facts.phase
    f.law = "predicted" if last.get("predicted") else "own_past" if facts.samples else "none"
    f.action = advice.get("action")
    f.gauges = {
        "run_loss": facts.loss, "run_step": facts.step, "run_predicted_loss": last.get("expected"),
        "run_band_lower": last.get("lower"), "run_band_upper": last.get("upper"),
        "run_loss_gap_sigma": last.get("gap_sigma"), "run_loss_gap_nats": last.get("gap_nats"),
        "run_attempt": facts.attempt, "run_tokens": plain(facts.tokens),
        "run_tokens_per_second": plain(facts.tokens_per_s), "run_mfu_ratio": plain(facts.mfu),
        "run_goodput_ratio": goodput(facts),
    }  # fmt: skip
    f.final = _quantiles(advice.get("final_loss") or last.get("predicted_final"))
    took = last.get("step_s")
    f.step_seconds = {"0.5": took[0], "0.99": took[1]} if took else None
    f.samples, f.nan, f.inf = facts.samples, facts.nan_samples, facts.inf_samples
    f.above, f.below = outside[0], outside[1]
    f.restarts, f.gpu_seconds = facts.restarts, facts.gpu_seconds
    f.checkpoint_time, f.checkpoint_failures = facts.checkpoint_received, facts.checkpoint_failures


def plain(value: float | None) -> float | None:
    """A finite number or None."""
    return value if value is not None and value - value == 0 else None


def _quantiles(final: Any) -> dict[str, float] | None:
    if not isinstance(final, dict):
        return None
    names = (("0.5", "p50"), ("0.05", "p05"), ("0.95", "p95"))
    found = {q: final.get(name) for q, name in names}
    return {q: float(v) for q, v in found.items() if isinstance(v, (int, float)) and v == v} or None
