"""The Kubernetes manifests of a run: a pure function of its spec, so that `plan` prints what `submit` sends.

    manifests(spec)   a NetworkPolicy that shuts the run's pods off from everything they do not need, and its RayJob

The RayJob is one object with everything in it: spec and prediction lie in an annotation of the head's pod, mounted as
a file, so nothing can be created by half or be left behind. What is decided here, and why:

queue       with a LocalQueue the job is created suspended, and Kueue lets all of its pods in at once or none. Kueue
            wants the cluster gone after the job, and no autoscaler; the Kueue priority decides who waits
retries     losscast restarts ranks by itself and counts them (`policy.max_restarts`). KubeRay's `backoffLimit` builds a
            new cluster, and is for the loss of the head: 3 at most, since KubeRay can't tell that from a run that was
            given up, of which a retry ends at once (`launcher.kuberay.entry`). The submitter only follows the log, and
            asks for the job before it submits one, so its own retries cost nothing
twice       an entrypoint may run twice; the run's log lets one of the two write. Its submission id is the run's, so a
            retry takes over and a stranger's submission exits 75
end         GPUs are given back a minute after the job ends: what it printed is with the run by then
eviction    preStop asks the ranks for a checkpoint and waits for it; the grace period is longer than that wait. Where
            `kubernetes.env` names LOSSCAST_SCHEDULED_EVENTS the workers ask Azure too, and the policy lets them
security    PodSecurity `restricted`: no root, no writable image, no capabilities. InfiniBand needs locked memory; without
            the IPC_LOCK capability the nodes must allow it (docs/azure.md)

Names, lengths and combinations that KubeRay or Kueue refuse only after creation are refused by `launcher.runspec.checks`, or
mended (`launcher.kuberay.pods.job_name`). Written for KubeRay 1.5 or newer and Kueue 0.15 or newer.
"""

import ipaddress
import json
import re
from collections.abc import Mapping
from typing import Any

from launcher.errors import WrongInput
from launcher.kuberay.pods import (
    RUN_LABEL,
    SPEC_FOLDER,
    head_pod,
    job_name,
    labels_of,
    notices_at,
    submitter_pod,
    worker_pod,
)
from launcher.runspec.model import Kubernetes, RunSpec

ANNOTATION_LIMIT = 240 * 1024
"""Bytes; the API server allows 256 KiB of annotations an object."""
CLUSTERS_LOST = 3
"""Heads that may be lost before a run is given up."""


def manifests(
    spec: RunSpec, *, prediction: Mapping[str, Any] | None = None, submission: str | None = None
) -> list[dict[str, Any]]:
    """Every object that the run needs in its namespace, in the order they are to be created.

    prediction  prediction.json as plain data, registered before anything trains
    submission  who submits; retries of one submission take over from each other. Default: the spec's own digest

    Raises WrongInput for a run that is not for kuberay, or too large to travel in an annotation.
    """
    k8s = _kubernetes(spec)
    body = {
        "spec": spec.to_dict(),
        "prediction": prediction,
        "submission": submission or f"{spec.name}-{spec.digest.removeprefix('sha256:')[:8]}",
    }
    text = json.dumps(body, sort_keys=True, indent=1) + "\n"
    if len(text) > ANNOTATION_LIMIT:
        raise WrongInput(
            f"{spec.name}: spec and prediction take {len(text)} bytes, and {ANNOTATION_LIMIT} travel with a RayJob. "
            "Predict with fewer points on the curve."
        )
    return [_network_policy(spec, k8s), _ray_job(spec, k8s, text)]


