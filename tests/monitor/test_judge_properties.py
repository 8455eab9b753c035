"""Rules of the judge that hold for any curve: hypothesis draws the noise, the fault and the cut."""

import json
import math
import random

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from monitor.judge import Settings
from monitor.replay import Watch, replay
from monitor.verdict import Sample, Verdict

STEPS = 260
FEW = settings(max_examples=12, deadline=None)


def losses(seed: int, fault: float, at: int, sd: float = 0.05) -> list[float]:
    """A falling curve with right-skewed noise; from `at` on `fault` higher."""
    rng = random.Random(seed)
    noise = (sd * (rng.gauss(0, 1) + 0.5 * (rng.expovariate(1) - 1)) for _ in range(STEPS))
    return [2.0 + 4.0 * (t + 5) ** -0.4 + e + (fault if t >= at else 0.0) for t, e in enumerate(noise)]


def line(shift: float = 0.0, scale: int = 1) -> dict[str, object]:
    """A prediction of that curve, nats per token."""
    steps = list(range(0, STEPS, 10))
    middle = [2.0 + 4.0 * (t + 5) ** -0.4 + shift for t in steps]
    curve = {"step": [scale * t for t in steps], "p50": middle}
    curve |= {"p05": [m - 0.05 for m in middle], "p95": [m + 0.05 for m in middle]}
    return {
        "final_loss": {"p05": middle[-1] - 0.05, "p50": middle[-1], "p95": middle[-1] + 0.05},
        "curve": curve,
    }


def samples(values: list[float], scale: int = 1) -> list[Sample]:
    return [Sample(scale * t, x) for t, x in enumerate(values)]


def called(answer: dict) -> list[tuple]:
    return [
        (a["alert"], a["severity"], a["step"], a["since_step"], a["resolved_step"]) for a in answer["alerts"]
    ]


def judged(watch: Watch, stream: list[Sample]) -> list[Verdict]:
    return [watch.observe(sample) for sample in stream]


any_run = st.tuples(st.integers(0, 999), st.sampled_from([0.0, 0.1, 0.4, 2.0]), st.integers(60, 240))


@FEW
@given(any_run, st.sampled_from([-4.0, 0.5, 16.0, 1024.0]), st.booleans())
def test_a_constant_added_to_loss_and_prediction_changes_nothing(
    run: tuple[int, float, int], constant: float, with_line: bool
) -> None:
    here = replay(samples(losses(*run)), prediction=line() if with_line else None)
    there = replay(
        samples([x + constant for x in losses(*run)]), prediction=line(constant) if with_line else None
    )
    assert called(here) == called(there)


@FEW
@given(any_run, st.sampled_from([2, 200, 1_000_000]), st.booleans())
def test_the_unit_of_steps_changes_nothing(run: tuple[int, float, int], scale: int, with_line: bool) -> None:
    here = replay(samples(losses(*run)), prediction=line() if with_line else None)
    there = replay(samples(losses(*run), scale), prediction=line(scale=scale) if with_line else None)
    scaled = [(a, s, *(None if v is None else v * scale for v in rest)) for a, s, *rest in called(here)]
    assert scaled == called(there)


@FEW
@given(any_run, st.sampled_from([math.nan, math.inf, -math.inf]), st.integers(0, STEPS - 1), st.booleans())
def test_a_non_finite_loss_is_never_healthy(
    run: tuple[int, float, int], bad: float, at: int, with_line: bool
) -> None:
    values = losses(*run)
    values[at] = bad
    watch = Watch(prediction=line() if with_line else None)
    verdicts = judged(watch, samples(values))
    assert verdicts[at].state == "non_finite"
    assert any(a.alert == "LossNonFinite" and a.severity == "critical" for a in verdicts[at].opened)
    assert all(math.isfinite(v.expected) for v in verdicts[at + 1 :] if v.expected is not None)


@FEW
@given(
    any_run, st.integers(0, STEPS - 1), st.sampled_from(["bare", "line", "control"]), st.integers(0, STEPS)
)
def test_a_monitor_restarted_anywhere_gives_the_same_verdicts(
    run: tuple[int, float, int], cut: int, kind: str, nan_at: int
) -> None:
    values = losses(*run)
    if nan_at < STEPS:
        values[nan_at] = math.nan
    prediction = line() if kind == "line" else None
    twin = losses(run[0], 0.0, STEPS) if kind == "control" else None

    def feed(watch: Watch, part: range) -> list[Verdict]:
        out = []
        for t in part:
            if twin is not None:
                watch.observe_control(Sample(t, twin[t]))
            out.append(watch.observe(Sample(t, values[t], lr=0.1, grad_norm=1.0 + t % 3, spread=0.01)))
        return out

    whole = feed(Watch(prediction=prediction, total_steps=STEPS), range(STEPS))
    first = Watch(prediction=prediction, total_steps=STEPS)
    parts = feed(first, range(cut))
    state = json.dumps(first.state_dict(), allow_nan=False)
    assert len(state.encode()) <= 10_000
    second = Watch.from_state(Settings(), json.loads(state), prediction=prediction, total_steps=STEPS)
    parts += feed(second, range(cut, STEPS))
    assert repr(parts) == repr(whole)  # repr: a NaN is equal to itself there


@FEW
@given(any_run, st.integers(2, 12), st.integers(0, 99))
def test_arrival_shuffled_within_a_window_and_repeated_changes_nothing(
    run: tuple[int, float, int], window: int, seed: int
) -> None:
    stream = samples(losses(*run))
    rng = random.Random(seed)
    shuffled = sorted(stream, key=lambda s: s.step + rng.uniform(0, window))
    repeated = [s for s in shuffled for _ in range(rng.choice([1, 1, 2]))]
    assert called(replay(repeated)) == called(replay(stream))


@FEW
@given(any_run)
def test_a_late_or_repeated_sample_changes_nothing_in_a_live_judge(run: tuple[int, float, int]) -> None:
    stream = samples(losses(*run))
    once, twice = Watch(), Watch()
    for at, sample in enumerate(stream):
        verdict = once.observe(sample)
        assert twice.observe(sample) == verdict
        again = twice.observe(replace(stream[at // 2], loss=99.0))
        over = any(alert.resolved_step is not None for alert in verdict.opened)  # a spike's causes go with it
        held = again.causes if over else verdict.causes
        assert again == verdict._replace(opened=(), closed=(), state=again.state, causes=held)
        assert again.opened == again.closed == ()
