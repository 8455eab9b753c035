"""Runs on Kubernetes from outside, against a small API server: everything it may answer, and when it does not."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import Failed, Held, WrongInput
from launcher.kuberay import api as kuberay_api
from launcher.kuberay import client as kuberay_client
from launcher.kuberay.api import RAY_JOBS, Api, connect
from launcher.kuberay.refusals import Away, Forbidden, RefusedObject
from launcher.runspec.file import read_spec
from launcher.runspec.model import RunSpec
from tests.launcher.kube_stub import TOKEN, Refusal, Stub

urllib3 = pytest.importorskip("urllib3")
ROOT = Path(__file__).parents[2]
NS, NAME = "training", "gpt-7b"


@pytest.fixture
def stub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    """Checks against the schemas where they are at hand."""
    monkeypatch.setattr(kuberay_api, "BACKOFF_S", 0.01)
    monkeypatch.setattr(kuberay_client, "RECONNECT_S", 0.01)
    monkeypatch.setattr(kuberay_client, "GONE_S", 2.0)
    from tests.k8s import schemas

    def check(body: dict[str, Any]) -> list[str]:
        if body["kind"] == "RayJob":
            return schemas.custom(body) if not isinstance(schemas._tool(), str) else []
        return schemas.builtin(body) if body["kind"] == "NetworkPolicy" else []

    with Stub(check) as found:
        yield found


@pytest.fixture
def api(stub: Stub) -> Api:
    return Api(urllib3.PoolManager(), stub.url, lambda: {"Authorization": f"Bearer {TOKEN}"})


@pytest.fixture
def spec() -> RunSpec:
    return read_spec(ROOT / "examples/gpt-7b-64xH100.yaml")


def workload(stub: Stub, active: bool = True, **conditions: tuple[str, str, str]) -> None:
    """Kueue's Workload of the job. Conditions: type=(status, reason, message)."""
    job = stub.objects[("rayjobs", NS, NAME)]
    stub.put(
        "workloads",
        {
            "apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "Workload",
            "metadata": {"name": f"rayjob-{NAME}-1", "namespace": NS, "labels": {"kueue.x-k8s.io/job-uid": job["metadata"]["uid"]}},
            "spec": {"active": active},
            "status": {"conditions": [{"type": k, "status": v[0], "reason": v[1], "message": v[2]} for k, v in conditions.items()]},
        },
    )  # fmt: skip


def once(method: str, part: str, answer: Refusal | str) -> Any:
    left = [answer]
    return lambda m, path: left.pop() if left and m == method and part in path else None


def test_submit_makes_the_policy_then_the_job_which_owns_it(stub: Stub, api: Api, spec: RunSpec) -> None:
    done = kuberay_client.submit(api, spec, prediction={"digest": "sha256:1"})
    job, policy = stub.objects[("rayjobs", NS, NAME)], stub.objects[("networkpolicies", NS, f"{NAME}-pods")]
    writes = [path.split("/")[-1] for method, path in stub.requests if method == "POST"]
    assert writes == ["networkpolicies", "rayjobs"]
    assert done.uid == job["metadata"]["uid"] == policy["metadata"]["ownerReferences"][0]["uid"]
    assert done.job == kuberay_client.submission_of(job) and job["spec"]["suspend"] is True


def test_a_second_submission_is_held_off_while_the_job_lives(stub: Stub, api: Api, spec: RunSpec) -> None:
    first = kuberay_client.submit(api, spec)
    with pytest.raises(Held, match=first.job) as error:
        kuberay_client.submit(api, spec)
    assert error.value.exit_status == 75
    stub.started(NS, NAME)
    with pytest.raises(Held, match="is running"):
        kuberay_client.submit(api, spec)


def test_a_job_that_ended_makes_room(stub: Stub, api: Api, spec: RunSpec) -> None:
    first = kuberay_client.submit(api, spec)
    stub.status("rayjobs", NS, NAME, jobDeploymentStatus="Failed", jobStatus="FAILED")
    second = kuberay_client.submit(api, spec)
    assert second.job != first.job and second.uid != first.uid


def test_a_strangers_job_of_the_same_name_is_left_alone(stub: Stub, api: Api, spec: RunSpec) -> None:
    stub.put(
        "rayjobs",
        {
            "kind": "RayJob",
            "metadata": {"name": NAME, "namespace": NS},
            "status": {"jobDeploymentStatus": "Complete"},
        },
    )
    with pytest.raises(WrongInput, match="did not make"):
        kuberay_client.submit(api, spec)
    assert ("rayjobs", NS, NAME) in stub.objects


