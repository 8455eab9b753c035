"""A ladder whose rungs are RayJobs, against a small API server; the test plays Kueue, KubeRay and the pods."""

import json
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher import cli
from launcher.jobs.climbing import Rung, run_ladder, standing
from launcher.jobs.ladder import read_file
from launcher.kuberay import api as kuberay_api
from launcher.kuberay.rungs import KubePlace
from launcher.runspec.accounting import parameter_count
from launcher.runspec.model import RunSpec
from launcher.storage.runfolder import RunFolder, write_whole
from tests.launcher.kube_stub import Refusal, Stub, kubeconfig

pytest.importorskip("kubernetes")
LADDER = """
name: rungs
tokens_per_param: 60
base:
  workload: {{kind: gpt, layers: 2, width: 8, heads: 2, context: 64}}
  data: {{path: /mnt/corpus}}
  train: {{batch_tokens: 4096, lr: 0.01, schedule: {{kind: wsd}}}}
  cluster: {{to: kuberay, gpus_per_node: 1, gpu: A100, price_per_gpu_hour: 2.0}}
  kubernetes:
    namespace: training
    image: registry.example.com/losscast:0.1
    {queue}
    volumes: [{{claim: corpus, path: /mnt/corpus, read_only: true}}, {{claim: runs, path: {runs}}}]
  checkpoints: {{url: {runs}}}
rungs:
  - {{workload: {{width: 16}}}}
  - {{workload: {{width: 24}}}}
  - {{workload: {{width: 32}}}}
  - {{workload: {{width: 48}}}}
"""
NS = "training"
NAMES = ["rungs-w16", "rungs-w24", "rungs-w32", "rungs-w48"]


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    from kubernetes.config import kube_config

    monkeypatch.setattr(kuberay_api, "BACKOFF_S", 0.01)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("LOSSCAST_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    with Stub() as found:
        config = tmp_path / "config"
        config.write_text(kubeconfig(found.url))
        monkeypatch.setenv("KUBECONFIG", str(config))
        monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(config))
        yield found


