"""Runs on Kubernetes from outside: hand in, look, follow, stop, let go on. The RayJob is the truth about the job; what the
run has done is told by its own storage (`launcher.jobs.standing`), where that can be reached from here.

    submit   refuses while the name's RayJob lives; one that ended is replaced. The network policy comes first, and goes
             with the job, which owns it
    stop     asks for a checkpoint and the end. With `now`, deletes the job: its pods still get their grace period
    suspend  takes the pods away and keeps the job: with a queue by deactivating its Workload, since Kueue would put back
             what is only suspended
    resume   lets a suspended job go on; one that ended is handed in again under a new submission
"""

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from launcher.errors import Failed, Held, WrongInput
from launcher.kuberay.api import EVENTS, PODS, POLICIES, RAY_JOBS, WORKLOADS, Api
from launcher.kuberay.manifests import manifests
from launcher.kuberay.pods import job_name
from launcher.kuberay.refusals import Away, Expired, Forbidden, NotThere, Taken
from launcher.kuberay.why import ENDED, Seen, Word, explain, phase, status_of
from launcher.runspec.model import RunSpec

GONE_S = 180.0
"""How long a job that ended may take to be deleted."""
RECONNECT_S = 2.0
Object = dict[str, Any]


@dataclass(frozen=True)
class Submission:
    """A RayJob that was made for a run."""

    run: str
    job: str
    """The submission's id."""
    namespace: str
    name: str
    uid: str
    server: str


