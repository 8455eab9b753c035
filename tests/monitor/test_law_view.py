"""What is drawn of a law is what the law says: every run, the line with its band, and only the law's own predictions."""

import json
import math

import numpy as np
import pytest

from monitor.forecast.fit import fit
from monitor.forecast.law import Law
from monitor.forecast.law_view import law_view
from monitor.forecast.points import Points
from monitor.forecast.prediction import predict
from monitor.forecast.presets import PRESETS, preset


def runs(sized: bool = True) -> Points:
    """Ten runs along one ratio of tokens to parameters, one of them diverged."""
    params = np.geomspace(1e6, 1e8, 10)
    tokens = 20 * params
    loss = 1.7 + 400 / params**0.34 + 1500 / tokens**0.36
    loss[4] *= 1.7
    nothing = np.full(10, np.nan)
    sizes = (params, tokens) if sized else (nothing, nothing)
    return Points(tuple(f"r{i}" for i in range(10)), *sizes, loss, 6 * params * tokens)


@pytest.fixture(scope="module")
def law() -> Law:
    return fit(runs(), effort=30)


def test_the_view_holds_every_run_used_and_every_run_left_out_with_its_reason(law: Law) -> None:
    view = law_view(law)
    assert {r["run"] for r in view["runs"]} == {f"r{i}" for i in range(10)} - {"r4"}
    assert [(e["run"], "diverged" in e["reason"]) for e in view["excluded"]] == [("r4", True)]
    assert all(abs(r["off"]) < 0.02 for r in view["runs"])
    assert json.loads(json.dumps(view, allow_nan=False)) == view


def test_the_line_is_the_laws_own_and_its_band_opens_beyond_the_runs(law: Law) -> None:
    line = law_view(law, beyond=100.0)["line"]
    assert line["flops"][-1] == pytest.approx(100 * line["fitted_to"])
    assert all(a < b for a, b in zip(line["flops"], line["flops"][1:], strict=False))
    assert all(lo < mid < hi for lo, mid, hi in zip(line["p05"], line["p50"], line["p95"], strict=True))
    widths = [math.log(hi / lo) for lo, hi in zip(line["p05"], line["p95"], strict=True)]
    inside = max(w for w, c in zip(widths, line["flops"], strict=True) if c <= line["fitted_to"])
    assert widths[-1] > inside


def test_only_predictions_of_this_law_are_on_its_picture(law: Law) -> None:
    own = predict(law, params=1e9, tokens=2e10, made_at=0.0).to_dict()
    view = law_view(law, [own, {**own, "law_digest": "sha256:another"}])
    (shown,) = view["predictions"]
    assert shown["flops"] == pytest.approx(6 * 1e9 * 2e10)
    assert (shown["p05"], shown["p50"], shown["p95"]) == tuple(own["final_loss"].values())
    assert view["line"]["flops"][-1] >= shown["flops"]


def test_a_law_of_compute_alone_has_a_line_too() -> None:
    view = law_view(fit(runs(sized=False), "frontier", effort=10))
    assert len(view["line"]["p50"]) == 60 and view["runs"][0]["params"] is None


@pytest.mark.parametrize("name", PRESETS)
def test_a_published_law_can_be_drawn(name: str) -> None:
    assert law_view(preset(name))["line"]["p50"][0] > law_view(preset(name))["line"]["p50"][-1]
