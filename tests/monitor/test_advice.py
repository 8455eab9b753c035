"""What the advice says of runs that are far off: the chance, the money, and words that promise no more than is known."""

import math
import random

import pytest
from msgspec.structs import replace

from monitor.advice import advise, final_loss, probability_of_missing
from monitor.replay import Watch, replay
from monitor.verdict import Alert, Cause, Sample

STEPS, HALF = 3000, 0.05


def line(step: float) -> float:
    return 2.0 + 6.0 * (step + 10) ** -0.3


TARGET = line(STEPS) + HALF


def band(every: int = 10) -> dict[str, object]:
    at = list(range(0, STEPS + 1, every))
    middle = [line(t) for t in at]
    low, high = [m - HALF for m in middle], [m + HALF for m in middle]
    final = {"p05": low[-1], "p50": middle[-1], "p95": high[-1]}
    return {"final_loss": final, "curve": {"step": at, "p05": low, "p50": middle, "p95": high}}


def run(until: int, every: int = 1, above: float = 0.0, since: int = 0) -> list[Sample]:
    rng = random.Random(3)
    return [
        Sample(t, line(t) + rng.gauss(0.0, 0.02) + (above if t >= since else 0.0), time=1e9 + 60.0 * t)
        for t in range(0, until, every)
    ]


def watched(samples: list[Sample], target: float | None = TARGET) -> Watch:
    watch = Watch(prediction=band(), target_loss=target)
    watch.price_per_hour = 100.0
    for sample in samples:
        watch.observe(sample)
    return watch


@pytest.mark.parametrize("every", [1, 60])
@pytest.mark.parametrize("until", [900, 1500, 2900])
@pytest.mark.parametrize("above", [0.5, 6.0])
def test_a_run_hopelessly_above_its_line_is_told_to_stop_with_the_money_it_saves(
    above: float, until: int, every: int
) -> None:
    """At 0.5 nats it is 16 sigmas of its band above the line, at 6 nats 200; above it from its first sample on."""
    watch = watched(run(until, every, above))
    said = watch.advice()
    assert {a.alert for a in watch.open_alerts()} == {"LossAbovePrediction"}
    assert said.action == "stop" and said.p_miss is not None and said.p_miss > 0.98
    assert said.final_loss is not None and said.final_loss["p05"] > TARGET
    assert said.money_left == pytest.approx((STEPS - said.step) / 60 * 100)
    assert "out of reach" in said.evidence[0] and "sigmas above its line" in said.evidence[0]
    assert any("stopping now saves" in e and "100 an hour" in e for e in said.evidence)


@pytest.mark.parametrize("every", [1, 60])
def test_a_gap_in_the_first_hundredths_of_a_run_counts_but_stops_nothing(every: int) -> None:
    said = watched(run(185, every, 6.0)).advice()
    assert said.p_miss is not None and said.p_miss > 0.9
    assert said.action == "continue" and not any("stopping now" in e for e in said.evidence)


def test_the_chance_to_miss_rises_with_the_gap_and_what_no_healthy_run_showed_widens_the_end() -> None:
    def end(gap: float) -> tuple[float, float]:
        here = {
            "step": 1500.0,
            "share": 0.5,
            "gap_samples": 90.0,
            "gap": gap,
            "band_sd": 0.03,
            "gap_sd": 0.002,
        }
        found = final_loss(band(), here)
        assert found is not None
        return found

    gaps = [0.0, 0.03, 0.06, 0.09, 0.2, 0.5, 1.0, 6.0]
    chances = [probability_of_missing(*end(gap), TARGET) for gap in gaps]
    assert chances == sorted(chances) and chances[0] < 0.1 and chances[-1] > 0.999
    widths = [end(gap)[1] for gap in gaps]
    assert widths == sorted(widths) and widths[0] == pytest.approx(widths[2]) and widths[-1] > 10 * widths[2]
    below = [probability_of_missing(*end(-gap), TARGET) for gap in gaps]
    assert below[0] == chances[0] and max(below[1:]) < below[0]


def test_a_sparse_run_six_nats_above_its_line_is_never_called_below_it() -> None:
    alerts = replay(run(STEPS, 60, 6.0), prediction=band())["alerts"]
    assert {a["alert"] for a in alerts} == {"LossAbovePrediction"}
    assert alerts[0]["expected"] < 4.0, "the line it should be on, not the line it is on"


def test_a_sparse_run_on_its_line_with_its_own_offset_is_left_alone() -> None:
    assert replay(run(STEPS, 60, 0.08), prediction=band())["alerts"] == []


def test_a_spike_under_way_is_waited_for_and_stops_nothing() -> None:
    watch = watched([*run(1500), *run(1510, above=6.0)[1500:]])
    said = watch.advice()
    assert [a.alert for a in watch.open_alerts()] == ["LossOffLine"]
    assert said.action == "continue" and said.p_miss is not None and said.p_miss < 0.5
    assert "wait" in said.evidence[0] and "as if it passed" in said.evidence[0]


