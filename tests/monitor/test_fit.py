"""Fits find what made the data, know no unit, say what they can't tell, and never put a NaN into law.json."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitor.errors import WrongInput
from monitor.forecast.anneal import Schedule, predicted
from monitor.forecast.fit import FORMS, ends, fit
from monitor.forecast.fit_anneal import fit_curves
from monitor.forecast.fit_chinchilla import bootstrap_plain, fit_plain
from monitor.forecast.fit_members import Runs, fit_mode
from monitor.forecast.law import Law, digest_of
from monitor.forecast.points import Curve, Curves, Points, read_curves, read_points

DATA = Path(os.environ.get("LOSSCAST_DATA", ""))
needs_data = pytest.mark.skipif(
    not (DATA / "points").is_dir(), reason="LOSSCAST_DATA names no folder of public runs"
)


def made(n: int = 20, noise: float = 0.002, seed: int = 0, names: str = "r") -> Points:
    """Runs of a known Chinchilla law on a grid of sizes and ratios."""
    rng = np.random.default_rng(seed)
    params = np.geomspace(1e6, 1e8, n)
    tokens = params * rng.choice([5.0, 20.0, 80.0], n)
    loss = (1.7 + 400 / params**0.34 + 1500 / tokens**0.36) * np.exp(noise * rng.standard_normal(n))
    return Points(
        tuple(f"{names}{i}" for i in range(n)), params, tokens, loss, 6 * params * tokens, path="made"
    )


def scaled(points: Points, params: float = 1.0, tokens: float = 1.0, loss: float = 1.0) -> Points:
    """The same runs in other units."""
    n, d = points.params * params, points.tokens * tokens
    return Points(points.run, n, d, points.loss * loss, points.flops * params * tokens)


def test_the_plain_fit_finds_the_law_that_made_the_data() -> None:
    points = made(60, noise=0.0)
    z, value = fit_plain(points.params, points.tokens, points.loss)
    np.testing.assert_allclose([np.exp(z[0]), z[3], z[4]], [1.7, 0.34, 0.36], rtol=1e-3)
    assert value < 1e-10


@given(st.floats(1e-9, 1e9), st.floats(1e-9, 1e9), st.floats(1e-2, 1e2))
@settings(max_examples=8, deadline=None)
def test_units_do_not_matter_to_the_plain_fit(params: float, tokens: float, loss: float) -> None:
    points, other = made(), scaled(made(), params, tokens, loss)
    z, value = fit_plain(points.params, points.tokens, points.loss)
    y, same = fit_plain(other.params, other.tokens, other.loss)
    assert math.isclose(value, same, rel_tol=1e-4)
    np.testing.assert_allclose([y[3], y[4], np.exp(y[0]) / loss], [z[3], z[4], np.exp(z[0])], rtol=5e-3)


@pytest.mark.parametrize("form", ["chinchilla", "eased_valley", "eased", "frontier", "bent"])
@given(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6), st.floats(1e-2, 1e2))
@settings(max_examples=3, deadline=None)
def test_units_do_not_matter_to_any_form(form: str, params: float, tokens: float, loss: float) -> None:
    points = made()
    runs, other = Runs.of(points), Runs.of(scaled(points, params, tokens, loss))
    here, there = fit_mode(form, runs).log_loss(runs), fit_mode(form, other).log_loss(other)
    np.testing.assert_allclose(there - math.log(loss), here, atol=2e-4)


@given(st.permutations(range(12)))
@settings(max_examples=5, deadline=None)
def test_the_order_of_runs_does_not_matter(order: list[int]) -> None:
    points = made(12)
    mixed = Points(
        tuple(points.run[i] for i in order),
        points.params[order],
        points.tokens[order],
        points.loss[order],
        points.flops[order],
    )
    for name in ("chinchilla", "frontier"):
        here, there = fit_mode(name, Runs.of(points)).point(), fit_mode(name, Runs.of(mixed)).point()
        np.testing.assert_allclose(there, here, rtol=1e-2)


def test_a_shuffled_file_leads_to_the_same_plain_law_and_interval() -> None:
    points = made(24)
    at = np.random.default_rng(3).permutation(24)
    mixed = Points(
        tuple(points.run[i] for i in at),
        points.params[at],
        points.tokens[at],
        points.loss[at],
        points.flops[at],
    )
    here, there = (fit(p, "chinchilla").predict(1e9, 2e10).to_dict() for p in (points, mixed))
    assert there == pytest.approx(here, rel=1e-6)


def test_runs_that_get_worse_with_compute_are_told_to_check_their_columns() -> None:
    points = made(12)
    law = fit(Points(points.run, points.params, points.tokens, np.sort(points.loss), points.flops), effort=20)
    assert not law.identifiable and "right columns" in law.why


def test_a_larger_run_from_the_same_law_falls_inside_its_interval() -> None:
    law = fit(made(24), effort=60)
    truth = 1.7 + 400 / 1e9**0.34 + 1500 / 2e10**0.36
    q = law.predict(1e9, 2e10)
    assert q.p05 < truth < q.p95
    assert abs(q.p50 / truth - 1) < 0.02
    near, far = law.predict(1.2e8, 2.4e9), law.predict(1e10, 2e11)
    assert (far.p95 - far.p05) / far.p50 > (near.p95 - near.p05) / near.p50


def test_intervals_hold_new_runs_inside_the_range_as_often_as_they_say() -> None:
    held = []
    for seed in range(5):
        law = fit(made(24, noise=0.008, seed=seed), effort=20)
        rng = np.random.default_rng([seed, 1])
        for n in np.geomspace(2e6, 8e7, 12):
            loss = (1.7 + 400 / n**0.34 + 1500 / (20 * n) ** 0.36) * np.exp(0.008 * rng.standard_normal())
            q = law.predict(n, 20 * n)
            held.append(q.p05 <= loss <= q.p95)
    assert 0.8 <= np.mean(held) <= 0.98


def test_a_ladder_of_one_ratio_is_humble_about_another() -> None:
    rng = np.random.default_rng(0)
    n = np.geomspace(1e7, 1e9, 10)
    loss = (1.7 + 400 / n**0.34 + 1500 / (20 * n) ** 0.36) * np.exp(0.003 * rng.standard_normal(10))
    law = fit(Points(tuple(map(str, range(10))), n, 20 * n, loss, 120 * n**2), effort=60)
    own = law.predict(1e8, 2e9)
    for ratio in (5.0, 40.0, 100.0):
        q = law.predict(1e8, ratio * 1e8)
        assert q.p05 < 1.7 + 400 / 1e8**0.34 + 1500 / (ratio * 1e8) ** 0.36 < q.p95
        assert math.log(q.p95 / q.p05) > 1.5 * math.log(own.p95 / own.p05)


def test_runs_almost_alike_make_no_absurd_interval() -> None:
    rng = np.random.default_rng(0)
    flops = np.repeat([1e3, 1.4e3, 2e3, 2.9e3], 12) * np.exp(0.01 * rng.standard_normal(48))
    step = 1 + 0.02 * (rng.random(48) > 0.5)
    loss = np.multiply(3.28 * np.exp(3e-4 * rng.standard_normal(48)), step)
    nothing = np.full(48, np.nan)
    law = fit(Points(tuple(map(str, range(48))), nothing, nothing, loss, flops), effort=20)
    q = law.predict(flops=1e6)
    assert 0.3 < q.p05 < q.p95 < 30


def test_small_runs_held_back_do_not_bend_the_law_below_the_large_ones() -> None:
    """A fixed warm-up costs a small run much and a large one nothing; a plain power law runs far too low after it."""
    params = np.geomspace(2e6, 3e8, 24)
    tokens = 20 * params
    flops = 6 * params * tokens
    loss = (1.7 + 400 / params**0.34 + 1500 / tokens**0.36) * np.exp(0.08 * (flops / flops[-1]) ** -0.2)
    points = Points(tuple(map(str, range(24))), params, tokens, loss, flops)
    far = 6 * 3e9 * 6e10
    truth = (1.7 + 400 / 3e9**0.34 + 1500 / 6e10**0.36) * math.exp(0.08 * (far / flops[-1]) ** -0.2)
    law = fit(points, effort=60)
    q = law.predict(3e9, 6e10)
    assert q.p05 < truth < q.p95 and abs(q.p50 / truth - 1) < 0.04
    plain = fit_mode("frontier", Runs.of(points)).log_loss(Runs(*np.log([[3e9], [6e10], [far], [truth]])))
    assert abs(q.p50 / truth - 1) < abs(math.exp(float(plain[0])) / truth - 1)


def test_runs_of_one_size_say_that_they_tell_nothing_of_size() -> None:
    tokens = np.geomspace(2e8, 2e11, 12)
    loss = 1.7 + 400 / 1e7**0.34 + 1500 / tokens**0.36
    law = fit(Points(tuple(map(str, range(12))), np.full(12, 1e7), tokens, loss, 6e7 * tokens), effort=60)
    assert not law.identifiable and "one size" in law.why
    same, larger = law.predict(1e7, 4e11), law.predict(1e9, 4e11)
    assert (larger.p95 - larger.p05) / larger.p50 > 5 * (same.p95 - same.p05) / same.p50


def test_a_law_written_before_stretch_was_known_still_reads() -> None:
    body = fit(made(8), "frontier", effort=10).to_dict()
    del body["digest"], body["stretch"]
    old = Law.from_dict({**body, "digest": digest_of(body)})
    assert old.stretch == 1.0 and old.predict(flops=1e20).p50 > 0


def finite(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(finite(v) for v in value.values())
    return all(finite(v) for v in value) if isinstance(value, (list, tuple)) else True


@pytest.mark.parametrize("form", ["auto", "chinchilla", "frontier"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_runs_are_fitted_for_what_they_are_worth_and_say_so(form: str, count: int) -> None:
    points = made(20)
    law = fit(points.keep(np.arange(20) < count), form, effort=20)
    assert not law.identifiable and f"{count} run" in law.why
    assert finite(law.to_dict())
    q = law.predict(1e8, 1e9)
    assert 0 < q.p05 <= q.p50 <= q.p95 < math.inf


def test_one_wild_run_among_few_makes_no_infinite_error() -> None:
    points = made(12, noise=0.002)
    for wild in (1e-3, 0.1, 10.0):
        tokens = points.tokens * np.where(np.arange(12) == 11, wild, 1.0)
        flops = 6 * points.params * tokens
        law = fit(Points(points.run, points.params, tokens, points.loss, flops), "chinchilla")
        Law.from_dict(json.loads(json.dumps(law.to_dict(), allow_nan=False)))


@pytest.mark.parametrize("form", ["auto", "chinchilla"])
def test_runs_of_one_size_or_all_alike_give_no_nan(form: str) -> None:
    points = made(6)
    one_size = Points(points.run, np.full(6, 1e6), points.tokens, points.loss, 6e6 * points.tokens)
    alike = Points(
        points.run,
        np.full(6, 1e6),
        np.full(6, 2e7),
        np.full(6, 3.0) + np.arange(6) * 1e-3,
        np.full(6, 1.2e14),
    )
    for some in (one_size, alike):
        law = fit(some, form, effort=10)
        assert finite(law.to_dict()) and not law.identifiable


def test_what_is_left_out_is_listed_and_can_be_kept() -> None:
    points = made(8)
    twice = Points(
        (*points.run, "again"),
        *(np.append(v, v[0]) for v in (points.params, points.tokens, points.loss, points.flops)),
    )
    law = fit(twice, "frontier", exclude=["r3"], effort=10)
    assert {e["run"]: e["reason"] for e in law.excluded} == {
        "r3": "asked for with --exclude",
        "again": "the same numbers as run r0",
    }
    assert "again" in fit(twice, "frontier", include=["again"], effort=10).runs["run"]
    with pytest.raises(WrongInput, match="no such run"):
        fit(points, exclude=["nobody"])


def test_a_diverged_run_is_left_out_of_the_combined_fit_with_its_reason() -> None:
    points = made(20)
    loss = points.loss.copy()
    loss[15] *= 1.8
    law = fit(Points(points.run, points.params, points.tokens, loss, points.flops), effort=10)
    assert [e["run"] for e in law.excluded] == ["r15"] and "diverged" in law.excluded[0]["reason"]
    plain = fit(Points(points.run, points.params, points.tokens, loss, points.flops), "chinchilla")
    assert not plain.excluded and len(plain.runs["run"]) == 20


def test_the_same_input_gives_the_same_law() -> None:
    first, second = (
        fit(made(10), "frontier", effort=10).to_dict(),
        fit(made(10), "frontier", effort=10).to_dict(),
    )
    for law in (first, second):
        law["fit"].pop("seconds"), law.pop("digest")
    assert json.dumps(first) == json.dumps(second)


def test_a_law_survives_its_file_and_a_changed_file_is_refused(tmp_path: Path) -> None:
    law = fit(made(8), "frontier", effort=10)
    law.write(tmp_path / "law.json")
    again = Law.read(tmp_path / "law.json")
    assert again.digest == law.digest
    assert again.predict(flops=1e20).p50 == pytest.approx(law.predict(flops=1e20).p50, rel=1e-9)
    data = json.loads((tmp_path / "law.json").read_text())
    data["noise_sd"] = 0.5
    (tmp_path / "law.json").write_text(json.dumps(data))
    with pytest.raises(WrongInput, match="does not match its digest"):
        Law.read(tmp_path / "law.json")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not JSON"),
        ("[1]", "no law.json"),
        ('{"a": 1}', "no law.json"),
        ('{"losscast_law": 99}', "version 99"),
    ],
)
def test_what_is_no_law_is_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "law.json").write_text(text)
    with pytest.raises(WrongInput, match=says):
        Law.read(tmp_path / "law.json")


def test_an_unknown_form_names_those_there_are() -> None:
    with pytest.raises(WrongInput, match=", ".join(FORMS)):
        fit(made(5), "cubic")


def curve(run: str, params: float, last_rate: float, loss: float) -> Curve:
    step = np.arange(1, 201)
    lr = np.linspace(1.0, last_rate, 200)
    return Curve(run, step, loss + 3.0 * step**-0.7, step * 1e4, lr, params=params)


def test_an_unfinished_run_is_no_final_point() -> None:
    curves = Curves((curve("a", 1e6, 0.0, 3.0), curve("b", 2e6, 0.6, 2.8), curve("c", 4e6, 0.02, 2.6)))
    points = ends(curves)
    assert points.run == ("a", "c")
    assert (
        points.excluded[0].run == "b"
        and "unfinished: it ends at 60% of its peak" in points.excluded[0].reason
    )
    assert ends(curves, include=["b"]).run == ("a", "b", "c")


def test_constant_rate_runs_count_when_none_decays() -> None:
    assert len(ends(Curves((curve("a", 1e6, 1.0, 3.0), curve("b", 2e6, 1.0, 2.8))))) == 2


@needs_data
def test_the_published_set_gives_the_published_law() -> None:
    points = read_points(DATA / "points/chinchilla_epoch.csv", where={"excluded_in_paper": "0"})
    z, value = fit_plain(points.params, points.tokens, points.loss)
    assert value <= 0.0010182742
    np.testing.assert_allclose([np.exp(z[0]), z[3], z[4]], [1.8169, 0.3478, 0.3658], atol=0.003)
    draws = bootstrap_plain(points.params, points.tokens, points.loss, z, 200)
    np.testing.assert_allclose([draws[:, 3].std(), draws[:, 4].std()], [0.015, 0.021], rtol=0.35)


@needs_data
@pytest.mark.parametrize(("size", "within"), [("25M", 0.009), ("100M", 0.007)])
def test_one_cosine_run_foretells_other_schedules(size: str, within: float) -> None:
    """What a single run can't tell comes from priors that were learnt on other data."""
    curves = read_curves(DATA / "curves/schedules_25m_100m.csv")
    model = fit_curves([curves[f"{size}-cosine_24000"]])
    assert model is not None and model["shapes"] == 1
    off = []
    for run in curves.runs:
        if run.run.startswith(f"{size}-") and run.run != f"{size}-cosine_24000":
            assert run.lr is not None
            rows = tuple(zip(run.step.tolist(), run.lr.tolist(), strict=True))
            line, _ = predicted(
                model, Schedule("file", rows=rows), run.step.astype(float), int(run.step[-1]), run.params
            )
            off.append(np.abs(line - run.loss).mean())
    assert len(off) == 8 and np.mean(off) < within
