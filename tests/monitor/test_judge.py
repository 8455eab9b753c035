"""What the judge promises, on made curves with a fixed seed."""

import json
import math
import random

import pytest

from monitor.judge import Settings
from monitor.replay import Watch, replay
from monitor.schema import spell
from monitor.verdict import Sample


def curve(steps: int, seed: int = 0, sd: float = 0.1) -> list[float]:
    """A loss that falls as a power of the step, with normal noise; nats per token."""
    rng = random.Random(seed)
    return [2.0 + 6.0 * (t + 10) ** -0.3 + rng.gauss(0.0, sd) for t in range(steps)]


def samples(losses: list[float]) -> list[Sample]:
    return [Sample(step, loss) for step, loss in enumerate(losses)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 1, 500])
def test_a_non_finite_loss_is_critical_at_its_own_step(bad: float, at: int) -> None:
    losses = curve(600)
    losses[at] = bad
    first = replay(samples(losses))["alerts"][0]
    assert (first["alert"], first["severity"], first["step"]) == ("LossNonFinite", "critical", at)


def test_a_healthy_run_is_left_alone() -> None:
    assert [replay(samples(curve(3000, seed)))["alerts"] for seed in range(3)] == [[], [], []]


def test_a_learning_rate_too_high_is_called_in_a_few_steps_and_paged() -> None:
    losses = curve(2000)
    losses[1000:] = [loss + min(3.0, 0.3 * (i + 1)) for i, loss in enumerate(losses[1000:])]
    alerts = replay(samples(losses))["alerts"]
    assert alerts[0]["alert"] == "LossOffLine" and 1000 <= alerts[0]["step"] <= 1010
    assert alerts[1]["alert"] == "LossDiverged" and alerts[1]["severity"] == "critical"


def test_a_loss_that_should_fall_and_stays_is_late_and_found() -> None:
    """A shift of 1.1 sigmas that the fall itself makes good within 200 samples; a frozen level finds 6 of 10."""
    found = []
    for seed in range(10):
        losses = [e - 0.0001 * t for t, e in enumerate(curve(1000, seed, sd=0.04))]
        losses[700:] = [loss + 0.044 for loss in losses[700:]]
        found += [a["step"] for a in replay(samples(losses))["alerts"][:1]]
    assert len(found) >= 9 and min(found) >= 700


def test_a_spike_that_recovers_ends_as_information() -> None:
    losses = curve(2000)
    losses[1000:1008] = [loss + 1.0 for loss in losses[1000:1008]]
    alerts = replay(samples(losses))["alerts"]
    assert [(a["alert"], a["severity"]) for a in alerts] == [
        ("LossOffLine", "warning"),
        ("LossSpike", "info"),
    ]
    assert all(a["resolved_step"] is not None for a in alerts)


@pytest.mark.parametrize("cut", [1, 7, 900, 1004, 1050])
def test_a_restart_of_the_monitor_changes_no_verdict(cut: int) -> None:
    losses = curve(1200)
    losses[1000:] = [loss + 0.7 for loss in losses[1000:]]
    stream = samples(losses)
    one = Watch(Settings())
    whole = [one.observe(s) for s in stream]
    two = Watch(Settings())
    parts = [two.observe(s) for s in stream[:cut]]
    state = json.dumps(spell(two.state_dict()))
    assert len(state) <= 10_000
    three = Watch.from_state(Settings(), json.loads(state))
    parts += [three.observe(s) for s in stream[cut:]]
    assert parts == whole


def test_a_young_run_that_no_longer_falls_is_left_alone_whatever_its_first_samples_were() -> None:
    called = []
    for seed in range(60):
        rng = random.Random(seed)
        noise = (
            rng.gauss(0, 0.05) + (rng.expovariate(6.0) if rng.random() < 0.05 else 0.0) for _ in range(250)
        )
        called += replay([Sample(t, 3.0 + e) for t, e in enumerate(noise)])["alerts"]
    assert called == []
