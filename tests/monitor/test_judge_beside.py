"""Beside the fast tests: plateaus, validations in a training stream, order of arrival, roll-back, the end of a noisy run."""

import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from monitor.advice import advise
from monitor.judge import Settings
from monitor.judge.order import WINDOW, Order
from monitor.replay import Watch, replay
from monitor.schema import spell
from monitor.verdict import Alert, Cause, Sample


def falling(steps: int, seed: int = 0, sd: float = 0.1) -> list[Sample]:
    rng = random.Random(seed)
    return [Sample(t, 2.0 + 6.0 * (t + 10) ** -0.3 + rng.gauss(0.0, sd)) for t in range(steps)]


def with_validation(run: list[Sample], every: int = 50, seed: int = 1) -> list[Sample]:
    rng = random.Random(seed)
    middle = [2.02 + 6.0 * (s.step + 10) ** -0.3 for s in run]
    return [
        replace(s, val_loss=m + rng.gauss(0, 0.004)) if s.step % every == 0 else s
        for s, m in zip(run, middle, strict=True)
    ]


def called(run: list[Sample], **given: object) -> list[tuple[str, int]]:
    return [(a["alert"], a["step"]) for a in replay(run, **given)["alerts"]]  # type: ignore[arg-type]


def stuck(run: list[Sample], at: int = 2000) -> list[Sample]:
    """The same run and noise, and a loss that falls no further."""
    fall = [6.0 * (s.step + 10) ** -0.3 for s in run]
    return [replace(s, loss=s.loss - f + fall[min(s.step, at)]) for s, f in zip(run, fall, strict=True)]


# plateau


def test_a_loss_that_stops_falling_is_a_plateau_before_half_as_many_steps_again() -> None:
    found = called(stuck(run := falling(4000, sd=0.03)))
    assert [name for name, _ in found] == ["LossPlateau"] and 2000 < found[0][1] < 3000
    assert called(run) == []


def test_a_plateau_that_the_prediction_or_the_learning_rate_explains_is_none() -> None:
    run = stuck(falling(4000, sd=0.03))
    at = list(range(0, 4000, 10))
    middle = [2.0 + 6.0 * (min(t, 2000) + 10) ** -0.3 for t in at]
    curve = {"step": at, "p50": middle, "p05": [m - 0.1 for m in middle], "p95": [m + 0.1 for m in middle]}
    final = {"p05": middle[-1] - 0.1, "p50": middle[-1], "p95": middle[-1] + 0.1}
    assert called(run, prediction={"final_loss": final, "curve": curve}) == []
    raised = [replace(s, lr=1e-3 if s.step < 2000 else 1.2e-3) for s in run]
    assert called(raised) == []


# validation


def test_healthy_validations_in_a_training_stream_are_no_news() -> None:
    assert [called(with_validation(falling(2000, seed), seed=seed)) for seed in range(4)] == [[]] * 4


@pytest.mark.parametrize("leap", [0.5, -0.5])
def test_a_validation_that_leaps_away_from_the_training_loss_is_called_at_once(leap: float) -> None:
    run = with_validation(falling(2000))
    bad = [s if s.val_loss is None or s.step < 1500 else replace(s, val_loss=s.val_loss + leap) for s in run]
    assert called(bad)[0] == ("ValidationApart", 1500)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_validation_that_is_no_number_is_critical_until_one_is_again(bad: float) -> None:
    run = with_validation(falling(2000))
    broken = [replace(s, val_loss=bad) if s.step in (1000, 1050) else s for s in run]
    alerts = replay(broken)["alerts"]
    assert [(a["alert"], a["severity"], a["step"]) for a in alerts] == [("LossNonFinite", "critical", 1000)]
    assert alerts[0]["resolved_step"] == 1101
    watch = Watch()
    for s in broken[:1001]:
        watch.observe(s)
    said = watch.advice()
    assert said.action == "continue" and "look at the evaluation" in said.evidence[-1]


