"""Restarts, announcements, one rank, throughput, gradient norm, controls, advice: what the judge makes of each."""

import math
import random

import pytest
from msgspec.structs import replace

from monitor.advice import advise
from monitor.judge import Judge, Settings
from monitor.replay import Watch, merged, off_prediction, replay
from monitor.verdict import Alert, Sample


def falling(steps: int, seed: int = 0, sd: float = 0.1) -> list[Sample]:
    rng = random.Random(seed)
    return [Sample(t, 2.0 + 6.0 * (t + 10) ** -0.3 + rng.gauss(0.0, sd)) for t in range(steps)]


def names(watch: Judge, stream: list[Sample]) -> list[str]:
    return [alert.alert for sample in stream for alert in watch.observe(sample).opened]


def band(steps: int, half: float, shift: float = 0.0) -> dict[str, object]:
    at = list(range(0, steps, 10))
    middle = [2.0 + 6.0 * (t + 10) ** -0.3 + shift for t in at]
    curve = {"step": at, "p05": [m - half for m in middle], "p50": middle, "p95": [m + half for m in middle]}
    return {
        "final_loss": {"p05": middle[-1] - half, "p50": middle[-1], "p95": middle[-1] + half},
        "curve": curve,
    }


def test_a_resume_that_goes_on_where_it_was_is_no_news() -> None:
    run, watch = falling(1500), Watch()
    again = [replace(s, attempt=2) for s in falling(1500, seed=1)[800:]]
    assert names(watch, run[:1000]) + names(watch, again) == []


@pytest.mark.parametrize(("before", "back"), [(60, 0), (500, 0), (500, 10), (3000, 100)])
def test_a_run_that_begins_again_from_early_on_is_no_news(before: int, back: int) -> None:
    run, watch = falling(before, sd=0.03), Watch()
    again = [replace(s, attempt=2) for s in falling(2000, seed=1, sd=0.03)[back:]]
    worse = [replace(s, attempt=2, loss=s.loss + 0.2) for s in falling(2100, seed=1, sd=0.03)[2000:]]
    assert names(watch, run) + names(watch, again) == []
    assert names(watch, worse) == ["LossOffLine", "LossDiverged"]


def power(seed: int, sd: float) -> list[Sample]:
    """A run that is young enough to fall by more than its noise within tens of steps."""
    rng = random.Random(seed)
    return [Sample(t, 6.0 * (t + 10) ** -0.2 + rng.gauss(0.0, sd)) for t in range(1, 400)]


@pytest.mark.parametrize(("before", "back"), [(250, 100), (250, 50), (150, 150), (100, 100), (60, 40)])
@pytest.mark.parametrize("sd", [0.005, 0.02, 0.1])
def test_a_loss_that_falls_on_after_a_resume_has_made_no_jump(before: int, back: int, sd: float) -> None:
    for seed in range(4):
        watch = Watch()
        again = [replace(s, attempt=2) for s in power(seed + 100, sd)[back : back + 100]]
        assert names(watch, power(seed, sd)[:before]) == []
        assert "LossJumpAfterResume" not in names(watch, again)


@pytest.mark.parametrize(("before", "back"), [(250, 100), (250, 50), (150, 150), (100, 100)])
@pytest.mark.parametrize("jump", [0.5, -0.5])
def test_a_jump_of_a_young_run_is_called_whichever_way_it_goes(before: int, back: int, jump: float) -> None:
    watch = Watch()
    names(watch, power(0, 0.02)[:before])
    jumped = [replace(s, attempt=2, loss=s.loss + jump) for s in power(100, 0.02)[back : back + 16]]
    assert {"LossJumpAfterResume", "LossDiverged"} & set(names(watch, jumped))


def test_a_jump_after_a_resume_is_called_within_tens_of_samples_and_names_the_resume() -> None:
    watch = Watch()
    assert names(watch, falling(1000)) == []
    later = [replace(s, attempt=2, loss=s.loss + 0.3) for s in falling(1100, seed=1)[1000:1040]]
    verdicts = [watch.observe(s) for s in later]
    called = [alert.alert for v in verdicts for alert in v.opened]
    assert "LossJumpAfterResume" in called
    assert any(cause.name == "resumed" for v in verdicts for cause in v.causes)


def test_a_roll_back_resolves_the_divergence_it_answers() -> None:
    run, watch = falling(1200), Watch()
    names(watch, run[:1000])
    names(watch, [replace(s, loss=s.loss + 2.0) for s in run[1000:1100]])
    assert "LossDiverged" in {alert.alert for alert in watch.open_alerts()}
    closed = watch.observe(replace(run[951], attempt=2)).closed
    assert {alert.alert for alert in closed} >= {"LossDiverged", "LossOffLine"}
    assert names(watch, [replace(s, attempt=2) for s in run[952:]]) == []


