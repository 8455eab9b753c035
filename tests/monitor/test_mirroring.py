"""A mirror tells each step once, in order, with what was expected of it, and goes on where it ended."""

import math
from collections.abc import Mapping
from typing import Any

import pytest

from monitor.errors import Failed
from monitor.mirroring import mirror, values_of


class Kept:
    """A sink that keeps what it is told."""

    def __init__(self, newest: int = -1) -> None:
        self.start = newest
        self.rows: list[tuple[int, dict[str, float]]] = []

    def newest(self) -> int:
        return self.start

    def tell(self, step: int, time_s: float, values: Mapping[str, float]) -> None:
        self.rows.append((step, dict(values)))

    def close(self) -> None:
        pass


class Service:
    """What a monitor answers about one run that makes `more` steps at each look, until `end`."""

    def __init__(self, steps: int, more: int = 0, end: int = 0, phase: str = "ended") -> None:
        self.steps, self.more, self.end, self.phase = steps, more, end, phase

    def ask(self, path: str) -> Any:
        if "/samples" not in path:
            if path == "/v1/runs/r" and self.phase == "running":
                self.steps += self.more
                if self.steps >= self.end:
                    self.phase = "ended"
            return {"phase": self.phase, "step": self.steps or None}
        first, last = (int(part.split("=")[1]) for part in path.split("?")[1].split("&"))
        rows = range(max(1, first), min(last, self.steps) + 1)
        return {
            "samples": [{"step": s, "attempt": 1, "time": 5.0, "loss": 2.0 + s, "lr": None} for s in rows]
        }


def test_every_step_is_told_once_and_in_order() -> None:
    sink = Kept()
    assert mirror(Service(12_001).ask, "r", sink, follow=False) == 12_001
    assert [step for step, _ in sink.rows] == list(range(1, 12_002))
    assert sink.rows[0][1] == {"loss": 3.0}


def test_it_goes_on_where_it_ended() -> None:
    sink = Kept(newest=90)
    assert mirror(Service(100).ask, "r", sink, follow=False) == 10
    assert [step for step, _ in sink.rows] == list(range(91, 101))


def test_a_live_run_is_followed_to_its_end_and_no_step_is_lost_or_told_twice() -> None:
    sink, waits = Kept(), []
    service = Service(3, more=7, end=50, phase="running")
    mirror(service.ask, "r", sink, follow=True, every_s=4.0, sleep=waits.append)
    assert [step for step, _ in sink.rows] == list(range(1, service.steps + 1))
    assert len(waits) >= 3 and set(waits) == {4.0}


def test_a_monitor_that_is_away_is_waited_for_only_when_following() -> None:
    service, away = Service(5), [True, True]

    def ask(path: str) -> Any:
        if away:
            away.pop()
            raise Failed("no monitor answers")
        return service.ask(path)

    said: list[str] = []
    sink = Kept()
    assert mirror(ask, "r", sink, follow=True, say=said.append, sleep=lambda s: None) == 5
    assert len(said) == 2 and "tried again" in said[0]
    away.append(True)
    with pytest.raises(Failed):
        mirror(ask, "r", Kept(), follow=False)


def test_numbers_that_are_no_numbers_are_kept_and_words_are_not() -> None:
    got = values_of(
        {
            "step": 3,
            "loss": "NaN",
            "grad_norm": "Infinity",
            "expected": 2.5,
            "slow_rank": "rank 3",
            "mfu": None,
        }
    )
    assert math.isnan(got["loss"]) and got["grad_norm"] == math.inf
    assert got["line/expected"] == 2.5 and set(got) == {"loss", "grad_norm", "line/expected"}
