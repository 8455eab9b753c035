"""A run as /metrics shows it in full: what the store knows of it and what the judge says."""

from typing import Any

from monitor.service.exporter import Detail
from monitor.service.goodput import goodput
from monitor.store.facts import RunFacts


def detail_of(facts: RunFacts, last: dict[str, Any]) -> Detail:
    """`last`: the judge's newest verdict, {} without any."""
    advice = last.get("advice") or {}
    outside = last.get("outside", (0, 0))
    took = last.get("step_s")
    # what has ended is not slow: a rate that stays behind would page for it
    trains = facts.phase == "running"
    return Detail(
        phase=facts.phase,
        law="predicted" if last.get("predicted") else "own_past" if facts.samples else "none",
        action=advice.get("action"),
        gauges={
            "run_loss": facts.loss, "run_step": facts.step, "run_predicted_loss": last.get("expected"),
            "run_band_lower": last.get("lower"), "run_band_upper": last.get("upper"),
            "run_loss_gap_sigma": last.get("gap_sigma"), "run_loss_gap_nats": last.get("gap_nats"),
            "run_attempt": facts.attempt, "run_tokens": plain(facts.tokens),
            "run_tokens_per_second": plain(facts.tokens_per_s) if trains else None,
            "run_mfu_ratio": plain(facts.mfu) if trains else None,
            "run_goodput_ratio": goodput(facts),
        },
        final=_quantiles(advice.get("final_loss") or last.get("predicted_final")),
        step_seconds={"0.5": took[0], "0.99": took[1]} if took else None,
        samples=facts.samples, nan=facts.nan_samples, inf=facts.inf_samples, above=outside[0], below=outside[1],
        restarts=facts.restarts, gpu_seconds=facts.gpu_seconds,
        checkpoint_time=facts.checkpoint_received, checkpoint_failures=facts.checkpoint_failures,
    )  # fmt: skip


def plain(value: float | None) -> float | None:
    """A finite number or None."""
    return value if value is not None and value - value == 0 else None


def _quantiles(final: Any) -> dict[str, float] | None:
    if not isinstance(final, dict):
        return None
    names = (("0.5", "p50"), ("0.05", "p05"), ("0.95", "p95"))
    found = {q: final.get(name) for q, name in names}
    return {q: float(v) for q, v in found.items() if isinstance(v, (int, float)) and v == v} or None
