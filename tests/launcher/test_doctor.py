"""Every finding is true, has its remedy, and the whole answer comes in time."""

import email.utils
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.cli import main
from launcher.data.prepare import prepare_corpus
from launcher.doctor.checks import Finding, disk, examine, versions
from launcher.doctor.data import data
from launcher.doctor.gpu import gpu_findings
from launcher.doctor.net import monitor, prometheus, skew, storage
from launcher.runspec.model import RunSpec
from launcher.storage.runfolder import write_whole
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


def data_of(path: str, cache: Path, **more: Any) -> Finding:
    gpt = {"kind": "gpt", "layers": 1, "width": 8, "heads": 1, "context": 32}
    train = {"tokens": 5120, "batch_tokens": 256, "lr": 0.01}
    spec = RunSpec.from_dict({"name": "t", "workload": gpt, "data": {"path": path}, "train": train, **more})
    (found,) = data(spec, cache)
    assert found.state == "pass" or found.state == "skip" or found.fix
    return found


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question. " * 20_000)
    prepare_corpus([str(text)], str(tmp_path / "corpus"))
    return tmp_path / "corpus"


def test_data_is_opened_as_a_rank_opens_it(corpus: Path, tmp_path: Path) -> None:
    found = data_of(str(corpus), tmp_path)
    assert found.state == "pass" and "held-out sequences" in found.said
    assert data_of("stdlib", tmp_path / "cache").state == "pass" and not (tmp_path / "cache").exists()
    (corpus / "train.bin").write_bytes((corpus / "train.bin").read_bytes()[:100])
    assert (found := data_of(str(corpus), tmp_path)).state == "fail" and "cut short" in found.said


@pytest.mark.parametrize(
    ("there", "said"),
    [
        (None, "no such folder"),
        ("empty", "no prepared corpus"),
        ("{", "no prepared corpus"),
        ("[]", "no prepared corpus"),
    ],
)
def test_data_that_is_no_token_folder_has_its_remedy(tmp_path: Path, there: str | None, said: str) -> None:
    folder = tmp_path / "corpus"
    if there is not None:
        folder.mkdir()
    if there not in (None, "empty"):
        (folder / "meta.json").write_text(str(there))
    found = data_of(str(folder), tmp_path)
    assert found.state == "fail" and said in found.said
    assert found.fix == f"losscast data prepare SOURCE -o {folder}"


def test_data_made_with_another_tokenizer_is_named(corpus: Path, tmp_path: Path) -> None:
    spec_data = {"path": str(corpus), "tokenizer": "/nowhere/tokenizer.json"}
    gpt = {"kind": "gpt", "layers": 1, "width": 8, "heads": 1, "context": 32, "vocab": 50304}
    found = data_of(str(corpus), tmp_path, data=spec_data, workload=gpt)
    assert found.state == "fail" and found.said.startswith("data.tokenizer")


def test_data_that_only_the_cluster_sees_is_no_failure_here(tmp_path: Path) -> None:
    away = data_of("/mnt/corpus-of-the-cluster", tmp_path, cluster={"to": "http://10.0.0.1:8265"})
    assert away.state == "warn" and "every node" in away.fix


@pytest.mark.e2e
def test_data_on_blob_is_looked_at_and_not_downloaded(
    corpus: Path, tmp_path: Path, azurite: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = azurite.store("runs", f"corpora-{tmp_path.name}")
    monkeypatch.setattr("launcher.storage.store.open_store", lambda url: store)
    url = "az://account/corpora/text"
    assert "no meta.json" in data_of(url, tmp_path / "cache").said
    for file in corpus.iterdir():
        store.put(file.name, file.read_bytes())
    assert data_of(url, tmp_path / "cache").state == "pass" and not (tmp_path / "cache").exists()
    store.put("train.bin", b"short")
    assert "train.bin has 5 bytes" in data_of(url, tmp_path / "cache").said
    store.delete("train.bin")
    assert "train.bin is not there" in data_of(url, tmp_path / "cache").said


def test_a_run_is_looked_at_by_its_folder_too_and_an_empty_name_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOSSCAST_HOME", str(tmp_path / "home"))
    gpt = {"kind": "gpt", "layers": 1, "width": 8, "heads": 1, "context": 32}
    train = {"tokens": 5120, "batch_tokens": 256, "lr": 0.01}
    spec = {"name": "t", "workload": gpt, "data": {"path": "/no/such/corpus"}, "train": train}
    write_whole(
        tmp_path / "runs" / "t" / "spec.json", {**spec, "checkpoints": {"url": str(tmp_path / "runs")}}
    )
    assert main(["doctor", str(tmp_path / "runs" / "t"), "--json"]) == 1
    said = {f["check"]: f for f in json.loads(capsys.readouterr().out)["findings"]}
    assert said["data"]["state"] == "fail" and said["storage"]["state"] == "pass"
    assert main(["doctor", ""]) == 2, "an unset variable is no wish to leave the run out"
