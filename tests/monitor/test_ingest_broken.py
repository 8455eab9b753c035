"""Whatever a request does to the writer, each that waits is answered, and only those that must be are refused."""

import sqlite3
from pathlib import Path

import pytest

from monitor import schema
from monitor.store.check import check
from monitor.store.columns import Damaged
from monitor.store.ingest import Ingest, Refused
from monitor.store.store import Store
from monitor.store.tables import Judged, Merge
from monitor.wire import Event, Request, parse
from tests.monitor.test_ingest import sample, send


def broken(run: str) -> Request:
    """A request whose second part can't be staged, as wire would refuse it."""
    parsed = parse(
        sample(run, 1, 1, 2) + schema.encode_event(schema.run_started(run, 1, time=1.0, prediction={}))
    )
    assert isinstance(parsed.parts[1], Event)
    parsed.parts[1].body["prediction"] = {"tokens": 10**400}
    return parsed


def test_a_request_that_breaks_the_staging_is_answered_alone(tmp_path: Path) -> None:
    made = Ingest(Store(tmp_path / "store"))
    group = [
        parse(sample("a", 1, 0, 1)),
        broken("a"),
        broken("new"),
        parse(sample("a", 1, 1, 2)),
        parse(sample("b", 1, 0, 1)),
    ]
    waiting = [made.submit(request) for request in group]
    judged = made.submit_judged([Judged(1, 0, 1, b"", "{}")])
    made.start()
    for k in (1, 2):
        with pytest.raises(Refused) as caught:
            waiting[k].result(10)
        assert (caught.value.status, caught.value.reason) == (422, "invalid")
    assert [waiting[k].result(10).accepted for k in (0, 3, 4)] == [1, 1, 1]
    judged.result(10)
    assert set(made.runs) == {"a", "b"} and made.known.owned == {"": 2}
    assert made.runs["a"].samples == 2 and made.runs["a"].prediction_ord is None
    assert made._waiting == [0, 0] and made.failing is None
    made.stop()
    assert list(check(made.store.path)) == []
    made.store.close()


def test_of_many_requests_that_break_the_staging_the_rest_is_to_come_back(tmp_path: Path) -> None:
    made = Ingest(Store(tmp_path / "store"))
    waiting = [made.submit(broken("a")) for _ in range(20)] + [made.submit(parse(sample("b", 1, 0, 1)))]
    made.start()
    statuses = []
    for future in waiting:
        with pytest.raises(Refused) as caught:
            future.result(10)
        statuses.append(caught.value.status)
    assert statuses == [422] * 8 + [503] * 13 and made._waiting == [0, 0]
    assert send(made, sample("b", 1, 0, 1)).accepted == 1 and made.failing is None
    made.stop()
    made.store.close()


def test_damage_met_while_events_are_staged_is_told_to_its_sender_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Ingest(Store(tmp_path / "store"))
    made.start()
    send(made, sample("a", 1, 0, 1))
    made.stop()
    made.store.close()
    made = Ingest(Store(tmp_path / "store"))
    real = made.store.has_event

    def has_event(run_id: int, attempt: int, digest: bytes) -> bool:
        if run_id == 1:
            raise Damaged("page 7")
        if run_id == 2:
            raise sqlite3.OperationalError("disk I/O error")
        return real(run_id, attempt, digest)

    monkeypatch.setattr(made.store, "has_event", has_event)
    events = [schema.encode_event(schema.event("restart", run, 1, time=1.0)) for run in ("a", "b", "c")]
    waiting = [made.submit(parse(event)) for event in events] + [made.submit(parse(sample("a", 1, 1, 2)))]
    made.start()
    for k in (0, 1):
        with pytest.raises(Refused) as caught:
            waiting[k].result(10)
        assert caught.value.status == 503
    assert waiting[2].result(10).accepted == 1 and waiting[3].result(10).accepted == 1
    made.stop()
    made.store.close()


def test_a_sender_that_hung_up_ends_nothing(tmp_path: Path) -> None:
    made = Ingest(Store(tmp_path / "store"))
    gone = [
        made.submit(parse(sample("a", 2, 0, 1))),
        made.submit(parse(sample("a", 1, 0, 1))),
    ]  # taken, and refused
    merge = made.merge(Merge(1))
    for future in (*gone, merge):
        assert future.cancel()
    made.start()
    assert send(made, sample("a", 2, 0, 1)).duplicates == 1
    made.stop()
    made.store.close()
