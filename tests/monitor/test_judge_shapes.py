"""Healthy runs whose loss does not fall as a power of the step: none of these shapes is an alarm."""

import math
import random

import pytest
from msgspec.structs import replace

from monitor.replay import replay
from monitor.verdict import Sample

STEPS = 3000


def run(seed: int, sd: float, shape: str) -> list[Sample]:
    rng = random.Random(seed)
    out = []
    for t in range(STEPS):
        done, lr = t / STEPS, None
        loss = 2.0 + 6.0 * (t + 10) ** -0.35
        if shape == "epochs":
            loss -= 0.06 * math.floor(4 * done)
        elif shape == "late start":
            loss = 2.0 + 6.0 * (max(0.0, t - 0.08 * STEPS) + 10) ** -0.35
        elif shape == "rate rises again":
            part = (2 * done) % 1
            lr = 0.1 + 0.45 * (1 + math.cos(math.pi * part))
            if done >= 0.5:
                lr = 0.1 + (lr - 0.1) * min(1.0, part / 0.02)
            loss += 0.12 * lr
        elif shape == "decay without its rate":
            loss -= 0.15 * max(0.0, done - 0.8) / 0.2
        out.append(Sample(t, loss + rng.gauss(0, sd), lr=lr))
    return out


@pytest.mark.parametrize("sd", [0.003, 0.04])
@pytest.mark.parametrize("shape", ["epochs", "late start", "rate rises again", "decay without its rate"])
def test_a_healthy_run_of_another_shape_is_left_alone(shape: str, sd: float) -> None:
    assert [replay(run(seed, sd, shape))["alerts"] for seed in range(3)] == [[], [], []]


def test_a_rate_that_rises_again_explains_no_loss_that_the_run_never_had_at_it() -> None:
    bad = [
        s if s.step < STEPS // 2 else replace(s, loss=s.loss + 0.5) for s in run(0, 0.01, "rate rises again")
    ]
    assert [a["alert"] for a in replay(bad)["alerts"]] == ["LossOffLine", "LossDiverged"]


def test_a_shift_soon_after_a_sudden_fall_is_still_called() -> None:
    bad = [s if s.step < 2500 else replace(s, loss=s.loss + 0.1) for s in run(1, 0.02, "epochs")]
    first = replay(bad)["alerts"][0]
    assert first["alert"] == "LossOffLine" and 2500 <= first["step"] <= 2510
