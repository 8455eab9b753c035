"""A loss that drops at once far below its prediction is news; a drop that was foretold, or that nobody foretold, is none."""

import json
import random

import pytest
from msgspec.structs import replace

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
    for seed, drop in enumerate((5.0, 5.0, 5.0, 20.0, 40.0)):
        found = replay(run(drop, AT + 200, seed), prediction=band())["alerts"]
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


@pytest.mark.parametrize("every", [1, 12])
def test_beside_a_control_a_drop_is_called_too_and_over_when_it_is_back(every: int) -> None:
    """The control has our batches, so most of our noise; only a fall that we alone have is news."""
    control = run(0.0)[::every]
    own = random.Random(9)
    ours = [replace(s, loss=s.loss + own.gauss(0.0, 0.004)) for s in run(20.0, AT + 400)[::every]]
    found = replay(ours, control=control)["alerts"]
    assert [a["alert"] for a in found] == ["LossBelowPrediction"]
    assert found[0]["severity"] == "warning" and AT <= found[0]["step"] <= AT + 10 * every
    assert found[0]["since_step"] >= AT - every
    assert found[0]["expected"] == pytest.approx(line(found[0]["step"]), abs=0.08)
    assert AT + 400 <= found[0]["resolved_step"] <= AT + 400 + 10 * every
    other = replay(control, control=ours)["alerts"]
    assert all(a["alert"] == "LossOffLine" and a["severity"] == "warning" for a in other), (
        "either may have moved"
    )
    assert replay(ours, control=run(20.0)[::every])["alerts"][:1] != found[:1], "both fell"


def test_beside_a_control_of_other_noise_or_of_small_drops_nothing_is_called() -> None:
    assert replay(run(20.0), control=run(0.0, seed=5))["alerts"] == []
    small = replay(run(0.5), control=run(0.0))["alerts"]
    assert all(a["step"] > AT + 100 for a in small), "what is slow is the bending gap's to call"


def test_a_monitor_restarted_in_a_drop_beside_a_control_gives_the_same_verdicts() -> None:
    stream, control = run(20.0, AT + 200), run(0.0)

    def fed(watch: Watch, begin: int, end: int) -> list[object]:
        out = []
        for ours, other in zip(stream[begin:end], control[begin:end], strict=True):
            watch.observe_control(other)
            out.append(watch.observe(ours))
        return out

    whole, first = Watch(total_steps=STEPS), Watch(total_steps=STEPS)
    verdicts = fed(whole, 0, STEPS)
    parts = fed(first, 0, AT + 50)
    second = Watch.from_state(Settings(), json.loads(json.dumps(first.state_dict())), total_steps=STEPS)
    assert repr(parts + fed(second, AT + 50, STEPS)) == repr(verdicts)
