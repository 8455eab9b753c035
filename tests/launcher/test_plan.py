"""What a run would be, from its spec alone; and the examples people start from."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.plan.lawcheck import conventions, doubts, mismatches
from launcher.plan.plan import make_plan, warnings
from launcher.plan.text import as_text
from launcher.runspec.document import read_data
from launcher.runspec.doubts import doubtful, not_yet
from launcher.runspec.file import read_spec
from launcher.runspec.gpus import gpu_named
from launcher.runspec.model import RunSpec
from launcher.training.memory import LIVE_PARAMETERS, rank_memory, stage_layers, stage_parameters

EXAMPLES = Path(__file__).parents[2] / "examples"


def big(**sections: Any) -> RunSpec:
    data: dict[str, Any] = {
        "name": "gpt-7b",
        "workload": {"layers": 32, "width": 4096, "heads": 32, "context": 2048, "vocab": 50304},
        "data": {"path": "/mnt/c", "tokenizer": "/t.json"},
        "train": {"tokens": 140e9, "batch_tokens": 4194304, "lr": 3e-4},
        "parallel": {"dp": 64, "zero": 1, "micro_batch": 1},
        "cluster": {
            "to": "http://ray:8265",
            "nodes": 8,
            "gpus_per_node": 8,
            "gpu": "H100",
            "price_per_gpu_hour": 4,
        },
    }
    for name, section in sections.items():
        data[name] = {**data.get(name, {}), **section}
    return RunSpec.from_dict(data)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("gpt-*.yaml")), ids=lambda p: p.stem)
def test_every_example_is_sound_and_plans(path: Path) -> None:
    spec = read_spec(path)
    assert doubtful(spec) == [] and warnings(spec) == not_yet(spec)
    plan = make_plan(spec)
    assert json.loads(json.dumps(plan)) == plan
    assert spec.name in as_text(plan)


def test_the_example_ladder_is_sound() -> None:
    from launcher.jobs.ladder import read_ladder, specs_of

    specs = specs_of(read_ladder(read_data(EXAMPLES / "ladder.yaml"), "ladder.yaml"))
    assert len(specs) >= 4 and len({s.train.seed for s in specs}) == 1


def test_hours_and_dollars_are_a_range_by_stated_utilisation() -> None:
    plan = make_plan(big())
    assert plan["hours"]["high"] / plan["hours"]["low"] == pytest.approx(0.55 / 0.30)
    assert plan["dollars"]["low"] == pytest.approx(plan["hours"]["low"] * 64 * 4)
    ideal = (plan["flops"] + plan["attention_flops"]) / (64 * 989e12) / 3600
    assert plan["hours"]["low"] == pytest.approx(ideal / 0.55)


def test_what_is_not_known_is_none_and_said() -> None:
    plan = make_plan(big(cluster={"gpu": "FPGA"}))
    assert plan["hours"] is None and plan["dollars"] is None
    assert any("not known here" in w["message"] for w in plan["warnings"])
    assert "unknown" in as_text(plan)


def test_the_job_is_the_one_that_is_sent() -> None:
    from launcher.jobs.job import ray_job

    job = make_plan(big())["job"]
    assert job["address"] == "http://ray:8265" and job["placement"]["bundles"] == 64
    sent = ray_job(
        big(), "/mnt/a b/gpt-7b", "gpt-7b-00", python="/usr/bin/python3", env={"A": "1", "EMPTY": ""}
    )
    assert sent["entrypoint"] == "/usr/bin/python3 -m launcher.recovery.driver '/mnt/a b/gpt-7b' gpt-7b-00"
    env = sent["runtime_env"]["env_vars"]
    assert env["A"] == "1" and "EMPTY" not in env and sent.keys() == job["submit_job"].keys()


def test_zero_divides_what_it_says_it_divides() -> None:
    memory = {z: (rank_memory(big(parallel={"zero": z})) or [])[0] for z in (0, 1, 2, 3)}
    n = 6.65e9
    assert memory[0].optimizer == pytest.approx(12 * n, rel=0.01)
    assert memory[1].optimizer == pytest.approx(memory[0].optimizer / 64)
    assert memory[2].gradients == pytest.approx(4 * n / 64, rel=0.01)
    assert memory[3].parameters == pytest.approx(2 * n / 64, rel=0.01)
    assert memory[2].parameters == memory[1].parameters == pytest.approx(2 * n, rel=0.01)


def test_a_pipeline_spreads_layers_and_its_first_stage_holds_most_activations() -> None:
    spec = big(parallel={"dp": 16, "pp": 4})
    assert stage_layers(spec) == [8, 8, 8, 8]
    counts = stage_parameters(spec)
    assert counts is not None and counts[0] == counts[-1] > counts[1]
    memory = rank_memory(spec) or []
    assert [round(m.activations / memory[3].activations) for m in memory] == [4, 3, 2, 1]
    assert memory[3].logits > 0 == memory[0].logits


def test_recomputation_trades_memory_for_flops() -> None:
    plain, recomputed = big(), big(parallel={"activation_checkpointing": True})
    assert (rank_memory(recomputed) or [])[0].activations < 0.2 * (rank_memory(plain) or [])[0].activations
    assert make_plan(recomputed)["hours"]["low"] == pytest.approx(make_plan(plain)["hours"]["low"] * 4 / 3)


def test_offloading_moves_the_optimizer_to_the_host() -> None:
    memory = (rank_memory(big(parallel={"offload": "cpu"})) or [])[0]
    assert memory.optimizer == 0 < memory.host
    plain = (rank_memory(big()) or [])[0]
    assert memory.host > plain.optimizer, "with a copy of parameters and gradients beside it"


def test_zero_3_counts_what_it_gathers_ahead_twice() -> None:
    """The buffer that parameters were gathered into lives beside them until the last of it is used."""
    spec = big(parallel={"zero": 3})
    memory, bucket = (rank_memory(spec) or [])[0], 2 * (1 << 27)
    assert memory.gathered == pytest.approx(2 * LIVE_PARAMETERS + 2 * bucket)  # and its reduction's, on GPUs
    assert memory.total >= memory.parameters + memory.optimizer + memory.activations + memory.gathered


def test_a_bucket_that_is_flattened_and_the_steps_scratch_are_no_part_of_backward() -> None:
    memory = (rank_memory(big(parallel={"zero": 1})) or [])[0]
    lasting = memory.parameters + memory.optimizer + memory.buffers
    phases = (
        memory.gradients + memory.activations + memory.logits + memory.gathered,
        memory.gradients + memory.reduce,
        memory.step,
    )
    assert memory.total == lasting + max(phases)


def test_a_model_that_does_not_fit_is_said_with_what_would() -> None:
    said = [p for p in warnings(big(parallel={"zero": 0})) if "GB" in p.message]
    assert said and "a H100 has 80" in said[0].message and "Try zero: 1" in said[0].message


def test_a_checkpoint_interval_longer_than_the_time_to_failure_is_said() -> None:
    data = {"nodes": 512, "gpus_per_node": 8}
    slow = big(
        cluster=data, parallel={"dp": 4096, "micro_batch": None}, checkpoints={"every_steps": 30000, "url": "/r"},
        train={"tokens": 14e12, "batch_tokens": 4096 * 2048 * 2},
    )  # fmt: skip
    said = [p.message for p in warnings(slow) if "fail once in" in p.message]
    assert said and "Set every_steps to" in said[0]
    better = int(said[0].rsplit(" to ", 1)[1].split(" ")[0])
    assert not any("fail once" in p.message for p in warnings(big(
        cluster=data, parallel={"dp": 4096, "micro_batch": None}, checkpoints={"every_steps": better, "url": "/r"},
        train={"tokens": 14e12, "batch_tokens": 4096 * 2048 * 2},
    )))  # fmt: skip


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("H100", "H100"), ("NVIDIA H100 80GB HBM3", "H100"), ("a100-sxm4-40gb", "A100-40GB"), ("A100", "A100"),
        ("NVIDIA H200", "H200"), ("Tesla V100-SXM2-32GB", "V100"), ("L40S", "L40S"), ("A10G", "A10G"), ("TPU v5", None),
        (None, None),
    ],
)  # fmt: skip
def test_gpus_are_known_by_the_names_people_give_them(said: str | None, name: str | None) -> None:
    gpu = gpu_named(said)
    assert (gpu.name if gpu else None) == name


def test_a_law_of_another_tokenizer_or_convention_is_not_this_runs() -> None:
    spec = big()
    assert (
        mismatches(spec, conventions(spec), "law.json") == [] == doubts(spec, conventions(spec), "law.json")
    )
    assert mismatches(spec, {}, "law.json") == []
    other = mismatches(spec, {"tokenizer": "bytes"}, "law.json")
    assert (
        other[0].keys == ("law", "data.tokenizer")
        and "fitted with another tokenizer: bytes" in other[0].message
    )
    assert mismatches(spec, {"params": "embeddings left out"}, "law.json")
    assert "cosine" in doubts(spec, {"schedule": "wsd, decay 20%, to 0"}, "law.json")[0].message


def test_importing_what_plan_needs_brings_no_heavy_library() -> None:
    code = (
        "import sys; from launcher.runspec.file import read_spec; from launcher.plan.plan import make_plan;"
        f"make_plan(read_spec({str(EXAMPLES / 'gpt-tiny.yaml')!r}));"
        "print([m for m in ('torch', 'ray', 'deepspeed', 'numpy', 'scipy') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