def submit(
    api: Api,
    spec: RunSpec,
    *,
    prediction: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Submission:
    """Create everything the run needs. Raises Held (75) while its RayJob lives, RefusedObject for what the cluster refuses."""
    job = f"{spec.name}-{secrets.token_hex(4)}"
    policy, wanted = manifests(spec, prediction=prediction, submission=job)
    namespace, name = wanted["metadata"]["namespace"], wanted["metadata"]["name"]
    _make_room(api, namespace, name, say)
    new = _put_policy(api, namespace, policy)
    try:
        made = _create(api, namespace, wanted, job)
    except Away:  # it may be there, and then needs its policy
        raise
    except (Failed, WrongInput):
        if new:  # nothing is left behind
            with contextlib.suppress(Failed):
                api.delete(POLICIES, namespace, policy["metadata"]["name"])
        raise
    uid = str(made["metadata"].get("uid", ""))
    owner = {"apiVersion": "ray.io/v1", "kind": "RayJob", "name": name, "uid": uid}
    try:
        api.change(
            POLICIES,
            namespace,
            policy["metadata"]["name"],
            lambda o: o["metadata"].update(ownerReferences=[owner]),
        )
    except Failed as error:
        say(f"the network policy will outlive the job: {error}")
    return Submission(spec.name, job, namespace, name, uid, api.host)


def _create(api: Api, namespace: str, wanted: Object, job: str) -> Object:
    """Create the RayJob, and look where the outcome is open. Raises Held when another submission was faster, Away when it
    can't be found out whether it was made."""
    name = wanted["metadata"]["name"]
    try:
        return api.create(RAY_JOBS, namespace, wanted)
    except Taken:
        made = api.get(RAY_JOBS, namespace, name)
        if submission_of(made) != job:
            raise Held(_held(made)) from None
        return made
    except Away as error:
        try:
            found = api.find(RAY_JOBS, namespace, name)
        except Failed:
            raise Away(
                f"{error} Whether the job was made is open: `losscast status` tells, once it answers."
            ) from error
        if found is None or submission_of(found) != job:
            raise Failed(f"{error} Nothing was made.") from error
        return found


def submission_of(job: Object) -> str | None:
    """The submission's id that a RayJob carries."""
    import json

    template = (
        ((job.get("spec") or {}).get("rayClusterSpec") or {}).get("headGroupSpec", {}).get("template", {})
    )
    text = ((template.get("metadata") or {}).get("annotations") or {}).get("losscast/body")
    try:
        return json.loads(text or "")["submission"]
    except (ValueError, KeyError, TypeError):
        return None


def _held(job: Object) -> str:
    name, namespace = job["metadata"]["name"], job["metadata"]["namespace"]
    return (
        f"{name}: RayJob {namespace}/{name} (submission {submission_of(job) or 'unknown'}) is {phase(job)}. "
        "Stop it with `losscast stop`, or wait for it."
    )


def _make_room(api: Api, namespace: str, name: str, say: Callable[[str], None]) -> None:
    """Nothing of the name may be there. A job that ended is removed."""
    old = api.find(RAY_JOBS, namespace, name)
    if old is None:
        return
    ours = (old["metadata"].get("labels") or {}).get("app.kubernetes.io/managed-by") == "losscast"
    if not ours:
        raise WrongInput(
            f"{namespace}/{name} is a RayJob that losscast did not make. Give the run another name."
        )
    if phase(old) not in ENDED | {"stopped"}:
        raise Held(_held(old))
    say(f"removing RayJob {namespace}/{name}, which has ended")
    api.delete(RAY_JOBS, namespace, name)
    deadline = time.monotonic() + GONE_S
    while api.find(RAY_JOBS, namespace, name) is not None:
        if time.monotonic() > deadline:
            raise Failed(
                f"RayJob {namespace}/{name} ended, and does not go away: is the KubeRay operator running?"
            )
        time.sleep(0.5)


def _put_policy(api: Api, namespace: str, policy: Object) -> bool:
    """True when there was none before."""
    try:
        api.create(POLICIES, namespace, policy)
        return True
    except Taken:

        def update(found: Object) -> None:
            found["spec"] = policy["spec"]
            found["metadata"]["labels"] = policy["metadata"]["labels"]

        api.change(POLICIES, namespace, policy["metadata"]["name"], update)
        return False


# Looking


def names(spec: RunSpec) -> tuple[str, str]:
    """Namespace and name of a run's RayJob."""
    if spec.kubernetes is None:
        raise WrongInput(f"{spec.name}: is not for kuberay")
    return spec.kubernetes.namespace, job_name(spec.name)


def status(api: Api, spec: RunSpec) -> dict[str, Any]:
    """Where the RayJob stands, as plain data."""
    namespace, name = names(spec)
    job = api.find(RAY_JOBS, namespace, name)
    said, work = status_of(job), None if job is None else _workload(api, job)
    cluster = said.get("rayClusterStatus") or {}
    return {
        "run": spec.name,
        "phase": phase(job, work),
        "namespace": namespace,
        "rayjob": name,
        "job": submission_of(job) if job else None,
        "ray_status": said.get("jobStatus"),
        "message": said.get("message"),
        "clusters_lost": said.get("failed") or 0,
        "workers_ready": cluster.get("readyWorkerReplicas"),
        "workers": cluster.get("desiredWorkerReplicas"),
        "started": said.get("startTime"),
        "ended": said.get("endTime"),
    }


def seen(api: Api, spec: RunSpec) -> Seen:
    """Everything that may explain the run. What we may not read is left out."""
    namespace, name = names(spec)
    job = api.find(RAY_JOBS, namespace, name)
    if job is None:
        return Seen(None)
    work, pods, events = _workload(api, job), _pods(api, job), []
    for about in [
        name,
        *([work["metadata"]["name"]] if work else []),
        *[p["metadata"]["name"] for p in pods[:16]],
    ]:
        try:
            events += api.list(EVENTS, namespace, fields=f"involvedObject.name={about}")
        except (Forbidden, NotThere):
            break
    events.sort(key=lambda e: str(e.get("lastTimestamp") or e.get("eventTime") or ""))
    return Seen(job, work, pods, events)


def why(api: Api, spec: RunSpec) -> Word:
    """Why the run is where it is, in words."""
    return explain(seen(api, spec))


def _workload(api: Api, job: Object) -> Object | None:
    """Kueue's Workload of a RayJob: the one it owns."""
    if not (job["metadata"].get("labels") or {}).get("kueue.x-k8s.io/queue-name"):
        return None
    try:
        found = api.list(
            WORKLOADS,
            job["metadata"]["namespace"],
            labels=f"kueue.x-k8s.io/job-uid={job['metadata'].get('uid')}",
        )
    except (NotThere, Forbidden):
        return None
    return found[-1] if found else None


def _pods(api: Api, job: Object) -> list[Object]:
    cluster = status_of(job).get("rayClusterName")
    if not cluster:
        return []
    try:
        return api.list(PODS, job["metadata"]["namespace"], labels=f"ray.io/cluster={cluster}")
    except Forbidden:
        return []


def follow(api: Api, spec: RunSpec) -> Iterator[dict[str, Any]]:
    """The run's status now and whenever it changes, until it has ended or is gone."""
    namespace, name = names(spec)
    last = None
    for job in api.states(RAY_JOBS, namespace, name):
        now = (phase(job), status_of(job).get("message"))
        if now != last:
            last = now
            yield {"run": spec.name, "phase": now[0], "message": now[1]}
        if now[0] in ENDED | {"stopped"}:
            return


def logs(api: Api, spec: RunSpec, *, follow: bool = False) -> Iterator[str]:
    """What the job has printed, as its submitter pod tells it: the newest one's, each line once however often the connection
    breaks. Raises Failed where no pod has printed anything (yet, or any more)."""
    namespace, name = names(spec)
    since, pod = "", None
    while True:
        pods = api.list(PODS, namespace, labels=f"job-name={name}")
        pods.sort(key=lambda p: str(p["metadata"].get("creationTimestamp") or ""))
        if pods and pods[-1]["metadata"]["name"] != pod:
            pod, since = pods[-1]["metadata"]["name"], ""
        state = phase(api.find(RAY_JOBS, namespace, name))
        over = state in ENDED | {"stopped", "absent"}
        if pod is None and (over or not follow):
            raise Failed(
                f"{name}: no pod has printed anything here: the job is {state}. "
                + (
                    "`losscast why` says what it waits for."
                    if not over
                    else "What it printed is kept with the run."
                )
            )
        if pod is not None:
            try:
                for line in api.log(namespace, pod, follow=follow, since=since or None):
                    stamp, _, text = line.partition(" ")
                    if stamp > since:
                        since = stamp
                        yield text
            except (NotThere, Away, Expired):
                if not follow:
                    raise
        if not follow or over:
            return
        time.sleep(RECONNECT_S)


# Changing


def delete(api: Api, spec: RunSpec) -> bool:
    """Remove the RayJob and all it owns. False when there was none, which is fine."""
    namespace, name = names(spec)
    there = api.find(RAY_JOBS, namespace, name) is not None
    api.delete(RAY_JOBS, namespace, name)
    api.delete(POLICIES, namespace, f"{name}-pods")
    return there


def suspend(api: Api, spec: RunSpec) -> str:
    """Take the pods away, each after a commit, and keep the job. What it was before: `pending` has no pods."""
    before = str(status(api, spec)["phase"])
    _let(api, spec, go=False)
    return before


def resume(api: Api, spec: RunSpec, *, prediction: Mapping[str, Any] | None = None) -> Submission | None:
    """Let a suspended run go on (None), or hand one that ended in again. Raises Held for one that runs."""
    namespace, name = names(spec)
    job = api.find(RAY_JOBS, namespace, name)
    if job is None or phase(job) in ENDED | {"stopped"}:
        return submit(api, spec, prediction=prediction)
    work = _workload(api, job)
    if phase(job) == "suspended" or (work is not None and (work.get("spec") or {}).get("active") is False):
        _let(api, spec, go=True)
        return None
    raise Held(_held(job))


def _let(api: Api, spec: RunSpec, *, go: bool) -> None:
    namespace, name = names(spec)
    job = api.find(RAY_JOBS, namespace, name)
    if job is None:
        raise WrongInput(f"{spec.name}: there is no RayJob {namespace}/{name}; nothing is left to stop.")
    if phase(job) in ENDED | {"stopped"}:
        raise WrongInput(
            f"{name}: the job has ended ({phase(job)}); nothing is left to {'resume' if go else 'suspend'}."
        )
    if not (job["metadata"].get("labels") or {}).get("kueue.x-k8s.io/queue-name"):
        api.change(RAY_JOBS, namespace, name, lambda o: o["spec"].update(suspend=not go))
        return
    work = _workload(api, job)
    if work is None:
        raise Failed(f"{name}: Kueue keeps no Workload for it. Is Kueue running?")
    api.change(WORKLOADS, namespace, work["metadata"]["name"], lambda o: o["spec"].update(active=go))
