"""Mutes end by themselves, an acknowledgement holds for the advice as it was, and neither hides what is so."""

import json
import math
import threading
from pathlib import Path

import pytest

from launcher.cli import main
from monitor.errors import WrongInput
from monitor.service.attention import Attention, duration
from monitor.service.tokens import Tokens
from tests.monitor.live import Service, wait_for
from tests.monitor.test_service import Open, curve, lines

HOUR = 3600.0


def operator(opened: Open) -> dict[str, str]:
    return {"Authorization": f"Bearer {opened.monitor.tokens.create(('operate', 'read'), 'ann')}"}


def test_a_mute_silences_the_rule_until_its_time_and_hides_nothing(tmp_path: Path) -> None:
    now = [1e9]
    opened = Open(tmp_path / "store", clock=lambda: now[0])
    opened.send(*lines("a", [*curve(40), math.nan]))
    opened.judged()
    headers = operator(opened)
    assert opened.client.post("/v1/runs/a/mute", json={"for_s": HOUR}).status_code == 403
    made = opened.client.post(
        "/v1/runs/a/mute", json={"for_s": HOUR, "alerts": ["LossNonFinite"], "why": "known"}, headers=headers
    )
    assert made.status_code == 200 and made.json()["until"] == 1e9 + HOUR and made.json()["by"] == "ann"
    text = opened.client.get("/metrics").text
    assert 'losscast_run_muted{alert="LossNonFinite",run="a"} 1.0' in text
    assert 'losscast_verdict{run="a",state="non_finite",team=""} 1.0' in text, "the fact itself stays"
    shown = opened.client.get("/v1/runs").json()["runs"][0]
    assert shown["muted"]["why"] == "known" and shown["state"] == "non_finite"
    now[0] += HOUR + 1
    assert "losscast_run_muted" not in opened.client.get("/metrics").text
    assert opened.client.get("/v1/runs/a").json()["muted"] is None
    opened.client.post("/v1/runs/a/mute", json={"for_s": HOUR}, headers=headers)
    assert 'run_muted{alert="all",run="a"}' in opened.client.get("/metrics").text
    assert opened.client.delete("/v1/runs/a/mute", headers=headers).status_code == 204
    assert "losscast_run_muted" not in opened.client.get("/metrics").text
    opened.close()


@pytest.mark.parametrize(
    "body", [{}, {"for_s": 0}, {"for_s": -5}, {"for_s": 1e12}, {"for_s": "1h"}, {"for_s": True}, {"for_s": 60, "x": 1},
             {"for_s": 60, "alerts": ["Watchdog"]}, {"for_s": 60, "alerts": "LossDiverged"}, {"for_s": 60, "why": "w" * 301}, []],
)  # fmt: skip
def test_a_mute_that_makes_no_sense_is_refused(tmp_path: Path, body: object) -> None:
    opened = Open(tmp_path / "store")
    opened.send(*lines("a", curve(3)))
    answer = opened.client.post("/v1/runs/a/mute", json=body, headers=operator(opened))
    assert answer.status_code == 422 and answer.json()["error"]
    assert opened.monitor.attention.mutes(0.0) == {}
    opened.close()


def test_advice_that_was_seen_says_so_until_it_changes_or_the_snooze_is_over(tmp_path: Path) -> None:
    now = [1e9]
    opened = Open(tmp_path / "store", clock=lambda: now[0])
    opened.send(*lines("a", curve(40)))
    opened.judged()
    headers = operator(opened)
    assert opened.client.post("/v1/runs/a/advice", json={"for_s": HOUR}, headers=headers).status_code == 200
    seen = opened.client.get("/v1/runs/a/advice").json()["advice"]["seen"]
    assert seen == {"by": "ann", "at": 1e9, "until": 1e9 + HOUR}
    now[0] += HOUR
    assert opened.client.get("/v1/runs/a/advice").json()["advice"]["seen"] is None
    opened.client.post("/v1/runs/a/advice", headers=headers)
    assert opened.client.get("/v1/runs/a/advice").json()["advice"]["seen"]["until"] is None
    opened.send(*lines("a", [math.nan], seq=40, step=41))
    opened.judged()
    advice = opened.client.get("/v1/runs/a/advice").json()["advice"]
    assert advice["action"] == "roll_back" and advice["seen"] is None, "another advice is news"
    opened.close()


