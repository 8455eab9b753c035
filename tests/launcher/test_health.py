"""Which rank is slow, and which one computes something else."""

import math
import random

from launcher.training.health import Apart, Stragglers
from launcher.training.preflight import report, slow_ranks


def test_a_rank_that_is_slow_for_good_is_named_and_one_slow_step_is_not() -> None:
    dice = random.Random(0)
    steady = Stragglers(window=16)
    for step in range(200):
        own = [1.0 + 0.05 * dice.random() for _ in range(4)]
        own[step % 4] *= 5 if step % 8 == 0 else 1
        assert steady.add(own) == {}
    slow = Stragglers(window=16)
    found = [slow.add([1.0, 1.0, 1.6, 1.0]) for _ in range(16)]
    assert found[-1] == {"slow_rank": 2, "slow_ratio": 1.6} and found[-2] == {}
    assert "rank 2 is slow" in (slow.news(0.0) or "") and slow.news(0.1) is None
    for _ in range(16):
        slow.add([1.0] * 4)
    assert slow.news(59.0) is None and "rank 2 keeps up again" in (slow.news(60.0) or "")


def test_a_lag_that_nobody_waits_for_is_not_named() -> None:
    quick, slower = Stragglers(window=4), Stragglers(window=4)
    assert [quick.add([0.002, 0.004]) for _ in range(40)] == [{}] * 40
    assert [slower.add([0.02, 0.04]) for _ in range(4)][-1] == {"slow_rank": 1, "slow_ratio": 2.0}


def test_ranks_that_are_slow_by_turns_are_said_once_a_minute_and_counted() -> None:
    turns, said = Stragglers(window=4), []
    for step in range(100_000):  # of 5 ms: 500 s
        own = [0.01, 0.01]
        own[step // 8 % 2] = 0.03
        turns.add(own)
        if (news := turns.news(step * 0.005)) is not None:
            said.append(news)
    assert 5 <= len(said) <= 9
    assert "changes in 60 s)" in said[1] and "changes" not in said[0]


def test_of_two_ranks_the_slow_one_is_named() -> None:
    two = Stragglers(window=4)
    assert [two.add([2.0, 1.0]) for _ in range(4)][-1] == {"slow_rank": 0, "slow_ratio": 2.0}


def test_a_rank_that_computes_slowly_is_named_before_the_first_step() -> None:
    assert slow_ranks([1.0]) == {} and slow_ranks([1.0, 1.2, 1.1]) == {}
    assert slow_ranks([1.0, 2.0]) == {1: 2.0}
    said = report([0.001, 0.001, 0.003], [0.01, 0.012, 0.011], wrong=[1])
    assert "rank 2 is slow: 3.0 x" in said[1] and "rank 1 got a wrong sum" in said[2]


def test_a_rank_that_computes_something_else_is_named_once_a_minute() -> None:
    dice, apart, said = random.Random(1), Apart(), list[str | None]()
    for step in range(400):
        losses = [2.0 + 0.01 * dice.gauss(0, 1) for _ in range(8)]
        losses[5] += 0.3 if step >= 300 else 0.0
        said.append(apart.add(losses, step * 1.0))
    told = [step for step, word in enumerate(said) if word]
    assert told == [304, 364]
    assert "rank 5 stands apart: its loss is 2." in (said[304] or "")


def test_ordinary_ranks_and_single_outliers_are_not_apart() -> None:
    dice, apart = random.Random(2), Apart()
    for step in range(20_000):
        losses = [2.0 + 0.01 * dice.gauss(0, 1) for _ in range(4)]
        losses[step % 4] += 0.5 if step % 50 == 0 else 0.0
        assert apart.add(losses, step * 1.0) is None
    shared = Apart()  # of ranks that share a model
    assert all(shared.add([2.0, 2.0 + 1e-7 * (step > 100)], step) is None for step in range(300))
    assert Apart().add([2.0], 0.0) is None


def test_of_two_ranks_both_are_named_and_a_nan_is_the_one_that_has_it() -> None:
    two, four = Apart(), Apart()
    for step in range(100):
        assert two.add([2.0, 2.01], step) is None and four.add([2.0, 2.01, 2.0, 1.99], step) is None
    words = [two.add([2.0, 3.0], 100.0 + step) for step in range(5)]
    assert "rank 0 or 1 stands apart" in (words[-1] or "")
    words = [four.add([2.0, 2.01, math.nan, 1.99], 100.0 + step) for step in range(5)]
    assert "rank 2 stands apart: its loss is nan" in (words[-1] or "")
    assert all(four.add([math.nan] * 4, 1000.0 + step) is None for step in range(20)), "all of them: nobody"