def as_yaml(objects: list[dict[str, Any]]) -> str:
    """The objects as YAML documents for kubectl: no aliases, and text of several lines as such."""
    import yaml

    class Plain(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Plain.add_representer(str, text)
    return yaml.dump_all(objects, Dumper=Plain, sort_keys=False, width=1000, allow_unicode=True)


def _kubernetes(spec: RunSpec) -> Kubernetes:
    if spec.cluster.to != "kuberay" or spec.kubernetes is None:
        raise WrongInput(f"cluster.to: {spec.cluster.to}: only kuberay has manifests.")
    return spec.kubernetes


def _ray_job(spec: RunSpec, k8s: Kubernetes, text: str) -> dict[str, Any]:
    labels = labels_of(spec)
    if k8s.queue:
        labels["kueue.x-k8s.io/queue-name"] = k8s.queue
        if k8s.priority:
            labels["kueue.x-k8s.io/priority-class"] = k8s.priority
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {
            "name": job_name(spec.name),
            "namespace": k8s.namespace,
            "labels": labels,
            "annotations": {"losscast/spec-digest": spec.digest, "losscast/run": spec.name},
        },
        "spec": {
            "suspend": bool(k8s.queue),
            "submissionMode": "K8sJobMode",
            "entrypoint": f"python -m launcher.kuberay.entry {SPEC_FOLDER}/run.json",
            "metadata": {"losscast_run": spec.name},
            "backoffLimit": min(spec.policy.max_restarts, CLUSTERS_LOST),
            "submitterConfig": {"backoffLimit": 20},
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 60,
            "submitterPodTemplate": submitter_pod(spec, k8s),
            "rayClusterSpec": {
                "rayVersion": k8s.ray_version,
                "authOptions": {"mode": "token"},
                "headGroupSpec": {
                    "rayStartParams": {
                        "dashboard-host": "0.0.0.0",
                        "num-cpus": "0",  # no rank on the head
                        "object-store-memory": "200000000",
                    },
                    "template": head_pod(spec, k8s, text),
                },
                "workerGroupSpecs": [
                    {
                        "groupName": "workers",
                        "replicas": spec.cluster.nodes.max,
                        "minReplicas": spec.cluster.nodes.min,
                        "maxReplicas": spec.cluster.nodes.max,
                        "rayStartParams": {"object-store-memory": "1000000000"},
                        "template": worker_pod(spec, k8s),
                    }
                ],
            },
        },
    }


def _network_policy(spec: RunSpec, k8s: Kubernetes) -> dict[str, Any]:
    """In: the run's own pods, the operator on the dashboard, Prometheus on the metrics. Out: the run's own pods, DNS,
    HTTPS (storage, identity) and the monitor's port. Neighbouring runs can't reach each other, and nothing reaches the
    machine's metadata address, which would hand out the node's own identity: but where run.yaml asks for
    notices of eviction, which are at that address too: a policy sees no further than addresses and ports."""
    own = {"podSelector": {"matchLabels": {RUN_LABEL: labels_of(spec)[RUN_LABEL]}}}

    def anywhere(role: str) -> list[dict[str, Any]]:
        return [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"app.kubernetes.io/name": role}}}]

    egress: list[dict[str, Any]] = [
        {"to": [own]},
        {"to": [{"namespaceSelector": {}}], "ports": [{"protocol": p, "port": 53} for p in ("UDP", "TCP")]},
        {"ports": [{"protocol": "TCP", "port": 443}]},
    ]
    if spec.monitor is not None:
        found = re.match(r"(https?)://[^/]*?(?::(\d+))?(?:/|$)", spec.monitor.url)
        port = int(found[2] or (443 if found[1] == "https" else 80)) if found else 443
        if port != 443:
            egress.append({"ports": [{"protocol": "TCP", "port": port}]})
    notices = notices_at(k8s)
    if notices is not None:
        address, port = ipaddress.ip_network(notices[0]), notices[1]
        egress.append(
            {"to": [{"ipBlock": {"cidr": str(address)}}], "ports": [{"protocol": "TCP", "port": port}]}
        )
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {
            "name": f"{job_name(spec.name)}-pods",
            "namespace": k8s.namespace,
            "labels": labels_of(spec),
        },
        "spec": {
            "podSelector": own["podSelector"],
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [
                {"from": [own]},
                {"from": anywhere("kuberay-operator"), "ports": [{"protocol": "TCP", "port": 8265}]},
                {"from": anywhere("prometheus"), "ports": [{"protocol": "TCP", "port": 8080}]},
            ],
            "egress": egress,
        },
    }