def test_a_validation_says_where_the_run_is_better_than_noisy_training_samples() -> None:
    """A wide band must not make one noisy sample the truth: the last validation is."""
    run = with_validation(falling(700, sd=0.13), every=100)
    run.append(replace(run[-1], step=700, loss=run[-1].loss + 0.4, val_loss=2.85))
    at = list(range(0, 701, 10))
    middle = [2.2 + 6.0 * (t + 10) ** -0.3 for t in at]
    curve = {"step": at, "p50": middle, "p05": [m - 0.35 for m in middle], "p95": [m + 0.35 for m in middle]}
    final = {"p05": middle[-1] - 0.35, "p50": middle[-1], "p95": middle[-1] + 0.35}
    with_val = replay(run, prediction={"final_loss": final, "curve": curve})["final_loss"]
    assert with_val["p05"] < 2.85 < with_val["p95"] and with_val["p95"] - with_val["p05"] < 0.1
    without = replay(
        [replace(s, val_loss=None) for s in run], prediction={"final_loss": final, "curve": curve}
    )["final_loss"]
    truth = 2.0 + 6.0 * 710**-0.3
    assert abs(without["p50"] - truth) < 0.08


# drift in a sparse log


@pytest.mark.parametrize("sign", [1, -1])
def test_a_drift_in_a_log_of_a_dozen_validations_is_called_before_the_end(sign: int) -> None:
    at = [125 * i for i in range(1, 13)]
    middle = [3.2 + 5.0 * t**-0.5 for t in at]
    curve = {"step": at, "p50": middle}
    curve |= {"p05": [m - 0.003 for m in middle], "p95": [m + 0.003 for m in middle]}
    final = {"p05": middle[-1] - 0.003, "p50": middle[-1], "p95": middle[-1] + 0.003}
    rng = random.Random(1)
    healthy = [Sample(t, m + rng.gauss(0, 0.0018)) for t, m in zip(at, middle, strict=True)]
    drifting = [replace(s, loss=s.loss + sign * 0.016 * max(0, s.step - 300) / 1200) for s in healthy]
    given = {"final_loss": final, "curve": curve}
    name = "LossAbovePrediction" if sign > 0 else "LossBelowPrediction"
    assert called(healthy, prediction=given) == []
    found = called(drifting, prediction=given)
    assert [n for n, _ in found] == [name] and 500 < found[0][1] <= 1250


@pytest.mark.parametrize("every", [50, 200])
def test_noisy_samples_of_a_sparse_log_are_not_taken_for_a_drift(every: int) -> None:
    at = list(range(0, 60 * every, every))
    middle = [2.0 + 6.0 * (t + 10) ** -0.3 for t in at]
    curve = {"step": at, "p50": middle, "p05": [m - 0.02 for m in middle], "p95": [m + 0.02 for m in middle]}
    final = {"p05": middle[-1] - 0.02, "p50": middle[-1], "p95": middle[-1] + 0.02}
    given = {"final_loss": final, "curve": curve}
    inside = 0
    for seed in range(20):
        rng = random.Random(seed)
        run = [Sample(t, m + rng.gauss(0, 0.04)) for t, m in zip(at, middle, strict=True)]
        answer = replay(run, prediction=given)
        assert answer["alerts"] == []
        inside += answer["final_loss"]["p05"] <= middle[-1] <= answer["final_loss"]["p95"]
        drifting = [replace(s, loss=s.loss + 0.2 * s.step / at[-1]) for s in run]
        assert [a["alert"] for a in replay(drifting, prediction=given)["alerts"]][:1] == [
            "LossAbovePrediction"
        ]
    assert inside >= 16


# order of arrival