def test_an_announced_change_of_data_is_not_an_anomaly_and_an_unannounced_one_is() -> None:
    run = falling(1600)
    moved = [s if s.step < 1000 else replace(s, loss=s.loss + 0.3) for s in run]
    told, untold = Watch(), Watch()
    told.announce(1000, "data: second mix")
    assert names(told, moved) == []
    assert "LossOffLine" in names(untold, moved)


def test_a_schedule_that_warms_up_again_is_not_an_anomaly() -> None:
    steps = range(1200)
    lr = [1e-3 * (0.55 + 0.45 * math.cos(2 * math.pi * t / 400)) for t in steps]
    rng = random.Random(0)
    run = [Sample(t, 3.0 + 40 * lr[t] + rng.gauss(0, 0.01), lr=lr[t]) for t in steps]
    assert replay(run)["alerts"] == []


@pytest.mark.parametrize("with_line", [False, True])
def test_a_learning_rate_that_leaps_past_all_it_was_explains_no_rise(with_line: bool) -> None:
    """The rise stays inside a band of 0.4 nats either way, and the rate stays high."""
    run = [replace(s, lr=1e-2 * (1 - s.step / 700)) for s in falling(680, sd=0.13)]
    fault = [
        s if s.step < 340 else replace(s, lr=30 * (s.lr or 0.0), loss=s.loss + 0.3 * (s.step < 500))
        for s in run
    ]
    watch = Watch(prediction=band(680, 0.4, shift=0.2) if with_line else None)
    called = [(a.alert, a.step) for s in fault for a in watch.observe(s).opened]
    assert called[0][0] == "LossOffLine" and 340 <= called[0][1] <= 370
    assert names(Watch(), run) == []


def test_a_learning_rate_fault_names_the_learning_rate() -> None:
    run, watch = [replace(s, lr=1e-3) for s in falling(1000)], Watch()
    names(watch, run)
    fault = [Sample(1000 + i, run[-1].loss + 0.3 * i, lr=3e-2) for i in range(20)]
    causes = [cause for s in fault for cause in watch.observe(s).causes]
    assert causes and causes[-1].name == "learning_rate" and "0.001 to 0.03" in causes[-1].evidence


def test_a_gradient_norm_that_leaves_first_is_named_and_is_information_only() -> None:
    rng = random.Random(0)
    run = [replace(s, grad_norm=1.0 + 0.1 * rng.random()) for s in falling(600)]
    run += [Sample(600 + i, run[-1].loss, grad_norm=5.0) for i in range(4)]
    run += [Sample(604 + i, run[-1].loss + 1.0, grad_norm=5.0) for i in range(8)]
    watch = Watch()
    opened = [a for s in run for a in watch.observe(s).opened]
    assert [(a.alert, a.severity) for a in opened[:1]] == [("GradNormHigh", "info")]
    assert any(c.name == "gradient_norm" and "step 600" in c.evidence for c in watch.causes())


def test_one_rank_apart_and_lost_throughput_are_called() -> None:
    rng = random.Random(0)
    run = [replace(s, spread=0.02 + 0.005 * rng.random(), tokens_per_s=1e5) for s in falling(400)]
    run += [Sample(400 + i, run[-1].loss, spread=0.3, tokens_per_s=5e4) for i in range(40)]
    assert {"RankApart", "ThroughputDropped"} <= set(names(Watch(), run))


def test_a_small_shift_shows_at_once_beside_a_control_and_not_without() -> None:
    noise, rng = falling(900, sd=0.1), random.Random(7)
    mine = [replace(s, loss=s.loss + rng.gauss(0, 0.004)) for s in noise]
    twin = merged([[replace(s, loss=s.loss + rng.gauss(0, 0.004)) for s in noise]])
    shifted = [s if s.step < 700 else replace(s, loss=s.loss + 0.02) for s in mine]
    alone, beside = replay(shifted), replay(shifted, control=twin)
    assert alone["alerts"] == [] and replay(mine, control=twin)["alerts"] == []
    assert beside["alerts"][0]["alert"] == "LossOffLine" and 700 <= beside["alerts"][0]["step"] <= 710


