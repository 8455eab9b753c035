"""run.yaml as types: defaults, what follows from them, digests, counts, the DeepSpeed configuration."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.errors import WrongInput
from launcher.runspec.accounting import (
    attention_flops_per_token,
    flops_per_token,
    gpt_parameters,
    parameter_count,
    total_flops,
    total_tokens,
)
from launcher.runspec.doubts import doubtful
from launcher.runspec.jsonschema import json_schema
from launcher.runspec.model import Gpt, RunSpec
from launcher.training.ds_config import deepspeed_config

MINIMAL: dict[str, Any] = {
    "name": "gpt-tiny",
    "workload": {"layers": 2, "width": 64, "heads": 4, "context": 128},
    "data": {"path": "stdlib"},
    "train": {"tokens": 1e6, "batch_tokens": 4096, "lr": 3e-3},
}


def spec(**sections: Any) -> RunSpec:
    data = {k: dict(v) if isinstance(v, dict) else v for k, v in MINIMAL.items()}
    for name, section in sections.items():
        data[name] = {**data.get(name, {}), **section} if isinstance(section, dict) else section
    return RunSpec.from_dict(data)


def test_a_minimal_spec_is_enough_and_every_default_is_written_out() -> None:
    run = spec()
    assert run.train.precision == "fp32" and run.workload.vocab == 256  # type: ignore[union-attr]
    assert run.total_steps == 245 and run.batch_sequences == 32 and run.ranks == 1
    assert run.to_dict()["policy"]["max_restarts"] == 10


def test_precision_follows_the_hardware() -> None:
    gpu = spec(cluster={"gpus_per_node": 1, "gpu": "H100"})
    assert gpu.train.precision == "bf16"
    assert spec(cluster={"gpus_per_node": 1}, train={"precision": "fp32"}).train.precision == "fp32"


def test_a_spec_survives_json_and_its_digest_says_so() -> None:
    run = spec(
        cluster={"to": "http://ray:8265", "nodes": {"min": 1, "max": 2}},
        train={"optimizer": {"betas": [0.9, 0.99]}},
    )
    again = RunSpec.from_dict(json.loads(json.dumps(run.to_dict())))
    assert again == run and again.digest == run.digest and run.digest.startswith("sha256:")


def test_writing_a_default_out_changes_no_digest_and_any_other_change_does() -> None:
    assert spec(train={"seed": 0}).digest == spec().digest
    assert spec(train={"seed": 1}).digest != spec().digest


def test_a_spec_can_not_be_changed() -> None:
    with pytest.raises(ValueError):
        spec().name = "other"  # type: ignore[misc]


def test_plain_data_that_is_wrong_is_answered_by_path() -> None:
    with pytest.raises(WrongInput, match=r"train\.lr: need more than 0; got 0"):
        spec(train={"lr": 0})


@settings(max_examples=80, deadline=None)
@given(
    dp=st.sampled_from([1, 2, 3, 4, 8]), pp=st.sampled_from([1, 2, 4]), per_rank=st.integers(1, 64),
    context=st.sampled_from([32, 128, 1024]),
)  # fmt: skip
def test_the_derived_micro_batch_always_makes_whole_batches(
    dp: int, pp: int, per_rank: int, context: int
) -> None:
    run = spec(
        workload={"layers": 4, "context": context},
        train={"batch_tokens": dp * per_rank * context},
        parallel={"dp": dp, "pp": pp},
    )
    assert run.micro_batch * run.accumulation * dp == run.batch_sequences
    assert run.micro_batch == 1 or run.micro_batch * context <= 16_384
    config = deepspeed_config(run)
    assert (
        config["train_batch_size"]
        == config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * dp
    )


def test_parameters_are_counted_by_the_stated_convention() -> None:
    gpt = Gpt(layers=12, width=768, heads=12, context=1024, vocab=50257, positions="learned")
    counts = gpt_parameters(gpt)
    assert counts.embedding == 50257 * 768 and counts.positions == 1024 * 768 and counts.head == 0
    assert counts.blocks == 12 * 12 * 768 * 768
    untied = gpt_parameters(gpt.model_copy(update={"tied": False, "positions": "rotary"}))
    assert untied.head == untied.embedding and untied.positions == 0


def test_the_count_is_that_of_the_model_itself() -> None:
    torch = pytest.importorskip("torch")
    from launcher.workloads.gpt import GPT, GPTShape

    for positions, tied in (("rotary", True), ("learned", False)):
        shape: dict[str, Any] = {
            "layers": 3,
            "width": 32,
            "heads": 4,
            "context": 16,
            "vocab": 300,
            "mlp_ratio": 3,
        }
        with torch.device("meta"):
            model = GPT(GPTShape(**shape, positions=positions, tied=tied))
        count = sum(p.numel() for p in model.parameters())
        assert gpt_parameters(Gpt(**shape, positions=positions, tied=tied)).total == count  # type: ignore[arg-type]


def test_flops_are_six_a_parameter_and_attention_stands_apart() -> None:
    run = spec()
    n = parameter_count(run)
    assert n is not None and flops_per_token(run) == 6 * n
    assert total_flops(run) == 6 * n * total_tokens(run) and total_tokens(run) == 245 * 4096
    assert attention_flops_per_token(run) == 12 * 2 * 64 * 128


def test_an_entrypoint_needs_no_data_and_may_state_its_size() -> None:
    run = RunSpec.from_dict({**MINIMAL, "workload": {"entrypoint": "my_train:main", "params": 1e9}})
    assert parameter_count(run) == 1_000_000_000 and run.context == 1


FULL: dict[str, Any] = {
    **MINIMAL,
    "team": "a",
    "eval": {"every_steps": 10, "batches": 1},
    "parallel": {"dp": 2, "pp": 1, "tp": 1, "zero": 1, "micro_batch": 4, "offload": "none"},
    "cluster": {"to": "http://r:8265", "nodes": {"min": 1, "max": 2}, "gpus_per_node": 1, "gpu": "H100"},
    "checkpoints": {"url": "./runs", "every_steps": 10, "keep": 2},
    "monitor": {"url": "http://m:8700", "token_env": "T"},
    "policy": {"on_divergence": "observe", "target_loss": 2.0},
}
JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**30), 10**30), st.floats(), st.text(max_size=8), st.just([]), st.just({}),
    st.just([1, "a"]), st.just({"x": None}), st.sampled_from([0, 1, 3, 7, 2**53, "1e5", "off", "az://", "http://"]),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(data=st.data(), junk=JUNK)
def test_no_value_anywhere_makes_validation_fail_in_another_way(data: st.DataObject, junk: Any) -> None:
    from launcher.plan.plan import make_plan
    from launcher.plan.text import as_text

    spoilt = json.loads(json.dumps(FULL))
    where, key = spoilt, data.draw(st.sampled_from(sorted(FULL)))
    while isinstance(where[key], dict) and where[key] and data.draw(st.booleans()):
        where = where[key]
        key = data.draw(st.sampled_from(sorted(where)))
    where[key] = junk
    try:
        run = RunSpec.from_dict(spoilt)
    except WrongInput as error:
        assert all(": " in line for line in str(error).splitlines()[1:])
        return
    assert as_text(make_plan(run))


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"train": {"precision": "bf16"}}, "bf16 on CPU"),
        ({"checkpoints": {"every_steps": 500}}, "before its first checkpoint"),
        ({"eval": {"every_steps": 500}}, "before its first evaluation"),
        ({"eval": {"every_steps": 5, "batches": 100}}, "held out"),
        ({"workload": {"layers": 3}, "parallel": {"pp": 2}}, "uneven"),
        ({"workload": {"layers": 4}, "parallel": {"pp": 4, "micro_batch": 32}}, "idle 75% of the time"),
        ({"cluster": {"price_per_gpu_hour": 2}}, "uses none"),
        ({"train": {"tokens": 8192}}, "fewer than one token a parameter"),
    ],
)
def test_what_will_disappoint_is_said(sections: dict[str, Any], words: str) -> None:
    assert any(words in p.message for p in doubtful(spec(**sections)))


def test_a_sound_spec_has_nothing_doubtful() -> None:
    assert doubtful(spec(checkpoints={"every_steps": 50})) == []


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_the_configuration_says_what_the_spec_says(zero: int, offload: str) -> None:
    if zero == 0 and offload == "cpu":
        return
    config = deepspeed_config(spec(parallel={"dp": 2, "zero": zero, "offload": offload}))
    assert config["zero_optimization"]["stage"] == zero
    assert ("offload_optimizer" in config["zero_optimization"]) == (offload == "cpu")
    assert json.loads(json.dumps(config)) == config


def test_the_schema_describes_every_key_in_json_schemas_own_words() -> None:
    schema = json_schema()
    text = json.dumps(schema)
    assert '"ge"' not in text and '"gt"' not in text
    assert schema["required"] == ["name", "workload", "train"]
    assert schema["$defs"]["Train"]["properties"]["lr"]["description"] == "Peak learning rate."
    assert schema["$defs"]["Cluster"]["properties"]["nodes"]["anyOf"][0]["type"] == "integer"
    undescribed = [
        f"{model}.{key}"
        for model, section in [("RunSpec", schema), *schema["$defs"].items()]
        for key, about in section["properties"].items()
        if "description" not in about
    ]
    assert undescribed == []