def test_a_divergence_counts_in_the_chance_to_miss() -> None:
    said = watched([*run(1500), *run(1700, above=1.0)[1500:]]).advice()
    assert said.action == "roll_back" and said.p_miss is not None and said.p_miss > 0.98


@pytest.mark.parametrize("every", [1, 15])
@pytest.mark.parametrize(
    ("since", "by"), [(2250, 1.0), (2250, -1.0), (2250, 0.3), (2940, 1.0), (2700, 6.0), (2700, -0.5)]
)
def test_what_the_end_is_told_as_meets_the_loss_as_the_run_ends(since: int, by: float, every: int) -> None:
    said = watched(run(STEPS, every, by, since)).advice()
    assert said.final_loss is not None and said.p_miss is not None
    assert said.final_loss["p50"] == pytest.approx(line(STEPS) + by, abs=0.05)
    assert said.p_miss > 0.98 if by > 0 else said.p_miss < 0.02


@pytest.mark.parametrize("times", [1.2, 1.44])
def test_a_run_whose_gap_moves_all_along_is_met_at_its_end_too(times: float) -> None:
    far = [replace(s, loss=times * s.loss) for s in run(STEPS)]
    said = watched(far).advice().final_loss
    assert said is not None and said["p50"] == pytest.approx(times * line(STEPS), abs=0.02)


@pytest.mark.parametrize("by", [1.0, -1.0])
def test_a_shift_that_lasts_is_in_the_end_long_before_it(by: float) -> None:
    said = watched(run(1700, above=by, since=1500)).advice()
    assert said.final_loss is not None
    assert said.final_loss["p05"] - 0.1 < line(STEPS) + by < said.final_loss["p95"] + 0.1
    assert abs(said.final_loss["p50"] - line(STEPS)) > 0.7


def test_a_spike_that_recovers_moves_the_end_neither_under_way_nor_after() -> None:
    steady = watched(run(2000)).advice().final_loss
    assert steady is not None
    for until in (1505, 1510, 1530, 1600, 2000):
        spiked = [replace(s, loss=s.loss + (2.0 if 1500 <= s.step < 1510 else 0.0)) for s in run(until)]
        end = watched(spiked).advice().final_loss
        assert end is not None and end["p50"] == pytest.approx(steady["p50"], abs=0.02)


def test_a_diverged_run_is_never_said_to_reach_its_target() -> None:
    samples = [*run(1500), *run(1700, above=1.0)[1500:]]
    said = watched(samples, target=9.0).advice()
    assert said.action == "roll_back" and said.p_miss is None
    assert not any("is missed with probability" in e for e in said.evidence)
    diverged = (Alert("LossDiverged", "critical", 480, 431, 3.0, 2.9),)
    nowhere = {"step": 500.0, "share": 0.5, "gap_samples": 0.0, "gap": 0.0, "band_sd": 1.0, "gap_sd": 0.0}
    said = advise(nowhere, diverged, band(), 9.0)
    assert said.p_miss is None and said.final_loss is None and "nothing says" in " ".join(said.evidence)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_has_no_end_and_misses_any_target(bad: float) -> None:
    watch = watched([*run(1500), Sample(1500, bad, time=1e9 + 9e4)])
    said = watch.advice()
    assert said.action == "roll_back" and said.p_miss == 1.0 and said.final_loss is None
    watch.observe(Sample(1501, line(1501), time=1e9 + 9.006e4))
    assert (back := watch.advice()).p_miss is not None and back.p_miss < 0.5 and back.final_loss is not None


def test_without_a_target_a_run_above_its_line_is_told_so_and_not_told_to_stop() -> None:
    said = watched(run(1500, above=0.5), target=None).advice()
    assert said.action == "continue" and said.p_miss is None
    assert "no target is set" in said.evidence[0] and "above its line" in said.evidence[0]


def test_without_a_prediction_a_target_is_not_said_to_be_safe() -> None:
    watch = Watch(target_loss=2.0, total_steps=STEPS)
    for sample in run(900):
        watch.observe(sample)
    said = watch.advice()
    assert said.p_miss is None and any("not known" in e or "no prediction" in e for e in said.evidence)
    assert not any("nothing speaks against" in e for e in said.evidence)


@pytest.mark.parametrize("name", ["LossPlateau", "RankApart", "ValidationApart", "LossJumpAfterResume"])
def test_no_open_alert_is_passed_over_in_the_evidence(name: str) -> None:
    here = {"step": 500.0, "share": 0.5, "gap_samples": 0.0, "gap": 0.0, "band_sd": 1.0, "gap_sd": 0.0}
    said = advise(here, (Alert(name, "warning", 480, 431, 3.0, 2.9),), None)
    assert any(name in e and "431" in e for e in said.evidence)