def test_two_submitters_at_once_make_one_job(stub: Stub, api: Api, spec: RunSpec) -> None:
    outcomes: list[str] = []

    def one() -> None:
        try:
            outcomes.append(kuberay_client.submit(api, spec).job)
        except Held:
            outcomes.append("held")

    threads = [threading.Thread(target=one) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    winner = kuberay_client.submission_of(stub.objects[("rayjobs", NS, NAME)])
    assert sorted(outcomes) == sorted(["held"] * 7 + [str(winner)])


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (Refusal(403, "Forbidden", 'rayjobs.ray.io is forbidden: User "jo" cannot create resource "rayjobs"'), Forbidden, "losscast-submitter"),
        (Refusal(403, "Forbidden", 'rayjobs.ray.io "gpt-7b" is forbidden: exceeded quota: gpus, requested: 64'), Failed, "ResourceQuota"),
        (Refusal(403, "Forbidden", 'admission webhook "vrayjob.kb.io" denied the request: queue is wrong'), RefusedObject, "queue is wrong"),
        (Refusal(403, "Forbidden", 'pods "x" is forbidden: violates PodSecurity "restricted:latest"'), RefusedObject, "PodSecurity"),
        (Refusal(422, "Invalid", "spec.backoffLimit: Invalid value"), RefusedObject, "backoffLimit"),
        (Refusal(404, "NotFound", "the server could not find the requested resource"), Failed, "KubeRay"),
        (Refusal(401, "Unauthorized", "Unauthorized"), Forbidden, "log in again"),
        (Refusal(500, "InternalError", 'failed calling webhook "mrayjob.kb.io": connection refused'), Failed, "not running"),
        (Refusal(504, "Timeout", "etcd is slow"), Failed, "Nothing was made"),
    ],
)  # fmt: skip
def test_a_refusal_says_what_to_do(
    stub: Stub, api: Api, spec: RunSpec, answer: Refusal, error: type[Exception], words: str
) -> None:
    stub.faults.append(once("POST", "rayjobs", answer))
    with pytest.raises(error, match=words):
        kuberay_client.submit(api, spec)
    assert not stub.objects, "no network policy is left behind either"


def test_a_namespace_that_is_not_there_is_named_with_who_makes_it(
    stub: Stub, api: Api, spec: RunSpec
) -> None:
    stub.faults.append(
        once("POST", "networkpolicies", Refusal(404, "NotFound", 'namespaces "training" not found'))
    )
    with pytest.raises(
        Failed, match=r"create networkpolicies gpt-7b-pods in namespace training: .* Whoever runs"
    ):
        kuberay_client.submit(api, spec)


def test_where_the_outcome_stays_open_it_is_said_and_the_jobs_policy_stays(
    stub: Stub, api: Api, spec: RunSpec
) -> None:
    """The job is made, its answer is lost, and the server is away for the look that follows."""
    lost: list[bool] = []

    def fault(method: str, path: str) -> str | None:
        if method == "POST" and path.endswith("rayjobs"):
            lost.append(True)
            return "late"
        return "drop" if lost else None

    stub.faults.append(fault)
    with pytest.raises(Away, match="is open"):
        kuberay_client.submit(api, spec)
    assert {kind for kind, _, _ in stub.objects} == {"rayjobs", "networkpolicies"}


def test_a_schema_that_is_broken_is_told_as_wrong_input(
    stub: Stub, api: Api, spec: RunSpec, crds: Any
) -> None:
    with pytest.raises(RefusedObject, match="invalid") as error:
        body = {
            "apiVersion": "ray.io/v1",
            "kind": "RayJob",
            "metadata": {"name": "x", "namespace": NS},
            "spec": {"suspendd": True},
        }
        api.create(RAY_JOBS, NS, body)
    assert error.value.exit_status == 2


def test_a_create_whose_answer_was_lost_is_looked_up_and_counts_once(
    stub: Stub, api: Api, spec: RunSpec
) -> None:
    stub.faults.append(once("POST", "rayjobs", "late"))
    done = kuberay_client.submit(api, spec)
    assert done.uid == stub.objects[("rayjobs", NS, NAME)]["metadata"]["uid"]
    assert len([1 for method, path in stub.requests if method == "POST" and path.endswith("rayjobs")]) == 1


