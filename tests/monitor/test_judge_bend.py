"""Drift beside runs of the same recipe: what bends is called, what healthy runs do is not, however few of them are known."""

import json
import math
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from launcher.cli import main
from monitor.errors import WrongInput
from monitor.judge import Settings
from monitor.judge.base import NOTHING_KNOWN
from monitor.judge.bend import FIRST, PARTS, Bend, Shape, Window, cholesky
from monitor.judge.bending import HEIGHT, HEIGHT_PAIR
from monitor.judge.old_runs import OldRuns, old_runs
from monitor.replay import Watch, replay
from monitor.verdict import Sample, Verdict

STEPS = 400
SHARES = [(k + 0.5) / PARTS for k in range(FIRST, PARTS)]
LIKE = Shape()


def bent(gaps: list[float], df: float = 20.0, size: float = 1.0) -> list[Bend]:
    """The test after each of these gaps, whose healthy size is `size`."""
    bend, out = Bend(lambda a, b: size * size * LIKE.at(a.share, b.share), df), []
    for index, (share, gap) in enumerate(zip(SHARES, gaps, strict=True)):
        bend.add(Window(index, share, gap, 0.0))
        out.append(bend.until(PARTS))
    return out


def healthy_gaps(rng: random.Random, df: float) -> list[float]:
    """Gaps of a healthy run, of the shape and size that the test counts on."""
    rows = cholesky([[LIKE.at(a, b) for b in SHARES] for a in SHARES])
    own = [rng.gauss(0, 1) for _ in SHARES]
    by = math.sqrt(df / rng.gammavariate(df / 2.0, 2.0)) if df > 1 else 0.01
    return [by * sum(a * b for a, b in zip(row, own, strict=False)) for row in rows]


@pytest.mark.parametrize(("df", "height"), [(10.0, HEIGHT), (40.0, HEIGHT), (NOTHING_KNOWN, HEIGHT_PAIR)])
def test_of_a_thousand_healthy_runs_hardly_one_is_called(df: float, height: float) -> None:
    """One in a thousand goes up and one down: of 300, four and more in one test of fifty million."""
    rng, runs = random.Random(7), 0
    for _ in range(300):
        bend, called = Bend(lambda a, b: LIKE.at(a.share, b.share), df), False
        for index, (share, gap) in enumerate(zip(SHARES, healthy_gaps(rng, df), strict=True)):
            bend.add(Window(index, share, gap, 0.0))
            called |= bend.called(height) != 0
        runs += called
    assert runs <= 3


def test_a_slow_ramp_is_called_and_one_window_that_leaps_is_not() -> None:
    gaps = healthy_gaps(random.Random(1), 40.0)
    ramp = [g + 12.0 * max(0.0, t - 0.2) for g, t in zip(gaps, SHARES, strict=True)]
    calls = [bend.called(HEIGHT) for bend in bent(ramp)]
    assert set(calls) == {0, 1} and SHARES[calls.index(1)] < 0.8
    assert set(bend.called(HEIGHT) for bend in bent([-g for g in ramp])) == {0, -1}
    for at in range(len(gaps)):
        leaps = [g + (30.0 if k == at else 0.0) for k, g in enumerate(gaps)]
        assert not any(bend.called(HEIGHT) for bend in bent(leaps))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999), st.sampled_from([1e-3, 0.5, 40.0]), st.integers(0, len(SHARES)))
def test_the_unit_of_a_gap_changes_nothing_and_neither_does_a_restart(
    seed: int, unit: float, cut: int
) -> None:
    gaps = healthy_gaps(random.Random(seed), 10.0)
    here, there = bent(gaps)[-1], bent([unit * g for g in gaps], size=unit)[-1]
    assert here.newest == pytest.approx(there.newest)
    # beside one control not even the size is known: what stands for it is next to nothing in any unit
    alone = bent([unit * g for g in gaps], NOTHING_KNOWN)[-1].newest
    assert alone == pytest.approx(bent(gaps, NOTHING_KNOWN)[-1].newest, abs=1e-4)
    first = Bend(lambda a, b: LIKE.at(a.share, b.share), 20.0)
    second = Bend(lambda a, b: LIKE.at(a.share, b.share), 20.0)
    for index, (share, gap) in enumerate(zip(SHARES, gaps, strict=True)):
        if index == cut:
            second.load(json.loads(json.dumps(first.state())))
            first = second
        first.add(Window(index, share, gap, 0.0))
    assert (first.newest, first.before) == (here.newest, here.before)


