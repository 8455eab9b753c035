"""Tokens a second are those of training: of all its steps, and of nothing else."""

import pytest

from launcher.training.pace import Pace


@pytest.mark.parametrize("every", [1, 100])
def test_a_run_that_tells_of_few_steps_is_as_fast_as_one_that_tells_of_all(every: int) -> None:
    pace = Pace(40, 0.0)
    for step in range(40 + every, 1000, every):
        assert pace.tokens_per_s(step, 512, 2.0 * (step - 40)) == pytest.approx(256.0)


def test_a_script_that_goes_back_has_a_rate() -> None:
    pace = Pace(40, 0.0)
    assert pace.tokens_per_s(10, 512, 2.0) == pytest.approx(256.0)
    assert pace.tokens_per_s(11, 512, 4.0) == pytest.approx(256.0)


def test_a_step_after_which_a_run_validates_is_as_fast_as_another() -> None:
    pace = Pace(0, 0.0)
    assert pace.tokens_per_s(1, 512, 2.0) == pytest.approx(256.0)
    pace.leave_out(30.0)
    assert pace.tokens_per_s(2, 512, 34.0) == pytest.approx(256.0)
    assert pace.tokens_per_s(3, 512, 36.0) == pytest.approx(256.0)
