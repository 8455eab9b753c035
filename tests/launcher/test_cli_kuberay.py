"""The commands on a run that is on Kubernetes, as a person uses them, against a small API server."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher import cli
from launcher.kuberay import api as kuberay_api
from launcher.runspec.file import read_spec
from launcher.storage.runfolder import RunFolder, write_whole
from launcher.training.saving import run_log
from tests.launcher.kube_stub import Stub, kubeconfig

pytest.importorskip("kubernetes")
ROOT = Path(__file__).parents[2]
NS, NAME = "training", "gpt-125m-disks"
RUN = str(ROOT / "examples/gpt-125m-kuberay.yaml")


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    from kubernetes.config import kube_config

    monkeypatch.setattr(kuberay_api, "BACKOFF_S", 0.01)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("LOSSCAST_HOME", str(tmp_path / "home"))
    with Stub() as found:
        config = tmp_path / "config"
        config.write_text(kubeconfig(found.url))
        monkeypatch.setenv("KUBECONFIG", str(config))
        monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(config))
        yield found


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    status = cli.main(list(argv))
    said = capsys.readouterr()
    return status, said.out, said.err


def test_from_submit_to_resume(stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "submit", RUN)
    assert status == 2 and "--yes" in err and not stub.objects, "it costs money, so somebody is asked"
    status, out, err = run(capsys, "submit", RUN, "--yes", "--json")
    assert status == 0 and json.loads(out)["namespace"] == NS and stub.url in err
    assert run(capsys, "submit", RUN, "--yes")[0] == 75
    assert run(capsys, "status", NAME)[1].startswith(f"{NAME}: starting")
    stub.started(NS, NAME)
    stub.status("rayjobs", NS, NAME, rayClusterStatus={"readyWorkerReplicas": 1, "desiredWorkerReplicas": 2})
    assert run(capsys, "status", RUN)[1] == f"{NAME}: running, 1 of 2 workers ready\n"
    status, out, _ = run(capsys, "why", RUN)
    assert status == 0 and "running: it runs" in out
    assert run(capsys, "stop", RUN)[0] == 0
    assert stub.objects[("rayjobs", NS, NAME)]["spec"]["suspend"] is True
    stub.status("rayjobs", NS, NAME, jobDeploymentStatus="Suspended")
    status, out, _ = run(capsys, "resume", NAME, "--yes")
    assert (
        status == 0 and "goes on" in out and stub.objects[("rayjobs", NS, NAME)]["spec"]["suspend"] is False
    )


def test_logs_and_a_failure_explained(stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "why", RUN)[1] == f"{NAME}: absent: there is no RayJob of this name in the namespace\n"
    run(capsys, "submit", RUN, "--yes")
    stub.put("pods", {"metadata": {"name": "p", "namespace": NS, "labels": {"job-name": NAME}}})
    stub.logs["p"] = [f"2026-01-01T00:00:0{n}.0Z line {n}" for n in range(3)]
    assert run(capsys, "logs", RUN)[1] == "line 0\nline 1\nline 2\n"
    assert run(capsys, "logs", RUN, "--tail", "1")[1] == "line 2\n"
    stub.status(
        "rayjobs",
        NS,
        NAME,
        jobDeploymentStatus="Failed",
        jobStatus="FAILED",
        reason="AppFailed",
        message="boom",
    )
    status, out, err = run(capsys, "logs", RUN, "-f")
    assert status == 1 and out.endswith("line 2\n") and f"{NAME}: failed" in err
    said = json.loads(run(capsys, "why", RUN, "--json")[1])
    assert said["phase"] == "failed" and "boom" in said["reason"]
    assert run(capsys, "stop", RUN, "--now")[0] == 0 and ("rayjobs", NS, NAME) not in stub.objects
    status, _, err = run(capsys, "stop", RUN)
    assert status == 2 and "nothing is left to stop" in err
    status, _, err = run(capsys, "stop", RUN, "--now")
    assert status == 0 and "there is no RayJob" in err


def test_a_cluster_that_is_away_is_one_line(stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    stub.faults.append(lambda method, path: "drop")
    for command in (("status", RUN), ("why", RUN), ("logs", RUN), ("stop", RUN), ("submit", RUN, "--yes")):
        status, out, err = run(capsys, *command)
        assert status == 1 and out == "" and "does not answer" in err and "Traceback" not in err


def test_ls_lists_what_this_machine_handed_to_kubernetes(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "ls")[0] == 2, "nothing was handed in, and there is no ./runs"
    assert run(capsys, "submit", RUN, "--yes")[0] == 0
    status, out, _ = run(capsys, "ls")
    assert status == 0 and out == f"{NAME}: starting\n"
    said = json.loads(run(capsys, "ls", "--json")[1])["runs"]
    assert [(r["run"], r["phase"], r["namespace"]) for r in said] == [(NAME, "starting", NS)]
    (tmp_path / "runs").mkdir()
    assert run(capsys, "ls", "runs")[1] == "", "a folder that is named is all that is asked for"
    (tmp_path / "config").unlink()
    status, out, err = run(capsys, "ls")
    assert status == 0 and out == f"{NAME}: its cluster was not asked\n" and err.startswith("warning: ")


def test_going_back_is_written_into_the_runs_log_where_that_is_in_reach(
    stub: Stub, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A disk of the cluster that this machine has not mounted is refused in words, and nothing is started."""
    status, _, err = run(capsys, "resume", RUN, "--back-to", "40", "--yes")
    assert status == 2 and "/mnt/runs" in err and "not mounted here" in err and not stub.objects
    with tempfile.TemporaryDirectory(
        dir="/var/tmp"
    ) as disk:  # pods have a /tmp of their own, which no run may lie in
        spec_file = tmp_path / "run.yaml"
        spec_file.write_text(Path(RUN).read_text().replace("/mnt/runs", disk))
        spec = read_spec(spec_file)
        folder = RunFolder.of(spec.checkpoints.url, spec.name)
        folder.path.mkdir(parents=True)
        write_whole(folder.spec, spec.to_dict())
        holding = run_log(folder).take("one")
        for step in (20, 40, 60):
            holding.append("commit", step=step, manifest=f"m{step}", manifest_sha256="0" * 64)
        back = ("resume", str(spec_file), "--back-to", "50", "--skip", "58:64")
        assert run(capsys, *back, "--yes")[0] == 75, "somebody holds it"
        holding.release()
        assert run(capsys, *back)[0] == 2 and len(run_log(folder).commits()) == 3, "nobody agreed to it"
        status, _, err = run(capsys, *back, "--yes")
        assert status == 0 and "goes back to step 40" in err and ("rayjobs", NS, NAME) in stub.objects
        assert [e.fields["step"] for e in run_log(folder).commits()] == [40, 20]


