"""The whole line as a newcomer runs it, in its shortened form; and Ctrl-C in the middle of it."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e
for needed in ("deepspeed", "ray", "matplotlib"):
    pytest.importorskip(needed, reason=f"needs {needed}: pip install 'losscast[train,plot]'")

from launcher.jobs.local_ray import descendants, still_runs  # noqa: E402

DEMO = [sys.executable, "-m", "launcher.cli", "demo", "--quick"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        [*DEMO, "--json", "--seed", "5", "--keep", str(folder / "kept"), "--out", str(folder / "out")],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, json.loads(done.stdout)


def test_the_prediction_was_made_before_the_target_started(demo: tuple[Path, dict]) -> None:
    folder, data = demo
    started = json.loads((folder / "kept" / "runs" / "target" / "log" / "0.json").read_text())["time"]
    prediction = json.loads((folder / "kept" / "runs" / "target" / "prediction.json").read_text())
    assert prediction["made_at"] < started
    assert prediction["digest"] == data["target"]["prediction_digest"]
    assert prediction["final_loss"] == data["target"]["predicted"]


def test_the_target_is_beyond_the_ladder(demo: tuple[Path, dict]) -> None:
    _, data = demo
    largest = max(data["ladder"], key=lambda r: r["flops"])
    assert len(data["ladder"]) >= 4
    assert data["target"]["params"] >= 2.5 * largest["params"]
    assert data["target"]["flops"] >= 6 * largest["flops"]


def test_what_is_reported_is_what_was_measured(demo: tuple[Path, dict]) -> None:
    folder, data = demo
    result = json.loads((folder / "kept" / "runs" / "target" / "result.json").read_text())
    target = data["target"]
    assert target["actual"] == result["loss"]
    assert target["error_percent"] == pytest.approx(100 * (target["predicted"]["p50"] / result["loss"] - 1))
    assert target["inside"] == (target["predicted"]["p05"] <= result["loss"] <= target["predicted"]["p95"])


def test_a_nan_is_called_at_its_step_and_nothing_before_a_fault(demo: tuple[Path, dict]) -> None:
    _, data = demo
    rate, nan = data["drills"]
    assert nan["alert"] == "LossNonFinite"
    assert nan["called_step"] == nan["fault_step"]
    for drill in (rate, nan):
        # that steps take longer than they did is true where something else runs on this machine
        early = [a for a in drill["alerts"] if a["step"] < drill["fault_step"]]
        assert [a for a in early if a["alert"] not in ("ThroughputDropped", "RunStalled")] == []


def test_a_learning_rate_too_high_is_called_though_the_loss_stays_inside_a_wide_band(
    demo: tuple[Path, dict],
) -> None:
    """Four rungs leave a band of half a nat either way; the run's own past is what shows the jump."""
    _, data = demo
    rate = data["drills"][0]
    assert rate["alert"] == "LossOffLine"
    assert 0 <= rate["called_step"] - rate["fault_step"] <= 30


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs Debian's prometheus")
def test_the_shipped_rules_fired_in_a_real_prometheus(demo: tuple[Path, dict]) -> None:
    _, data = demo
    assert "LossNonFinite" in data["drills"][1]["prometheus"]["alerts"]


def test_the_page_needs_nothing_beside_it(demo: tuple[Path, dict]) -> None:
    folder, data = demo
    page = (folder / "out" / "index.html").read_text()
    assert data["target"]["prediction_digest"] in page
    assert 'src="http' not in page
    assert (folder / "out" / "losscast.png").stat().st_size > 20_000


def test_ctrl_c_leaves_no_process_and_no_traceback(tmp_path: Path) -> None:
    with (tmp_path / "err").open("wb") as err:
        process = subprocess.Popen(
            [*DEMO, "--out", str(tmp_path / "out")], stdout=err, stderr=err, start_new_session=True,
            # a shell starts what it puts into the background with SIGINT ignored, and a child inherits that
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
    deadline = time.monotonic() + 90
    family: set[int] = set()
    while time.monotonic() < deadline and process.poll() is None:  # until workers train
        family |= set(descendants(process.pid))
        if any(b"ladder-" in line and b"/" in line for line in (tmp_path / "err").read_bytes().splitlines()):
            break
        time.sleep(0.5)
    family |= set(descendants(process.pid))
    assert len(family) > 5
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(still_runs(p) for p in family):
        time.sleep(0.2)
    left = {p: Path(f"/proc/{p}/cmdline").read_bytes() for p in family if still_runs(p)}
    assert left == {}
    said = (tmp_path / "err").read_text()
    assert "Traceback" not in said
