"""What a launcher books of a run's time comes out as it went in: API, /metrics, and again after a start."""

from pathlib import Path
from typing import Any

import pytest

from monitor.schema import encode_event, event
from tests.monitor.test_service import Open, curve, lines

BOOKS = {"gpu_seconds_useful": 900.0, "gpu_seconds_lost": 60.0, "gpu_seconds_idle": 40.0, "steps_lost": 12}


def told(kind: str, **fields: Any) -> bytes:
    return encode_event(event(kind, "a", 1, time=1e9, **fields))


def test_goodput_is_what_the_launcher_books(tmp_path: Path) -> None:
    opened = Open(tmp_path / "store")
    opened.send(*lines("a", curve(30)))
    assert opened.client.get("/v1/runs/a").json()["goodput"] == {
        "ratio": 1.0, "gpu_seconds": None, "dollars": None, "steps_lost": None
    }  # fmt: skip
    opened.send(told("restart", cause="sigkill", step=30, **{**BOOKS, "gpu_seconds_useful": 300.0}))
    opened.send(told("goodput", step=30, **BOOKS, dollars_useful=9.0, dollars_lost=0.6, dollars_idle=0.4))
    found = opened.client.get("/v1/runs/a").json()
    assert found["goodput"] == {
        "ratio": 0.9,
        "gpu_seconds": {"useful": 900.0, "lost": 60.0, "idle": 40.0},
        "dollars": {"useful": 9.0, "lost": 0.6, "idle": 0.4},
        "steps_lost": 12,
    }
    assert found["events"][-1]["event"] == "goodput" and found["events"][-1]["steps_lost"] == 12
    text = opened.client.get("/metrics").text
    assert 'losscast_gpu_seconds_total{run="a",state="lost"} 60.0' in text
    assert 'losscast_run_goodput_ratio{run="a"} 0.9' in text
    opened.close()
    again = Open(tmp_path / "store")
    assert again.client.get("/v1/runs/a").json()["goodput"] == found["goodput"]
    again.close()


@pytest.mark.parametrize("bad", [None, "NaN", "much", -1.0, True, [1], 1e300])
def test_books_that_make_no_sense_are_kept_as_sent_and_not_believed(tmp_path: Path, bad: object) -> None:
    opened = Open(tmp_path / "store")
    opened.send(*lines("a", curve(30)))
    opened.send(told("goodput", **{**BOOKS, "gpu_seconds_lost": bad}))
    found = opened.client.get("/v1/runs/a").json()
    assert found["goodput"]["gpu_seconds"] is None and found["goodput"]["ratio"] == 1.0
    assert found["events"][-1]["event"] == "goodput"
    assert "gpu_seconds" not in opened.client.get("/metrics").text
    opened.close()
