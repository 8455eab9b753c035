"""Kueue's, KubeRay's and the kubelet's conditions in words. Messages as those projects write them."""

from typing import Any

import pytest

from launcher.kuberay.why import Seen, explain, phase


def job(
    deployed: str = "", ray: str = "", *, suspend: bool = False, queue: str | None = "q", **status: Any
) -> dict[str, Any]:
    labels = {"kueue.x-k8s.io/queue-name": queue} if queue else {}
    said = {k: v for k, v in {"jobDeploymentStatus": deployed, "jobStatus": ray, **status}.items() if v}
    return {"metadata": {"name": "r", "labels": labels}, "spec": {"suspend": suspend}, "status": said}


def work(
    active: bool = True, checks: list[Any] | None = None, **conditions: tuple[str, str, str]
) -> dict[str, Any]:
    listed = [{"type": k, "status": s, "reason": r, "message": m} for k, (s, r, m) in conditions.items()]
    return {"spec": {"active": active}, "status": {"conditions": listed, "admissionChecks": checks or []}}


def pod(**status: Any) -> dict[str, Any]:
    return {"metadata": {"name": "r-worker-1"}, "status": status}


def waiting(reason: str, message: str = "", **more: Any) -> dict[str, Any]:
    return pod(
        containerStatuses=[
            {"image": "i", "state": {"waiting": {"reason": reason, "message": message}}, **more}
        ]
    )