def test_reads_outlive_a_server_that_is_busy_and_give_up_on_one_that_is_away(
    stub: Stub, api: Api, spec: RunSpec
) -> None:
    kuberay_client.submit(api, spec)
    stub.faults += [
        once("GET", "rayjobs", Refusal(429, "TooManyRequests", "slow down")),
        once("GET", "rayjobs", "drop"),
    ]
    assert kuberay_client.status(api, spec)["phase"] == "pending"
    stub.faults.append(lambda method, path: "drop")
    with pytest.raises(Away, match="does not answer"):
        kuberay_client.status(api, spec)
    gone = Api(urllib3.PoolManager(), "http://127.0.0.1:1", dict)
    with pytest.raises(Away, match="VPN"):
        kuberay_client.status(gone, spec)


def test_a_change_is_made_on_the_newest_version(stub: Stub, api: Api, spec: RunSpec) -> None:
    kuberay_client.submit(api, spec)
    tries = 0

    def edit(found: dict[str, Any]) -> None:
        nonlocal tries
        tries += 1
        if tries < 4:  # a controller is faster
            stub.status("rayjobs", NS, NAME, message=f"try {tries}")
        found["spec"]["suspend"] = False

    api.change(RAY_JOBS, NS, NAME, edit)
    kept = stub.objects[("rayjobs", NS, NAME)]
    assert tries == 4 and kept["spec"]["suspend"] is False and kept["status"]["message"] == "try 3"


