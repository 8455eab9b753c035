"""Where a RayJob stands, and why: Kueue's, KubeRay's and the kubelet's conditions in words. Pure: objects in, words out.

    phase(job)                  pending, starting, running, succeeded, failed, suspended
    explain(seen)               a headline, lines of evidence, and what to do

Kueue speaks through the conditions of a Workload, KubeRay through the RayJob's status, the scheduler and the kubelet through
pods and events. The one nearest to the trouble is the headline; what the others say is evidence.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Object = Mapping[str, Any]
ENDED = frozenset({"succeeded", "failed"})
IMAGE = frozenset({"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"})


@dataclass(frozen=True)
class Seen:
    """What the API server holds of one run."""

    job: Object | None
    workload: Object | None = None
    pods: Sequence[Object] = ()
    events: Sequence[Object] = ()
    """Of all of these, oldest first."""


@dataclass(frozen=True)
class Word:
    """The answer."""

    headline: str
    evidence: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)


def status_of(job: Object | None) -> Object:
    return (job or {}).get("status") or {}


def phase(job: Object | None, workload: Object | None = None) -> str:
    """One word for the RayJob; `absent` for none. Under a queue only its Workload tells that a person took it out of it."""
    if job is None:
        return "absent"
    status = status_of(job)
    deployed, ray = status.get("jobDeploymentStatus") or "", status.get("jobStatus") or ""
    if deployed == "Complete":
        return "succeeded" if ray == "SUCCEEDED" else "failed" if ray == "FAILED" else "stopped"
    if deployed in ("Failed", "ValidationFailed"):
        return "failed"
    if deployed in ("Suspending", "Suspended") or (job.get("spec") or {}).get("suspend"):
        by_hand = _out(workload) if _queue(job) else deployed in ("Suspending", "Suspended")
        return "suspended" if by_hand else "pending"
    if deployed == "Running" and ray == "RUNNING":
        return "running"
    return "starting"


def explain(seen: Seen) -> Word:
    """Why the run is where it is."""
    if seen.job is None:
        return Word(
            "there is no RayJob of this name in the namespace", (), ("losscast submit   hands it in",)
        )
    word, status = phase(seen.job, seen.workload), status_of(seen.job)
    evidence = tuple(_job_lines(seen.job) + _workload_lines(seen.workload) + _event_lines(seen.events))
    facts = {"phase": word, "ray_reason": status.get("reason"), "message": status.get("message")}
    if word == "failed":
        headline, advice = _failed(status)
    elif word in ("succeeded", "stopped"):
        headline, advice = ("the job has ended, and the cluster was given back", ())
    elif word == "suspended":
        headline = (
            "taken out of the queue" if _queue(seen.job) else "suspended"
        ) + " by a person: no pod runs"
        evicted = _true(seen.workload, "Evicted") or {}
        if str(evicted.get("reason")).startswith("DeactivatedDueTo"):
            headline = f"Kueue has given it up and took it out of the queue: {evicted.get('message') or evicted['reason']}"
        advice = ("losscast resume   lets it go on from its last checkpoint",)
    elif word == "pending":
        headline, advice = _queued(seen)
    else:
        headline, advice = _pods(seen.pods) or _waiting(seen, word)
    return Word(headline, evidence, tuple(advice), facts)


def condition(found: Object | None, kind: str) -> Object | None:
    """A condition of an object by its type."""
    return next((c for c in status_of(found).get("conditions") or () if c.get("type") == kind), None)


def _true(found: Object | None, kind: str) -> Object | None:
    said = condition(found, kind)
    return said if said and said.get("status") == "True" else None


def _queue(job: Object) -> str | None:
    return ((job.get("metadata") or {}).get("labels") or {}).get("kueue.x-k8s.io/queue-name")


def _out(workload: Object | None) -> bool:
    """Whether a Workload is deactivated."""
    return ((workload or {}).get("spec") or {}).get("active") is False


# Kueue

EVICTED = {
    "Preempted": (
        "Kueue took its place for a run of higher priority",
        "It comes back by itself when there is room.",
    ),
    "PodsReadyTimeout": (
        "Kueue let it in and not all pods became ready in time, so it was put back",
        "Nodes did not come up: see the pods' events, the node pool's limits and the subscription's GPU quota.",
    ),
    "AdmissionCheck": ("an admission check of the queue failed", "See the check's message below."),
    "ClusterQueueStopped": ("its ClusterQueue was stopped", "Ask whoever runs the queue."),
    "LocalQueueStopped": ("its LocalQueue was stopped", "Ask whoever runs the queue."),
    "NodeFailures": ("a node under it failed, and Kueue found no other", "It comes back when there is room."),
    "Deactivated": ("it was taken out of the queue", "losscast resume   puts it back"),
    "InactiveWorkload": ("it was taken out of the queue", "losscast resume   puts it back"),
}


def _queued(seen: Seen) -> tuple[str, tuple[str, ...]]:
    job, work = seen.job or {}, seen.workload
    queue = _queue(job)
    if queue is None:
        return "suspended, and no queue looks after it", ("losscast resume",)
    if work is None:
        return (
            f"Kueue has not looked at it yet: there is no Workload for queue {queue!r}",
            ("Is Kueue running, with ray.io/rayjob among its integrations (docs/kubernetes.md)?",),
        )
    if _true(work, "Admitted"):
        return "Kueue has let it in; KubeRay is about to start the pods", ()
    checks = [
        c for c in status_of(work).get("admissionChecks") or () if c.get("state") not in ("Ready", None)
    ]
    if _true(work, "QuotaReserved") and checks:
        said = "; ".join(
            f"{c.get('name')} is {c.get('state')}: {c.get('message') or 'no message'}" for c in checks
        )
        return f"its quota is reserved, and an admission check is open: {said}", ()
    reserved = condition(work, "QuotaReserved")
    message = str((reserved or {}).get("message") or "")
    evicted = _true(work, "Evicted")
    if evicted and not _quota(message):
        words, advice = EVICTED.get(
            str(evicted.get("reason")), (f"Kueue put it back ({evicted.get('reason')})", "")
        )
        return f"{words}: {evicted.get('message')}", (advice,) if advice else ()
    if reserved is None:
        return f"queue {queue!r} has not looked at it yet", ()
    return _why_no_quota(message, queue)


def _quota(message: str) -> bool:
    return "insufficient" in message or "assign flavors" in message


def _why_no_quota(message: str, queue: str) -> tuple[str, tuple[str, ...]]:
    """Kueue's message about quota in words. It names resource and flavor, and often how much is lacking."""
    if re.search(r"LocalQueue .* (doesn't|does not) exist", message):
        return f"there is no LocalQueue {queue!r} in this namespace", (
            "kubectl get localqueue   shows those that are",
        )
    if "is inactive" in message or "is stopped" in message:
        return f"queue {queue!r} lets nobody in: {message}", ("Ask whoever runs the queue.",)
    lack = re.findall(
        r"insufficient unused quota(?: in cohort)? for ([^ ]+) in flavor ([^ ,]+), ([^ ,]+) more needed",
        message,
    )
    if lack:
        parts = ", ".join(f"{more} more {resource} in {flavor}" for resource, flavor, more in lack)
        return f"waits for quota: {parts}", (
            "It starts by itself when others end. `kubectl get workloads` shows who is before it.",
        )
    if re.search(
        r"insufficient quota|request > maximum capacity|exceeds? (the )?(nominal|maximum)|borrowing limit",
        message,
    ):
        return f"asks for more than the queue can ever give: {message}", (
            "Ask for fewer nodes, or have the quota raised.",
        )
    if "supports only TopologyAwareScheduling" in message:
        return (
            f"the queue's nodes are given out by topology: {message}",
            ("Set kubernetes.topology, such as kubernetes.io/hostname.",),
        )
    if "does not support TopologyAwareScheduling" in message:
        return f"the queue's nodes have no topology: {message}", ("Leave kubernetes.topology out.",)
    if "topology" in message.lower():
        return f"no part of the topology has room for all of it: {message}", (
            "Wait, or leave kubernetes.topology out.",
        )
    if "untolerated taint" in message or "node affinity" in message or "doesn't match" in message:
        return f"no flavor of the queue fits its nodes: {message}", (
            "Compare node_selector and tolerations with the flavors.",
        )
    return f"waits in queue {queue!r}: {message or 'no reason given'}", ()


