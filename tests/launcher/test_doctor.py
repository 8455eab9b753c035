"""Every finding is true, has its remedy, and the whole answer comes in time."""

import email.utils
import json
import threading
import time
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.doctor.checks import Finding, disk, examine, versions
from launcher.doctor.gpu import gpu_findings
from launcher.doctor.net import monitor, prometheus, skew, storage
from tests.monitor.live import Service

H100 = "NVIDIA H100 80GB HBM3"


def states(found: list[Finding]) -> dict[str, str]:
    return {f.check: f.state for f in found}


def test_a_check_that_hangs_or_raises_costs_its_own_answer_alone() -> None:
    def broken() -> list[Finding]:
        raise OSError("no such thing")

    def fine() -> list[Finding]:
        return [Finding("fine", "pass", "yes")]

    began = time.monotonic()
    stuck = threading.Event()
    found = examine(
        {"hangs": lambda: [Finding("x", "pass", str(stuck.wait(30)))], "broken": broken, "fine": fine}, 0.3
    )
    stuck.set()
    assert time.monotonic() - began < 10
    assert states(found) == {"hangs": "warn", "broken": "fail", "fine": "pass"}


def test_whatever_is_not_fine_says_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LOSSCAST_HOME", str(tmp_path))
    monkeypatch.setenv("LOSSCAST_PROMETHEUS", "http://127.0.0.1:9")
    assert main(["doctor", "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is False
    assert {"python", "compiler", "disk", "ray", "prometheus"} <= {f["check"] for f in answer["findings"]}
    assert all(f["fix"] for f in answer["findings"] if f["state"] in ("warn", "fail"))


def test_storage_is_written_leased_read_and_left_clean(tmp_path: Path) -> None:
    assert states(storage(str(tmp_path / "runs"))) == {"storage": "pass"}
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
    (tmp_path / "file").write_text("")
    (found,) = storage(str(tmp_path / "file"))
    assert found.state == "fail" and found.fix


def test_a_storage_that_creates_a_key_twice_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from launcher.storage.store import FolderStore

    monkeypatch.setattr(FolderStore, "put_new", FolderStore.put)
    (found,) = storage(str(tmp_path))
    assert found.state == "fail" and "created twice" in found.said


def test_gpus_are_held_against_the_spec() -> None:
    row = ["0", H100, "81559", "500", "560.1", "0"]
    assert states(gpu_findings([row], 1, "H100")) == {"gpus": "pass"}
    assert gpu_findings([row], 8, "H100")[-1].state == "fail"
    assert "cluster.gpu says A100" in gpu_findings([row], 1, "A100")[-1].said
    sick = gpu_findings([[*row[:5], "3"]], 1, None)[-1]
    assert sick.state == "fail" and "uncorrected" in sick.said
    assert gpu_findings([["0", H100, "81559", "70000", "560.1", "[N/A]"]], 1, None)[-1].state == "warn"
    assert gpu_findings([], 0, None)[0].state == "skip" and gpu_findings([], 2, None)[0].state == "fail"


@pytest.mark.parametrize(("off_s", "state"), [(0, "pass"), (1, "pass"), (40, "warn"), (-40, "warn")])
def test_a_clock_that_is_off_is_seen(off_s: float, state: str) -> None:
    now = 1_763_800_000.0
    (found,) = skew(email.utils.formatdate(now - off_s, usegmt=True), now)
    assert found.state == state
    assert skew(None, now) == skew("not a date", now) == []


def test_too_little_disk_fails_and_a_place_that_is_not_there_yet_counts_by_its_parent(tmp_path: Path) -> None:
    (fine, full) = disk({"a": (tmp_path / "not" / "yet", 1.0), "b": (tmp_path, 1e18)})
    assert fine.state in ("pass", "warn") and str(tmp_path) in fine.said
    assert full.state == "fail" and "needed" in full.said


def test_a_monitor_is_asked_whether_it_takes_our_token(tmp_path: Path) -> None:
    with Service(tmp_path / "store") as service:
        assert states(monitor(service.url, "T", service.token)) == {
            "monitor": "pass",
            "clock skew": "pass",
            "monitor token": "pass",
        }
        assert states(monitor(service.url, "T", "lct_nonsense"))["monitor token"] == "fail"
        assert states(monitor(service.url, "T", ""))["monitor token"] == "fail"
        assert service.get("/v1/runs") is not None
    (found,) = monitor(service.url, "T", service.token)
    assert found.state == "fail" and "refused" in found.said


def test_a_prometheus_nobody_asked_for_may_be_away(tmp_path: Path) -> None:
    assert states(prometheus("http://127.0.0.1:9", asked_for=False)) == {"prometheus": "skip"}
    assert states(prometheus("http://127.0.0.1:9", asked_for=True)) == {"prometheus": "fail"}


def test_versions_name_what_is_here() -> None:
    assert states(versions())["python"] == "pass"
