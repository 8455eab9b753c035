"""The manifests of a run: valid, shut in, suspended until whole, and the same for the same spec."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from launcher.errors import WrongInput
from launcher.kuberay.manifests import as_yaml, manifests
from launcher.kuberay.pods import NAME_LIMIT, commit_wait_s, job_name
from launcher.runspec.file import read_spec
from launcher.runspec.model import RunSpec

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
EXAMPLES = ("gpt-7b-64xH100", "gpt-125m-kuberay")


def spec_of(name: str, **changes: Any) -> RunSpec:
    """An example, with sections replaced in part."""
    data = read_spec(ROOT / "examples" / f"{name}.yaml").to_dict()
    for section, keys in changes.items():
        data[section] = {**data[section], **keys} if isinstance(keys, dict) else keys
    return RunSpec.from_dict(data)


def templates(job: dict[str, Any]) -> dict[str, Any]:
    cluster = job["spec"]["rayClusterSpec"]
    return {
        "head": cluster["headGroupSpec"]["template"],
        "worker": cluster["workerGroupSpecs"][0]["template"],
        "submitter": job["spec"]["submitterPodTemplate"],
    }


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_plan_prints_is_the_golden_file(name: str) -> None:
    """Write it anew with LOSSCAST_GOLDEN=write, and read the difference before committing it. The spec that travels along is
    compared with the spec itself, since it holds every default of run.yaml."""
    done = subprocess.run(
        [sys.executable, "-m", "launcher.cli", "plan", f"examples/{name}.yaml", "--to", "kuberay", "-o", "yaml"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == ""
    printed = list(yaml.safe_load_all(done.stdout))
    assert done.stdout == as_yaml(printed)
    spec, notes = spec_of(name), templates(printed[1])["head"]["metadata"]["annotations"]
    assert json.loads(notes["losscast/body"])["spec"] == spec.to_dict()
    assert printed[1]["metadata"]["annotations"]["losscast/spec-digest"] == spec.digest
    notes["losscast/body"] = "<spec, prediction, submission>"
    printed[1]["metadata"]["annotations"]["losscast/spec-digest"] = "<sha256>"
    path, text = GOLDEN / f"{name}.yaml", as_yaml(printed)
    if os.environ.get("LOSSCAST_GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_manifests_pass_the_published_schemas(name: str, crds: Any, core: Any) -> None:
    policy, job = manifests(spec_of(name))
    assert list(crds(job)) == []
    assert list(core(policy)) == []
    for template in templates(job).values():
        assert (
            list(
                core(
                    {
                        "apiVersion": "v1",
                        "kind": "PodTemplate",
                        "metadata": {"name": "x"},
                        "template": template,
                    }
                )
            )
            == []
        )


def test_a_mistake_in_a_manifest_does_not_pass(crds: Any, core: Any) -> None:
    _, job = manifests(spec_of("gpt-7b-64xH100"))
    wrong = copy.deepcopy(job)
    wrong["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replica"] = 3
    assert "replica" in " ".join(crds(wrong))
    wrong = copy.deepcopy(job)
    wrong["spec"]["rayClusterSpec"]["authOptions"]["mode"] = "on"
    assert "authOptions" in " ".join(crds(wrong))
    template = copy.deepcopy(templates(job)["worker"])
    template["spec"]["containers"][0]["livenessProbe"]["httpGet"]["uri"] = "/"
    assert list(
        core({"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template})
    )


def test_the_same_spec_gives_the_same_manifests_and_nothing_is_shared_between_two() -> None:
    spec = spec_of("gpt-7b-64xH100")
    first = manifests(spec)
    text = as_yaml(first)
    first[1]["spec"]["suspend"] = "changed"
    assert as_yaml(manifests(spec)) == text
    assert list(yaml.safe_load_all(text)) == manifests(spec)


def test_under_a_queue_a_job_waits_until_kueue_lets_all_of_it_in() -> None:
    _, job = manifests(spec_of("gpt-7b-64xH100"))
    labels = job["metadata"]["labels"]
    assert job["spec"]["suspend"] is True
    assert (
        labels["kueue.x-k8s.io/queue-name"] == "pretraining"
        and labels["kueue.x-k8s.io/priority-class"] == "training-normal"
    )
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == 8
    assert group["groupName"] != "head"  # reserved by Kueue
    assert (
        group["template"]["metadata"]["annotations"]["kueue.x-k8s.io/podset-required-topology"]
        == "kubernetes.azure.com/agentpool"
    )
    # what Kueue's webhook demands of a job it manages
    assert job["spec"]["shutdownAfterJobFinishes"] is True and "clusterSelector" not in job["spec"]
    assert not job["spec"]["rayClusterSpec"].get("enableInTreeAutoscaling", False)
    assert "priorityClassName" not in group["template"]["spec"]  # the queue decides, not the scheduler


def test_without_a_queue_the_scheduler_decides() -> None:
    _, job = manifests(spec_of("gpt-125m-kuberay"))
    worker = templates(job)["worker"]
    assert job["spec"]["suspend"] is False
    assert not any("kueue" in key for key in job["metadata"]["labels"])
    assert worker["spec"]["priorityClassName"] == "training-high"
    term = worker["spec"]["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][0]
    assert term["topologyKey"] == "topology.kubernetes.io/zone"
    assert {"key": "nvidia.com/gpu", "operator": "Exists"} in worker["spec"]["tolerations"]
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert (group["minReplicas"], group["replicas"]) == (1, 2)


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_pod_is_restricted(name: str) -> None:
    """PodSecurity `restricted`, read off its own list, and a root file system that can't be written."""
    for template in templates(manifests(spec_of(name))[1]).values():
        pod = template["spec"]
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
        assert pod["automountServiceAccountToken"] is False
        assert all(
            set(v) - {"name"} <= {"emptyDir", "downwardAPI", "persistentVolumeClaim"} for v in pod["volumes"]
        )
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context == {
                "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]},
                "readOnlyRootFilesystem": True, "runAsNonRoot": True,
            }  # fmt: skip
            assert not any("hostPort" in port for port in container.get("ports", []))
            mounted = {m["mountPath"] for m in container["volumeMounts"]}
            assert {"/tmp", "/home/losscast"} <= mounted