# KubeRay


def _failed(status: Object) -> tuple[str, tuple[str, ...]]:
    reason, message = status.get("reason") or "", " ".join(str(status.get("message") or "").split())
    words = {
        "AppFailed": ("the run itself failed", ("losscast logs   shows its last words",)),
        "SubmissionFailed": (
            "the job could not be handed to Ray",
            ("The submitter pod's log says why; a wrong image or Ray version is the usual cause.",),
        ),
        "DeadlineExceeded": ("it ran longer than activeDeadlineSeconds", ()),
        "JobDeploymentStatusTransitionGracePeriodExceeded": ("Ray said it ended, and KubeRay did not follow", ()),
        "ValidationFailed": ("KubeRay refuses the RayJob", ("losscast plan -o yaml   shows what was sent",)),
        "JobStatusCheckTimeoutExceeded": ("the head did not answer for too long", ("losscast resume   goes on from the last checkpoint",)),
    }  # fmt: skip
    headline, advice = words.get(str(reason), (f"failed ({reason or 'no reason given'})", ()))
    return headline + (f": {message[:400]}" if message else ""), advice


def _waiting(seen: Seen, word: str) -> tuple[str, tuple[str, ...]]:
    status = status_of(seen.job)
    cluster = status.get("rayClusterStatus") or {}
    ready, wanted = cluster.get("readyWorkerReplicas") or 0, cluster.get("desiredWorkerReplicas")
    if word == "running":
        return "it runs", ()
    if status.get("jobDeploymentStatus") == "Retrying":
        return f"its cluster was lost {status.get('failed') or 1} time(s), and KubeRay builds another", ()
    if wanted and ready < wanted:
        return f"{ready} of {wanted} workers are ready", ()
    return "its cluster is ready, and the job is being handed in", ()