def test_what_a_rank_printed_is_read_from_the_runs_storage(
    stub: Stub, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Its pods know nothing of ranks: what was asked for is not passed over."""
    status, out, err = run(capsys, "logs", RUN, "--rank", "1")
    assert (
        status == 2
        and not out
        and "--rank: is kept in the run's storage" in err
        and "not mounted here" in err
    )
    with tempfile.TemporaryDirectory(dir="/var/tmp") as disk:
        spec_file = tmp_path / "run.yaml"
        spec_file.write_text(Path(RUN).read_text().replace("/mnt/runs", disk))
        spec = read_spec(spec_file)
        folder = RunFolder.of(spec.checkpoints.url, spec.name)
        write_whole(folder.spec, spec.to_dict())
        for attempt in (1, 2):
            (folder.attempt(attempt) / "output").mkdir(parents=True)
            (folder.attempt(attempt) / "output" / "rank-1.log").write_text(f"rank 1 of {attempt}\n")
        assert run(capsys, "logs", str(spec_file), "--rank", "1")[:2] == (0, "rank 1 of 2\n")
        assert run(capsys, "logs", str(spec_file), "--rank", "1", "--attempt", "1")[1] == "rank 1 of 1\n"
        status, _, err = run(capsys, "logs", str(spec_file), "--rank", "7")
        assert status == 2 and "rank 7 of its newest attempt left no output" in err
