import pytest

from launcher.errors import WrongInput
from launcher.training.drill import Drill, DrillCrash, read_drill


def test_no_drill_changes_nothing() -> None:
    for text in (None, ""):
        drill = read_drill(text)
        assert drill.lr(10**6, 0.5) == 0.5
        assert not any(drill.poisons(s) for s in range(100))


def test_a_learning_rate_drill_begins_at_its_step_and_stays() -> None:
    drill = read_drill("lr*30@100")
    assert [drill.lr(s, 1.0) for s in (99, 100, 5000)] == [1.0, 30.0, 30.0]
    assert not drill.poisons(100)


def test_a_nan_drill_strikes_once() -> None:
    drill = read_drill(" nan@7 ")
    assert [s for s in range(20) if drill.poisons(s)] == [7]
    assert drill == Drill(step=7, nan=True)


def test_a_crash_drill_strikes_rank_0_at_its_step_in_every_attempt() -> None:
    drill = read_drill("crash@7")
    for step, rank in ((6, 0), (8, 0), (7, 1)):
        drill.strike(step, rank, attempt=1)
    for attempt in (1, 2):
        with pytest.raises(DrillCrash, match=f"step 7, attempt {attempt}"):
            drill.strike(7, 0, attempt)


def test_a_hang_drill_spares_the_attempt_that_comes_after() -> None:
    read_drill("hang@7").strike(7, 0, attempt=2)


@pytest.mark.parametrize("bad", ["lr", "nan", "lr*-3@5", "lr*30@", "inf@3", "lr*30@5;nan@7"])
def test_a_drill_that_can_not_be_read_stops_the_run_with_its_text(bad: str) -> None:
    with pytest.raises(WrongInput, match="Use lr"):
        read_drill(bad)
