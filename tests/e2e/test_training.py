"""The training path for real: torch, DeepSpeed on gloo, torchrun; then the same through Ray."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.e2e
pytest.importorskip("deepspeed", reason="needs torch and deepspeed: pip install 'losscast[train]'")

from launcher.jobs import local_ray  # noqa: E402

SPEC = """
name: {name}
workload: {{kind: gpt, layers: 2, width: 12, heads: 1, context: 32{workload}}}
data: {{path: stdlib, holdout_tokens: 8192}}
train: {{tokens: 10240, batch_tokens: 256, lr: 0.03, lr_base_width: 16, schedule: {{kind: linear, warmup_tokens: 1024}}, seed: 3}}
eval: {{every_steps: 20, batches: 2}}
parallel: {{dp: {dp}, zero: {zero}{parallel}}}
checkpoints: {{url: {runs}, every_steps: 20}}
"""


def spec_file(folder: Path, name: str, dp: int, zero: int, workload: str = "", parallel: str = "") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(
        SPEC.format(name=name, dp=dp, zero=zero, runs=folder / "runs", workload=workload, parallel=parallel)
    )
    return path


def torchrun(spec: Path, ranks: int, **env: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={local_ray.free_port()}",
        "-m", "launcher.worker", str(spec),
    ]  # fmt: skip
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **env},
    )


def curve(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / "runs" / name / "attempts" / "1" / "curve.csv").open() as file:
        return list(csv.DictReader(file))


def losses(folder: Path, name: str) -> list[float]:
    return [float(row["loss"]) for row in curve(folder, name)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def test_a_run_leaves_its_curve_its_points_row_and_validation(tmp_path: Path, cache: str) -> None:
    done = torchrun(spec_file(tmp_path, "one", 1, 1), 1, LOSSCAST_CACHE=cache)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.strip().splitlines()[-1])
    result = json.loads((tmp_path / "runs" / "one" / "result.json").read_text())
    rows = curve(tmp_path, "one")
    assert said["finished"] and said["step"] == 40
    assert result["loss"] == said["val_loss"]
    assert result["tokens"] == 10240
    assert [r["step"] for r in rows if r["val_loss"]] == ["20", "40"]
    assert float(rows[-1]["val_loss"]) == pytest.approx(result["loss"], rel=1e-6)


@pytest.mark.parametrize("workload", ["", ", positions: learned", ", tied: false, layers: 3"])
def test_parameters_are_counted_as_they_are(workload: str) -> None:
    import torch  # noqa: F401

    from launcher.runspec.accounting import gpt_parameters
    from launcher.runspec.model import Gpt
    from launcher.workloads.gpt import GPT, GPTShape

    shape: dict[str, Any] = {"layers": 2, "width": 12, "heads": 1, "context": 32, "vocab": 256}
    for part in filter(None, workload.split(",")):
        key, _, value = part.strip().partition(": ")
        if key:
            shape[key] = {"false": False}.get(value, int(value) if value.isdigit() else value)
    model = GPT(GPTShape(**shape))
    assert sum(p.numel() for p in model.parameters()) == gpt_parameters(Gpt(kind="gpt", **shape)).total


def test_a_drill_is_felt_at_its_step_and_not_before(tmp_path: Path, cache: str) -> None:
    torchrun(spec_file(tmp_path, "calm", 1, 0), 1, LOSSCAST_CACHE=cache)
    done = torchrun(spec_file(tmp_path, "nan", 1, 0), 1, LOSSCAST_CACHE=cache, LOSSCAST_DRILL="nan@15")
    assert "on purpose" in done.stderr
    calm, drilled = losses(tmp_path, "calm"), losses(tmp_path, "nan")
    assert drilled[:14] == calm[:14]
    assert all(x != x for x in drilled[14:])


def test_a_wrong_world_size_is_said_in_one_line(tmp_path: Path, cache: str) -> None:
    done = torchrun(spec_file(tmp_path, "w", 2, 1), 1, LOSSCAST_CACHE=cache)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if "losscast:" in line]
    assert said and "2 ranks and 1 were started" in said[0]


def test_the_same_spec_through_ray_gives_the_same_losses(tmp_path: Path, cache: str) -> None:
    pytest.importorskip("ray", reason="needs ray: pip install 'losscast[train]'")
    from launcher.jobs.submit import logs, submit, wait
    from launcher.runspec.file import read_spec

    direct = torchrun(spec_file(tmp_path, "direct", 2, 1), 2, LOSSCAST_CACHE=cache)
    assert direct.returncode == 0, direct.stderr[-2000:]
    head = local_ray.start(tmp_path / "ray", cpus=2)
    other = local_ray.start(tmp_path / "other", cpus=2)  # a cluster that started later must not get the job
    try:
        spec = read_spec(spec_file(tmp_path, "through-ray", 2, 1))
        job = submit(spec, head.dashboard, head.environment(), env={"LOSSCAST_CACHE": cache})
        states = wait([job], head.environment())
        assert states == {"through-ray": "SUCCEEDED"}, logs(job, head.environment())[-3000:]
    finally:
        family = [head.pid, *local_ray.descendants(head.pid)]
        local_ray.stop(head)
        local_ray.stop(other)
    assert losses(tmp_path, "through-ray") == pytest.approx(losses(tmp_path, "direct"), abs=1e-5)
    left = [pid for pid in family if local_ray.still_runs(pid)]
    assert left == []
    assert not Path(head.temp).exists()
    assert "finished" in "".join(p.read_text() for p in (tmp_path / "ray" / "jobs").iterdir())
