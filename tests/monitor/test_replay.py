"""`losscast replay`: its contract, its exit statuses, and the recorded runs it must get right."""

import json
import math
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.cli import main
from monitor.replay import read_samples, replay

DATA = os.environ.get("LOSSCAST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="LOSSCAST_DATA is not set: no recorded curves here")


def write(path: Path, losses: list[object], run: str = "a") -> str:
    lines = ["run,step,loss", *(f"{run},{step},{loss}" for step, loss in enumerate(losses))]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def falling(steps: int) -> list[object]:
    return [2.0 + 6.0 * (t + 10) ** -0.3 + 0.03 * ((t * 7919) % 13 - 6) / 6 for t in range(steps)]


def test_a_run_on_its_line_exits_0_with_the_whole_contract(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", write(tmp_path / "c.csv", falling(400)), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["samples"] == 400 and answer["alerts"] == [] and answer["final_loss"] is None
    assert {"step", "action", "p_miss", "evidence"} <= set(answer["advice"][0])


def test_a_run_that_ends_off_its_line_exits_3_with_the_alert_and_its_onset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = falling(400)
    losses[300:] = [6.0] * 100
    assert main(["replay", write(tmp_path / "c.csv", losses), "--json"]) == 3
    alerts = json.loads(capsys.readouterr().out)["alerts"]
    assert [(a["alert"], a["severity"]) for a in alerts] == [
        ("LossOffLine", "warning"),
        ("LossDiverged", "critical"),
    ]
    assert set(alerts[0]) == {
        "alert", "severity", "step", "since_step", "resolved_step", "value", "expected",
    }  # fmt: skip
    assert all(295 <= a["since_step"] <= a["step"] for a in alerts)


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_a_non_finite_loss_in_a_file_is_judged_and_printed_as_json_can(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: str
) -> None:
    losses = falling(60)
    losses[40] = bad
    main(["replay", write(tmp_path / "c.csv", losses), "--json"])
    first = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["alerts"][0]
    assert (first["alert"], first["step"]) == ("LossNonFinite", 40)


def test_a_row_whose_loss_is_empty_is_passed_over_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = falling(60)
    losses[40] = losses[59] = ""
    assert main(["replay", write(tmp_path / "c.csv", losses), "--json"]) == 0
    told = capsys.readouterr()
    answer = json.loads(told.out)
    assert (answer["samples"], answer["rows_without_loss"], answer["alerts"]) == (58, 2, [])
    assert "2 rows without a loss, passed over" in told.err
    assert main(["replay", write(tmp_path / "none.csv", [""] * 5)]) == 2
    assert "no row has a loss" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "text", "says"),
    [
        ("--prediction", None, "no such file in"),
        ("--prediction", '{"curve":' + "[" * 100_000, "nested too deep"),
        ("--prediction", "{", "not JSON"),
        ("--prediction", "[]", "holds no prediction"),
        ("--prediction", '{"curve": {"step": [1, 2], "p50": [3]}}', "equally long lists"),
        ("--prediction", "{}", "final_loss needs"),
        ("--prediction", '{"final_loss": {"p50": null}}', "final_loss needs"),
        ("--prediction", '{"final_loss": {"p05": 3, "p50": 2, "p95": 1}}', "do not fall"),
        ("--prediction", '{"curve": {"step": [1], "p05": [1], "p50": [NaN], "p95": [3]}}', "at step 1"),
        ("--control", "step\n1\n", "loss"),
    ],
)
def test_a_file_that_cannot_be_used_exits_2_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, text: str | None, says: str
) -> None:
    other = tmp_path / "other"
    if text is not None:
        other.write_text(text)
    assert main(["replay", write(tmp_path / "c.csv", falling(20)), flag, str(other)]) == 2
    said = capsys.readouterr().err
    assert str(other) in said and says in said


@pytest.mark.parametrize("target", ["nan", "inf", "-1", "0"])
def test_a_target_that_is_no_loss_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    path = write(tmp_path / "c.csv", falling(20))
    assert main(["replay", path, "--target-loss", target]) == 2
    assert "--target-loss" in capsys.readouterr().err


@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_of_a_few_samples_it_is_said_that_they_are_too_few(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], samples: int
) -> None:
    assert main(["replay", write(tmp_path / "c.csv", falling(samples))]) == 0
    said = capsys.readouterr().out
    assert "too few samples to judge" in said and "nothing speaks against" not in said
    assert f"{samples} {'sample' if samples == 1 else 'samples'}, 0 alerts" in said


@pytest.mark.parametrize(
    ("unit", "asks"),
    [
        (lambda x: x, None),
        (lambda x: x / math.log(2.0), "is this loss in bits?"),
        (math.exp, "is this a perplexity?"),
        (lambda x: 1.3 * x, None),
    ],
    ids=["nats", "bits", "perplexity", "far above its line"],
)
def test_a_loss_in_another_unit_is_asked_about(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], unit: Callable[[float], float], asks: str | None
) -> None:
    line = [2.0 + 6.0 * (t + 10) ** -0.3 for t in range(400)]
    curve = {
        "step": list(range(400)),
        "p05": [x - 0.1 for x in line],
        "p50": line,
        "p95": [x + 0.1 for x in line],
    }
    given = tmp_path / "p.json"
    final = {"p05": line[-1] - 0.1, "p50": line[-1], "p95": line[-1] + 0.1}
    given.write_text(json.dumps({"final_loss": final, "curve": curve}))
    path = write(tmp_path / "c.csv", [unit(x) for x in falling(400)])  # type: ignore[arg-type]
    main(["replay", path, "--prediction", str(given), "--json"])
    question = json.loads(capsys.readouterr().out)["question"]
    assert question is None if asks is None else question.startswith(asks)
    main(["replay", path, "--prediction", str(given)])
    assert (asks or "is this") in capsys.readouterr().out or asks is None