@pytest.mark.parametrize("batches", [0.5, 2])
def test_a_control_of_another_batch_size_is_held_against_the_same_data(batches: float) -> None:
    batch = [Sample(s.step, s.loss, tokens=1000.0 * (s.step + 1)) for s in falling(2000, sd=0.04)]
    shifted = [s if s.step < 1500 else replace(s, loss=s.loss + 0.03) for s in batch]
    rng = random.Random(7)
    if batches == 2:
        pairs = zip(batch[::2], batch[1::2], strict=True)
        other = [replace(b, step=b.step // 2, loss=(a.loss + b.loss) / 2) for a, b in pairs]
    else:
        halves = [(s, h) for s in batch for h in (0.5, 0.0)]
        other = [replace(s, step=2 * s.step + (h == 0), tokens=s.tokens - 1000 * h) for s, h in halves]  # type: ignore[operator]
    other = [replace(s, loss=s.loss + rng.gauss(0, 0.004)) for s in other]
    assert replay(batch, control=other)["alerts"] == []
    found = replay(shifted, control=other)["alerts"]
    assert all(alert["step"] >= 1520 for alert in replay(shifted)["alerts"])
    assert found[0]["alert"] == "LossOffLine" and 1500 <= found[0]["step"] < 1520


def test_bad_data_that_moves_both_runs_is_not_held_against_ours() -> None:
    rng = random.Random(3)
    mine = falling(900, sd=0.1)
    both = [s if not 600 <= s.step < 603 else replace(s, loss=s.loss + 0.2) for s in mine]
    twin = [replace(s, loss=s.loss + rng.gauss(0, 0.004)) for s in both]
    assert replay(both, control=twin)["alerts"] == []


def test_a_run_on_its_prediction_is_left_alone_and_its_own_offset_is_learnt() -> None:
    run = [replace(s, loss=s.loss + 0.02) for s in falling(3000, sd=0.05)]
    answer = replay(run, prediction=band(3000, 0.05), target_loss=2.7)
    assert answer["alerts"] == [] and not off_prediction(answer)
    assert answer["final_loss"]["p05"] < run[-1].loss + 0.1 and answer["advice"][-1]["p_miss"] is not None


def test_a_slow_drift_above_its_prediction_is_called_and_pages_when_the_target_is_lost() -> None:
    run = [replace(s, loss=s.loss + 0.1 * max(0, s.step - 600) / 2400) for s in falling(3000, sd=0.04)]
    answer = replay(run, prediction=band(3000, 0.012), target_loss=2.0 + 6.0 * 3010**-0.3 + 0.02)
    called = [(a["alert"], a["severity"]) for a in answer["alerts"]]
    assert ("LossAbovePrediction", "warning") in called and ("LossAbovePrediction", "critical") in called
    assert off_prediction(answer) and answer["alerts"][0]["step"] < 2000


def test_a_run_below_its_prediction_is_news() -> None:
    run = [replace(s, loss=s.loss - 0.3) for s in falling(2000, sd=0.04)]
    assert "LossBelowPrediction" in {a["alert"] for a in replay(run, prediction=band(2000, 0.05))["alerts"]}


def test_a_sparse_run_thrown_back_beyond_its_half_is_paged_at_once() -> None:
    losses = [9.2, 6.7, 5.9, 5.4, 5.1, 4.8, 4.5, 4.3, 4.1, 3.9, 3.8, 3.77, 3.88, 5.7, 4.7]
    answer = replay([Sample(200 * (i + 1), x) for i, x in enumerate(losses)])
    assert [(a["alert"], a["severity"], a["step"]) for a in answer["alerts"]] == [
        ("LossOffLine", "warning", 2800),
        ("LossDiverged", "critical", 2800),
    ]


def outlook(**changes: float) -> dict[str, float]:
    base = {"step": 500.0, "share": 0.5, "gap_samples": 100.0, "gap": 0.0, "band_sd": 0.02, "gap_sd": 0.001}
    return base | changes


@pytest.mark.parametrize("gap", [-0.05, 0.0, 0.05])
def test_a_present_gap_moves_the_end_its_way_and_by_less(gap: float) -> None:
    said = advise(outlook(gap=gap), (), band(1000, 0.033))
    assert said.final_loss is not None
    moved = said.final_loss["p50"] - band(1000, 0.033)["final_loss"]["p50"]  # type: ignore[index]
    assert abs(moved) <= abs(gap) and moved * gap >= 0


def test_advice_to_roll_back_names_the_step_to_go_back_before() -> None:
    said = advise(outlook(), (Alert("LossDiverged", "critical", 480, 431, 9.0, 3.0),), None)
    assert said.action == "roll_back" and any("431" in e for e in said.evidence)


def test_settings_that_cannot_work_are_refused_with_what_to_set() -> None:
    with pytest.raises(ValueError, match="page"):
        Settings(page=5.0)
    with pytest.raises(ValueError, match="memory"):
        Settings(memory=3)
