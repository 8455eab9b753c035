"""`fit` and `predict` as a stranger meets them: odd files are read or refused in words, and a law says what it rests on."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from monitor.errors import WrongInput
from monitor.forecast.law import Law, digest_of
from tests.monitor.law_commands import run

SIZES = np.geomspace(1e6, 1e8, 5).repeat(3)


@pytest.fixture
def points(tmp_path: Path) -> Path:
    """Fifteen runs of a known law, with a bits-per-byte figure that hangs on the loss."""
    rng, lines = np.random.default_rng(0), ["run,params,tokens,loss,bpb"]
    for i, n in enumerate(SIZES):
        d = n * (5, 20, 80)[i % 3]
        loss = (1.7 + 400 / n**0.34 + 1500 / d**0.36) * np.exp(0.005 * rng.standard_normal())
        lines.append(f"r{i},{n},{d},{loss},{0.4 * loss**0.8}")
    path = tmp_path / "points.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def law(points: Path, tmp_path: Path) -> Path:
    """A plain law of them in its file."""
    assert run("fit", str(points), "--form", "chinchilla", "-o", str(tmp_path / "law.json")) == 0
    return tmp_path / "law.json"


def curve(run: str, params: float, total: int, end: float, upto: int | None = None) -> list[str]:
    """A run whose rate goes down in a line to `end` of its peak; `upto` where it was stopped."""
    return [
        f"{run},{s},{1.7 + 300 / params**0.34 + 8 * (s + 20) ** -0.5 + 0.3 * (1 - (1 - end) * s / total)},{1e-3 * (1 - (1 - end) * s / total)},{params},{s * 1000},"
        + (f"{0.9 if s < total / 2 else 0.7}" if s % 100 == 0 else "")
        for s in range(0, (upto or total) + 1, 10)
    ]


def curves(path: Path, *rows: list[str]) -> Path:
    path.write_text(
        "\n".join(["run,step,loss,lr,params,tokens,bpb", *(line for row in rows for line in row)]) + "\n"
    )
    return path


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"members": []}, "members"),
        ({"members": [{"form": "sum"}]}, "sum"),
        ({"runs": {}}, "params"),
        ({"runs": {"run": [], "params": [], "tokens": [], "flops": [], "loss": []}}, "runs"),
        ({"noise_sd": "much"}, "much"),
        ({"stretch": -1.0}, "stretch"),
        ({"excluded": None}, "NoneType"),
    ],
)
def test_a_law_made_by_hand_is_refused_in_words(law: Path, change: dict, says: str) -> None:
    body = {**json.loads(law.read_text()), **change}
    del body["digest"]
    law.write_text(json.dumps({**body, "digest": digest_of(body)}))
    with pytest.raises(WrongInput, match=f"lacks or garbles.*{says}.*fit again"):
        run("predict", str(law), "--params", "1e9", "--tokens", "2e10")


@pytest.mark.parametrize("draws", [[], [[1.0, 2.0]], [["a"] * 5], "none"])
def test_a_law_with_broken_draws_is_refused_in_words(law: Path, draws: object) -> None:
    body = json.loads(law.read_text())
    body["members"][0]["draws"] = draws
    del body["digest"]
    law.write_text(json.dumps({**body, "digest": digest_of(body)}))
    with pytest.raises(WrongInput, match=r"lacks or garbles.*fit again"):
        run("predict", str(law), "--params", "1e9", "--tokens", "2e10")


def test_a_law_from_before_there_were_tasks_still_reads(
    law: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = {k: v for k, v in json.loads(law.read_text()).items() if k not in ("digest", "task", "stretch")}
    law.write_text(json.dumps({**body, "digest": digest_of(body)}))
    assert run("predict", str(law), "--params", "1e9", "--tokens", "2e10", "--json") == 0
    assert json.loads(capsys.readouterr().out)["final_loss"]["p50"] > 1.7


def test_a_law_that_tells_size_from_data_is_not_asked_for_compute_alone(points: Path, tmp_path: Path) -> None:
    out = tmp_path / "auto.json"
    assert run("fit", str(points), "-o", str(out)) == 0
    with pytest.raises(WrongInput, match="needs params and tokens; fit --form frontier"):
        run("predict", str(out), "--flops", "1e22")
    assert run("fit", str(points), "--form", "frontier", "-o", str(out)) == 0
    assert run("predict", str(out), "--flops", "1e20") == 0


def test_a_run_to_include_that_is_not_there_is_wrong_input(points: Path) -> None:
    with pytest.raises(WrongInput, match=r"--include r99: .* has no such run"):
        run("fit", str(points), "--form", "chinchilla", "--include", "r99")


def test_a_benchmark_is_fitted_on_the_ends_of_curves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = curves(tmp_path / "c.csv", *(curve(f"r{n:g}", n, 400, 0.0) for n in (1e6, 2e6, 4e6)))
    assert run("fit", str(path), "--metric", "bpb", "-o", str(tmp_path / "law.json")) == 0
    assert run("predict", str(tmp_path / "law.json"), "--params", "4e6", "--tokens", "4e5", "--json") == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["metric"]["p50"] == pytest.approx(0.7, abs=0.02)
    assert answer["curve"] is not None


def test_runs_cut_short_or_at_a_constant_rate_are_fitted_and_said_to_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = curves(tmp_path / "short.csv", curve("r", 1e6, 400, 0.0, upto=200))
    assert run("fit", str(short)) == 0
    assert "cut short: their learning rates had come down to no less than 50%" in capsys.readouterr().err
    flat = curves(tmp_path / "flat.csv", curve("r", 1e6, 400, 1.0))
    assert run("fit", str(flat)) == 0
    assert "the law is of losses at full rate" in capsys.readouterr().err


def test_a_schedule_file_of_another_length_than_the_run_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = curves(tmp_path / "c.csv", curve("r", 1e6, 400, 0.0))
    plan, law = tmp_path / "s.csv", tmp_path / "law.json"
    plan.write_text("step,lr\n10,1e-3\n300,0\n")
    assert run("fit", str(path), "-o", str(law)) == 0
    target = ("--params", "1e6", "--batch-tokens", "1000", "--schedule", str(plan))
    assert run("predict", str(law), *target, "--tokens", "4e5") == 0
    assert "last row is step 300 and the run has 400: its last rate goes on" in capsys.readouterr().err
    assert run("predict", str(law), *target, "--tokens", "2e5") == 0
    assert "ends at step 200, before the schedule's last row, step 300" in capsys.readouterr().err


def test_no_curve_starts_above_what_an_untrained_model_loses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = curves(tmp_path / "c.csv", curve("r", 1e6, 400, 0.0))
    assert run("fit", str(path), "--form", "curve", "-o", str(tmp_path / "law.json")) == 0
    capsys.readouterr()
    target = ("--params", "1e6", "--tokens", "4e5", "--batch-tokens", "1000", "--json")
    assert run("predict", str(tmp_path / "law.json"), *target) == 0
    first = json.loads(capsys.readouterr().out)["curve"]["p50"][0]
    assert first <= float(curve("r", 1e6, 400, 0.0)[0].split(",")[2]) * (1 + 1e-6)


def test_the_error_that_is_told_is_that_of_what_predict_returns(
    points: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("fit", str(points), "--json", "-o", str(tmp_path / "l.json")) == 0
    told = json.loads(capsys.readouterr().out)
    law = Law.read(tmp_path / "l.json")
    runs = law.runs
    off = [
        law.predict(n, d, c).p50 - x
        for n, d, c, x in zip(runs["params"], runs["tokens"], runs["flops"], runs["loss"], strict=True)
    ]
    assert told["rmse_predicted"] == pytest.approx((sum(e * e for e in off) / len(off)) ** 0.5)
    assert told["explained"] > 0.9
    assert run("fit", str(points)) == 0
    said = capsys.readouterr()
    assert "that of what predict returns" in said.out and "explains" not in said.err


def test_a_law_that_explains_nothing_says_so_and_what_to_keep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(2)
    rows = [
        f"r{i},{10 ** rng.uniform(6, 8):.0f},{10 ** rng.uniform(8, 10):.0f},{rng.uniform(2, 6):.4f},{('base', 'tuned')[i % 2]}"
        for i in range(40)
    ]
    path = tmp_path / "p.csv"
    path.write_text("run,params,tokens,loss,hparams\n" + "\n".join(rows) + "\n")
    assert run("fit", str(path)) == 0
    said = capsys.readouterr().err
    assert "the law explains" in said and "--where COLUMN=VALUE, such as hparams=base" in said
