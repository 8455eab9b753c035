import copy
import json
from pathlib import Path
from typing import Any

import pytest

from launcher.cli import main
from launcher.errors import WrongInput
from launcher.jobs.climbing import Rung, finished, fitting, write_points
from launcher.jobs.ladder import merged, read_ladder, specs_of
from launcher.runspec.accounting import parameter_count
from launcher.storage.runfolder import RunFolder, write_whole

LADDER: dict[str, Any] = {
    "name": "bytes",
    "tokens_per_param": 60,
    "base": {
        "workload": {"kind": "gpt", "layers": 2, "width": 8, "heads": 1, "context": 64},
        "data": {"path": "stdlib"},
        "train": {"batch_tokens": 512, "lr": 0.03},
        "parallel": {"dp": 2},
    },
    "rungs": [
        {"workload": {"width": 8}},
        {"workload": {"width": 12}},
        {"workload": {"width": 12, "layers": 4}},
    ],
}


def test_every_rung_is_a_run_of_its_own_on_the_same_data_order() -> None:
    specs = specs_of(read_ladder(LADDER, "l"))
    assert [s.name for s in specs] == ["bytes-w8", "bytes-w12", "bytes-w12-l4"]
    assert {(s.train.seed, s.data and s.data.path) for s in specs} == {(0, "stdlib")}
    assert len({s.digest for s in specs}) == 3


def test_tokens_per_param_is_kept_to_the_nearest_batch() -> None:
    for spec in specs_of(read_ladder(LADDER, "l")):
        params = parameter_count(spec)
        assert params is not None
        assert spec.train.tokens % 512 == 0
        assert abs(spec.train.tokens - 60 * params) <= 256


def test_two_rungs_of_one_name_are_refused_by_name() -> None:
    twice = {**LADDER, "rungs": [{"workload": {"width": 8}}, {"workload": {"width": 8}}]}
    with pytest.raises(WrongInput, match="bytes-w8"):
        specs_of(read_ladder(twice, "l"))


def test_rungs_on_two_clusters_are_refused() -> None:
    there = {"workload": {"width": 12}, "cluster": {"to": "http://127.0.0.1:9"}}
    with pytest.raises(WrongInput, match=r"go to http://127\.0\.0\.1:9 and local.*one cluster"):
        specs_of(read_ladder({**LADDER, "rungs": [{"workload": {"width": 8}}, there]}, "l"))


def test_a_rung_that_can_not_be_says_which_it_is() -> None:
    broken = {**LADDER, "rungs": [{"workload": {"width": 8}}, {"workload": {"heads": 5}}]}
    with pytest.raises(WrongInput, match=r"(?s)rungs\[1\].*heads"):
        specs_of(read_ladder(broken, "l"))


@pytest.mark.parametrize("change", [{"rungs": []}, {"at_once": 0}, {"nmae": "x"}, {"name": "Not A Name"}])
def test_a_ladder_file_that_is_none_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(WrongInput, match=r"ladder\.yaml"):
        read_ladder({**LADDER, **change}, "ladder.yaml")


def test_merging_leaves_the_base_as_it_was() -> None:
    before = copy.deepcopy(LADDER["base"])
    merged(LADDER["base"], {"train": {"lr": 1.0}})
    assert LADDER["base"] == before


def test_points_and_curves_of_the_finished_rungs_alone(tmp_path: Path) -> None:
    specs = specs_of(read_ladder(merged(LADDER, {"base": {"checkpoints": {"url": str(tmp_path)}}}), "l"))
    rungs = []
    for spec, state in zip(specs, ("finished", "failed", "finished"), strict=True):
        folder = RunFolder.of(str(tmp_path), spec.name)
        folder.attempt(1).mkdir(parents=True)
        folder.curve(1).write_text(f"run,step,loss\n{spec.name},1,2.5\n")
        row = {
            "run": spec.name,
            "params": 10,
            "tokens": 20,
            "loss": 2.5,
            "flops": 1200.0,
            "attempt": 1,
            "digest": spec.digest,
        }
        if state == "finished":
            write_whole(folder.result, row)
        assert finished(folder, spec) == (state == "finished")
        rungs.append(Rung(spec, folder, state))
    points, curves = tmp_path / "points.csv", tmp_path / "curves.csv"
    assert write_points(rungs, points, curves) == 2
    assert [line.split(",")[0] for line in points.read_text().splitlines()] == [
        "run",
        "bytes-w8",
        "bytes-w12-l4",
    ]
    assert curves.read_text().splitlines() == ["run,step,loss", "bytes-w8,1,2.5", "bytes-w12-l4,1,2.5"]


def test_a_finished_run_of_another_spec_is_not_this_rung(tmp_path: Path) -> None:
    spec = specs_of(read_ladder(LADDER, "l"))[0]
    folder = RunFolder(tmp_path / spec.name)
    write_whole(folder.result, {"digest": "sha256:another"})
    assert not finished(folder, spec)


def test_as_many_rungs_start_as_fit_beside_those_in_flight() -> None:
    specs = specs_of(read_ladder(LADDER, "l"))  # two ranks each
    a, b, c = specs
    assert fitting(specs, [], {"CPU": 4.0}, None) == [a, b]
    assert fitting([b, c], [a], {"CPU": 5.0}, None) == [b]
    assert fitting([b, c], [a], {"CPU": 64.0}, 2) == [b]
    assert fitting(specs, [], {"CPU": 4.0}, 3) == [a, b, c]
    assert fitting([c], [a, b], {"CPU": 4.0}, 2) == []
    assert fitting([c], [a, b], {"CPU": 4.0}, None) == []
    assert fitting([], [a], {"CPU": 4.0}, None) == []


