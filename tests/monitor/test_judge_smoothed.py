"""Smoothed logs: their neighbours say the same thing twice, which is no alarm, and a change still shows at once."""

import json
import random
from collections.abc import Sequence

import pytest

from monitor.judge import Settings
from monitor.replay import Watch, replay
from monitor.verdict import Sample


def own(steps: int, seed: int, fault: float = 0.0, at: int = 0) -> list[float]:
    """Losses of single steps."""
    rng = random.Random(seed)
    noise = (0.05 * (rng.gauss(0, 0.9) + 0.4 * (rng.expovariate(1) - 1)) for _ in range(steps))
    return [2.0 + 6.0 * (t + 10) ** -0.3 + e + (fault if t >= at > 0 else 0.0) for t, e in enumerate(noise)]


def smoothed(losses: Sequence[float], keep: float) -> list[Sample]:
    """What a logger writes that keeps a running mean."""
    out, mean = [], losses[0]
    for step, x in enumerate(losses):
        mean = keep * mean + (1.0 - keep) * x
        out.append(Sample(step, mean))
    return out


def wandering(steps: int, seed: int, rho: float) -> list[Sample]:
    """A flat loss whose own noise remembers."""
    rng, e, out = random.Random(seed), 0.0, []
    for step in range(steps):
        e = rho * e + (1.0 - rho**2) ** 0.5 * rng.gauss(0, 0.04)
        out.append(Sample(step, 2.5 + e))
    return out


@pytest.mark.parametrize("rho", [0.5, 0.8, 0.95])
def test_noise_that_remembers_is_seldom_an_alarm(rho: float) -> None:
    calls = [a for seed in range(10) for a in replay(wandering(3000, seed, rho))["alerts"]]
    assert sum(a["severity"] == "critical" for a in calls) <= 1
    assert sum(a["severity"] == "warning" for a in calls) <= 4  # every third sample is worth one at best


@pytest.mark.parametrize("keep", [0.5, 0.9])
def test_a_change_shows_in_a_smoothed_log_within_a_few_samples(keep: float) -> None:
    first = []
    for seed in range(5):
        assert replay(smoothed(own(2000, seed), keep))["alerts"] == []
        calls = replay(smoothed(own(2000, seed, 0.2, 1500), keep))["alerts"]
        assert [a["alert"] for a in calls][:2] == ["LossOffLine", "LossDiverged"]
        first.append(calls[0]["step"] - 1500)
    assert sorted(first)[2] <= 5 and max(first) <= 15


def test_losses_of_single_steps_are_taken_as_they_are() -> None:
    watch = Watch()
    for step, x in enumerate(own(3000, 1)):
        watch.observe(Sample(step, x))
        assert watch.smoothing.rho == 0.0


def test_a_judge_of_a_smoothed_log_goes_on_where_it_was() -> None:
    run = smoothed(own(1200, 3, 0.3, 900), 0.9)
    whole = [alert for watch in [Watch()] for s in run for alert in watch.observe(s).opened]
    watch, parts = Watch(), []
    for s in run:
        parts += watch.observe(s).opened
        watch = Watch.from_state(Settings(), json.loads(json.dumps(watch.state_dict())))
    assert whole == parts and whole


def test_a_sparse_log_that_falls_steeply_is_not_taken_for_a_smoothed_one() -> None:
    first = []
    for seed in range(8):
        rng = random.Random(seed)
        run = [Sample(t, 2.0 + 6.0 * (t + 10) ** -0.3 + rng.gauss(0, 0.04)) for t in range(0, 3000, 50)]
        bad = [s if s.step < 1500 else Sample(s.step, s.loss + 0.3) for s in run]
        calls = [a["step"] for a in replay(bad)["alerts"]]
        first.append(calls[0] if calls else 3000)
    assert sorted(first)[4] <= 1900