def rows(count: int) -> list[tuple]:
    return [(seq, 10 * seq, 3.0, None) for seq in range(count)]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 999), st.integers(1, WINDOW // 2), st.integers(1, 40), st.integers(0, 120))
def test_rows_shuffled_within_the_window_and_repeated_come_out_in_order(
    seed: int, window: int, chunk: int, restart: int
) -> None:
    rng = random.Random(seed)
    arriving = sorted(rows(120), key=lambda row: row[0] + rng.uniform(0, window))
    order, out = Order(), []
    for start in range(0, len(arriving), chunk):
        if start >= restart:  # a monitor restarted here goes on with what waited
            kept = json.loads(json.dumps(order.state()))
            order = Order()
            order.load(kept)
        out += list(order.ready(0, arriving[start : start + chunk]))
    out += order.flush()
    assert out == rows(120)


def test_rows_in_order_are_never_delayed_and_lost_ones_only_for_a_while() -> None:
    order = Order()
    assert [list(order.ready(0, [row])) for row in rows(50)] == [[row] for row in rows(50)]
    thinned = [row for row in rows(2000)[50:] if row[0] % 2]
    behind, done = [], 0
    for sent, row in enumerate(thinned, 1):
        done += len(order.ready(0, [row]))
        behind.append(sent - done)
    assert max(behind) <= WINDOW and behind[-1] == 0
    assert len(order.ready(1, rows(3))) == 3, "a new attempt counts from 0"


def test_a_row_that_is_no_number_waits_for_nothing() -> None:
    order = Order()
    order.ready(0, rows(3))
    assert list(order.ready(0, [rows(9)[5]])) == []
    nan = (7, 70, math.nan, None)
    assert list(order.ready(0, [nan])) == [rows(9)[5], nan]


def test_shuffled_arrival_gives_the_same_verdicts_live() -> None:
    run = falling(1200)
    run[1000:] = [replace(s, loss=s.loss + 0.7) for s in run[1000:]]
    rng = random.Random(5)
    shuffled = sorted(run, key=lambda s: s.step + rng.uniform(0, WINDOW // 2))

    def judged(stream: list[Sample]) -> list[tuple]:
        watch, out = Watch(), []
        for s in stream:
            for seq, step, loss in watch.order.ready(0, [(s.step, s.step, s.loss)]):
                assert seq == step
                out += [(a.alert, a.step, a.since_step) for a in watch.observe(Sample(step, loss)).opened]
        return out

    assert judged(shuffled) == judged(run) and len(judged(run)) == 2


def test_the_state_of_a_judge_with_everything_in_it_stays_under_10_kb() -> None:
    run, rng = falling(3000), random.Random(2)
    at = list(range(0, 3001, 20))
    middle = [2.0 + 6.0 * (t + 10) ** -0.3 for t in at]
    curve = {"step": at, "p50": middle, "p05": [m - 0.1 for m in middle], "p95": [m + 0.1 for m in middle]}
    final = {"p05": middle[-1] - 0.1, "p50": middle[-1], "p95": middle[-1] + 0.1}
    watch = Watch(prediction={"final_loss": final, "curve": curve}, target_loss=2.1)
    for s in run:
        where = {"tokens": 1.23456789e11 + 524288.0 * s.step, "lr": 1e-3 * rng.random()}
        watch.observe_control(replace(s, loss=s.loss + 0.01 * rng.random(), **where))
        more = {"grad_norm": rng.random(), "tokens_per_s": 1e6 * rng.random(), "spread": rng.random()}
        watch.observe(replace(s, time=1.7e9 + 1.2345678 * s.step, val_loss=s.loss, **where, **more))
        if s.step % 50 == 0:
            watch.checkpoint(s.step)
    for k in range(100):  # a control that is ahead, samples that wait for others, a long announcement
        watch.observe_control(Sample(3000 + k, 2.0 + rng.random(), tokens=1.25e11 + 524288.0 * k))
    for k in range(WINDOW):
        row = (2 * k + 5, 3000 + k, 2 + rng.random(), 1.25e11, 1.7e9 + rng.random(), None)
        watch.order.ready(1, [(*row, rng.random(), rng.random(), 1e6 * rng.random(), rng.random())])
    assert len(watch.order.waiting) >= WINDOW - 1
    watch.announce(4000, "x" * 200)
    assert len(json.dumps(spell(watch.state_dict()), separators=(",", ":")).encode()) <= 10_000


# roll back, causes


def test_a_roll_back_names_the_newest_checkpoint_before_the_onset_and_the_batches_to_skip() -> None:
    watch = Watch()
    run = [replace(s, tokens=1000.0 * (s.step + 1)) for s in falling(1000)]
    for s in run:
        watch.observe(s)
        if s.step and s.step % 100 == 0:
            watch.checkpoint(s.step)
    watch.checkpoint(900, ok=False)
    for t in range(1000, 1100):
        watch.observe(Sample(t, run[-1].loss + 2.0, tokens=1000.0 * (t + 1)))
        if t == 1050:
            watch.checkpoint(1050)
    again = Watch.from_state(Settings(), json.loads(json.dumps(spell(watch.state_dict()))))
    for said in (watch.advice(), again.advice()):
        assert (said.action, said.roll_back_to) == ("roll_back", 800)
        assert said.skip is not None and 995 <= said.skip[0] <= 1001 and said.skip[1] <= 1005
        assert any("step 800" in e for e in said.evidence)
        assert any("data_position" in e and "about tokens" in e for e in said.evidence)


def test_a_sparse_log_goes_back_before_the_steps_it_does_not_show() -> None:
    watch = Watch()
    for i, loss in enumerate([9.2, 6.7, 5.9, 5.4, 5.1, 4.8, 4.5, 4.3, 4.1, 3.9, 3.8, 3.77, 3.88, 5.7]):
        watch.observe(Sample(200 * (i + 1), loss))
        watch.checkpoint(200 * (i + 1) - 100)
    said = watch.advice()
    assert (said.action, said.roll_back_to, said.skip) == ("roll_back", 2500, (2601, 2800))


def test_a_cause_seen_before_the_loss_left_moves_the_onset() -> None:
    outlook = {"step": 500.0, "share": 0.5, "gap_samples": 0.0, "gap": 0.0, "band_sd": 1.0, "gap_sd": 0.0}
    alert = Alert("LossDiverged", "critical", 480, 431, 9.0, 3.0)
    norm = Cause("gradient_norm", "5.0 times its level, first at step 425", 425)
    said = advise(outlook, (alert,), None, causes=(norm,), checkpoints=(400, 428))
    assert said.roll_back_to == 400 and said.skip == (425, 480)


def test_a_gradient_norm_that_is_no_number_is_the_cause_of_the_loss_that_follows() -> None:
    watch = Watch()
    for s in falling(200):
        watch.observe(replace(s, grad_norm=1.0))
    watch.observe(Sample(200, 2.9, grad_norm=math.inf))
    verdict = watch.observe(Sample(201, math.nan, grad_norm=math.nan))
    assert [(c.name, c.step) for c in verdict.causes] == [("gradient_norm", 200)]
    json.dumps(watch.state_dict(), allow_nan=False)


def test_every_alert_of_one_rank_carries_its_cause() -> None:
    rng = random.Random(0)
    run = [replace(s, spread=0.02 + 0.005 * rng.random()) for s in falling(400)]
    watch = Watch()
    for s in run:
        watch.observe(s)
    verdicts = [watch.observe(Sample(400 + i, run[-1].loss, spread=0.3)) for i in range(10)]
    assert [c.name for v in verdicts for a in v.opened if a.alert == "RankApart" for c in v.causes] == [
        "one_rank"
    ]


def test_money_and_hours_left_come_with_the_advice_where_the_price_is_known() -> None:
    watch = Watch(total_steps=1000)
    watch.price_per_hour = 32.0
    for s in falling(501):
        watch.observe(replace(s, time=1000.0 + 36.0 * s.step))
    said = watch.advice()
    assert said.hours_left == pytest.approx(5.0, rel=0.02) and said.money_left == pytest.approx(
        160.0, rel=0.02
    )