# Pods


def _pods(pods: Sequence[Object]) -> tuple[str, tuple[str, ...]] | None:
    """The trouble of the pods, the worst first; None without any."""
    stuck: list[tuple[int, str, tuple[str, ...]]] = []
    for pod in pods:
        name, status = pod["metadata"]["name"], status_of(pod)
        scheduled = condition(pod, "PodScheduled")
        if scheduled and scheduled.get("status") == "False":
            stuck.append(
                (
                    2,
                    f"the scheduler finds no node for {name}: {scheduled.get('message')}",
                    _for_nodes(scheduled),
                )
            )
        for container in [
            *(status.get("initContainerStatuses") or ()),
            *(status.get("containerStatuses") or ()),
        ]:
            waiting = (container.get("state") or {}).get("waiting") or {}
            ended = (
                (container.get("lastState") or {}).get("terminated")
                or (container.get("state") or {}).get("terminated")
                or {}
            )
            reason, message = waiting.get("reason") or "", " ".join(str(waiting.get("message") or "").split())
            if reason in IMAGE:
                advice = ("Check kubernetes.image, and that the nodes may pull from this registry.",)
                stuck.append((0, f"{name} can't pull its image: {message or container.get('image')}", advice))
            elif reason == "CreateContainerConfigError":
                stuck.append((0, f"{name} lacks its configuration: {message}", _for_secret(message)))
            elif reason == "CreateContainerError":
                stuck.append((0, f"{name} can't be created: {message}", ()))
            elif ended.get("reason") == "OOMKilled":
                advice = ("Raise kubernetes.memory_gib_per_gpu; /dev/shm counts as memory too.",)
                stuck.append((1, f"{name} was killed for using more memory than it asked for", advice))
            elif reason == "CrashLoopBackOff":
                stuck.append(
                    (
                        1,
                        f"{name} crashes again and again (last exit {ended.get('exitCode')})",
                        ("losscast logs",),
                    )
                )
    if not stuck:
        return None
    _, headline, advice = min(stuck, key=lambda s: s[0])
    same = len({s[1] for s in stuck})
    return headline + (f" (and {same - 1} more)" if same > 1 else ""), advice


def _for_nodes(scheduled: Object) -> tuple[str, ...]:
    message = str(scheduled.get("message") or "")
    if "Insufficient nvidia.com/gpu" in message or "Insufficient rdma" in message:
        return (
            "A node pool that scales from zero takes minutes; if its limit or the GPU quota is reached, it never comes.",
        )
    if "untolerated taint" in message:
        return ("Add the taint to kubernetes.tolerations.",)
    if "node affinity" in message or "node selector" in message:
        return (
            "No node has these labels: compare kubernetes.node_selector with `kubectl get nodes --show-labels`.",
        )
    if "persistentvolumeclaim" in message.lower():
        return ("kubectl get pvc   shows whether the claims of kubernetes.volumes exist",)
    return ()


def _for_secret(message: str) -> tuple[str, ...]:
    if "secret" in message:
        return (
            "kubectl create secret generic losscast-token --from-literal=token=$(losscast monitor token create --store DIR --scope ingest,read)",
        )
    return ()


# Evidence


def _job_lines(job: Object) -> list[str]:
    status, spec = status_of(job), job.get("spec") or {}
    said = [f"suspend={bool(spec.get('suspend'))}"]
    said += [
        f"{key}={status[key]}"
        for key in ("jobDeploymentStatus", "jobStatus", "reason", "failed")
        if status.get(key)
    ]
    lines = ["RayJob: " + ", ".join(said)]
    cluster = status.get("rayClusterStatus") or {}
    if cluster.get("desiredWorkerReplicas"):
        lines.append(
            f"workers: {cluster.get('readyWorkerReplicas') or 0} of {cluster['desiredWorkerReplicas']} ready"
        )
    return lines


def _workload_lines(work: Object | None) -> list[str]:
    return [
        f"Workload {c['type']}={c.get('status')}"
        + (f" ({c.get('reason')}): {c.get('message')}" if c.get("message") else "")
        for c in status_of(work).get("conditions") or ()
    ]


def _event_lines(events: Sequence[Object], most: int = 6) -> list[str]:
    warnings = [e for e in events if e.get("type") == "Warning"]
    return [
        f"{(e.get('involvedObject') or {}).get('name')}: {e.get('reason')}: {' '.join(str(e.get('message') or '').split())[:300]}"
        for e in warnings[-most:]
    ]