def test_columns_and_rows_of_a_foreign_file_can_be_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.csv"
    rows = [f"{kind},{t},{x}" for t, x in enumerate(falling(100)) for kind in ("train", "val")]
    path.write_text("kind,Step,Value\n" + "\n".join(rows) + "\n")
    assert main(["replay", str(path), "--columns", "loss=Value", "--where", "kind=train", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 100
    assert main(["replay", str(path), "--where", "kind=train"]) == 2


def test_a_resumed_run_is_judged_as_it_was_lived(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = falling(500)
    bad[300:] = [6.0] * 200
    lines = [f"1,{t},{x}" for t, x in enumerate(bad[:400])]
    lines += [f"2,{t},{x + 1e-6}" for t, x in enumerate(falling(900)) if t >= 200]
    path = tmp_path / "c.csv"
    for text in (["attempt,step,loss", *lines], ["step,loss", *(line[2:] for line in lines)]):
        path.write_text("\n".join(text) + "\n")
        assert main(["replay", str(path), "--json"]) == 0
        alerts = json.loads(capsys.readouterr().out)["alerts"]
        assert {(a["alert"], a["since_step"], a["resolved_step"]) for a in alerts} == {
            ("LossOffLine", 300, 200),
            ("LossDiverged", 300, 200),
        }


def test_several_runs_in_a_file_are_judged_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = falling(100), falling(100)
    bad[60] = "nan"
    rows = [f"{run},{t},{x}" for run, curve in (("good", good), ("bad", bad)) for t, x in enumerate(curve)]
    path = tmp_path / "c.csv"
    path.write_text("run,step,loss\n" + "\n".join(rows) + "\n")
    main(["replay", str(path), "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["samples"] == 200 and [a["run"] for a in answer["alerts"]] == ["bad"]
    assert main(["replay", str(path), "--run", "good"]) == 0
    assert main(["replay", str(path), "--run", "neither"]) == 2


@pytest.mark.parametrize(
    ("steps", "seed", "shift", "says"),
    [
        (600, 7919, 0, None),
        (150, 7919, 0, "it takes more than 200 samples"),
        (600, 104729, 0, "its noise is not the run's"),
        (600, 7919, 10_000, "no steps in common"),
    ],
    ids=["of its batches", "short", "of other batches", "of other steps"],
)
def test_what_became_of_a_control_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: int, seed: int, shift: int, says: str | None
) -> None:
    def noise(seed: int) -> list[float]:
        rng = random.Random(seed)
        return [2.0 + 6.0 * (t + 10) ** -0.3 + rng.gauss(0.0, 0.03) for t in range(steps)]

    ours = write(tmp_path / "c.csv", [x + 0.001 * (t % 3) for t, x in enumerate(noise(7919))])
    other = tmp_path / "o.csv"
    other.write_text("step,loss\n" + "".join(f"{t + shift},{x}\n" for t, x in enumerate(noise(seed))))
    assert main(["replay", ours, "--control", str(other), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["control"]
    assert told["runs"] == 1 and told["steps"] == (0 if shift else steps)
    assert (told["why"] is None) == (says is None) == (told["used"] > 0)
    assert main(["replay", ours, "--control", str(other)]) == 0
    text = capsys.readouterr().out
    assert "control: 1 run," in text and (says or "judged by it") in text


def test_old_runs_of_another_recipe_are_asked_about(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [f"r{k},{t},{4.0 + 0.001 * k + 6.0 * (t + 10) ** -0.3}" for k in range(3) for t in range(400)]
    old = tmp_path / "old.csv"
    old.write_text("run,step,loss\n" + "\n".join(rows) + "\n")
    rng = random.Random(1)
    ours: list[object] = [2.0 + 6.0 * (t + 10) ** -0.3 + rng.gauss(0.0, 0.02) for t in range(400)]
    main(["replay", write(tmp_path / "c.csv", ours), "--control", str(old)])
    assert "3 old runs, 400 steps" in (said := capsys.readouterr().out) and "are they of its recipe?" in said


@needs_data
@pytest.mark.parametrize(
    "name", ["perstep_seeds", "schedules_25m_100m", "olmo_ladder_to_1b", "collapse_c5m_schedules"]
)
def test_real_healthy_runs_are_left_alone(name: str) -> None:
    runs = read_samples(Path(str(DATA)) / "curves" / f"{name}.csv")
    chosen = list(runs.values())[:: max(1, len(runs) // 8)]
    assert [a for samples in chosen for a in replay(samples)["alerts"]] == []


@needs_data
def test_the_real_blow_up_is_paged_two_log_points_after_its_minimum() -> None:
    runs = read_samples(Path(str(DATA)) / "curves" / "blowups_350m.csv")
    samples = next(s for name, s in runs.items() if name.startswith("blowup-4-alibi-fp32"))
    pages = [a["step"] for a in replay(samples)["alerts"] if a["severity"] == "critical"]
    assert pages and pages[0] <= min(samples, key=lambda s: s.loss).step + 400
