"""Views that are kept: what they show is what a fresh reading would, and the second look reads only what is new."""

import itertools
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from monitor.schema import encode_event, run_started
from monitor.service import monitor as monitor_service
from monitor.service import views as kept_views
from monitor.service.monitor import Monitor
from monitor.service.views import Parts, Views
from monitor.store import reading
from monitor.store.columns import Columns
from monitor.store.ingest import Ingest
from monitor.store.reading import LAST, rows, samples
from monitor.store.store import Store
from monitor.store.tables import ChunkRow
from monitor.wire import parse
from tests.monitor.test_ingest import sample

MOST = 300


class Counting(Store):
    """A store that counts the samples it gives out."""

    read = 0

    def chunks(self, *args: Any, **more: Any) -> Iterator[ChunkRow]:
        for chunk in super().chunks(*args, **more):
            self.read += chunk.n
            yield chunk


class Told:
    """A run in a store, its views, and what was expected of the samples up to `judged`."""

    def __init__(self, folder: Path) -> None:
        self.store = Counting(folder)
        self.store.connection.execute("PRAGMA synchronous=OFF")
        self.ingest = Ingest(self.store)
        self.ingest.start()
        self.now = 0.0
        self.views = Views(self.store, lambda: self.now)
        self.seq = {1: 0}
        self.judged: list[tuple[int, Columns]] = []

    def send(self, steps: range, attempt: int = 1, spikes: tuple[int, ...] = ()) -> None:
        lines = []
        for step in steps:
            loss = 9.0 if step in spikes else 2.0 + (step * 7919 % 1000) / 1e5
            lines.append(sample("r", attempt, self.seq[attempt], step, loss))
            self.seq[attempt] += 1
        self.ingest.submit(parse(b"".join(lines))).result(60)

    def judge(self) -> None:
        import numpy as np

        self.judged = []
        for attempt, columns in samples(self.store, self.ingest.runs["r"], []):
            flat = {name: np.full(columns.n, 2.0) for name in ("expected", "lower", "upper", "gap_sigma")}
            band = Columns(columns.n, {"seq": columns.get("seq"), "step": columns.get("step"), **flat})
            self.judged.append((attempt, band))

    def look(self) -> tuple[int, list[dict[str, Any]], int]:
        """Samples there are, those shown, and how many were read for it."""
        self.store.read = 0
        total, fewer, parts = self.views.whole(self.ingest.runs["r"], self.judged, MOST)
        assert fewer
        return total, shown(parts), self.store.read


def shown(parts: Parts) -> list[dict[str, Any]]:
    return list(itertools.chain.from_iterable(rows(parts)))


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Told]:
    monkeypatch.setattr(kept_views, "LEAST_SAMPLES", 1000)
    made = Told(tmp_path / "store")
    made.send(range(1, 2001), spikes=(777,))
    made.judge()
    yield made
    made.ingest.stop()
    made.store.close()


def test_the_second_look_reads_only_what_came_since(told: Told) -> None:
    total, first, read = told.look()
    assert (total, read) == (2000, 2000) and 777 in [row["step"] for row in first]
    assert told.look() == (2000, first, 0)
    told.send(range(2001, 2011), spikes=(2005,))
    total, second, read = told.look()
    assert total == 2010 and read == 10 and second[: len(first)] == first
    assert [row["step"] for row in second[len(first) :]] == list(range(2001, 2011))
    assert second[-6]["loss"] == 9.0


def test_what_was_not_judged_yet_is_read_again(told: Told) -> None:
    told.send(range(2001, 2051))
    assert [row["expected"] for row in told.look()[1][-3:]] == [None] * 3
    told.judge()
    assert [row["expected"] for row in told.look()[1][-3:]] == [2.0] * 3


def test_a_sample_that_comes_late_shows(told: Told) -> None:
    told.send(range(3000, 4000))
    told.judge()
    assert 2500 not in [row["step"] for row in told.look()[1]]
    told.send(range(2500, 2501), spikes=(2500,))
    assert {row["step"]: row["loss"] for row in told.look()[1]}[2500] == 9.0


def test_a_new_attempt_takes_over_the_steps_it_replays(told: Told) -> None:
    told.look()
    told.seq[2] = 0
    told.ingest.submit(parse(encode_event(run_started("r", 2, resume_step=500, time=1.0)))).result(60)
    assert max(row["step"] for row in told.look()[1]) == 500
    told.send(range(501, 701), attempt=2)
    total, after, _ = told.look()
    assert total == 700 and max(row["step"] for row in after) == 700
    assert 777 not in [row["step"] for row in after]


def test_a_view_is_read_anew_after_a_while(told: Told) -> None:
    told.look()
    told.now = kept_views.KEPT_S + 1.0
    assert told.look()[2] == 2000


def test_whatever_comes_the_extremes_are_shown_and_every_value_is_true(told: Told) -> None:
    rng, last = random.Random(1), 2000
    for _ in range(60):
        count = rng.choice((1, 1, 5, 30, 120))
        told.send(range(last + 1, last + count + 1), spikes=(last + 1 + rng.randrange(count),))
        last += count
        if rng.random() < 0.5:
            told.judge()
        truth = {row["step"]: row["loss"] for row in shown(samples(told.store, told.ingest.runs["r"], []))}
        total, seen, _ = told.look()
        steps = [row["step"] for row in seen]
        assert total == len(truth) == last and steps == sorted(set(steps))
        assert {row["step"]: row["loss"] for row in seen}.items() <= truth.items()
        spikes = [row["step"] for row in seen if row["loss"] == 9.0]
        bucket = 4 * last // MOST + 2
        for step in (step for step, loss in truth.items() if loss == 9.0):
            assert min(abs(step - other) for other in spikes) <= bucket
        assert min(truth.values()) == min(row["loss"] for row in seen)
        assert len(seen) <= MOST + MOST // 4


def test_of_long_runs_one_is_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes memory in step with its length, and a page may ask for many."""
    monkeypatch.setattr(kept_views, "LARGE_SAMPLES", 50)
    inside, most = [0], [0]

    def find(*args: Any, **more: Any) -> Any:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.02)
        inside[0] -= 1
        return found(*args, **more)

    found = reading.find
    told = Told(tmp_path)
    told.send(range(1, 101))
    told.ingest.stop()
    told.store.close()
    monitor = Monitor(tmp_path)
    monkeypatch.setattr(monitor_service, "find", find)
    monkeypatch.setattr(kept_views, "find", find)
    facts = monitor.ingest.runs["r"]
    asked = [(0, LAST, 10), (5, 90, 10), (5, 90, 0)] * 3
    with ThreadPoolExecutor(9) as pool:
        answers = list(pool.map(lambda a: monitor.samples(facts, a[0], a[1], None, a[2]), asked))
    assert {total for total, _, _ in answers} == {100, 86} and most == [1]
