"""What a RayJob starts, on a real Ray here: the entrypoint trains the run it carries, the preStop hook of a worker and then
that of the head have a checkpoint committed in the middle, and a second start of the same job (KubeRay's retry) trains nothing twice.

What Kubernetes does around it is not here: its pods are one machine.
"""

import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.e2e
pytest.importorskip("deepspeed", reason="needs torch and deepspeed: pip install 'losscast[train]'")

from launcher.errors import Failed  # noqa: E402
from launcher.jobs import local_ray  # noqa: E402
from launcher.jobs.cluster import Cluster  # noqa: E402
from launcher.kuberay.manifests import manifests  # noqa: E402
from launcher.kuberay.prestop import commits, drivers, listens, ranks, wait_for_commit  # noqa: E402
from launcher.runspec.model import RunSpec  # noqa: E402
from launcher.storage.runfolder import RunFolder, last_step, read_json  # noqa: E402


@pytest.fixture
def head(tmp_path: Path) -> Iterator[local_ray.Head]:
    started = local_ray.start(tmp_path / "ray", cpus=2)
    yield started
    local_ray.stop(started)


def until(condition: Any, what: str, seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.2)
    pytest.fail(f"waited {seconds:g} s for {what}")


@pytest.fixture
def runs() -> Iterator[Path]:
    """A folder that is not below /tmp, which pods keep to themselves."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        yield Path(folder)


def test_from_the_manifest_to_a_finished_run(head: local_ray.Head, tmp_path: Path, runs: Path) -> None:
    spec = RunSpec.from_dict(
        {
            "name": "pods", "workload": {"layers": 2, "width": 32, "heads": 2, "context": 64},
            "data": {"path": "stdlib", "holdout_tokens": 4096},
            "train": {"tokens": 256 * 400, "batch_tokens": 256, "lr": 0.01},
            "parallel": {"dp": 2}, "checkpoints": {"url": str(runs), "every_steps": 10_000},
            "cluster": {"to": "kuberay"},
            "kubernetes": {"image": "i", "volumes": [{"claim": "runs", "path": str(runs)}]},
        }
    )  # fmt: skip
    job = manifests(spec)[1]["spec"]
    template = job["rayClusterSpec"]["headGroupSpec"]["template"]
    carried = tmp_path / "run.json"
    carried.write_text(template["metadata"]["annotations"]["losscast/body"])
    entrypoint = (
        job["entrypoint"]
        .replace("/etc/losscast/run.json", shlex.quote(str(carried)))
        .replace("python", shlex.quote(sys.executable), 1)
    )
    env = {e["name"]: e["value"] for e in template["spec"]["containers"][0]["env"] if "value" in e}
    env |= {
        "HOME": os.environ["HOME"],
        "LOSSCAST_CACHE": str(tmp_path / "cache"),
        "LOSSCAST_WORK": str(tmp_path / "work"),
        "RAY_AUTH_MODE": "token",
    }
    env.pop("TORCH_EXTENSIONS_DIR")
    cluster, folder = Cluster(head.dashboard, head.environment()), RunFolder.of(str(runs), "pods")

    def handed_in(name: str) -> bool:
        try:
            cluster.submit(
                {
                    "entrypoint": entrypoint,
                    "submission_id": name,
                    "runtime_env": {"env_vars": env},
                    "metadata": {},
                }
            )
        except Failed as error:
            assert "try again" in str(error), error  # its agents start after the head
            return False
        return True

    def start(name: str) -> None:
        until(lambda: handed_in(name), "an agent")

    def state(name: str) -> str:
        return cluster.job(name).status

    start("first")
    until(
        lambda: (
            (folder.attempts() and last_step(folder, 1) >= 5) or state("first") in ("FAILED", "SUCCEEDED")
        ),
        "five steps",
    )
    assert state("first") == "RUNNING", cluster.log("first")
    # in a pod every process is the run's own; here only those below our Ray are
    ours = set(local_ray.descendants(head.pid))
    training, driving = ours & set(ranks()), ours & set(drivers())
    assert (
        len(training) == 2
        and len(driving) == 1
        and all(listens(Path("/proc"), pid) for pid in training | driving)
    )

    def evict(pod: set[int]) -> list[int]:
        """The hook of a pod that holds these processes: whom it signalled."""
        signalled: list[int] = []

        def kill(pid: int, number: int) -> None:
            if pid in pod:
                signalled.append(pid)
                os.kill(pid, number)

        assert wait_for_commit(60, lambda: commits(str(folder.path)), kill=kill)
        return sorted(signalled)

    assert commits(str(folder.path)) == 0
    assert evict(training) == sorted(training) and commits(str(folder.path)) == 1, (
        "both ranks of a worker were asked and committed together"
    )
    assert evict(driving) == sorted(driving) and commits(str(folder.path)) == 2, "the head has no rank to ask"
    until(lambda: state("first") in ("FAILED", "SUCCEEDED"), "the end", 240)
    assert state("first") == "SUCCEEDED", cluster.log("first")
    result = read_json(folder.result)
    assert result is not None and result["steps"] == 400
    assert folder.attempts() == [1], cluster.log("first")
    end = json.loads((folder.path / "output" / f"pods-{spec.digest[7:15]}.end.json").read_text())
    assert end["status"] == 0

    start("second")  # KubeRay starts the entrypoint again
    until(lambda: state("second") in ("FAILED", "SUCCEEDED"), "the second end")
    assert state("second") == "SUCCEEDED" and "not tried again" in cluster.log("second")
    assert folder.attempts() == [1]