def test_the_command_line_mutes_beside_a_live_service(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = Open(tmp_path / "store")
    opened.send(*lines("a", curve(5)))
    store = ["--store", str(tmp_path / "store")]
    assert (
        main(["monitor", "mute", "a", "--for", "2h", "--alert", "LossSpike", "--why", "noisy", *store]) == 0
    )
    assert opened.client.get("/v1/runs/a").json()["muted"]["alerts"] == ["LossSpike"]
    capsys.readouterr()
    assert main(["monitor", "mutes", "--json", *store]) == 0
    assert json.loads(capsys.readouterr().out)["a"]["why"] == "noisy"
    assert main(["monitor", "unmute", "a", *store]) == 0
    assert opened.client.get("/v1/runs/a").json()["muted"] is None
    for wrong in (["unmute", "a"], ["mute", "A", "--for", "2h"], ["mute", "a", "--for", "soon"],
                  ["mute", "a", "--for", "99d"], ["mute", "a", "--for", "1h", "--alert", "Watchdog"]):  # fmt: skip
        assert main(["monitor", *wrong, *store]) == 2, wrong
    opened.close()


def test_many_mute_at_once_and_none_is_lost(tmp_path: Path) -> None:
    threads = [
        threading.Thread(target=lambda i=i: Attention(tmp_path).mute(f"r{i}", 60, 1000.0)) for i in range(12)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert set(Attention(tmp_path).mutes(1001.0)) == {f"r{i}" for i in range(12)}
    (tmp_path / "attention.json").write_text("{")
    assert Attention(tmp_path).mutes(1001.0) == {}, "a damaged file mutes nobody"


def test_durations() -> None:
    assert [duration(t) for t in ("30s", "90m", "5min", "2h", "1.5d")] == [30, 5400, 300, 7200, 129600]
    for bad in ("", "h", "5", "5w", "1h30"):
        with pytest.raises(WrongInput):
            duration(bad)


def test_a_person_says_it_to_a_live_monitor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Service(tmp_path / "store") as service:
        tokens = Tokens(tmp_path / "store")
        operate = tokens.create(("operate", "read"), "ann")
        service.ask("/v1/events", b"".join(lines("a", curve(60))))
        wait_for(lambda: (service.get("/v1/runs/a") or {}).get("advice"), 60)

        def alert(*args: str, token: str = operate) -> int:
            monkeypatch.setenv("LOSSCAST_TOKEN", token)
            return main(["alert", *args, "--url", service.url])

        assert alert("mute", "a", "--for", "2h", "--alert", "LossSpike", "--why", "known") == 0
        muted = service.get("/v1/runs/a")["muted"]
        assert muted["alerts"] == ["LossSpike"] and muted["by"] == "ann" and muted["why"] == "known"
        assert alert("unmute", "a") == 0 and service.get("/v1/runs/a")["muted"] is None
        assert alert("ack", "a") == 0
        assert service.get("/v1/runs/a")["advice"]["seen"]["until"] is None
        assert alert("ack", "a", "--back") == 0 and service.get("/v1/runs/a")["advice"]["seen"] is None
        assert alert("snooze", "a", "--for", "1d") == 0
        assert service.get("/v1/runs/a")["advice"]["seen"]["until"] > 0
        assert "a: its advice (continue) is snoozed for 1d" in capsys.readouterr().err
        assert alert("announce", "a", "--step", "50", "--what", "second mix", token=service.token) == 0
        assert "from step 50 on, 'second mix' is no anomaly" in capsys.readouterr().err
        said = [e for e in service.get("/v1/runs/a")["events"] if e["event"] == "announce"]
        assert [(e["attempt"], e["step"], e["what"]) for e in said] == [(1, 50, "second mix")]

        for args, token, why in (
            (("ack", "a"), service.token, "may not operate"),
            (("ack", "a"), "wrong", "--scope operate"),
            (("announce", "a", "--step", "9", "--what", "x"), operate, "may not ingest"),
            (("announce", "b", "--step", "9", "--what", "x"), service.token, "no run b;"),
            (("announce", "a", "--step", "-1", "--what", "x"), service.token, "0 or more"),
            (("ack", "b"), operate, "no run b; `losscast runs` lists them"),
            (("mute", "b", "--for", "1h"), operate, "no run b;"),
            (("mute", "b", "--for", "90d"), operate, "--for 90d: give more than nothing and at most 30d"),
            (("ack", "A/.."), operate, "is no run's name"),
            (("mute", "a", "--for", "90d"), operate, "at most"),
            (("mute", "a", "--for", "long"), operate, "90m or 2h"),
            (("mute", "a", "--for", "1h", "--alert", "Nothing"), operate, "no alert of a run"),
        ):
            assert alert(*args, token=token) == 2
            assert why in capsys.readouterr().err
