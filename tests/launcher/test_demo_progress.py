import time

import pytest

from launcher.cli.demo_progress import Progress, clock

PARTS = {"start": 10.0, "ladder": 100.0, "target": 90.0}


def at(phase: str, elapsed_s: float, **spent: float) -> Progress:
    progress = Progress(dict(PARTS))
    progress.phase(phase)
    progress.spent.update(spent)
    progress._phase_began = time.monotonic() - elapsed_s
    return progress


def test_before_anything_is_known_the_estimate_stands() -> None:
    assert at("start", 0.0).left_s(0.0) == pytest.approx(200.0, abs=1)


def test_a_machine_half_as_fast_has_twice_the_time_left() -> None:
    slow = at("target", 60.0, start=20.0, ladder=200.0)
    assert slow.left_s(0.5) == pytest.approx(60.0, abs=1)
    assert at("ladder", 100.0, start=10.0).left_s(0.5) == pytest.approx(100.0 + 90.0, abs=1)


def test_time_left_is_never_nothing_while_a_phase_has_not_begun_to_move() -> None:
    assert at("target", 10_000.0, start=10.0, ladder=100.0).left_s(0.0) >= 15.0


def test_clock() -> None:
    assert [clock(s) for s in (0, 59.9, 61, 3600)] == ["0:00", "0:59", "1:01", "60:00"]
