"""A run with its checkpoints on Azure Blob: trained for real, killed, resumed from what Blob has, and cleaned up after."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.ports import free_port
from tests.azurite import ACCOUNT, KEY, Azurite, Entra, needs_azurite

pytestmark = pytest.mark.e2e
pytest.importorskip("deepspeed", reason="needs torch and deepspeed: pip install 'losscast[train]'")
needs_azurite()

ROOT = Path(__file__).resolve().parents[2]
STEPS = 300
SPEC = """
name: {name}
workload: {{kind: gpt, layers: 2, width: 12, heads: 1, context: 32}}
data: {{path: stdlib, holdout_tokens: 8192}}
train: {{tokens: {tokens}, batch_tokens: 256, lr: 0.03, lr_base_width: 16, schedule: {{kind: linear, warmup_tokens: 1024}}, seed: 3}}
parallel: {{dp: 2, zero: {zero}}}
checkpoints: {{url: "{url}", every_steps: 40, keep: 1}}
"""


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment of a pod with workload identity, and a storage account behind https."""
    folder = tmp_path_factory.mktemp("cloud")
    with Azurite(folder / "azurite", oauth=True) as azurite, Entra(azurite.certificate) as entra:
        azurite.create("runs")
        yield {
            **{k: v for k, v in os.environ.items() if not k.startswith("AZURE_")},
            **entra.environment,
            "LOSSCAST_AZ_ENDPOINT": azurite.endpoint,
            "LOSSCAST_WORK": str(folder / "work"),
            "LOSSCAST_CACHE": str(folder / "cache"),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
        }


def start(spec: Path, environment: dict[str, str]) -> "subprocess.Popen[str]":
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}",
        "-m", "launcher.worker", str(spec),
    ]  # fmt: skip
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip


def losscast(environment: dict[str, str], *args: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "launcher.cli", *args], env=environment, cwd=ROOT, text=True, capture_output=True, timeout=120
    )  # fmt: skip


def kill_all(process: "subprocess.Popen[str]") -> None:
    """SIGKILL the launcher and its ranks, as a machine that goes away does. What they had started ends by itself."""
    os.killpg(process.pid, signal.SIGKILL)
    for pid in children(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.wait()


def children(pid: int) -> list[int]:
    """Ranks that torchrun put into sessions of their own."""
    from launcher.jobs.local_ray import descendants

    return list(descendants(pid))


def losses(path: Path) -> dict[int, float]:
    with path.open() as file:
        return {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file)}


def spec_file(folder: Path, name: str, url: str, zero: int = 1, steps: int = STEPS) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(SPEC.format(name=name, url=url, zero=zero, tokens=steps * 256))
    return path


def store_of(cloud: dict[str, str], name: str) -> Any:
    from infra.blob import BlobStore

    return BlobStore(cloud["LOSSCAST_AZ_ENDPOINT"].replace("{account}", ACCOUNT), "runs", f"team/{name}", KEY)


