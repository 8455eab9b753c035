"""What else can be handed to Ray with `losscast submit`: tensor parallel on a corpus of one's own, a script, a function."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e
pytest.importorskip("deepspeed", reason="needs torch and deepspeed: pip install 'losscast[train]'")
pytest.importorskip("ray", reason="needs ray: pip install 'losscast[train]'")

ROOT = Path(__file__).parents[2]
TENSOR_PARALLEL = """
name: split
workload: {kind: gpt, layers: 2, width: 16, heads: 2, context: 32}
data: {path: ./tokens, holdout_tokens: 2048}
train: {tokens: 2048, batch_tokens: 256, lr: 0.03}
parallel: {tp: 2, zero: 1}
checkpoints: {url: ./runs, every_steps: 4}
"""
SCRIPT = """
name: script
workload: {entrypoint: plain.py, args: [--steps, 6], context: 1}
train: {tokens: 192, batch_tokens: 32, lr: 3e-3, schedule: {kind: constant}}
parallel: {dp: 2, zero: 1}
checkpoints: {url: ./runs}
"""
FUNCTION = """
name: function
workload: {entrypoint: "my_train:main", args: {width: 8}, context: 32}
data: {path: ./tokens}
train: {tokens: 2048, batch_tokens: 256, lr: 1e-2}
parallel: {dp: 2, zero: 1}
checkpoints: {url: ./runs, every_steps: 4}
"""


def losscast(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command, as somebody gives it in a folder; homes and caches are the test's own."""
    home = folder.parent / "home"
    own = {"LOSSCAST_HOME": str(home), "LOSSCAST_CACHE": str(home / "cache"), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "launcher.cli", *words],
        cwd=folder, capture_output=True, text=True, timeout=400,
        env={**os.environ, **own, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a corpus and code, and a local Ray that was started from somewhere else."""
    home = tmp_path_factory.mktemp("kinds")
    desk, elsewhere = home / "desk", home / "elsewhere"
    shutil.copytree(
        ROOT / "examples" / "own", desk, ignore=shutil.ignore_patterns("runs", "__pycache__", "*.yaml")
    )
    elsewhere.mkdir()
    (home / "text.txt").write_text("the cat sat on the mat, and the dog did not. " * 20_000)
    made = losscast(desk, "data", "prepare", str(home / "text.txt"), "-o", "tokens")
    assert made.returncode == 0, made.stderr
    up = losscast(elsewhere, "ray", "up")
    assert up.returncode == 0, up.stderr
    try:
        yield desk
    finally:
        losscast(elsewhere, "ray", "down")


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        pytest.param(TENSOR_PARALLEL, 8, id="tensor parallel"),
        pytest.param(SCRIPT, 6, id="script"),
        pytest.param(FUNCTION, 8, id="function"),
    ],
)
def test_it_trains_to_its_end_through_submit(desk: Path, text: str, steps: int) -> None:
    name = text.split()[1]
    (desk / f"{name}.yaml").write_text(text)
    done = losscast(desk, "submit", f"{name}.yaml", "--yes", "--follow")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((desk / "runs" / name / "result.json").read_text())
    assert result["steps"] == steps
    rows = (desk / "runs" / name / "attempts" / "1" / "curve.csv").read_text().splitlines()
    assert len(rows) == steps + 1


def test_data_that_is_not_there_is_said_before_anything_is_handed_in(desk: Path) -> None:
    (desk / "missing.yaml").write_text(
        TENSOR_PARALLEL.replace("split", "missing").replace("./tokens", "./tokenz")
    )
    done = losscast(desk, "submit", "missing.yaml", "--yes")
    assert done.returncode == 2 and not (desk / "runs" / "missing").exists()
    assert "data.path: " in done.stderr and "losscast data prepare" in done.stderr
    assert "Traceback" not in done.stderr
