"""When a group of ranks is hung, and who hangs it."""

import mmap
import time
from pathlib import Path

import pytest

from launcher.recovery.hang import CONFIRM_S, FLOOR_S, LONG_S, HangWatch, suspects
from launcher.recovery.rank import Pulse, RankProcess
from launcher.training.warm import PHASES, PULSE, Heart


@pytest.mark.parametrize(
    ("pulse", "is_hung"),
    [
        (Pulse(9, "step", 2.9 * 60, 60.0), False),
        (Pulse(9, "step", 3.1 * 60, 60.0), True),
        (Pulse(9, "step", 0.9 * FLOOR_S, 0.01), False),
        (Pulse(9, "step", 1.1 * FLOOR_S, 0.01), True),
        (Pulse(9, "validate", 20 * FLOOR_S, 0.01), False),
        (Pulse(9, "checkpoint", 1.1 * LONG_S, 0.01), True),
        (Pulse(-1, "start", 1.1 * LONG_S, 0.0), False),
        (Pulse(1, "step", 20 * FLOOR_S, 0.0), False),
        (Pulse(1, "step", 1.1 * LONG_S, 0.0), True),
        (Pulse(9, "own", 20 * FLOOR_S, 0.01), False),
        (Pulse(9, "own", 1.1 * LONG_S, 0.01), True),
    ],
)
def test_hung_is_three_times_the_usual_longest_step(pulse: Pulse, is_hung: bool) -> None:
    assert (watched([pulse] * 400) is not None) == is_hung


def watched(signs: list[Pulse | None], every_s: float = 0.5, watch: HangWatch | None = None) -> str | None:
    """What a watch says that is shown one rank's signs of life, one a look; the first thing it says."""
    watch, now, heard = watch or HangWatch(), 0.0, 0.0
    for sign in signs:
        now += every_s
        awake = watch.awake_s(now)
        heard = heard if sign is None else awake
        if (why := watch.hung({0: sign}, {0: awake - heard})) is not None:
            return f"{why} @{awake:g}"
    return None


def test_a_host_that_does_not_answer_is_hung() -> None:
    looks = int(FLOOR_S / 0.5)
    assert watched([None] * (looks + 3)) is not None
    assert watched([None] * (looks - 1)) is None


def test_a_driver_that_stood_still_blames_nobody() -> None:
    """Its own look was an hour ago: that nobody was heard meanwhile says nothing."""
    assert watched([None] * 5, every_s=3600.0) is None
    assert watched([None] * int(FLOOR_S), every_s=3600.0) is not None, "it looked often enough since"


def test_a_host_that_stood_still_and_goes_on_is_not_hung() -> None:
    before, frozen = Pulse(9, "step", 0.1, 0.01), Pulse(9, "step", 3 * FLOOR_S, 0.01)
    looks = int(CONFIRM_S / 0.5)
    assert watched([before, *[frozen] * looks, Pulse(10, "step", 0.1, 0.01)]) is None
    assert watched([before, *[frozen] * (looks + 2)]) is not None
    slow = Pulse(9, "step", 200.0, 60.0)  # its next step may take a minute
    assert watched([slow] * 100) is None and watched([slow] * 130) is not None
    other = Pulse(10, "step", 2 * FLOOR_S, 0.01)
    assert watched([*[frozen] * looks, *[other] * looks]) is None, "it has made a step between two stands"


WAITING = 'process 7, state S\nThread 7 (idle): "MainThread"\n    all_reduce (torch/distributed/x.py:1)\n'
BUSY = 'process 8, state R\nThread 8 (active): "MainThread"\n    tokenize (own.py:1)\n'
STOPPED = WAITING.replace("state S", "state T")


@pytest.mark.parametrize(
    ("dumps", "named"),
    [
        ({0: WAITING, 1: BUSY}, [1]),
        ({0: WAITING, 1: STOPPED}, [1]),
        ({0: WAITING, 1: WAITING}, []),
        ({0: BUSY, 1: BUSY}, []),
        ({0: WAITING, 1: ""}, [1]),
        ({0: WAITING, 1: "process 9, state S\nno stacks: not allowed\n"}, []),
    ],
)
def test_whom_the_others_wait_for(dumps: dict[int, str], named: list[int]) -> None:
    assert suspects(dumps) == named


def test_how_long_a_step_takes_is_known_after_the_second_whatever_runs_between_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, page = [100.0], mmap.mmap(-1, PULSE.size)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    heart = Heart(page)

    def beat(at: float, step: int, phase: str) -> tuple[float, str]:
        now[0] = at
        heart(step, phase)
        _, _, p99, number = PULSE.unpack_from(page, 0)
        return p99, PHASES[number]

    assert beat(100.0, 1, "step") == (0.0, "step"), "one step says nothing of the next"
    assert beat(100.0, 1, "own") == (0.0, "own")
    assert beat(160.0, 2, "step") == (60.0, "step")
    assert beat(160.0, 2, "own") == (60.0, "own")
    assert beat(161.0, 2, "checkpoint")[1] == "checkpoint" and beat(300.0, 2, "step")[1] == "step"
    assert beat(360.0, 3, "step") == (60.0, "step"), "a checkpoint is no part of a step"


def test_a_rank_whose_imports_fail_says_so_at_once(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit(7)")
    began = time.monotonic()
    rank = RankProcess({"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"})
    try:
        assert not rank.wait_ready(60.0) and time.monotonic() - began < 30.0
        assert rank.died == 7
    finally:
        rank.close()