def test_a_run_killed_in_the_middle_goes_on_from_what_blob_has(
    cloud: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launcher.errors import Held
    from launcher.storage.runlog import RunLog

    monkeypatch.setenv("REQUESTS_CA_BUNDLE", cloud["REQUESTS_CA_BUNDLE"])
    undisturbed = start(spec_file(tmp_path, "az-run", str(tmp_path / "runs")), cloud)
    out, err = undisturbed.communicate(timeout=300)
    assert undisturbed.returncode == 0, err[-2000:]
    reference, ended = losses(tmp_path / "runs/az-run/attempts/1/curve.csv"), json.loads(out.splitlines()[-1])

    spec, log = (
        spec_file(tmp_path, "az-run", f"az://{ACCOUNT}/runs/team"),
        RunLog(store_of(cloud, "az-run"), "az-run"),
    )
    first = start(spec, cloud)
    deadline = time.monotonic() + 240
    while len(log.commits()) < 2:
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()[1][-2000:]
        time.sleep(0.1)
    ranks = children(first.pid)
    kill_all(first)
    with pytest.raises(Held, match="is held by attempt 1, submission torchrun"):
        log.take("somebody else")
    committed = log.commits()[0].fields["step"]
    assert 0 < committed < STEPS and ranks
    shutil.rmtree(cloud["LOSSCAST_WORK"])  # another machine goes on: only Blob remembers

    while log.standing().alive:
        time.sleep(0.5)
    second = start(spec, cloud)
    out, err = second.communicate(timeout=300)
    assert second.returncode == 0, err[-2000:]
    assert json.loads(out.splitlines()[-1])["val_loss"] == pytest.approx(ended["val_loss"], abs=1e-4)
    work = Path(cloud["LOSSCAST_WORK"], ACCOUNT, "runs/team/az-run")
    resumed = losses(work / "attempts/2/curve.csv")
    assert min(resumed) == committed + 1 and max(resumed) == STEPS
    assert [resumed[s] for s in resumed] == pytest.approx([reference[s] for s in resumed], abs=1e-4)

    store = store_of(cloud, "az-run")
    keys = {item.key for item in store.list("")}
    assert {"spec.json", "result.json", "attempts/2/curve.csv"} <= keys
    assert json.loads(store.get("result.json"))["steps"] == STEPS
    newest = log.commits()[0]
    assert newest.fields["step"] == STEPS and newest.attempt == 2
    shards = [k for k in keys if k.startswith(f"attempts/2/checkpoints/step-{STEPS}/")]
    assert len([k for k in shards if "optim_states" in k]) == 2, "every rank's shard is there"
    done = losscast(cloud, "janitor", f"az://{ACCOUNT}/runs/team", "--every-nth", "80")
    assert done.returncode == 0, done.stderr
    left = {
        k.split("/")[3].split(".")[0] for k in (item.key for item in store.list("attempts/")) if "/step-" in k
    }
    kept = {e.fields["step"] for e in log.commits() if e.fields["step"] % 80 == 0} | {STEPS}
    assert left == {f"step-{step}" for step in kept} and len(done.stdout.splitlines()) > 0, done.stdout
    staged = [p for p in work.glob("staged/**/*") if p.is_file()]
    assert staged == [], "nothing stays behind on the machine but what a resume would use"


def test_zero_3_saves_every_ranks_shards_and_exports_the_weights_of_the_whole_model(
    cloud: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launcher.storage.checkpoints import newest_verified
    from launcher.storage.runlog import RunLog

    monkeypatch.setenv("REQUESTS_CA_BUNDLE", cloud["REQUESTS_CA_BUNDLE"])
    run = start(spec_file(tmp_path, "az-zero3", f"az://{ACCOUNT}/runs/team", zero=3, steps=60), cloud)
    _, err = run.communicate(timeout=300)
    assert run.returncode == 0, err[-2000:]
    store = store_of(cloud, "az-zero3")
    found = newest_verified(store, RunLog(store, "az-zero3"))
    assert found is not None and found.step == 60
    names = sorted(found.files)
    assert [n for n in names if "model_states" in n] == [
        f"zero_pp_rank_{r}_mp_rank_00_model_states.pt" for r in range(2)
    ]
    assert len([n for n in names if "optim_states" in n]) == 2

    from safetensors.torch import load_file

    whole = start(spec_file(tmp_path, "whole", str(tmp_path / "runs"), zero=0, steps=60), cloud)
    _, err = whole.communicate(timeout=300)
    assert whole.returncode == 0, err[-2000:]
    files = [tmp_path / "zero3.safetensors", tmp_path / "whole.safetensors"]
    for place, file in zip(
        (f"az://{ACCOUNT}/runs/team/az-zero3", str(tmp_path / "runs/whole")), files, strict=True
    ):
        done = losscast(cloud, "export", place, "-o", str(file), "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["step"] == 60
    sharded, direct = (load_file(file) for file in files)
    assert sharded.keys() == direct.keys() and len(direct) > 5
    for name, tensor in direct.items():
        assert (sharded[name] - tensor).abs().max() < 1e-3, name
    done = losscast(cloud, "export", f"az://{ACCOUNT}/runs/team/az-zero3", "-o", str(files[0]), "--step", "7")
    assert done.returncode == 2 and "no checkpoint of that step" in done.stderr, done.stderr