def test_a_rung_larger_than_the_cluster_starts_when_it_is_alone() -> None:
    """An autoscaler may bring what it lacks; and a smaller one goes before it."""
    big, small = specs_of(
        read_ladder(
            {
                **LADDER,
                "rungs": [{"workload": {"width": 8}, "parallel": {"dp": 8}}, {"workload": {"width": 12}}],
            },
            "l",
        )
    )
    assert fitting([big, small], [], {"CPU": 2.0}, None) == [small]
    assert fitting([big], [small], {"CPU": 2.0}, None) == []
    assert fitting([big], [], {"CPU": 2.0}, None) == [big]
    assert fitting([big], [], {"CPU": 64.0}, None) == [big]


def test_progress_is_one_line_a_change_where_there_is_no_terminal(tmp_path: Path) -> None:
    import io

    from launcher.cli.ladder_display import Display

    specs = specs_of(read_ladder(merged(LADDER, {"base": {"checkpoints": {"url": str(tmp_path)}}}), "l"))
    rungs = [Rung(s, RunFolder.of(str(tmp_path), s.name)) for s in specs]
    out, now = io.StringIO(), [0.0]
    display = Display("bytes", out, lambda: now[0])
    for second in range(65):
        now[0] = float(second)
        display.show(rungs if second < 50 else [Rung(specs[0], rungs[0].folder, "failed", "why"), *rungs[1:]])
    assert [line.partition(",  ")[0] for line in out.getvalue().splitlines()] == [
        "bytes: 3 waiting",
        "bytes: 3 waiting",
        "bytes: 2 waiting, 1 failed",
    ]


BROKEN = """\
name: l
{own}
base:
  workload: {{kind: gpt, layers: 2, width: 8, heads: 1, context: 32}}
  data: {{path: stdlib}}
  train: {{tokens: 5120, batch_tokens: 256, lr: {lr}}}
rungs:
  - {{workload: {{width: 8}}}}
  - {{workload: {{{key}: 12}}}}
"""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"own": "at_onc: 3"}, "2:1 at_onc: unknown key. Did you mean at_once?"),
        ({"own": "at_once: many"}, "2:10 at_once: need a whole number; got 'many'."),
        (
            {"own": 'tokens_per_param: "60"'},
            "2:19 tokens_per_param: need a number; got '60'. Remove the quotes.",
        ),
        ({"lr": "-1"}, "6:48 base.train.lr: need more than 0; got -1"),
        ({"key": "wdth"}, "9:17 rungs[1].workload.wdth: is not a key in workload. Did you mean width?"),
    ],
)
def test_a_problem_is_told_where_it_was_written(tmp_path: Path, change: dict[str, str], words: str) -> None:
    from launcher.jobs.ladder import read_file

    path = tmp_path / "ladder.yaml"
    path.write_text(BROKEN.format(**{"own": "at_once: 2", "lr": "0.01", "key": "width", **change}))
    with pytest.raises(WrongInput) as caught:
        read_file(str(path))
    said = str(caught.value)
    assert f"{path}:{words}" in said and "1 problem" in said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base: x\nrungs: [{}]", "2:7 base: need what all rungs share"),
        ("base: {}\nrungs: 3", "3:8 rungs: need a list of rungs, each a mapping"),
        ("base: {}\nrungs: []", "3:8 rungs: is empty"),
        ("base: {}\nrungs: [7]", "3:9 rungs[0]: need a mapping of what the rung changes"),
    ],
)
def test_a_ladder_of_the_wrong_shape_is_told_what_it_needs(tmp_path: Path, text: str, words: str) -> None:
    from launcher.jobs.ladder import read_file

    path = tmp_path / "ladder.yaml"
    path.write_text(f"name: l\n{text}\n")
    with pytest.raises(WrongInput) as caught:
        read_file(str(path))
    assert f"{path}:{words}" in str(caught.value)


def test_two_rungs_of_one_name_are_both_pointed_at(tmp_path: Path) -> None:
    from launcher.jobs.ladder import read_file

    path = tmp_path / "ladder.yaml"
    path.write_text(BROKEN.format(own="at_once: 2", lr="0.01", key="width").replace("12", "8"))
    with pytest.raises(WrongInput) as caught:
        read_file(str(path))
    said = str(caught.value)
    assert "2 problems" in said and f"{path}:8:5 rungs[0]: two rungs would be called l-w8" in said


def test_a_run_given_for_a_ladder_is_said_to_be_one() -> None:
    with pytest.raises(WrongInput, match="losscast submit"):
        read_ladder({"name": "x", "train": {}}, "run.yaml")


def test_data_that_is_not_there_and_a_token_that_is_not_set_are_said_before_hours_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOSSCAST_TOKEN", raising=False)
    watched = merged(LADDER, {"base": {"monitor": {"url": "http://watch.lab:8700"}}})
    Path("ladder.yaml").write_text(json.dumps(watched))
    assert main(["ladder", "ladder.yaml", "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert "LOSSCAST_TOKEN is not set here" in said and "--scope ingest,read\n" in said
    absent = merged(watched, {"base": {"data": {"path": "corpus"}}})
    Path("ladder.yaml").write_text(json.dumps(absent))
    assert main(["ladder", "ladder.yaml", "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert "rung bytes-w8: data.path: corpus" in said and "losscast data prepare" in said
    rungs = [*LADDER["rungs"], {"workload": {"width": 16}, "data": {"path": "corpus"}}]
    Path("ladder.yaml").write_text(json.dumps({**watched, "rungs": rungs}))
    assert main(["ladder", "ladder.yaml", "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert said.count("it will fail, and the others go on") == 1 and "data.path: corpus" in said
