"""The learning rate of every step."""

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.runspec.model import RunSpec
from launcher.runspec.schedule import lr_at, schedule_rows


def run(tokens: int = 100_000, batch: int = 1000, lr: float = 1.0, **schedule: Any) -> RunSpec:
    return RunSpec.from_dict(
        {
            "name": "r",
            "workload": {"layers": 1, "width": 8, "heads": 1, "context": 100},
            "data": {"path": "stdlib"},
            "train": {"tokens": tokens, "batch_tokens": batch, "lr": lr, "schedule": schedule},
        }
    )


def test_warm_up_is_a_line_from_zero() -> None:
    spec = run(kind="constant", warmup_tokens=10_000)
    assert [lr_at(s, spec) for s in (0, 1, 5, 10, 11, 100)] == pytest.approx([0, 0.1, 0.5, 1, 1, 1])


def test_wsd_holds_and_then_decays_in_a_line_to_the_last_step() -> None:
    spec = run(kind="wsd", warmup_tokens=10_000, decay_tokens=20_000, final_lr=0.2)
    assert [lr_at(s, spec) for s in (10, 50, 80, 90, 100, 120)] == pytest.approx([1, 1, 1, 0.6, 0.2, 0.2])


def test_cosine_and_linear_are_half_way_at_half_time() -> None:
    for kind in ("cosine", "linear"):
        spec = run(kind=kind, warmup_tokens=20_000, final_lr=0.5)
        assert [lr_at(s, spec) for s in (20, 60, 100)] == pytest.approx([1, 0.75, 0.5])


def test_wsd_decays_over_a_fifth_unless_told() -> None:
    assert run(kind="wsd").train.schedule.decay_tokens == 20_000


SCHEDULES = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["wsd", "cosine", "linear", "constant"]),
        "warmup_tokens": st.integers(0, 30_000),
    }
)


@settings(max_examples=60, deadline=None)
@given(schedule=SCHEDULES, batch=st.sampled_from([100, 700, 1000, 1300]), final=st.floats(0, 1))
def test_every_rate_lies_between_zero_and_the_peak_and_never_rises_after_warm_up(
    schedule: dict[str, Any], batch: int, final: float
) -> None:
    if schedule["kind"] != "constant":
        schedule["final_lr"] = final
    spec = run(batch=batch, **schedule)
    rates = [lr_at(s, spec) for s in range(spec.total_steps + 1)]
    assert all(0 <= r <= 1 + 1e-12 for r in rates)
    warm = int(spec.warmup_steps) + 1
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(rates[warm:]))
    if schedule["kind"] != "constant":
        assert rates[-1] == pytest.approx(final)


@settings(max_examples=40, deadline=None)
@given(schedule=SCHEDULES)
def test_the_thinned_rows_restore_the_schedule(schedule: dict[str, Any]) -> None:
    spec = run(batch=100, **schedule)
    rows = schedule_rows(spec, at_most=200)
    assert rows[0][0] == 0 and rows[-1][0] == spec.total_steps and len(rows) < 260
    for (a, at), (b, bt) in itertools.pairwise(rows):
        middle = (a + b) // 2
        line = at + (bt - at) * (middle - a) / (b - a)
        assert lr_at(middle, spec) == pytest.approx(line, abs=2e-3)


def test_a_negative_step_is_refused() -> None:
    with pytest.raises(ValueError):
        lr_at(-1, run())
