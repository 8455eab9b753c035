"""A prediction holds the final loss and the way there, is sealed by its digest, and is never overwritten."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from monitor.errors import WrongInput
from monitor.forecast.anneal import NAMES, LrPath, Schedule, loss_at, predicted
from monitor.forecast.fit import fit
from monitor.forecast.fit_anneal import fit_curves
from monitor.forecast.law import Law
from monitor.forecast.points import Curve, Curves, Points
from monitor.forecast.prediction import Prediction, predict
from tests.monitor.law_commands import run as run_command

SIZES = (4e3, 7e3, 1.2e4, 2e4, 3e4)
BATCH = 512.0
NOISE = 0.1


def ladder(seed: int = 0) -> tuple[Points, Curves]:
    """Runs of one recipe whose curves share one shape, 60 tokens a parameter, with batch noise."""
    rng = np.random.default_rng(seed)
    rows, curves = [], []
    for n in (*SIZES, 7.5e4):
        tokens = 60 * n
        final = 8.0 * (6 * n * tokens) ** -0.06
        steps = np.arange(1, int(tokens / BATCH) + 1)
        x = steps / steps[-1]
        loss = final * x**-0.1 * (1 + 0.05 * (1 - x)) * 1.01
        noisy = np.minimum(loss, 5.5) + NOISE * rng.standard_normal(steps.size)
        curves.append(Curve(f"n{n:g}", steps, noisy, steps * BATCH, np.maximum(1 - x, 0), params=n))
        rows.append((n, tokens, final * math.exp(0.002 * rng.standard_normal()), 6 * n * tokens))
    n, d, loss, c = np.array(rows).T
    return Points(tuple(c.run for c in curves), n, d, loss, c), Curves(tuple(curves))


@pytest.fixture(scope="module")
def law() -> Law:
    points, curves = ladder()
    small = points.keep(points.params <= 3e4)
    return fit(small, curves=Curves(curves.runs[:-1]), effort=40)


def test_the_band_holds_the_mean_of_a_healthy_larger_run(law: Law) -> None:
    made = predict(law, params=7.5e4, tokens=4.5e6, made_at=0.0)
    points, curves = ladder()
    run = curves.runs[-1]
    line = made.curve
    assert line is not None and len({len(v) for v in line.values()}) == 1 and len(line["step"]) <= 2000
    assert line["step"][0] == 1 and line["step"][-1] == round(4.5e6 / BATCH)
    assert made.final_loss.p05 < points.loss[-1] < made.final_loss.p95
    means = [(run.step[k].mean(), run.loss[k].mean()) for k in np.array_split(np.arange(50, len(run)), 30)]
    inside = [
        np.interp(s, line["step"], line["p05"]) <= m <= np.interp(s, line["step"], line["p95"])
        for s, m in means
    ]
    assert np.mean(inside) >= 0.9
    middle = [abs(np.interp(s, line["step"], line["p50"]) / m - 1) for s, m in means]
    assert np.median(middle) < 0.02
    assert made.body["step_sd"] == pytest.approx(NOISE, rel=0.1)


def test_a_prediction_says_what_it_rests_on(law: Law) -> None:
    body = predict(law, params=7.5e4, tokens=4.5e6, made_at=12.0).to_dict()
    assert body["law_digest"] == law.digest and body["made_at"] == 12.0
    assert body["in_range"] is False and body["extrapolation"]["flops_ratio"] == pytest.approx(6.25, rel=1e-3)
    assert body["identifiable"] is False and "irreducible" in body["why"]
    assert body["batch_tokens"] == BATCH and body["schedule"] == "that of the fitted runs"


def test_a_changed_prediction_is_refused_and_none_is_overwritten(law: Law, tmp_path: Path) -> None:
    made = predict(law, params=7.5e4, tokens=4.5e6)
    made.write(tmp_path / "p.json")
    assert Prediction.read(tmp_path / "p.json").digest == made.digest
    with pytest.raises(WrongInput, match="never overwritten"):
        made.write(tmp_path / "p.json")
    data = json.loads((tmp_path / "p.json").read_text())
    data["final_loss"]["p50"] += 0.01
    with pytest.raises(WrongInput, match="does not match its digest"):
        Prediction.from_dict(data)


@pytest.mark.parametrize(
    "wrong",
    [{"params": 0.0}, {"params": math.nan}, {"tokens": -1.0}, {"batch_tokens": 0.0}, {"params": None}],
)
def test_an_impossible_target_is_wrong_input(law: Law, wrong: dict) -> None:
    with pytest.raises(WrongInput):
        predict(law, **{"params": 7.5e4, "tokens": 4.5e6, **wrong})


TRUTH = np.array([2.5, 0.4, 0.5, 0.2, 20.0, 0.6, 0.6, 0.8, 0.0, 0.3])


def run_under(text: str, steps: int = 2000, run: str = "r") -> Curve:
    """A noiseless curve of TRUTH under a schedule."""
    at = np.arange(10, steps + 1, 10)
    knots, lr = Schedule.parse(text).rates(steps)
    path = LrPath.of(knots, lr, unit=1900.0)
    return Curve(run, at, loss_at(TRUTH, path, at.astype(float)), lr=np.interp(at, knots, lr))


def test_an_unseen_schedule_is_predicted_from_three_seen() -> None:
    seen = [
        run_under("cosine:warmup=0.05,final=0.1", run="a"),
        run_under("constant:warmup=0.05", run="b"),
        run_under("wsd:warmup=0.05,decay=0.5,final=0.3", run="c"),
    ]
    law = fit(Curves(tuple(seen)), "curve", effort=10)
    made = predict(
        law, tokens=2000.0, batch_tokens=1.0, schedule="wsd:warmup=0.05,decay=0.15,final=0.05", made_at=0.0
    )
    truth = run_under("wsd:warmup=0.05,decay=0.15,final=0.05")
    assert made.curve is not None
    late = truth.step > 200
    off = np.interp(truth.step[late], made.curve["step"], made.curve["p50"]) - truth.loss[late]
    assert np.abs(off).mean() < 0.005
    assert made.final_loss.p50 == pytest.approx(truth.loss[-1], abs=0.01)


def test_a_curve_law_from_before_there_was_a_power_still_reads() -> None:
    model = fit_curves([run_under("cosine:warmup=0.05,final=0.1")])
    assert model is not None
    at = NAMES.index("p")
    model["theta"][at] = 0.0
    model["draws"] = [[*row[:at], 0.0, *row[at + 1 :]] for row in model["draws"]]
    old = {**model, "theta": [v for i, v in enumerate(model["theta"]) if i != at]}
    old["draws"] = [[v for i, v in enumerate(row) if i != at] for row in model["draws"]]
    plan, steps = Schedule.parse("constant"), np.array([500.0, 2000.0])
    for now, then in zip(
        predicted(model, plan, steps, 2000, None), predicted(old, plan, steps, 2000, None), strict=True
    ):
        np.testing.assert_allclose(now, then)


def test_curves_without_rates_teach_no_schedule() -> None:
    c = run_under("constant")
    assert fit_curves([Curve("x", c.step, c.loss)]) is None
    with pytest.raises(WrongInput, match="column lr"):
        fit(Curves((Curve("x", c.step, c.loss),)), "curve")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("triangle", "neither a kind"),
        ("wsd:decay=2", "fractions"),
        ("wsd:decay=x", "no NAME=FRACTION"),
        ("cosine:peak=1", "no length 'peak'"),
    ],
)
def test_a_schedule_that_is_none_says_what_there_is(text: str, says: str) -> None:
    with pytest.raises(WrongInput, match=says):
        Schedule.parse(text)


def test_a_schedule_file_is_linear_between_rows_and_from_zero(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("lr,step\n0.0,300\n2.0,100\n")
    plan = Schedule.parse(str(tmp_path / "s.csv"))
    path = LrPath.of(*plan.rates(300))
    np.testing.assert_allclose(np.interp([50, 100, 200], path.steps, path.lr), [1.0, 2.0, 1.0])
    assert path.area_at(np.array([300.0]))[0] == pytest.approx(300.0, rel=1e-6)
    (tmp_path / "bad.csv").write_text("step,lr\n1,x\n")
    with pytest.raises(WrongInput, match=r"bad.csv:2:3 lr: 'x' is no number"):
        Schedule.parse(str(tmp_path / "bad.csv"))


def test_the_commands_print_one_json_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = tmp_path / "p.csv"
    points.write_text(
        "loss,tokens,params,run\n"
        + "".join(f"{8 * (6 * n * 60 * n) ** -0.06},{60 * n},{n},r{n}\n" for n in SIZES)
    )
    assert (
        run_command("fit", str(points), "-o", str(tmp_path / "law.json"), "--form", "chinchilla", "--json")
        == 0
    )
    answer = json.loads(capsys.readouterr().out)
    assert set(answer["parameters"]) == set(answer["standard_errors"]) == {"E", "A", "B", "alpha", "beta"}
    assert {"form", "objective", "rmse", "seconds", "excluded"} <= set(answer)
    assert (
        run_command(
            "predict",
            str(tmp_path / "law.json"),
            "--params",
            "1e5",
            "--tokens",
            "6e6",
            "-o",
            str(tmp_path / "q.json"),
            "--json",
        )
        == 0
    )
    answer = json.loads(capsys.readouterr().out)
    assert {"final_loss", "identifiable", "in_range", "extrapolation", "curve"} <= set(answer)
    assert answer == json.loads((tmp_path / "q.json").read_text())


def test_a_place_that_can_not_be_written_is_told_in_words(law: Law, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for write in (law.write, predict(law, params=7.5e4, tokens=4.5e6).write):
        with pytest.raises(WrongInput, match=r"can't be written: .*file is a file, not a folder\. Give -o"):
            write(tmp_path / "file" / "x.json")


def test_a_size_beyond_numbers_is_wrong_input(law: Law) -> None:
    with pytest.raises(WrongInput, match="no run is that size"):
        predict(law, params=1e300, tokens=1e300)


def test_a_trend_of_shapes_that_dies_out_beyond_the_ladder_stays_in_the_band() -> None:
    """Small runs whose early losses lie the higher the smaller they are, up to a size from which all curves are one."""
    rng = np.random.default_rng(5)
    rows, curves = [], []
    for n in (*SIZES, 7.5e4):
        tokens = 60 * n
        final = 8.0 * (6 * n * tokens) ** -0.06
        steps = np.arange(1, int(tokens / BATCH) + 1)
        x = steps / steps[-1]
        late = max(0.0, math.log(3e4 / n))
        loss = final * x**-0.05 * np.exp(0.12 * late * (1 - x))
        noisy = np.minimum(loss, 5.5) + NOISE * rng.standard_normal(steps.size)
        curves.append(Curve(f"n{n:g}", steps, noisy, steps * BATCH, np.maximum(1 - x, 0), params=n))
        rows.append((n, tokens, final, 6 * n * tokens))
    n, d, loss, c = np.array(rows).T
    names = tuple(c.run for c in curves)
    points = Points(names[:-1], n[:-1], d[:-1], loss[:-1], c[:-1])
    law = fit(points, curves=Curves(tuple(curves[:-1])))
    made = predict(law, params=n[-1], tokens=d[-1], batch_tokens=BATCH).curve
    assert made is not None
    for x in (0.2, 0.4, 0.6, 0.8):
        at = x * made["step"][-1]
        low, high = (float(np.interp(at, made["step"], made[k])) for k in ("p05", "p95"))
        assert low < float(loss[-1]) * x**-0.05 < high, x


def test_what_fit_and_predict_say_of_units_they_can_not_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        f"{n:g},{n:g},{step},{(1.5 + 300 / n**0.34 + 2 * (step + 1) ** -0.5) * 1e-4}"
        for n in (1e6, 4e6, 1.6e7)
        for step in range(0, 100, 5)
    ]
    path, out = tmp_path / "curves.csv", tmp_path / "law.json"
    path.write_text("\n".join(["run,params,global_step,eval/loss", *rows]) + "\n")
    assert run_command("fit", str(path), "-o", str(out)) == 0
    told = capsys.readouterr()
    assert "tokens are optimizer steps" in told.err and "nats" not in told.out
    assert run_command("predict", str(out), "--params", "1e8", "--tokens", "95") == 0
    told = capsys.readouterr()
    assert "tokens are optimizer steps" in told.err
    assert "1e+08 params, fitted runs have 1e+06 to 1.6e+07" in told.err
    assert float(told.out.split()[0]) == pytest.approx(2.5e-4, rel=0.5)