# a recipe's runs, made up


def batches(seed: int) -> list[float]:
    rng = random.Random(seed)
    return [rng.gauss(0, 0.1) for _ in range(STEPS)]


def a_run(seed: int, order: int = 0, drift: float = 0.0) -> list[Sample]:
    """A run of the recipe: its own slow way, the noise of the batches it reads, and a drift from a fifth on."""
    rng, shared, way, pace, out = random.Random(1000 + seed), batches(order), 0.0, 0.0, []
    level = rng.gauss(0, 0.004)
    for t in range(STEPS):
        pace += 0.02 * (-pace + rng.gauss(0, 0.0006))
        way += pace - 0.002 * way
        base = 2.0 + 6.0 * (t + 10) ** -0.3
        rise = drift * max(0.0, t / STEPS - 0.2) / 0.8
        out.append(Sample(t, base + level + way + shared[t] + rng.gauss(0, 0.003) + rise))
    return out


def recipe(runs: int, order: int = 0) -> OldRuns:
    return old_runs([a_run(seed, order) for seed in range(runs)])


def test_a_drift_beside_old_runs_is_called_early_and_a_healthy_run_never() -> None:
    many, few = recipe(16), recipe(3)
    found: dict[str, list[int]] = {"many": [], "few": []}
    for seed in range(50, 58):
        assert replay(a_run(seed), old=many)["alerts"] == []
        assert replay(a_run(seed), old=few)["alerts"] == []
        for name, old in (("many", many), ("few", few)):
            alerts = replay(a_run(seed, drift=0.05), old=old)["alerts"]
            found[name] += [a["step"] for a in alerts if a["alert"] == "LossAbovePrediction"][:1]
            assert all(a["severity"] == "warning" and a["since_step"] <= a["step"] for a in alerts)
    assert len(found["many"]) == 8 and sorted(found["many"])[4] <= 0.65 * STEPS
    assert len(found["few"]) <= 8 and (not found["few"] or sorted(found["few"])[0] >= min(found["many"]))


def test_a_run_that_bends_down_is_below() -> None:
    alerts = replay(a_run(50, drift=-0.05), old=recipe(16))["alerts"]
    assert [a["alert"] for a in alerts] == ["LossBelowPrediction"]


def test_a_run_on_other_batches_than_the_old_runs_is_not_taken_for_a_drift() -> None:
    """Their gaps hold no batch noise and its gap holds all of it: its sums with alternating signs say so."""
    old = recipe(16)
    assert [replay(a_run(seed, order=5 + seed), old=old)["alerts"] for seed in range(50, 60)] == [[]] * 10


def test_the_verdict_says_that_old_runs_were_used_and_where_they_were() -> None:
    watch = Watch(old_runs=recipe(8))
    verdict = [watch.observe(sample) for sample in a_run(50)[:200]][-1]
    assert verdict.source == "old_runs" and verdict.lower is not None and verdict.upper is not None
    assert verdict.lower < verdict.observed < verdict.upper
    watch.announce(200, "data")
    verdict = [watch.observe(sample) for sample in a_run(50)[200:300]][-1]
    assert verdict.source == "own_past", "after a planned change they say nothing"


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 99), st.integers(0, STEPS), st.booleans(), st.sampled_from([0.0, 0.06]))
def test_a_monitor_restarted_anywhere_beside_old_runs_or_a_control_gives_the_same_verdicts(
    seed: int, cut: int, with_old: bool, drift: float
) -> None:
    old, twin, run = (OLD if with_old else None), a_run(seed + 200), a_run(seed, drift=drift)

    def feed(watch: Watch, part: range) -> list[Verdict]:
        out = []
        for t in part:
            if not with_old:
                watch.observe_control(twin[t])
            out.append(watch.observe(run[t]))
        return out

    whole = feed(Watch(total_steps=STEPS, old_runs=old), range(STEPS))
    first = Watch(total_steps=STEPS, old_runs=old)
    parts = feed(first, range(cut))
    state = json.dumps(first.state_dict(), allow_nan=False)
    assert len(state.encode()) <= 10_000
    second = Watch.from_state(Settings(), json.loads(state), total_steps=STEPS, old_runs=old)
    assert repr(parts + feed(second, range(cut, STEPS))) == repr(whole)


