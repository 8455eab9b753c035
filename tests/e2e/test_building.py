"""A ZeRO-3 model is built in shards: no rank ever holds all of it, and it trains as the whole one would."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e
pytest.importorskip("deepspeed", reason="needs torch and deepspeed: pip install 'losscast[train]'")

ROOT = Path(__file__).parents[2]


def test_a_sharded_model_takes_less_memory_to_build_and_gives_the_same_losses(tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    done = subprocess.run(
        [
            sys.executable, str(ROOT / "bench" / "build.py"), "--ranks", "2", "--layers", "6", "--width", "256", "--json", str(table),
        ],
        capture_output=True, text=True, timeout=400, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    said = json.loads(table.read_text())
    whole, sharded = said["whole"], said["sharded"]
    assert whole["losses"] == sharded["losses"] and len(whole["losses"][0]) == 3
    model = 4 * said["params"]
    assert whole["model"] > 0.95 * model, "it measures what it says"
    assert sharded["model"] < 0.8 * model
