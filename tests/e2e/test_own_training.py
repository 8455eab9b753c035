"""Training of the user's own: a function that is told about its run, and a DeepSpeed script that knows nothing of it."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e
pytest.importorskip("deepspeed", reason="needs torch and deepspeed: pip install 'losscast[train]'")

from launcher.jobs import local_ray  # noqa: E402

ROOT = Path(__file__).parents[2]


def torchrun(folder: Path, *what: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={local_ray.free_port()}", *what,
    ]  # fmt: skip
    base = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=240, env={**os.environ, **base, **env}
    )


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A copy of the example, small."""
    folder = tmp_path / "own"
    shutil.copytree(ROOT / "examples" / "own", folder, ignore=shutil.ignore_patterns("runs", "__pycache__"))
    spec = folder / "function.yaml"
    spec.write_text(
        spec.read_text()
        .replace("tokens: 4e5", "tokens: 16384")
        .replace("warmup_tokens: 2e4", "warmup_tokens: 2048")
        .replace("every_steps: 50", "every_steps: 3")
    )
    return folder


def curve(folder: Path, run: str, attempt: int = 1) -> list[dict[str, str]]:
    with (folder / "runs" / run / "attempts" / str(attempt) / "curve.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_function_of_the_users_own_is_recorded_saved_and_resumed(own: Path, tmp_path: Path) -> None:
    cache = {"LOSSCAST_CACHE": str(tmp_path / "cache")}
    done = torchrun(own, "-m", "launcher.worker", "function.yaml", **cache)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = curve(own, "own-function")
    assert [r["step"] for r in rows] == [str(i) for i in range(1, 9)]
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert rows[-1]["tokens"] == "16384" and float(rows[-1]["lr"]) == 0.0
    assert json.loads((own / "runs" / "own-function" / "result.json").read_text())["steps"] == 8
    kept = own / "runs" / "own-function" / "attempts" / "1" / "checkpoints"
    assert {p.name for p in kept.iterdir() if p.is_dir()} == {"step-3", "step-6", "step-8"}

    # forget the last checkpoint's commit: the next attempt goes on from step 6 and trains the same again
    log = own / "runs" / "own-function" / "log"
    entries = [(json.loads(p.read_text()), p) for p in log.iterdir()]
    for entry, path in entries:
        if entry.get("step") == 8:
            shutil.rmtree(kept / "step-8")
            assert path.exists()
    again = torchrun(own, "-m", "launcher.worker", "function.yaml", **cache)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "step-8" in again.stderr or "step 8" in again.stderr, "it says what it skipped"
    more = curve(own, "own-function", 2)
    assert [r["step"] for r in more] == ["7", "8"]
    assert [float(r["loss"]) for r in more] == pytest.approx([float(r["loss"]) for r in rows[6:]], abs=1e-5)


def test_a_plain_deepspeed_script_trains_as_it_does_alone_and_every_update_is_told(own: Path) -> None:
    alone = torchrun(
        own, "plain.py", "--steps", "12"
    )  # how a Python without losscast ends is not ours: its losses count
    spec = own / "script.yaml"
    spec.write_text(spec.read_text().replace("--steps, 40", "--steps, 12"))
    through = torchrun(own, "-m", "launcher.worker", "script.yaml")
    assert through.returncode == 0, through.stderr[-3000:]

    def printed(text: str) -> list[str]:
        return [line for line in text.splitlines() if line.startswith("loss ")]

    assert len(printed(alone.stdout)) == 12, alone.stderr[-3000:]
    assert printed(through.stdout) == printed(alone.stdout)
    rows = curve(own, "own-script")
    assert [r["step"] for r in rows] == [str(i) for i in range(1, 13)]
    assert all(float(r["lr"]) == 3e-3 and float(r["grad_norm"]) > 0 for r in rows)
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])


@pytest.mark.parametrize(
    ("entrypoint", "says"),
    [
        ("nothing_here:main", "no module nothing_here in"),
        ("my_train:absent", "has no function absent"),
        ("absent.py", "no script absent.py in"),
    ],
)
def test_an_entrypoint_that_is_not_there_is_said_in_one_line(own: Path, entrypoint: str, says: str) -> None:
    spec = own / "function.yaml"
    spec.write_text(spec.read_text().replace("my_train:main", entrypoint).replace("args: {width: 48}, ", ""))
    done = subprocess.run(
        [sys.executable, "-m", "launcher.worker", "function.yaml"],
        cwd=own, capture_output=True, text=True, timeout=120,
        env={
            **os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(local_ray.free_port()),
        },
    )  # fmt: skip
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if "workload.entrypoint" in line]
    assert said and says in said[0]
    assert "Traceback" not in done.stderr