def unscheduled(message: str) -> dict[str, Any]:
    return pod(
        conditions=[
            {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
        ]
    )


@pytest.mark.parametrize(
    ("found", "word"),
    [
        (None, "absent"),
        (job(suspend=True), "pending"),
        (job("Suspended", suspend=True), "pending"),  # Kueue put it back
        (job("Suspended", suspend=True, queue=None), "suspended"),
        (job(suspend=True, queue=None), "pending"),
        (job(), "starting"),
        (job("Initializing"), "starting"),
        (job("Running", "PENDING"), "starting"),
        (job("Running", "RUNNING"), "running"),
        (job("Retrying", "FAILED"), "starting"),
        (job("Complete", "SUCCEEDED"), "succeeded"),
        (job("Complete", "STOPPED"), "stopped"),
        (job("Complete", "FAILED"), "failed"),
        (job("Failed", "FAILED"), "failed"),
        (job("ValidationFailed"), "failed"),
    ],
)
def test_one_word_for_every_state(found: Any, word: str) -> None:
    assert phase(found) == word


NO_FLAVOR = "couldn't assign flavors to pod set workers: "
PENDING = ("False", "Pending")


@pytest.mark.parametrize(
    ("workload", "words"),
    [
        (None, "Kueue has not looked at it"),
        (work(), "has not looked at it yet"),
        (work(active=False), "taken out of the queue by a person"),
        (
            work(active=False, Evicted=("True", "DeactivatedDueToRequeuingLimitExceeded", "exceeding the maximum number of re-queuing retries")),
            "Kueue has given it up and took it out of the queue: exceeding the maximum",
        ),
        (work(Admitted=("True", "Admitted", ""), QuotaReserved=("True", "", "")), "KubeRay is about to start"),
        (
            work(QuotaReserved=(*PENDING, NO_FLAVOR + "insufficient unused quota for nvidia.com/gpu in flavor h100, 32 more needed")),
            "waits for quota: 32 more nvidia.com/gpu in h100",
        ),
        (
            work(QuotaReserved=(*PENDING, NO_FLAVOR + "insufficient unused quota in cohort for cpu in flavor system, 4 more needed")),
            "waits for quota: 4 more cpu in system",
        ),
        (
            work(QuotaReserved=(*PENDING, NO_FLAVOR + "insufficient quota for nvidia.com/gpu in flavor h100, request > maximum capacity (128 > 64)")),
            "more than the queue can ever give",
        ),
        (work(QuotaReserved=("False", "Inadmissible", "LocalQueue q doesn't exist")), "no LocalQueue 'q' in this namespace"),
        (work(QuotaReserved=("False", "Inadmissible", "ClusterQueue gpus is inactive")), "lets nobody in"),
        (work(QuotaReserved=(*PENDING, NO_FLAVOR + 'topology "fabric" allows to fit only 3 out of 8 pod(s)')), "no part of the topology"),
        (work(QuotaReserved=(*PENDING, NO_FLAVOR + "untolerated taint {sku gpu NoSchedule} in flavor h100")), "no flavor of the queue fits"),
        (work(QuotaReserved=(*PENDING, NO_FLAVOR + 'Flavor "gpu" supports only TopologyAwareScheduling')), "given out by topology"),
        (work(QuotaReserved=(*PENDING, NO_FLAVOR + 'Flavor "gpu" does not support TopologyAwareScheduling')), "have no topology"),
        (work(QuotaReserved=(*PENDING, "something new")), "waits in queue 'q': something new"),
        (
            work(QuotaReserved=("True", "", ""), checks=[{"name": "prov", "state": "Pending", "message": "scaling up"}]),
            "prov is Pending: scaling up",
        ),
        (work(Evicted=("True", "Preempted", "Preempted to accommodate a workload"), QuotaReserved=(*PENDING, "Preempted")), "higher priority"),
        (work(Evicted=("True", "PodsReadyTimeout", "Exceeded the PodsReady timeout"), QuotaReserved=(*PENDING, "x")), "not all pods became ready"),
        (work(Evicted=("True", "SomethingNew", "why"), QuotaReserved=(*PENDING, "x")), "SomethingNew"),
    ],
)  # fmt: skip
def test_kueue_in_words(workload: Any, words: str) -> None:
    said = explain(Seen(job(suspend=True), workload))
    assert words in said.headline
    out = (workload or {}).get("spec", {}).get("active") is False
    assert said.facts["phase"] == ("suspended" if out else "pending")


@pytest.mark.parametrize(
    ("pods", "words", "advice"),
    [
        ([waiting("ImagePullBackOff", 'Back-off pulling image "i"')], "can't pull its image", "kubernetes.image"),
        ([waiting("CreateContainerConfigError", 'secret "losscast-token" not found')], "lacks its configuration", "create secret"),
        ([waiting("CrashLoopBackOff", lastState={"terminated": {"exitCode": 3}})], "last exit 3", "logs"),
        ([waiting("CrashLoopBackOff", lastState={"terminated": {"reason": "OOMKilled"}})], "more memory", "memory_gib_per_gpu"),
        ([unscheduled("0/9 nodes are available: 9 Insufficient nvidia.com/gpu.")], "finds no node", "scales from zero"),
        ([unscheduled("0/9 nodes are available: 9 node(s) had untolerated taint {a: b}.")], "finds no node", "tolerations"),
        ([unscheduled("0/9 nodes are available: 9 node(s) didn't match Pod's node affinity/selector.")], "finds no node", "node_selector"),
        ([unscheduled('persistentvolumeclaim "runs" not found')], "finds no node", "get pvc"),
        ([unscheduled("Insufficient nvidia.com/gpu"), waiting("ErrImagePull", "x")], "can't pull its image: x (and 1 more)", ""),
    ],
)  # fmt: skip
def test_the_worst_trouble_of_the_pods_is_the_headline(pods: list[Any], words: str, advice: str) -> None:
    said = explain(Seen(job("Initializing"), None, pods))
    assert words in said.headline and advice in " ".join(said.advice)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (
            job("Failed", "FAILED", reason="AppFailed", message="exit code 1"),
            "the run itself failed: exit code 1",
        ),
        (job("Failed", reason="SubmissionFailed"), "could not be handed to Ray"),
        (job("Failed", reason="SomethingNew", message="m"), "failed (SomethingNew): m"),
        (
            job("ValidationFailed", reason="ValidationFailed", message="name too long"),
            "refuses the RayJob: name too long",
        ),
        (job("Retrying", failed=2), "lost 2 time(s)"),
        (
            job("Initializing", rayClusterStatus={"readyWorkerReplicas": 3, "desiredWorkerReplicas": 8}),
            "3 of 8 workers",
        ),
        (job("Running", "RUNNING"), "it runs"),
        (job("Complete", "SUCCEEDED"), "has ended"),
        (job("Suspended", suspend=True, queue=None), "suspended by a person"),
        (None, "no RayJob"),
    ],
)
def test_kuberay_in_words(found: Any, words: str) -> None:
    assert words in explain(Seen(found)).headline


def test_conditions_and_warnings_are_the_evidence() -> None:
    events = [
        {"type": t, "reason": r, "message": "m", "involvedObject": {"name": "r"}}
        for t, r in (("Normal", "N"), ("Warning", "W"))
    ]
    said = explain(Seen(job(suspend=True), work(QuotaReserved=("False", "Pending", "because")), (), events))
    text = "\n".join(said.evidence)
    assert (
        "suspend=True" in text
        and "QuotaReserved=False (Pending): because" in text
        and "r: W: m" in text
        and ": N:" not in text
    )


def test_odd_objects_do_not_break_it() -> None:
    for strange in (
        {"metadata": {}},
        {"metadata": {"labels": None}, "spec": None, "status": None},
        {"metadata": {}, "status": {"conditions": None}},
    ):
        assert explain(Seen(strange, strange)).headline
