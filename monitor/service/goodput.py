"""What became of a run's time: the share of it that still counts, by its launcher's books or, without them, by its steps."""

from typing import Any

from monitor.store.facts import RunFacts
from monitor.store.reading import spans


def goodput_of(facts: RunFacts) -> dict[str, Any]:
    """The share that counts, and where the launcher keeps books, GPU seconds and money."""
    return {
        "ratio": goodput(facts),
        "gpu_seconds": facts.gpu_seconds or None,
        "dollars": facts.gpu_dollars or None,
        "steps_lost": facts.steps_lost,
    }


def goodput(facts: RunFacts) -> float | None:
    """Share of the GPU time that still counts, by the launcher's books; without them, of the steps of all attempts."""
    spent = sum(facts.gpu_seconds.values())
    if spent > 0:
        return facts.gpu_seconds["useful"] / spent
    trained = sum(
        (a.last_step or 0) - (a.resume_step or 0) for a in facts.attempts if a.last_step is not None
    )
    if trained <= 0 or facts.step is None:
        return None
    kept = 0
    for attempt, first, last in spans(facts.attempts):
        found = facts.attempt_facts(attempt)
        if found is not None and found.last_step is not None:
            kept += max(0, min(last, found.last_step) - max(first, 1) + 1)
    return min(1.0, kept / trained)
