"""The commands an engineer runs before anything starts: validate, plan, schema."""

import json
from pathlib import Path

import pytest

from launcher.cli import main

EXAMPLES = Path(__file__).parents[2] / "examples"
BROKEN = Path(__file__).parent / "broken_specs"


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    status = main(argv)
    said = capsys.readouterr()
    return status, said.out, said.err


@pytest.fixture(scope="session")
def law(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A law of noiseless runs: E 1.7, A 400, B 400, alpha 0.34, beta 0.28."""
    from monitor.forecast.fit import fit
    from monitor.forecast.points import read_points

    rows = ["run,params,tokens,loss"]
    for n in (2e6, 5e6, 1e7, 3e7, 1e8):
        for ratio in (5, 20, 80):
            d = n * ratio
            rows.append(f"r{n:g}-{ratio},{n},{d},{1.7 + 400 / n**0.34 + 400 / d**0.28}")
    folder = tmp_path_factory.mktemp("law")
    (folder / "points.csv").write_text("\n".join(rows) + "\n")
    fitted = fit(read_points(folder / "points.csv"), form="chinchilla")
    fitted.write(folder / "law.json")
    return folder / "law.json"


def test_sound_specs_are_said_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(p) for p in sorted(EXAMPLES.glob("gpt-*.yaml"))]
    status, out, err = run(capsys, "validate", *files)
    assert status == 0 and all("this version" in w for w in err.split("warning: ")[1:])
    assert out.count(": ok (sha256:") == len(files)


def test_a_broken_spec_exits_2_with_its_place_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(BROKEN / "zero-2-with-pipeline.yaml")
    status, out, err = run(capsys, "validate", path, str(EXAMPLES / "gpt-tiny.yaml"))
    assert status == 2 and "gpt-tiny.yaml: ok" in out
    assert f"{path}:9:23 parallel.pp:" in err


def test_problems_and_warnings_come_as_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    doubtful = tmp_path / "run.yaml"
    doubtful.write_text(
        (EXAMPLES / "gpt-tiny.yaml").read_text().replace("every_steps: 100}", "every_steps: 9999}")
    )
    status, out, _ = run(capsys, "validate", "--json", str(BROKEN / "zero-lr.yaml"), str(doubtful))
    answer = json.loads(out)
    assert status == 2 and answer["ok"] is False
    problem = answer["files"][0]["problems"][0]
    assert (problem["line"], problem["column"], problem["path"]) == (7, 7, "train.lr")
    assert answer["files"][1]["ok"] and "first checkpoint" in answer["files"][1]["warnings"][0]["message"]
    assert run(capsys, "validate", "--strict", str(doubtful))[0] == 2


def test_plan_says_what_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "plan", str(EXAMPLES / "gpt-125m.yaml"))
    assert status == 0
    for words in ("123,568,128", "4,769 steps", "8 on 8 GPUs", "memory of one GPU (of 80 GB)", '"stage": 1'):
        assert words in out


def test_plan_as_json_holds_the_exact_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    from launcher.runspec.file import read_spec
    from launcher.training.ds_config import deepspeed_config

    path = EXAMPLES / "gpt-7b-64xH100.yaml"
    status, out, _ = run(capsys, "plan", str(path), "--json")
    plan = json.loads(out)
    assert status == 0 and plan["deepspeed"] == deepspeed_config(read_spec(path))
    assert plan["dollars"]["low"] < plan["dollars"]["high"] and plan["prediction"] is None


def test_plan_says_that_the_data_is_not_here_where_submit_would_refuse_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    spec = (EXAMPLES / "gpt-tiny.yaml").read_text()
    assert "path: stdlib" in spec
    absent, other, given = (tmp_path / f"{name}.yaml" for name in ("absent", "other", "given"))
    absent.write_text(spec.replace("path: stdlib", f"path: {tmp_path}/corpus"))
    other.write_text(spec.replace("path: stdlib", f"path: {tmp_path}"))
    given.write_text(spec)
    for unfit in (absent, other):
        said = run(capsys, "plan", str(unfit))[2]
        assert "data.path: submit will refuse it, seen from" in said and "losscast data prepare" in said
    assert "will refuse" not in run(capsys, "plan", str(given))[2]
    assert "will refuse" not in run(capsys, "plan", "--to", "http://head:8265", str(absent))[2]


def test_a_script_saves_when_it_does_and_plan_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "plan", str(EXAMPLES / "own" / "script.yaml"))
    assert status == 0 and "those that the script saves, to ./runs" in out
    assert "before its first checkpoint" not in err


def test_under_a_law_plan_predicts_and_says_what_would_be_optimal(
    capsys: pytest.CaptureFixture[str], law: Path
) -> None:
    status, out, _ = run(capsys, "plan", str(EXAMPLES / "gpt-125m.yaml"), "--law", str(law), "--json")
    plan = json.loads(out)
    n, d = plan["params"], plan["tokens"]
    true = 1.7 + 400 / n**0.34 + 400 / d**0.28
    final = plan["prediction"]["final_loss"]
    assert status == 0 and final["p50"] == pytest.approx(true, rel=0.01)
    assert final["p05"] <= final["p50"] <= final["p95"]
    best = plan["optimal"]
    # Hoffmann et al. 2022, equation 4: N_opt = G (C/6)^(beta / (alpha + beta))
    g = (0.34 * 400 / (0.28 * 400)) ** (1 / 0.62)
    assert best["params"] == pytest.approx(g * (n * d) ** (0.28 / 0.62), rel=0.25)
    assert best["params"] * best["tokens"] == pytest.approx(n * d)
    assert best["excess_nats"] >= 0
    assert "nats/token" in run(capsys, "plan", str(EXAMPLES / "gpt-125m.yaml"), "--law", str(law))[1]


def test_a_law_of_another_tokenizer_is_refused_at_the_key(
    capsys: pytest.CaptureFixture[str], law: Path, tmp_path: Path
) -> None:
    from monitor.forecast.law import Law

    body = Law.read(law).to_dict()
    changed = {**{k: v for k, v in body.items() if k != "digest"}, "conventions": {"tokenizer": "gpt2"}}
    (tmp_path / "law.json").write_text(json.dumps(changed))
    (tmp_path / "run.yaml").write_text((EXAMPLES / "gpt-tiny.yaml").read_text() + "law: law.json\n")
    status, _, err = run(capsys, "plan", str(tmp_path / "run.yaml"))
    assert status == 2 and "law: " in err and "fitted with another tokenizer: gpt2" in err
    assert ":16:6 law:" in err


def test_what_the_command_line_gave_is_named_by_its_option(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "plan", str(EXAMPLES / "gpt-tiny.yaml"), "--to", "slurm")
    assert status == 2 and "--to slurm: cluster.to: need local" in err and ":1:1" not in err


def test_manifests_need_kuberay(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "plan", str(EXAMPLES / "gpt-tiny.yaml"), "-o", "yaml")
    assert status == 2 and out == "" and "only kuberay has manifests" in err


def test_the_schema_takes_every_example_and_refuses_what_it_can(capsys: pytest.CaptureFixture[str]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    from launcher.errors import WrongInput
    from launcher.runspec.document import read_data

    status, out, _ = run(capsys, "schema")
    assert status == 0
    validator = jsonschema.Draft202012Validator(json.loads(out))
    for path in EXAMPLES.glob("gpt-*.yaml"):
        validator.validate(read_data(path))
    refused = 0
    for path in BROKEN.glob("*.yaml"):
        try:
            refused += not validator.is_valid(read_data(path))
        except WrongInput:
            continue
    assert refused >= 50, "an editor sees most mistakes that are not combinations"
