"""A run of a live monitor told again to the real W&B (offline), MLflow (a folder) and TensorBoard."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from monitor.schema import encode_event, event, run_started, sample
from tests.monitor.live import Service

pytestmark = pytest.mark.e2e
STEPS = 120


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Any:
    service = Service(tmp_path_factory.mktemp("mirrors") / "store")
    service.start(60)
    lines = [encode_event(run_started("big", 1, time=1000.0))]
    lines += [
        encode_event(sample("big", 1, s, step=s + 1, time=1001.0 + s, loss=loss(s + 1), lr=1e-3))
        for s in range(STEPS)
    ]
    lines.append(encode_event(event("run_ended", "big", 1, time=2000.0, reason="finished")))
    status, said = service.ask("/v1/events", b"".join(lines))
    assert status == 200, said
    yield service
    service.stop()


def loss(step: int) -> float:
    return float("nan") if step == 50 else 2.0 + 1.0 / step


def run_mirror(
    service: Service, folder: Path, *words: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launcher.cli", "mirror", "big", "--url", service.url, *words],
        cwd=folder, capture_output=True, text=True, timeout=180,
        env={**os.environ, "LOSSCAST_TOKEN": service.token, "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
    )  # fmt: skip


def test_mlflow_has_every_step_and_a_second_mirror_adds_none(service: Service, tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    where = {"MLFLOW_TRACKING_URI": f"file:{tmp_path}/ml", "MLFLOW_ALLOW_FILE_STORE": "true"}
    for told in (STEPS, 0):
        done = run_mirror(service, tmp_path, "--to", "mlflow", "--place", "runs", **where)
        assert done.returncode == 0 and f"{told} steps told to mlflow" in done.stderr, done.stderr
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    client = MlflowClient(f"file:{tmp_path}/ml")
    experiment = client.get_experiment_by_name("runs")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    history = {m.step: m.value for m in client.get_metric_history(run.info.run_id, "loss")}
    assert sorted(history) == list(range(1, STEPS + 1))
    assert history[7] == loss(7) and history[50] != history[50]
    assert run.info.run_name == "big"


def test_wandb_is_told_every_step_offline(service: Service, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    done = run_mirror(
        service, tmp_path, "--to", "wandb", "--place", "runs", WANDB_MODE="offline", WANDB_DIR=str(tmp_path)
    )
    assert done.returncode == 0 and f"{STEPS} steps told to wandb" in done.stderr, done.stderr
    (file,) = tmp_path.rglob("*.wandb")
    rows = history_of(file)
    assert sorted(rows) == list(range(1, STEPS + 1))
    assert rows[7]["loss"] == loss(7) and rows[7]["lr"] == 1e-3


def history_of(file: Path) -> dict[int, dict[str, Any]]:
    """Rows by step, from W&B's file: records in LevelDB's log format, each a protobuf of its own."""
    wire: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")

    rows = {}
    for data in records(file.read_bytes()):
        record = wire.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            row = {
                item.key or ".".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            rows[int(row["_step"])] = row
    return rows


def records(log: bytes) -> Iterator[bytes]:
    """Whole records: chunks of (crc, length, type) and content in blocks of 32 KiB, after a header of 7 bytes."""
    at, held = 7, b""
    while at + 7 <= len(log):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = int.from_bytes(log[at + 4 : at + 6], "little"), log[at + 6]
        held += log[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or its last part
            yield held
            held = b""


def test_tensorboard_gets_a_file_and_a_second_one_is_refused(service: Service, tmp_path: Path) -> None:
    done = run_mirror(service, tmp_path, "--to", "tensorboard", "--place", "tb")
    assert done.returncode == 0 and any((tmp_path / "tb" / "big").iterdir()), done.stderr
    again = run_mirror(service, tmp_path, "--to", "tensorboard", "--place", "tb")
    assert again.returncode == 2 and "holds something already" in again.stderr


def test_a_run_that_is_not_there_makes_nothing_anywhere(service: Service, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launcher.cli", "mirror", "other", "--url", service.url, "--to", "tensorboard"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
        env={**os.environ, "LOSSCAST_TOKEN": service.token, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert (
        done.returncode == 2
        and "no run other; `losscast runs` lists them" in done.stderr
        and not list(tmp_path.iterdir())
    )
