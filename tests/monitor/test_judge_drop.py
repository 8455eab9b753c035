"""A loss that drops at once far below its prediction is news; a drop that was foretold, or that nobody foretold, is none."""

import json
import random
from dataclasses import replace

import pytest

from monitor.judge import Settings
from monitor.replay import Watch, replay
from monitor.verdict import Sample

STEPS, AT = 2000, 1200
SD = 0.03
"""Standard deviation of the band, nats per token."""


def line(step: int, cut: float = 0.0) -> float:
    return 2.0 + 6.0 * (step + 10) ** -0.3 - (cut if step >= AT else 0.0)


def band(cut: float = 0.0) -> dict[str, object]:
    at = sorted({*range(0, STEPS + 1, 10), AT - 1})
    middle = [line(t, cut) for t in at]
    low, high = [m - 1.645 * SD for m in middle], [m + 1.645 * SD for m in middle]
    final = {"p05": low[-1], "p50": middle[-1], "p95": high[-1]}
    return {"final_loss": final, "curve": {"step": at, "p05": low, "p50": middle, "p95": high}}


def run(drop: float, until: int = STEPS, seed: int = 0, noise: float = 0.02) -> list[Sample]:
    """Of the band's deviations `drop` lower from AT on, and back on its line from `until` on."""
    rng = random.Random(seed)
    return [
        Sample(t, line(t) + rng.gauss(0.0, noise) - (drop * SD if AT <= t < until else 0.0))
        for t in range(STEPS)
    ]


@pytest.mark.parametrize("noise", [0.01, 0.02, 0.04])
@pytest.mark.parametrize("drop", [4.0, 6.0, 40.0])
def test_a_drop_of_four_deviations_of_the_band_is_called_within_ten_samples(
    drop: float, noise: float
) -> None:
    found = replay(run(drop, noise=noise), prediction=band())["alerts"]
    assert [a["alert"] for a in found] == ["LossBelowPrediction"]
    assert found[0]["severity"] == "warning" and AT <= found[0]["step"] <= AT + 10
    assert AT - 5 <= found[0]["since_step"] <= found[0]["step"] and found[0]["resolved_step"] is None


def test_back_on_its_line_it_is_over_and_nobody_is_paged() -> None:
    for seed in range(5):
        found = replay(run(5.0, AT + 200, seed), prediction=band())["alerts"]
        assert [a["alert"] for a in found] == ["LossBelowPrediction"]
        assert AT + 200 <= found[0]["resolved_step"] <= AT + 210


def test_a_drop_that_is_foretold_small_or_without_a_prediction_is_no_news() -> None:
    assert replay(run(5.0), prediction=band(5.0 * SD))["alerts"] == []
    assert replay(run(1.5), prediction=band())["alerts"] == []
    assert replay(run(5.0))["alerts"] == []


def test_healthy_runs_that_wander_in_their_band_are_left_alone() -> None:
    for seed in range(8):
        rng, way, out = random.Random(seed), 0.0, []
        for sample in run(0.0, seed=seed):
            way += rng.gauss(0.0, 0.01 * SD)
            out.append(replace(sample, loss=sample.loss + way))
        assert replay(out, prediction=band())["alerts"] == []


@pytest.mark.parametrize("cut", [AT - 1, AT + 2, AT + 50, AT + 203])
def test_a_monitor_restarted_in_a_drop_gives_the_same_verdicts(cut: int) -> None:
    stream = run(5.0, AT + 200)
    whole = Watch(prediction=band())
    verdicts = [whole.observe(s) for s in stream]
    first = Watch(prediction=band())
    parts = [first.observe(s) for s in stream[:cut]]
    second = Watch.from_state(Settings(), json.loads(json.dumps(first.state_dict())), prediction=band())
    assert repr(parts + [second.observe(s) for s in stream[cut:]]) == repr(verdicts)