def test_ray_asks_for_a_token_and_both_sides_carry_it() -> None:
    cluster = manifests(spec_of("gpt-7b-64xH100"))[1]["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert tuple(int(n) for n in cluster["rayVersion"].split(".")) >= (2, 52, 0)
    names = {
        e["name"]
        for t in templates(manifests(spec_of("gpt-7b-64xH100"))[1]).values()
        for e in t["spec"]["containers"][0]["env"]
    }
    assert not {n for n in names if n.startswith("RAY_AUTH")}, (
        "the operator puts them in; ours would win over them"
    )


def test_the_monitors_token_comes_from_a_secret_and_is_in_no_manifest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOSSCAST_TOKEN", "s3cret-token")
    text = as_yaml(manifests(spec_of("gpt-7b-64xH100")))
    assert "s3cret" not in text and "secretKeyRef" in text


def test_the_grace_period_outlasts_the_wait_for_a_commit() -> None:
    for name in EXAMPLES:
        spec = spec_of(name)
        for role in ("head", "worker"):
            pod = templates(manifests(spec)[1])[role]["spec"]
            command = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
            assert int(command[-1]) == commit_wait_s(spec) < pod["terminationGracePeriodSeconds"]
    big = spec_of("gpt-7b-64xH100", workload={"layers": 96, "width": 12288, "heads": 96})
    assert commit_wait_s(spec_of("gpt-7b-64xH100")) < commit_wait_s(big) <= 600


def test_the_runs_own_pods_are_all_that_may_talk_to_each_other() -> None:
    policy, job = manifests(spec_of("gpt-7b-64xH100"))
    own = policy["spec"]["podSelector"]["matchLabels"]
    for template in templates(job).values():
        assert own.items() <= template["metadata"]["labels"].items()
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    sources = [s for rule in policy["spec"]["ingress"] for s in rule["from"]]
    assert all("ipBlock" not in s and s.get("podSelector", {}).get("matchLabels") for s in sources)
    everywhere = [rule["ports"] for rule in policy["spec"]["egress"] if "to" not in rule]
    assert [p["port"] for ports in everywhere for p in ports] == [443, 8700]


def test_notices_of_eviction_are_reached_where_run_yaml_names_them_and_nowhere_else(core: Any) -> None:
    """What the pods are told to ask is what `launcher.recovery.preempt` asks, and what the policy lets them reach."""
    from launcher.recovery.preempt import METADATA

    def rules(env: dict[str, str]) -> list[Any]:
        policy, job = manifests(spec_of("gpt-7b-64xH100", kubernetes={"env": env}))
        assert list(core(policy)) == []
        pod = templates(job)["worker"]["spec"]["containers"][0]["env"]
        assert {
            "name": "LOSSCAST_SCHEDULED_EVENTS",
            "value": env.get("LOSSCAST_SCHEDULED_EVENTS", "off"),
        } in pod
        return [rule for rule in policy["spec"]["egress"] if "ipBlock" in rule.get("to", [{}])[0]]

    assert rules({}) == rules({"LOSSCAST_SCHEDULED_EVENTS": "off"}) == []
    assert rules({"LOSSCAST_SCHEDULED_EVENTS": METADATA}) == [
        {"to": [{"ipBlock": {"cidr": "169.254.169.254/32"}}], "ports": [{"protocol": "TCP", "port": 80}]}
    ]
    elsewhere = rules({"LOSSCAST_SCHEDULED_EVENTS": "https://[fd00::7]:8443/x"})
    assert elsewhere == [
        {"to": [{"ipBlock": {"cidr": "fd00::7/128"}}], "ports": [{"protocol": "TCP", "port": 8443}]}
    ]
    assert rules({"LOSSCAST_SCHEDULED_EVENTS": "http://a-name:99999/x"}) == []


def test_the_users_environment_wins_and_infiniband_is_asked_for() -> None:
    worker = templates(manifests(spec_of("gpt-7b-64xH100", kubernetes={"env": {"NCCL_DEBUG": "INFO"}}))[1])[
        "worker"
    ]
    container = worker["spec"]["containers"][0]
    env = {e["name"]: e.get("value") for e in container["env"]}
    assert env["NCCL_DEBUG"] == "INFO" and "NCCL_IB_DISABLE" not in env
    assert (
        container["resources"]["limits"]["rdma/shared_ib"] == 1
        and container["resources"]["limits"]["nvidia.com/gpu"] == 8
    )
    plain = templates(manifests(spec_of("gpt-7b-64xH100", kubernetes={"infiniband": {}}))[1])["worker"]
    assert {"name": "NCCL_IB_DISABLE", "value": "1"} in plain["spec"]["containers"][0]["env"]


def test_the_entrypoint_finds_spec_prediction_and_submission() -> None:
    spec = spec_of("gpt-7b-64xH100")
    _, job = manifests(spec, prediction={"digest": "sha256:1"}, submission="gpt-7b-12345678")
    body = json.loads(templates(job)["head"]["metadata"]["annotations"]["losscast/body"])
    assert RunSpec.from_dict(body["spec"]).digest == spec.digest
    assert body["prediction"] == {"digest": "sha256:1"} and body["submission"] == "gpt-7b-12345678"


def test_a_prediction_too_large_for_an_annotation_is_refused() -> None:
    with pytest.raises(WrongInput, match="fewer points"):
        manifests(spec_of("gpt-7b-64xH100"), prediction={"curve": [1.5] * 100_000})


def test_a_run_for_another_place_has_no_manifests() -> None:
    with pytest.raises(WrongInput, match="only kuberay"):
        manifests(read_spec(ROOT / "examples/gpt-tiny.yaml"))


@given(st.from_regex(r"[a-z0-9][a-z0-9-]{0,62}", fullmatch=True))
def test_every_run_has_a_name_that_kuberay_takes(run: str) -> None:
    name = job_name(run)
    assert len(name) <= NAME_LIMIT and name[0].isalpha() and name[-1].isalnum() and name == name.lower()
    assert job_name(run) == name


def test_names_that_must_be_mended_stay_apart() -> None:
    assert job_name("gpt-7b") == "gpt-7b"
    long = "a" * 60
    assert len({job_name(long + tail) for tail in ("b", "c", "")} | {job_name("7b"), job_name("7b-")}) == 5
