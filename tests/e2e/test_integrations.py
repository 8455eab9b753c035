"""The callbacks, in the trainers they are for: every step is told, with the numbers the trainer itself reports."""

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.integrations.line import MonitorLine

pytestmark = pytest.mark.e2e


class Heard:
    """A line that remembers, and asks to stop at a step."""

    def __init__(self, stop: int | None = None) -> None:
        self.steps: list[dict[str, Any]] = []
        self.closed: tuple[bool, float | None] | None = None
        self._stop = stop

    def told(self, step: int, loss: float, **more: Any) -> bool:
        self.steps.append({"step": step, "loss": loss, **more})
        return step == self._stop

    def close(self, finished: bool, val_loss: float | None = None) -> None:
        self.closed = (finished, val_loss)


def rows(folder: Path, name: str, attempt: int = 1) -> list[dict[str, str]]:
    with (folder / name / "attempts" / str(attempt) / "curve.csv").open() as file:
        return list(csv.DictReader(file))


# Hugging Face


def hugging_face(line: Any, folder: Path) -> Any:
    """Train a tiny GPT-2 for 6 steps of 2 micro-batches; returns the Trainer."""
    transformers = pytest.importorskip(
        "transformers", reason="needs transformers: pip install 'losscast[huggingface]'"
    )
    pytest.importorskip("accelerate", reason="needs accelerate: pip install 'losscast[huggingface]'")
    import torch

    from launcher.integrations.transformers import LosscastCallback

    config = transformers.GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    draw = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, 64, (16,), generator=draw) for _ in range(48)]
    data = [{"input_ids": x, "labels": x} for x in texts]
    trainer = transformers.Trainer(
        model=transformers.GPT2LMHeadModel(config),
        args=transformers.TrainingArguments(
            output_dir=str(folder), max_steps=6, per_device_train_batch_size=4, gradient_accumulation_steps=2,
            logging_steps=1, eval_strategy="steps", eval_steps=3, save_strategy="no", learning_rate=1e-2, report_to=[],
            use_cpu=True, disable_tqdm=True,
        ),
        train_dataset=data, eval_dataset=data[:8], callbacks=[LosscastCallback(line)],
    )  # fmt: skip
    trainer.train()
    return trainer


def test_hugging_faces_trainer_tells_every_step(tmp_path: Path) -> None:
    heard = Heard()
    log = hugging_face(heard, tmp_path).state.log_history
    own = [x for x in log if "loss" in x]
    assert [s["step"] for s in heard.steps] == [1, 2, 3, 4, 5, 6]
    assert [s["loss"] for s in heard.steps] == [x["loss"] for x in own]
    assert [s["lr"] for s in heard.steps] == [x["learning_rate"] for x in own]
    assert all(s["grad_norm"] > 0 for s in heard.steps)
    evaluated = [x["eval_loss"] for x in log if "eval_loss" in x]
    assert [s["step"] for s in heard.steps if s["val_loss"] is not None] == [4], "with the step after it"
    assert heard.steps[3]["val_loss"] == evaluated[0]
    assert heard.closed == (True, evaluated[1])


def test_hugging_faces_trainer_stops_when_asked(tmp_path: Path) -> None:
    heard = Heard(stop=2)
    trainer = hugging_face(heard, tmp_path)
    assert trainer.state.global_step == 2 and heard.closed is not None and heard.closed[0] is False
    assert (tmp_path / "checkpoint-2").is_dir(), "what it had is saved first"


# Lightning