OLD = recipe(6)


def beside(run: list[Sample], control: list[Sample]) -> set[str]:
    return {a["alert"] for a in replay(run, control=control)["alerts"]}


def test_beside_one_control_a_drift_is_called_and_a_smaller_twins_bend_is_not() -> None:
    """A twin that is smaller begins further off, and its distance bends of itself."""
    for seed in range(50, 56):
        assert beside(long_run(seed), long_run(seed + 20)) == set()
        smaller = [replace(s, loss=s.loss + 0.3 * (s.step / LONG) ** 0.5) for s in long_run(seed + 20)]
        assert beside(long_run(seed), smaller) == set()
    found = [beside(long_run(seed, 0.04), long_run(seed + 20)) for seed in range(50, 56)]
    assert sum(f == {"LossAbovePrediction"} for f in found) >= 5


LONG = 1200


def long_run(seed: int, drift: float = 0.0) -> list[Sample]:
    """As `a_run`, long enough for a control to be used."""
    rng, shared, way, pace, out = random.Random(1000 + seed), random.Random(0), 0.0, 0.0, []
    for t in range(LONG):
        pace += 0.01 * (-pace + rng.gauss(0, 0.0001))
        way += pace - 0.001 * way
        rise = drift * max(0.0, t / LONG - 0.2) / 0.8
        base = 2.0 + 6.0 * (t + 10) ** -0.3 + shared.gauss(0, 0.1)
        out.append(Sample(t, base + way + rng.gauss(0, 0.003) + rise))
    return out


def test_what_was_superseded_by_a_resume_is_forgotten() -> None:
    run, watch = a_run(50), Watch(old_runs=OLD)
    for sample in a_run(50, drift=0.2)[:300]:
        watch.observe(sample)
    assert "LossAbovePrediction" in {a.alert for a in watch.open_alerts()}
    for sample in run[80:]:
        watch.observe(replace(sample, attempt=2))
    assert "LossAbovePrediction" not in {a.alert for a in watch.open_alerts()}


# the command


def write(path: Path, runs: dict[str, list[Sample]]) -> str:
    lines = [f"{name},{s.step},{s.loss}" for name, run in runs.items() for s in run]
    path.write_text("run,step,loss\n" + "\n".join(lines) + "\n")
    return str(path)


def test_controls_given_one_by_one_or_in_one_file_are_the_same_old_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = {str(seed): a_run(seed) for seed in range(6)}
    apart = [write(tmp_path / f"{name}.csv", {name: run}) for name, run in runs.items()]
    curve = write(tmp_path / "curve.csv", {"new": a_run(50, drift=0.1)})
    command = ["replay", curve, "--json"]
    assert main([*command, *(word for path in apart for word in ("--control", path))]) == 3
    one_by_one = json.loads(capsys.readouterr().out)
    assert main([*command, "--control", write(tmp_path / "all.csv", runs)]) == 3
    assert json.loads(capsys.readouterr().out) == one_by_one
    assert "LossAbovePrediction" in {a["alert"] for a in one_by_one["alerts"]}


def test_controls_that_say_nothing_of_how_runs_differ_are_said_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    curve = write(tmp_path / "curve.csv", {"new": a_run(50)})
    two = write(tmp_path / "two.csv", {str(seed): a_run(seed) for seed in range(2)})
    assert main(["replay", curve, "--control", two]) == 0
    assert "2 old runs" in (said := capsys.readouterr().err) and "give 3 or more" in said
    with pytest.raises(WrongInput, match="steps in common, in 0 of"):
        old_runs([a_run(1)[k::3] for k in range(3)])