@pytest.fixture
def ladder(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Writes a ladder file; the volume of its runs is seen here too, and lies outside /tmp, which pods have to themselves."""
    volume = tempfile.mkdtemp(dir="/var/tmp")

    def write(queue: str = "queue: small", runs: str = volume) -> str:
        path = tmp_path / "ladder.yaml"
        path.write_text(LADDER.format(queue=queue, runs=runs))
        return str(path)

    yield write
    shutil.rmtree(volume)


class Controllers:
    """Lets every RayJob in, has it train, and ends it.

    broken   names whose run fails
    gather   how many must wait before the first is let in; after a minute fewer will do
    """

    def __init__(self, stub: Stub, broken: set[str], gather: int = 1) -> None:
        self.stub, self.broken, self.gather, self.most = stub, broken, gather, 0
        self._until = time.monotonic() + 60
        """most: RayJobs that were under way at once."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> "Controllers":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join(60)

    def _work(self) -> None:
        while not self._over.wait(0.02):
            with self.stub.changed:
                jobs = [o for (kind, _, _), o in self.stub.objects.items() if kind == "rayjobs"]
            live = [o for o in jobs if "jobDeploymentStatus" not in (o.get("status") or {})]
            self.most = max(self.most, len(live))
            if len(live) < self.gather and time.monotonic() < self._until:
                continue
            self.gather = 1
            for job in live:
                self._train(job)

    def _train(self, job: dict[str, Any]) -> None:
        name = job["metadata"]["name"]
        self.stub.started(NS, name)
        head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["metadata"]["annotations"]
        body = json.loads(head["losscast/body"])
        spec = RunSpec.from_dict(body["spec"])
        bad = name in self.broken
        train(spec, body["submission"], bad)
        self.stub.status(
            "rayjobs",
            NS,
            name,
            jobDeploymentStatus="Failed" if bad else "Complete",
            jobStatus="FAILED" if bad else "SUCCEEDED",
            reason="AppFailed" if bad else None,
        )


def train(spec: RunSpec, submission: str, bad: bool) -> None:
    """What a run's pods leave in its storage."""
    folder = RunFolder.of(spec.checkpoints.url, spec.name)
    write_whole(folder.spec, spec.to_dict())
    n, steps = parameter_count(spec), spec.total_steps
    assert n is not None
    if bad:
        write_whole(folder.path / "submission.json", {"job": submission})
        write_whole(folder.path / "output" / f"{submission}.end.json", {"status": 1, "type": "RankFailed"})
        (folder.path / "output" / f"{submission}.log").write_text("losscast: rank 1 ran out of memory\n")
        return
    final = 1.7 + 30.0 / n**0.4 + 40.0 / (60.0 * n) ** 0.35
    folder.attempt(1).mkdir(parents=True, exist_ok=True)
    rows = [f"{spec.name},{s},{final + 3.0 / s:.5f},{s * 4096}" for s in range(1, steps + 1)]
    folder.curve(1).write_text("\n".join(["run,step,loss,tokens", *rows]) + "\n")
    row = {
        "run": spec.name,
        "params": n,
        "tokens": steps * 4096,
        "loss": final,
        "flops": 6.0 * n * steps * 4096,
    }
    write_whole(folder.result, {**row, "attempt": 1, "digest": spec.digest})


@pytest.mark.e2e
def test_rungs_go_to_kubernetes_one_fails_and_only_that_one_is_made_again(
    stub: Stub, ladder: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str], quick: None
) -> None:
    command = ["ladder", ladder(), "-o", str(tmp_path / "law.json"), "--json"]
    assert cli.main(command) == 2 and not stub.objects, "it costs money, so somebody is asked"
    assert "$" in (said := capsys.readouterr().err) and "--yes" in said
    with Controllers(stub, broken={"rungs-w24"}, gather=4) as made:
        assert cli.main([*command, "--yes"]) == 1
    assert made.most == 4, "with a queue all are handed in at once"
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert answer["finished"] == [n for n in NAMES if n != "rungs-w24"]
    assert answer["failed"] == {"rungs-w24": "rank 1 ran out of memory"}
    assert "next: losscast why rungs-w24" in err and (tmp_path / "law.json").exists()
    before = {n: stub.objects[("rayjobs", NS, n)]["metadata"]["uid"] for n in NAMES}
    with Controllers(stub, broken=set()):
        assert cli.main([*command, "--yes"]) == 0
    after = {n: stub.objects[("rayjobs", NS, n)]["metadata"]["uid"] for n in NAMES}
    assert [n for n in NAMES if before[n] != after[n]] == ["rungs-w24"]
    assert json.loads(capsys.readouterr().out)["finished"] == NAMES
    assert cli.main(command) == 0, "nothing is left to pay for, so nobody is asked"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command looks at the cluster every five seconds; here nothing is gained by that."""
    import launcher.jobs.climbing as climbing

    real = climbing.run_ladder
    monkeypatch.setattr(
        climbing,
        "run_ladder",
        lambda rungs, place, **more: real(rungs, place, **{**more, "interval_s": 0.05}),
    )


def place_of(stub: Stub, path: str) -> tuple[KubePlace, list[Rung]]:
    _, specs = read_file(path)
    return KubePlace(kuberay_api.connect(), specs), standing(specs)


def test_without_a_queue_one_rung_at_a_time_holds_machines(stub: Stub, ladder: Callable[..., str]) -> None:
    place, rungs = place_of(stub, ladder(queue="priority: low"))
    with Controllers(stub, broken=set()) as made:
        ended = run_ladder(rungs, place, interval_s=0.05)
    assert [r.state for r in ended] == ["finished"] * 4 and made.most == 1


def test_an_interrupted_ladder_lets_its_rungs_rest_and_the_next_one_lets_them_go_on(
    stub: Stub, ladder: Callable[..., str]
) -> None:
    place, rungs = place_of(stub, ladder(queue="priority: low"))

    def interrupt(now: list[Rung]) -> None:
        if any(r.state == "running" for r in now):
            raise KeyboardInterrupt

    class Begun(Controllers):
        def _train(self, job: dict[str, Any]) -> None:
            self.stub.started(NS, job["metadata"]["name"])

    with Begun(stub, broken=set()), pytest.raises(KeyboardInterrupt):
        run_ladder(rungs, place, tick=interrupt, interval_s=0.05)
    ((key, job),) = [(k, o) for k, o in stub.objects.items() if k[0] == "rayjobs"]
    assert job["spec"]["suspend"] is True
    stub.status("rayjobs", NS, key[2], jobDeploymentStatus="Suspended")
    mine = next(r for r in rungs if r.spec.name == key[2])
    assert place.look(mine) is None and "suspended" in place.outcome(mine)
    place.start(mine)
    after = stub.objects[key]
    assert after["spec"]["suspend"] is False and after["metadata"]["uid"] == job["metadata"]["uid"]


def test_a_rung_that_was_deleted_or_never_began_has_the_clusters_word(
    stub: Stub, ladder: Callable[..., str]
) -> None:
    place, rungs = place_of(stub, ladder())
    place.start(rungs[0])
    assert (now := place.look(rungs[0])) is not None and (now.state, now.why) == ("waiting", "pending")
    stub.status(
        "rayjobs", NS, NAMES[0], jobDeploymentStatus="Failed", reason="ValidationFailed", message="no"
    )
    assert place.look(rungs[0]) is None and "KubeRay refuses the RayJob: no" in place.outcome(rungs[0])
    stub.remove("rayjobs", NS, NAMES[0])
    assert place.look(rungs[0]) is None and "was deleted" in place.outcome(rungs[0])


def test_a_rung_that_the_cluster_refuses_or_that_somebody_holds_fails_alone(
    stub: Stub, ladder: Callable[..., str]
) -> None:
    place, rungs = place_of(stub, ladder())
    other = {"losscast/spec-digest": "sha256:other"}
    labels = {"app.kubernetes.io/managed-by": "losscast"}
    meta = {"name": NAMES[0], "namespace": NS, "annotations": other, "labels": labels}
    stub.put("rayjobs", {"metadata": meta, "spec": {}, "status": {"jobDeploymentStatus": "Running"}})
    refused: list[str] = []

    def refuse_one(method: str, path: str) -> Refusal | None:
        if method == "POST" and path.endswith("/rayjobs") and not refused:
            refused.append(path)
            return Refusal(422, "Invalid", "RayJob is invalid: no such image")
        return None

    stub.faults.append(refuse_one)
    with Controllers(stub, broken=set()):
        ended = {r.spec.name: r for r in run_ladder(rungs, place, interval_s=0.05)}
    assert "another spec of that name" in ended[NAMES[0]].why
    assert "no such image" in ended[NAMES[3]].why, "the longest goes first, and was refused"
    assert [ended[n].state for n in NAMES] == ["failed", "finished", "finished", "failed"]


def test_a_cluster_that_is_away_or_runs_out_of_sight_is_said_before_anything_is_paid_for(
    stub: Stub, ladder: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    law = str(tmp_path / "law.json")
    assert cli.main(["ladder", ladder(runs="/mnt/nowhere-here"), "-o", law, "--yes"]) == 2
    assert "none of this machine" in capsys.readouterr().err
    stub.faults.append(lambda method, path: "drop")
    assert cli.main(["ladder", ladder(), "-o", law, "--yes"]) == 1
    err = capsys.readouterr().err
    assert "does not answer" in err and "Traceback" not in err and not stub.objects