@pytest.mark.parametrize(
    ("every", "causes", "says"),
    [
        (1.0, (), "since step 431: "),
        (100.0, (), "since step 431 (or from step 332 on: the log shows one in 100): "),
        (
            1.0,
            (Cause("gradient_norm", "9.0 times its level", 420),),
            "since step 431 (gradient norm since step 420): ",
        ),
    ],
)
def test_one_onset_is_told_or_why_there_are_two(every: float, causes: tuple[Cause, ...], says: str) -> None:
    here = {"step": 500.0, "share": 0.5, "gap_samples": 0.0, "gap": 0.0, "band_sd": 1.0, "gap_sd": 0.0}
    diverged = (Alert("LossDiverged", "critical", 480, 431, 3.0, 2.9),)
    said = advise(here | {"every": every}, diverged, None, causes=causes)
    assert f"off its line for good {says}" in said.evidence[0]


def test_a_learning_rate_that_broke_the_run_is_to_be_lowered_and_no_data_skipped() -> None:
    watch = Watch()
    for sample in run(1000):
        watch.observe(replace(sample, lr=1e-3))
    watch.checkpoint(900)
    for sample in run(1100, above=2.0)[1000:]:
        watch.observe(replace(sample, lr=1e-2))
    said = watch.advice()
    assert (said.action, said.roll_back_to, said.skip) == ("lower_lr", 900, None)
    assert "lower the learning rate" in said.evidence[0] and not any("skip" in e for e in said.evidence)


def stuck(at: int, jump: float, since: int, steps: int = 6000) -> list[Sample]:
    """A loss that jumps at a planned change of data, falls on, and from `at` on falls no further."""
    rng = random.Random(5)
    return [
        Sample(t, line(min(t, at)) + (jump if t >= since else 0.0) + rng.gauss(0.0, 0.1))
        for t in range(steps)
    ]


@pytest.mark.parametrize("jump", [-0.5, 0.0, 0.5])
def test_a_plateau_after_an_announced_change_is_called_and_a_fall_that_goes_on_is_not(jump: float) -> None:
    def called(samples: list[Sample]) -> list[tuple[str, int]]:
        watch, found = Watch(), []
        watch.announce(1000, "new data mix")
        for sample in samples:
            found += [(a.alert, a.step) for a in watch.observe(sample).opened]
        return found

    found = called(stuck(2500, jump, 1000))
    assert [name for name, _ in found] == ["LossPlateau"] and 2500 < found[0][1] < 2 * 2500
    assert called(stuck(10_000, jump, 1000)) == []


# a run that is longer than what was predicted


def with_tokens(total_tokens: float | None, until: int, every: int = 10) -> Watch:
    """Of 1,000 tokens a step, beside a prediction that ends at STEPS of them."""
    given = band()
    curve = given["curve"]
    assert isinstance(curve, dict)
    curve["tokens"] = [1000.0 * (t + 1) for t in curve["step"]]
    watch = Watch(prediction=given, target_loss=TARGET, total_tokens=total_tokens)
    for sample in run(until, every):
        watch.observe(replace(sample, tokens=1000.0 * (sample.step + 1)))
    return watch


@pytest.mark.parametrize(("total", "until"), [(3e7, 1), (3e7, 900), (None, 2 * STEPS), (3e7, 2 * STEPS)])
def test_a_run_longer_than_its_prediction_has_no_end_foretold_and_is_told_so(
    total: float | None, until: int
) -> None:
    """Its prediction's end is that of another schedule; it was told with an eighteenth of its own interval."""
    said = with_tokens(total, until).advice()
    assert said.final_loss is None and said.p_miss is None and said.action == "continue"
    assert any("as long as its prediction" in e and "losscast predict" in e for e in said.evidence)
    assert not any("no prediction" in e for e in said.evidence)


@pytest.mark.parametrize("over", [0.5, 1.0, 1.02])
def test_a_run_that_ends_with_its_prediction_or_a_batch_later_keeps_its_end(over: float) -> None:
    said = with_tokens(over and 1000.0 * STEPS * max(1.0, over), int(STEPS * over)).advice()
    assert said.final_loss is not None and said.p_miss is not None and said.p_miss < 0.5
    assert said.final_loss["p05"] < line(STEPS) < said.final_loss["p95"]


def test_where_the_curve_says_nothing_of_a_step_the_interval_is_the_predictions_own() -> None:
    """Between the last step of a curve that begins late and the run's first: no gap is known, so nothing narrows it."""
    given = band()
    curve, final = given["curve"], given["final_loss"]
    assert isinstance(curve, dict) and isinstance(final, dict)
    for name, values in curve.items():
        curve[name] = values[100:]
    watch = Watch(prediction=given, target_loss=TARGET)
    watch.observe(Sample(1, 10.0))
    said = watch.advice().final_loss
    assert said is not None and said["p95"] - said["p05"] >= final["p95"] - final["p05"] - 1e-9
