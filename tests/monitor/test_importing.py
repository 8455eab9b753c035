"""A run trained elsewhere is read by its usual names, sent once however often, judged, and pages nobody."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from launcher.cli import main
from monitor.errors import WrongInput
from monitor.service.importing import read, run_id
from tests.monitor.live import Service, wait_for
from tests.monitor.test_service import Open, curve, lines


def wrote(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_columns_are_known_by_the_names_that_trackers_give_them(tmp_path: Path) -> None:
    found = read(
        wrote(
            tmp_path / "a.csv",
            "_step,train/loss,learning_rate,eval/loss,gpu\n1,2.5,0.1,,9\n2,2.4,0.1,,9\n2,,,2.6,9\n3,NaN,0.1,,9\n",
        ),
        {},
    )
    assert found.columns == {
        "step": "_step",
        "loss": "train/loss",
        "val_loss": "eval/loss",
        "lr": "learning_rate",
    }
    assert found.unused == ["gpu"]
    assert [s["step"] for s in found.samples] == [1, 2, 3]
    assert found.samples[1] == {"step": 2, "loss": 2.4, "lr": 0.1, "val_loss": 2.6}
    assert math.isnan(found.samples[2]["loss"])


def test_json_lines_keep_a_missing_loss_apart_from_one_that_is_not_finite(tmp_path: Path) -> None:
    rows = [
        '{"step":1,"loss":2.5}',
        '{"step":1,"memory":9}',
        "",
        '{"step":2,"loss":NaN}',
        '{"step":3,"loss":"Infinity"}',
    ]
    found = read(wrote(tmp_path / "a.jsonl", "\n".join(rows)), {})
    assert [s["step"] for s in found.samples] == [1, 2, 3] and found.without_loss == 1
    assert math.isinf(found.samples[2]["loss"])


def test_a_row_whose_loss_is_empty_is_passed_over_and_counted(tmp_path: Path) -> None:
    found = read(wrote(tmp_path / "a.csv", "step,loss\n1,2.5\n2,\n3, \n4,nan\n"), {})
    assert [s["step"] for s in found.samples] == [1, 4] and found.without_loss == 2
    assert math.isnan(found.samples[1]["loss"])


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "", "header"), ("a.csv", "step,x\n1,2\n", "which column is the loss"), ("a.csv", "step,loss\n1,x\n", ":2: loss"),
        ("a.csv", "step,loss\n1.5,2\n", "whole number"), ("a.csv", "step,loss\n-1,2\n", "whole number"),
        ("a.csv", "step,loss\n", "no row"), ("a.csv", "step,loss\n1,2,3\n", ":2:1: 3 values under 2 columns"), ("a.jsonl", "{}\n[1]\n", ":2:"),
        ("a.jsonl", '{"step":1,', ":1: not JSON"), ("a.txt", "x", "need a .csv"), ("a.csv", "step,loss\n1," + "9" * 400 + "\n", "no row|finite|"),
        ("a.csv", "run,step,loss\na,1,2\nb,1,2\n", "--only"),
        ("a.csv", "run,step,loss\n" + "".join(f"r{i},1,2\n" for i in range(11)), r"r6, r7 \.\.\. and 3 more$"),
    ],
)  # fmt: skip
def test_what_cant_be_read_is_told_with_its_line(tmp_path: Path, name: str, text: str, words: str) -> None:
    path = wrote(tmp_path / name, text)
    if "999" in text:
        assert math.isinf(read(path, {}).samples[0]["loss"])
        return
    with pytest.raises(WrongInput, match=words):
        read(path, {})


def test_a_csv_is_read_as_replay_reads_it(tmp_path: Path) -> None:
    for text in (
        "step;loss\n1;2.5\n2;2.25\n",
        "\ufeff# mine\nstep|loss\n1|2.5\n\n2|2.25\n",
        "step\tloss\n1\t2.5\n2\t2.25\n",
    ):
        path = tmp_path / "a.csv"
        path.write_text(text, encoding="utf-8")
        assert [s["loss"] for s in read(path, {}).samples] == [2.5, 2.25]
    for name in ("b.csv", "b.jsonl"):
        (tmp_path / name).write_bytes(b"step,loss\n1,\x80\n")
        with pytest.raises(WrongInput, match=r"not UTF-8 text .byte 0x80.; save it as UTF-8"):
            read(tmp_path / name, {})


def test_a_run_is_chosen_and_columns_are_named(tmp_path: Path) -> None:
    path = wrote(tmp_path / "a.csv", "run,step,ce\na,1,2\nb,1,3\n")
    assert read(path, {"loss": "ce"}, "b").samples == [{"step": 1, "loss": 3.0}]
    for chosen, run in (({"loss": "zz"}, "b"), ({"los": "ce"}, "b"), ({"loss": "ce"}, "c")):
        with pytest.raises(WrongInput):
            read(path, chosen, run)
    assert [run_id(n) for n in ("My Run_7", "---", "x" * 80)] == ["my-run-7", "imported", "x" * 63]


def test_tensorboards_event_files_are_read_as_its_own_writer_writes_them(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    folder = tmp_path / "runs" / "Big One"
    writer = EventFileWriter(str(folder))

    def add(tag: str, step: int, value: float) -> None:
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
        writer.add_event(Event(step=step, wall_time=1e9 + step, summary=summary))

    for step, loss in enumerate(curve(50), 1):
        add("train/loss", step, loss)
        if step % 10 == 0:
            add("val/loss", step, loss + 0.1)
    add("train/loss", 51, math.nan)
    writer.close()
    found = read(folder, {})
    assert len(found.samples) == 51 and math.isnan(found.samples[-1]["loss"])
    assert (
        found.samples[0]["loss"] == pytest.approx(curve(50)[0], rel=1e-6)
        and found.samples[0]["time"] == 1e9 + 1
    )
    assert found.samples[9]["val_loss"] == pytest.approx(curve(50)[9] + 0.1, rel=1e-6)
    with pytest.raises(WrongInput, match="no event file"):
        read(tmp_path / "runs", {})


def test_it_is_sent_once_judged_and_pages_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "old.jsonl"
    losses = [*curve(60), math.nan, *curve(20, start=62)]
    path.write_text("\n".join(json.dumps({"step": i, "loss": v}) for i, v in enumerate(losses, 1)))
    with Service(tmp_path / "store") as service:
        monkeypatch.setenv("LOSSCAST_TOKEN", service.token)
        said: list[dict[str, Any]] = []
        for _ in range(2):
            assert main(["import", str(path), "--url", service.url, "--json"]) == 0
            said.append(json.loads(capsys.readouterr().out))
        assert said[0]["accepted"] == 83 and said[1] == {**said[0], "accepted": 0, "duplicates": 83}
        wait_for(lambda: [a["alert"] for a in service.get("/v1/runs/old")["alerts"]] == ["LossNonFinite"], 20)
        found = service.get("/v1/runs/old")
        assert found["phase"] == "ended" and found["samples"] == 81
        assert b'run="old"' not in service.ask("/metrics")[1]
        monkeypatch.setenv("LOSSCAST_TOKEN", "wrong")
        assert main(["import", str(path), "--url", service.url]) == 1
    assert main(["import", str(path), "--url", service.url]) == 1
    assert main(["import", str(path), "--dry-run", "--run", "A B"]) == 2


def test_what_is_exported_for_tensorboard_comes_back_as_it_was(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    opened = Open(tmp_path / "store")
    losses = [*curve(40), math.nan]
    opened.send(*lines("a", losses))
    opened.judged()
    opened.close()
    out = str(tmp_path / "board") + "/"
    assert main(["monitor", "export", "a", "--store", str(tmp_path / "store"), "-o", out]) == 0
    found = read(tmp_path / "board" / "a", {})
    assert [s["loss"] for s in found.samples[:40]] == pytest.approx(losses[:40], rel=1e-6)
    assert math.isnan(found.samples[40]["loss"]) and "line/expected" in found.unused
    assert main(["monitor", "export", "a", "--store", str(tmp_path / "store"), "-o", out]) == 2, (
        "it would be shown twice"
    )


@pytest.mark.parametrize("target", ["nan", "-1", "0"])
def test_a_target_that_is_no_loss_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    path = wrote(tmp_path / "a.csv", "step,loss\n1,2.5\n2,\n")
    assert main(["import", str(path), "--dry-run", "--target-loss", target]) == 2
    assert "--target-loss" in capsys.readouterr().err
    assert main(["import", str(path), "--dry-run"]) == 0
    told = capsys.readouterr()
    assert "1 row without a loss" in told.err and "a: 1 sample, steps" in told.out
