"""Which twin a run gets as its pacer, what it costs, and when it waits, rests and ends beside the run."""

from pathlib import Path
from typing import Any

import pytest

from launcher.cli import main
from launcher.runspec.accounting import parameter_count
from launcher.runspec.file import read_spec
from launcher.runspec.model import Gpt, RunSpec
from launcher.training.pacer import AHEAD, SHARE, control_of, step_flops, twin_of

EXAMPLES = Path(__file__).parents[2] / "examples"
MONITOR = {"url": "http://monitor.example:8700"}


def paced(name: str, **sections: dict[str, Any]) -> RunSpec:
    body = read_spec(EXAMPLES / f"{name}.yaml").to_dict()
    body |= {"monitor": MONITOR}
    body["policy"]["pacer"] = "auto"
    for section, keys in sections.items():
        body[section] |= keys
    return RunSpec.from_dict(body)


def found(spec: RunSpec) -> RunSpec:
    twin = twin_of(spec)
    assert twin.spec is not None, twin.why
    return twin.spec


SIZES = ["gpt-125m", "gpt-125m-kuberay", "gpt-7b-64xH100"]


@pytest.mark.parametrize("name", SIZES)
def test_the_twin_reads_the_very_same_batches_under_the_same_schedule(name: str) -> None:
    spec = paced(name)
    twin = found(spec)
    assert (twin.data, twin.train, twin.total_steps) == (spec.data, spec.train, spec.total_steps)
    assert twin.name == f"{spec.name}-pacer" and twin.policy.paces == spec.name
    assert twin.checkpoints == spec.checkpoints and twin.monitor == spec.monitor
    assert isinstance(twin.workload, Gpt) and isinstance(spec.workload, Gpt)
    for key in ("context", "vocab", "positions", "tied", "mlp_ratio"):
        assert getattr(twin.workload, key) == getattr(spec.workload, key)


@pytest.mark.parametrize("name", SIZES)
def test_it_costs_a_fifteenth_to_a_fifth_and_is_ahead(name: str) -> None:
    spec = paced(name)
    twin = twin_of(spec)
    n = parameter_count(found(spec)), parameter_count(spec)
    assert n[0] and n[1] and 1 / 15 <= n[0] / n[1] <= 1 / 5
    mine, its = step_flops(spec), step_flops(found(spec))
    assert mine and its and twin.share == pytest.approx(its / mine) and SHARE[0] <= twin.share <= SHARE[2]
    assert its / found(spec).ranks <= AHEAD * mine / spec.ranks
    assert found(spec).ranks < spec.ranks and found(spec).gpus == found(spec).ranks


def test_it_never_acts_never_goes_back_and_is_no_bodys_target() -> None:
    policy = found(paced("gpt-125m", policy={"on_divergence": "rollback", "target_loss": 2.5})).policy
    assert (policy.pacer, policy.on_divergence, policy.target_loss) == ("off", "observe", None)
    assert policy.max_restarts <= 3
    assert control_of(paced("gpt-125m")) == "gpt-125m-pacer" and control_of(found(paced("gpt-125m"))) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"policy": {"pacer": "off"}}, "none was asked for"),
        ({"train": {"tokens": 300 * 524288}}, "300 steps"),
        ({"workload": {"layers": 1, "width": 8, "heads": 2, "vocab": 50304}}, "most of it is embeddings"),
    ],
)
def test_where_it_can_not_pay_there_is_none_and_it_is_said_why(change: dict[str, Any], words: str) -> None:
    if "train" in change:
        change["train"]["schedule"] = {"kind": "cosine"}
    twin = twin_of(paced("gpt-125m", **change))
    assert twin.spec is None and words in twin.why


def test_without_a_monitor_nobody_would_look_at_it() -> None:
    policy = {"pacer": "auto", "on_divergence": "observe"}
    body = paced("gpt-125m").to_dict() | {"monitor": None, "policy": policy}
    assert "no monitor" in twin_of(RunSpec.from_dict(body)).why


def test_where_few_gpus_could_not_hold_it_its_state_is_spread() -> None:
    """A tenth of a large model is large: ZeRO's stage is raised before more GPUs are taken than its pace needs."""
    spec = paced("gpt-7b-64xH100", workload={"layers": 80, "width": 8192, "heads": 64}, parallel={"zero": 3})
    twin = found(spec)
    from launcher.runspec.gpus import gpu_named
    from launcher.training.memory import rank_memory

    gpu, memory = gpu_named("H100"), rank_memory(twin)
    assert gpu and memory and max(m.total for m in memory) < gpu.memory_bytes


def test_old_specs_keep_their_digest_and_a_pacers_says_whose_it_is() -> None:
    spec = read_spec(EXAMPLES / "gpt-125m.yaml")
    assert "paces" not in spec.to_dict()["policy"]
    twin = found(paced("gpt-125m"))
    assert twin.to_dict()["policy"]["paces"] == "gpt-125m"
    assert RunSpec.from_dict(twin.to_dict()) == twin


def test_the_plan_names_the_twin_its_flops_and_its_price(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (EXAMPLES / "gpt-125m.yaml").read_text().replace("policy: {", "policy: {pacer: auto, ")
    (tmp_path / "run.yaml").write_text(text)
    assert main(["plan", str(tmp_path / "run.yaml")]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("  pacer ")]
    twin = twin_of(read_spec(tmp_path / "run.yaml"))
    assert "gpt-125m-pacer" in line and "1 GPU beside" in line and "$0.42" in line
    assert f"{twin.share:.1%} of the run's" in line and "FLOPs" in line
    assert main(["plan", str(EXAMPLES / "gpt-125m.yaml")]) == 0
    assert "pacer" not in capsys.readouterr().out


def test_a_run_without_one_is_told_before_it_is_handed_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (EXAMPLES / "gpt-tiny.yaml").read_text()
    assert "policy" not in text and "monitor" not in text
    (tmp_path / "run.yaml").write_text(text + "\npolicy: {pacer: auto}\n")
    assert main(["submit", str(tmp_path / "run.yaml"), "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert "no pacer is started" in said and "no monitor" in said
    assert main(["submit", str(tmp_path / "run.yaml"), "--pacer", "--yes"]) == 2
    assert "has no pacer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("by", "alive", "released", "ended", "finished", "word"),
    [
        (None, False, False, False, False, "coming"),  # handed in, not begun
        ("old", False, True, False, False, "coming"),  # resumed: the stop was of the submission before
        ("job", True, False, False, False, "trains"),
        ("new", True, False, True, False, "trains"),  # resumed while its pacer still lived
        ("job", False, False, False, False, "gone"),
        ("job", False, True, False, False, "over"),
        (None, False, False, True, False, "over"),  # it failed before it took an attempt
        ("job", True, False, False, True, "over"),
    ],
)
def test_a_pacer_knows_where_its_run_stands(
    by: str | None, alive: bool, released: bool, ended: bool, finished: bool, word: str
) -> None:
    from launcher.recovery.pacing import lead

    assert lead("job", by, alive=alive, released=released, ended=ended, finished=finished) == word


def test_a_run_that_waits_for_places_is_seen_by_the_names_of_its_groups() -> None:
    from launcher.recovery.pacing import group_name, states

    table = [
        {"name": group_name("big", 1), "state": "REMOVED"},
        {"name": group_name("big", 2), "state": "CREATED"},
        {"name": group_name("big-pacer", 1), "state": "PENDING"},
        {"state": "PENDING"},
    ]
    assert states(table, "big") == ["CREATED"] and states(table, "big-pacer") == ["PENDING"]
