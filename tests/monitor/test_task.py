"""Benchmarks, published laws, ladder plans and pictures: each says what it foretells and what it can't."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from monitor.cli import fit as fit_command
from monitor.errors import WrongInput
from monitor.forecast.fit import fit
from monitor.forecast.law import Law
from monitor.forecast.plan_ladder import candidate, parse_target, plan_ladder
from monitor.forecast.points import Points
from monitor.forecast.prediction import predict
from monitor.forecast.presets import PRESETS, preset
from monitor.forecast.task import fit_link


def runs(count: int = 8) -> Points:
    n = np.geomspace(1e6, 1e8, count)
    loss = 1.8 + 300 / n**0.3
    return Points(tuple(f"r{i}" for i in range(count)), n, 20 * n, loss, 120 * n**2)


@pytest.fixture(scope="module")
def law() -> Law:
    return fit(runs(), "frontier", effort=20)


@pytest.mark.parametrize(
    ("metric", "floor", "true"),
    [
        ("bpb", 0.0, lambda loss: 0.4 * loss**0.9),
        ("accuracy", 0.25, lambda loss: 0.25 + 0.75 / (1 + np.exp(4 * np.log(loss / 2.6)))),
    ],
)
def test_a_benchmark_is_foretold_through_the_loss(law: Law, metric: str, floor: float, true) -> None:
    points = runs()
    task = fit_link(points.loss, true(points.loss), metric, floor)
    answer = predict(replace(law, task=task), params=4e8, tokens=8e9, made_at=0.0).body["metric"]
    exact = float(true(1.8 + 300 / 4e8**0.3))
    assert answer["p05"] < exact < answer["p95"]
    assert answer["p50"] == pytest.approx(exact, rel=0.03)


def test_a_pass_rate_is_foretold_from_compute_and_zeros_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import argparse

    rows = [
        f"r{k},{c:g},{100 * math.exp(-3 * (c / 1e20) ** -0.15):.4f}"
        for k, c in enumerate(np.geomspace(1e20, 1e22, 6))
    ]
    (tmp_path / "p.csv").write_text("\n".join(["run,flops,HumanEval", *rows, "zero,1e18,0"]))
    parser = argparse.ArgumentParser()
    fit_command.register(parser.add_subparsers())
    args = parser.parse_args(
        [
            "fit",
            str(tmp_path / "p.csv"),
            "--metric",
            "pass_rate",
            "--columns",
            "pass_rate=HumanEval",
            "-o",
            str(tmp_path / "l.json"),
            "--json",
        ]
    )
    assert args.func(args) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["excluded"][0]["run"] == "zero" and "no problem solved" in answer["excluded"][0]["reason"]
    metric = predict(Law.read(tmp_path / "l.json"), flops=1e24, made_at=0.0).body["metric"]
    assert metric["p05"] < math.exp(-3 * 1e4**-0.15) < metric["p95"]


def test_a_metric_that_is_not_there_is_wrong_input() -> None:
    from monitor.forecast.task import metric_values

    with pytest.raises(WrongInput, match="no column 'bpb'"):
        metric_values(runs(), "bpb")
    with pytest.raises(WrongInput, match="0 to 1"):
        metric_values(replace(runs(2), extra={"accuracy": ["0.5", "140"]}), "accuracy")


@pytest.mark.parametrize(
    ("name", "params", "tokens", "loss"),
    [
        ("hoffmann", 7e10, 1.4e12, 1.937),
        ("hoffmann_tex", 7e10, 1.4e12, 1.6934 + 406.4 / 7e10**0.3392 + 410.7 / 1.4e12**0.2849),
        ("epoch", 7e10, 1.4e12, 1.972),
        ("kaplan", 1e9, 2e10, (3.1e8 * 8.64e19 / 1.2e20) ** 0.05),
    ],
)
def test_a_published_law_gives_its_authors_figure(
    name: str, params: float, tokens: float, loss: float
) -> None:
    published = preset(name)
    q = published.predict(params, tokens)
    assert q.p05 < loss < q.p95 and q.p50 == pytest.approx(loss, rel=0.01)
    assert "arXiv" in published.conventions["source"]
    assert Law.from_dict(json.loads(json.dumps(published.to_dict()))).predict(
        params, tokens
    ).p50 == pytest.approx(q.p50, rel=1e-6)


@pytest.mark.parametrize("name", ["hoffmann", "hoffmann_tex", "epoch"])
def test_a_published_law_covers_what_its_authors_trained_and_no_more(name: str) -> None:
    published = preset(name)
    assert published.covers(1e9, 1e11, 6e20) and published.covers(1.6e10, 2e10, 6 * 1.6e10 * 2e10)
    assert not published.covers(1e9, 1e12, 6e21) and not published.covers(1e9, 1e8, 6e17)


def test_what_a_published_law_is_sure_of_is_said_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    from launcher.cli import main

    assert main(["predict", "hoffmann", "--params", "1e9", "--tokens", "4e11"]) == 0
    told = capsys.readouterr()
    assert "drift alone)" in told.out and "90% of the time" not in told.out
    assert "tokens, fitted" not in told.err and "untrained" not in told.err
    assert main(["predict", "epoch", "--params", "1e9", "--tokens", "2e10"]) == 0
    assert "90% of the time" in capsys.readouterr().out
    assert main(["predict", "hoffmann", "--params", "1e3", "--tokens", "1e4"]) == 0
    assert "more than an untrained model has (ln 32,000 = 10.4)" in capsys.readouterr().err


def test_an_unknown_published_law_names_those_there_are() -> None:
    with pytest.raises(WrongInput, match=", ".join(PRESETS)):
        preset("chinchila")


@pytest.mark.parametrize("count", [4, 6, 8])
@pytest.mark.parametrize("budget", [0.001, 0.01, 0.1])
def test_a_ladder_costs_its_budget(count: int, budget: float) -> None:
    rungs = candidate(1e9, 2e10, budget, count, 30.0)
    assert sum(r.flops for r in rungs) == pytest.approx(budget * 6 * 1e9 * 2e10)
    assert len(rungs) == count and max(r.params for r in rungs) < 1e9


def test_the_best_ladder_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monitor.forecast.plan_ladder.COUNTS", (4,))
    found = plan_ladder(1e9, 2e10, 0.01, simulations=1)
    assert [x.width for x in found] == sorted(x.width for x in found)
    assert found[0].to_dict()["share_of_target"] == pytest.approx(0.01)
    with pytest.raises(WrongInput, match="leaves no run"):
        plan_ladder(1e9, 2e10, 0.001, smallest=1e9)
    with pytest.raises(WrongInput, match="share of the target"):
        plan_ladder(1e9, 2e10, 2.0)


@pytest.mark.parametrize(
    "text", ["params=1e9", "params=1e9,tokens=-1", "params=x,tokens=1", "size=1,tokens=2"]
)
def test_a_target_that_is_none_is_wrong_input(text: str) -> None:
    with pytest.raises(WrongInput, match="params=1e9,tokens=2e10"):
        parse_target(text)


def test_a_law_can_be_drawn(law: Law, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from monitor.forecast.plot import draw_law

    draw_law(law, tmp_path / "law.png")
    assert (tmp_path / "law.png").stat().st_size > 10_000
    with pytest.raises(WrongInput, match=r"\.png, \.svg or \.pdf"):
        draw_law(law, tmp_path / "law.doc")
