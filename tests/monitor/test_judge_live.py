"""The judge inside the service: shuffled arrival, checkpoints to go back to, and money, as a sender gives them."""

import math
import random
from pathlib import Path
from typing import Any

import msgspec

from monitor import schema
from monitor.judge import Settings
from monitor.judging.feeding import Runs
from monitor.judging.run import Court, fresh, restored
from monitor.verdict import Sample
from tests.monitor.test_ingest import sample
from tests.monitor.test_judge_beside import falling
from tests.monitor.test_service import Open


def verdicts(folder: Path, lines: list[bytes]) -> tuple[list[Any], dict[str, Any]]:
    """What was called of the run, and the advice at its end."""
    opened = Open(folder)
    try:
        start = schema.run_started("a", 1, time=1e9, price_per_hour=7200.0, total_steps=2000)
        opened.send(schema.encode_event(start))
        for at in range(0, len(lines), 50):
            opened.send(*lines[at : at + 50])
        opened.judged()
        said = opened.client.get("/v1/runs/a/verdicts").json()["alerts"]
        advice = opened.client.get("/v1/runs/a/advice").json()
    finally:
        opened.close()
    return sorted((a["alert"], a["severity"], a["step"], a["since_step"]) for a in said), advice


def test_samples_shuffled_on_their_way_are_judged_as_in_order(tmp_path: Path) -> None:
    losses = [s.loss + (0.8 if s.step >= 500 else 0.0) for s in falling(620)]
    plain = [sample("a", 1, t, t + 1, loss) for t, loss in enumerate(losses)]
    saved = schema.encode_event(schema.event("checkpoint", "a", 1, time=1e9 + 400, step=400))
    rng = random.Random(4)
    order = sorted(range(len(plain)), key=lambda t: t + rng.uniform(0, 8))
    in_order = verdicts(tmp_path / "in", [*plain[:450], saved, *plain[450:]])
    shuffled = verdicts(
        tmp_path / "out", [*(plain[t] for t in order[:450]), saved, *(plain[t] for t in order[450:])]
    )
    assert in_order[0] == shuffled[0] and [name for name, *_ in in_order[0]] == [
        "LossDiverged",
        "LossOffLine",
    ]
    for _, advice in (in_order, shuffled):
        held = advice["advice"]
        assert held["money_left"] == 7200.0 * held["hours_left"] > 0
        assert (held["action"], held["roll_back_to"]) == ("roll_back", 400)
        assert held["skip"][0] >= 495


def test_a_state_that_was_kept_as_json_goes_on_like_one_that_is_kept_now(tmp_path: Path) -> None:
    """Stores of before: what is decided afterwards is the same, a loss that was no number included."""
    rng = random.Random(3)
    losses = [2.0 + rng.gauss(0.0, 0.02) for _ in range(300)]
    losses[250] = math.nan
    opened = Open(tmp_path / "store")
    opened.send(*(sample("a", 1, s, s + 1, loss) for s, loss in enumerate(losses)))
    store = opened.monitor.store
    court = Court(store, Settings(), Runs(store))
    first = fresh(court, 1)
    for chunk in store.chunks(1):
        first.feed(court, chunk)
    written = first.to_write()
    assert written.state[:1] != b"{"
    now = restored(court, 1, written.cursor, written.state, {})
    before = schema.encode_event(msgspec.msgpack.decode(written.state))
    then = restored(court, 1, written.cursor, before, {})
    for step in range(301, 400):
        said = Sample(step, 3.0 + rng.gauss(0.0, 0.02), time=1e9 + step, attempt=2)
        verdicts = [run.watch.observe(said) for run in (first, now, then)]
        assert repr(verdicts[0]) == repr(verdicts[1]) == repr(verdicts[2])
    assert any(verdict.state == "diverged" for verdict in verdicts)
    opened.close()


def test_a_page_of_a_judge_that_is_behind_is_held_out_from_when_it_is_known(tmp_path: Path) -> None:
    """A NaN that passed again while nobody could be told of it is a page all the same; one of long ago is none."""
    opened = Open(tmp_path / "store")
    court = Court(opened.monitor.store, Settings(), Runs(opened.monitor.store))
    run = fresh(court, 1)
    rows: list[Any] = [(s, s + 1, math.nan if s == 50 else 2.0, *[None] * 7) for s in range(400)]
    run.samples(1, 1, 1000.0, rows)
    assert run.last["called"] == {"LossNonFinite": 1000.0} and not run.watch.open_alerts()
    run.hold(1300.0)
    assert run.tell()["called"] == {"LossNonFinite": 1300.0}
    run.hold(1400.0)
    assert run.tell()["called"] == {"LossNonFinite": 1300.0}, "known already"
    again = fresh(court, 1)
    again.samples(1, 1, 1000.0, rows)
    again.hold(1e6)
    assert again.tell()["called"] == {"LossNonFinite": 1000.0}
    opened.close()
