"""What a plain DeepSpeed script saves is the run's as well: committed, verified, and what the next attempt goes on from."""

import csv
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e
pytest.importorskip("deepspeed", reason="needs torch and deepspeed: pip install 'losscast[train]'")

from launcher.jobs import local_ray  # noqa: E402
from launcher.storage.runfolder import RunFolder  # noqa: E402
from launcher.training.saving import run_log  # noqa: E402

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 10, 4
SCRIPT = """
import os, time
import deepspeed, torch
from torch import nn

CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}},
    "zero_optimization": {"stage": 1},
    "steps_per_print": 1000000,
}

class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, x, y):
        return nn.functional.mse_loss(self.layers(x), y)

deepspeed.init_distributed()
torch.manual_seed(0)
model = Regression()
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=CONFIG)
done = 0
if os.environ.get("LOADS") == "yes" and os.path.exists("kept/latest"):
    _, state = engine.load_checkpoint("kept")
    done = state["done"]
truth = torch.randn(16, 1, generator=torch.Generator().manual_seed(1))
while done < STEPS:
    draw = torch.Generator().manual_seed(1000 * done + torch.distributed.get_rank())
    x = torch.randn(4, 16, generator=draw)
    loss = engine(x, x @ truth)
    engine.backward(loss)
    engine.step()
    done += 1
    if done == int(os.environ.get("DIES_AT", 0)):
        raise RuntimeError("the machine burns")
    if done == int(os.environ.get("STOPPED_AT", 0)):
        open("runs/dies/stop", "w").close()  # what `losscast stop` does
        time.sleep(1.5)  # a run looks once a second
    if done % EVERY == 0:
        engine.save_checkpoint("kept", client_state={"done": done})
"""
SPEC = """
name: {name}
workload: {{entrypoint: train.py, context: 1}}
train: {{tokens: 80, batch_tokens: 8, lr: 3e-3, schedule: {{kind: constant}}}}
parallel: {{dp: 2, zero: 1}}
checkpoints: {{url: ./runs}}
"""


def attempt(folder: Path, name: str, **env: str) -> subprocess.CompletedProcess[str]:
    """One start of the run, as torchrun does it."""
    (folder / "train.py").write_text(SCRIPT.replace("STEPS", str(STEPS)).replace("EVERY", str(EVERY)))
    (folder / f"{name}.yaml").write_text(SPEC.format(name=name))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={local_ray.free_port()}",
        "-m", "launcher.worker", f"{name}.yaml",
    ]  # fmt: skip
    base = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "LOADS": "yes"}
    until = time.monotonic() + 300
    while True:
        done = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=400,
            env={**os.environ, **base, **env},
        )
        if "is held by" not in done.stderr or time.monotonic() > until:  # the lease of one that died lapses
            return done


def steps(folder: Path, name: str, number: int) -> dict[int, float]:
    """Step to loss, as attempt `number` recorded them."""
    with RunFolder(folder / "runs" / name).curve(number).open() as file:
        return {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file)}


def committed(folder: Path, name: str) -> list[int]:
    return sorted(e.fields["step"] for e in run_log(RunFolder(folder / "runs" / name)).commits())


def test_a_script_that_died_or_was_stopped_goes_on_from_what_the_run_kept_of_it(tmp_path: Path) -> None:
    whole = attempt(tmp_path, "whole")
    assert whole.returncode == 0, whole.stderr[-3000:]
    reference = steps(tmp_path, "whole", 1)
    assert list(reference) == list(range(1, STEPS + 1)) and committed(tmp_path, "whole") == [4, 8]
    assert (tmp_path / "kept" / "latest").read_text() == "global_step8", "its own folder is as ever"
    shutil.rmtree(tmp_path / "kept")

    died = attempt(tmp_path, "dies", DIES_AT="7")
    assert died.returncode != 0 and committed(tmp_path, "dies") == [4]
    shutil.rmtree(tmp_path / "kept")  # with the machine that it was on
    asked = attempt(tmp_path, "dies", STOPPED_AT="5")
    assert asked.returncode == 0, asked.stderr[-3000:]
    assert "step 4, committed by the run, is loaded for kept" in asked.stderr
    assert "asked to stop at step 6: the script goes on to its next save, and ends there" in asked.stderr
    assert list(steps(tmp_path, "dies", 2)) == [5, 6, 7, 8] and committed(tmp_path, "dies") == [4, 8]
    assert not RunFolder(tmp_path / "runs" / "dies").result.exists(), "stopped is not finished"

    (tmp_path / "runs" / "dies" / "stop").unlink()  # `losscast resume` takes the wish for an old one
    again = attempt(tmp_path, "dies")
    assert again.returncode == 0, again.stderr[-3000:]
    resumed = steps(tmp_path, "dies", 2) | steps(tmp_path, "dies", 3)
    assert resumed == pytest.approx({s: x for s, x in reference.items() if s > 4}, abs=1e-6)
    assert committed(tmp_path, "dies") == [4, 8]


def test_a_script_that_loads_nothing_is_not_said_to_have_resumed(tmp_path: Path) -> None:
    died = attempt(tmp_path, "deaf", DIES_AT="6")
    assert died.returncode != 0 and committed(tmp_path, "deaf") == [4]
    again = attempt(tmp_path, "deaf", LOADS="no")
    assert again.returncode == 0, again.stderr[-3000:]
    assert "the run has committed step 4, and the script began anew, since it loaded none" in again.stderr
    assert "engine.load_checkpoint('kept') would be given it" in again.stderr
    assert list(steps(tmp_path, "deaf", 2)) == list(range(1, STEPS + 1))