def lightning(line: Any, folder: Path) -> Any:
    """Train a tiny regression for 6 steps of 2 micro-batches; returns the module."""
    package = pytest.importorskip(
        "lightning.pytorch", reason="needs lightning: pip install 'losscast[lightning]'"
    )
    import torch

    from launcher.integrations.lightning import LosscastCallback

    class Module(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)
            self.seen: list[float] = []

        def training_step(self, batch: Any, index: int) -> Any:
            loss = torch.nn.functional.mse_loss(self.layer(batch[0]), batch[1])
            self.seen.append(loss.item())
            return loss

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("val_loss", torch.nn.functional.mse_loss(self.layer(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            halved = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.5**s)
            return [optimizer], [{"scheduler": halved, "interval": "step"}]

    torch.manual_seed(0)
    x = torch.randn(48, 4)
    data = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))
    module = Module()
    package.Trainer(
        max_steps=6, accumulate_grad_batches=2, val_check_interval=6, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=str(folder),
        callbacks=[LosscastCallback(line)],
    ).fit(
        module,
        torch.utils.data.DataLoader(data, batch_size=4, shuffle=False),
        torch.utils.data.DataLoader(data, batch_size=16),
    )  # fmt: skip
    return module


@pytest.mark.filterwarnings("ignore")
def test_lightnings_trainer_tells_every_optimizer_step(tmp_path: Path) -> None:
    heard = Heard()
    seen = lightning(heard, tmp_path).seen
    means = [(a + b) / 2 for a, b in zip(seen[::2], seen[1::2], strict=True)]
    assert [s["step"] for s in heard.steps] == [1, 2, 3, 4, 5, 6]
    assert [s["loss"] for s in heard.steps] == pytest.approx(means, rel=1e-5)
    assert [s["step"] for s in heard.steps if s["val_loss"] is not None] == [4], "with the step after it"
    assert heard.steps[1]["lr"] <= heard.steps[0]["lr"] <= 0.1
    assert heard.closed is not None and heard.closed[0] is True and heard.closed[1] is not None


@pytest.mark.filterwarnings("ignore")
def test_lightnings_trainer_stops_when_asked(tmp_path: Path) -> None:
    heard = Heard(stop=3)
    lightning(heard, tmp_path)
    assert [s["step"] for s in heard.steps] == [1, 2, 3]


# The line to a monitor


def test_a_line_outside_a_run_keeps_its_record_and_reaches_the_monitor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.monitor.live import Service, wait_for

    with Service(tmp_path / "store") as service:
        monkeypatch.setenv("LOSSCAST_TOKEN", service.token)
        for attempt in (1, 2):
            line = MonitorLine("mine", tmp_path / "runs", service.url, batch_tokens=100, total_steps=3)
            for step in (1, 2, 3):
                assert line.told(step, 5.0 - step, lr=0.1, val_loss=2.5 if step == 3 else None) is False
            line.close(finished=True)
            kept = rows(tmp_path / "runs", "mine", attempt)
            assert [(r["step"], r["tokens"], r["loss"]) for r in kept] == [
                ("1", "100", "4"),
                ("2", "200", "3"),
                ("3", "300", "2"),
            ]
        found = wait_for(lambda: service.get("/v1/runs/mine/samples"))
        assert [s["loss"] for s in found["samples"]] == [4.0, 3.0, 2.0]
        assert service.get("/v1/runs/mine")["attempt"] == 2


def test_in_a_run_of_losscast_the_callback_tells_the_run(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="needs torch and deepspeed: pip install 'losscast[train]'")
    pytest.importorskip("lightning.pytorch", reason="needs lightning: pip install 'losscast[lightning]'")
    from launcher.ports import free_port

    (tmp_path / "mine.py").write_text(
        "from tests.e2e.test_integrations import lightning\ndef main(run):\n    lightning(run, 'here')\n"
    )
    (tmp_path / "run.yaml").write_text(
        "name: mine\nworkload: {entrypoint: 'mine:main'}\n"
        "train: {tokens: 6, batch_tokens: 1, lr: 0.1, schedule: {kind: constant}}\ncheckpoints: {url: ./runs}\n"
    )
    env = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    done = subprocess.run(
        [sys.executable, "-m", "launcher.worker", "run.yaml"], cwd=tmp_path, capture_output=True, text=True, timeout=240,
        env={**os.environ, **env, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert [r["step"] for r in rows(tmp_path / "runs", "mine")] == ["1", "2", "3", "4", "5", "6"]