def test_following_outlives_an_expired_watch_and_a_cut_connection(
    stub: Stub, api: Api, spec: RunSpec
) -> None:
    kuberay_client.submit(api, spec)
    heard: list[str] = []

    def listen() -> None:
        for said in kuberay_client.follow(api, spec):
            heard.append(said["phase"])

    stub.faults.append(once("GET", "rayjobs", "drop"))
    thread = threading.Thread(target=listen, daemon=True)
    thread.start()

    def until(phase: str) -> None:
        waited = threading.Event()
        for _ in range(1000):
            if heard and heard[-1] == phase:
                return
            waited.wait(0.01)
        pytest.fail(f"heard {heard}, never {phase}")

    until("pending")
    stub.compact()
    stub.started(NS, NAME)
    until("running")
    stub.faults.append(once("GET", "rayjobs", "drop"))
    stub.compact()
    stub.status("rayjobs", NS, NAME, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
    thread.join(10)
    assert not thread.is_alive() and heard == ["pending", "running", "succeeded"]


def test_following_ends_when_the_job_is_deleted(stub: Stub, api: Api, spec: RunSpec) -> None:
    kuberay_client.submit(api, spec)
    heard = kuberay_client.follow(api, spec)
    assert next(heard)["phase"] == "pending"
    timer = threading.Timer(0.1, lambda: stub.remove("rayjobs", NS, NAME))
    timer.start()
    assert list(heard) == []
    timer.join()


def test_logs_come_once_each_however_often_the_connection_breaks(stub: Stub, api: Api, spec: RunSpec) -> None:
    kuberay_client.submit(api, spec)
    with pytest.raises(Failed, match="no pod has printed"):
        list(kuberay_client.logs(api, spec))
    stub.put("pods", {"metadata": {"name": "gpt-7b-aaaaa", "namespace": NS, "labels": {"job-name": NAME}}})
    stub.logs["gpt-7b-aaaaa"] = [f"2026-01-01T00:00:{n:02d}.000000001Z step {n}" for n in range(20)]
    assert list(kuberay_client.logs(api, spec)) == [f"step {n}" for n in range(20)]
    stub.started(NS, NAME)
    stub.break_logs_after = 7
    heard = kuberay_client.logs(api, spec, follow=True)
    got = [next(heard) for _ in range(20)]
    stub.status("rayjobs", NS, NAME, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
    assert got + list(heard) == [f"step {n}" for n in range(20)]


def test_logs_go_on_with_the_submitter_that_took_over(stub: Stub, api: Api, spec: RunSpec) -> None:
    kuberay_client.submit(api, spec)
    stub.status("rayjobs", NS, NAME, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
    for n, name in enumerate(("old", "new")):
        meta = {
            "name": name,
            "namespace": NS,
            "labels": {"job-name": NAME},
            "creationTimestamp": f"2026-01-0{n + 1}T00:00:00Z",
        }
        stub.put("pods", {"metadata": meta})
        stub.logs[name] = [f"2026-01-0{n + 1}T00:00:00.0Z {name}"]
    assert list(kuberay_client.logs(api, spec, follow=True)) == ["new"]


def test_under_a_queue_suspending_and_resuming_goes_through_kueue(
    stub: Stub, api: Api, spec: RunSpec
) -> None:
    kuberay_client.submit(api, spec)
    with pytest.raises(Failed, match="Is Kueue running"):
        kuberay_client.suspend(api, spec)
    workload(stub, QuotaReserved=("True", "QuotaReserved", ""), Admitted=("True", "Admitted", ""))
    assert kuberay_client.suspend(api, spec) == "pending"
    assert stub.objects[("workloads", NS, f"rayjob-{NAME}-1")]["spec"]["active"] is False
    assert kuberay_client.status(api, spec)["phase"] == "suspended"
    assert kuberay_client.resume(api, spec) is None
    assert stub.objects[("workloads", NS, f"rayjob-{NAME}-1")]["spec"]["active"] is True
    with pytest.raises(Held):
        kuberay_client.resume(api, spec)


def test_without_a_queue_the_job_itself_is_suspended(stub: Stub, api: Api) -> None:
    spec = read_spec(ROOT / "examples/gpt-125m-kuberay.yaml")
    kuberay_client.submit(api, spec)
    stub.started(NS, spec.name)
    kuberay_client.suspend(api, spec)
    assert stub.objects[("rayjobs", NS, spec.name)]["spec"]["suspend"] is True
    stub.status("rayjobs", NS, spec.name, jobDeploymentStatus="Suspended")
    assert kuberay_client.status(api, spec)["phase"] == "suspended"
    assert kuberay_client.resume(api, spec) is None
    assert stub.objects[("rayjobs", NS, spec.name)]["spec"]["suspend"] is False


def test_a_run_that_ended_is_resumed_as_a_new_submission(stub: Stub, api: Api, spec: RunSpec) -> None:
    first = kuberay_client.submit(api, spec)
    stub.status("rayjobs", NS, NAME, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
    with pytest.raises(WrongInput, match="has ended"):
        kuberay_client.suspend(api, spec)
    again = kuberay_client.resume(api, spec)
    assert again is not None and again.job != first.job


def test_deleting_takes_everything_and_twice_is_fine(stub: Stub, api: Api, spec: RunSpec) -> None:
    kuberay_client.submit(api, spec)
    assert kuberay_client.delete(api, spec) is True
    assert kuberay_client.delete(api, spec) is False
    assert not stub.objects and kuberay_client.status(api, spec)["phase"] == "absent"
    with pytest.raises(WrongInput, match="nothing is left to stop"):
        kuberay_client.suspend(api, spec)


def test_why_asks_for_what_it_may_and_does_without_the_rest(stub: Stub, api: Api, spec: RunSpec) -> None:
    kuberay_client.submit(api, spec)
    message = "couldn't assign flavors to pod set workers: insufficient unused quota for nvidia.com/gpu in flavor h100, 24 more needed"
    workload(stub, QuotaReserved=("False", "Pending", message))
    event = {
        "metadata": {"name": "e", "namespace": NS},
        "type": "Warning",
        "reason": "X",
        "message": "boo",
        "involvedObject": {"name": NAME},
    }
    stub.put("events", event)
    said = kuberay_client.why(api, spec)
    assert said.headline == "waits for quota: 24 more nvidia.com/gpu in h100" and any(
        "boo" in line for line in said.evidence
    )
    stub.faults.append(
        lambda m, path: Refusal(403, "Forbidden", "no") if "events" in path or "workloads" in path else None
    )
    assert "no Workload" in kuberay_client.why(api, spec).headline


def test_a_kubeconfig_is_read_and_its_token_sent(
    stub: Stub, spec: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("kubernetes")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    path = tmp_path / "config"
    path.write_text(
        f"""
apiVersion: v1
kind: Config
current-context: other
clusters: [{{name: c, cluster: {{server: "{stub.url}"}}}}, {{name: d, cluster: {{server: "http://127.0.0.1:1"}}}}]
users: [{{name: u, user: {{token: {TOKEN}}}}}]
contexts: [{{name: mine, context: {{cluster: c, user: u}}}}, {{name: other, context: {{cluster: d, user: u}}}}]
"""
    )
    # the client reads KUBECONFIG when it is imported
    from kubernetes.config import kube_config

    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(path))
    monkeypatch.setenv("KUBECONFIG", str(path))
    monkeypatch.setenv("LOSSCAST_KUBE_CONTEXT", "mine")
    assert kuberay_client.status(connect(), spec)["phase"] == "absent"
    monkeypatch.setenv("LOSSCAST_KUBE_CONTEXT", "nowhere")
    with pytest.raises(Failed, match="no cluster to talk to"):
        connect()
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    with pytest.raises(Failed, match="KUBECONFIG"):
        connect("mine")
