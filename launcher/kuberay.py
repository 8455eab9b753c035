"""The Kubernetes manifests of a run: a pure function of its spec, so that `plan` prints what `submit` sends.

    manifests(spec)   a NetworkPolicy that shuts the run's pods off from everything they do not need, and its RayJob

The RayJob is one object with everything in it: spec and prediction lie in an annotation of the head's pod, mounted as
a file, so nothing can be created by half or be left behind. What is decided here, and why:

queue       with a LocalQueue the job is created suspended, and Kueue lets all of its pods in at once or none. Kueue
            wants the cluster gone after the job, and no autoscaler; the Kueue priority decides who waits
retries     losscast restarts ranks by itself and counts them (`policy.max_restarts`). KubeRay's `backoffLimit` builds a
            new cluster, and is for the loss of the head: 3 at most, since KubeRay can't tell that from a run that was
            given up, of which a retry ends at once (`launcher.kuberay_entry`). The submitter only follows the log, and
            asks for the job before it submits one, so its own retries cost nothing
twice       an entrypoint may run twice; the run's log lets one of the two write. Its submission id is the run's, so a
            retry takes over and a stranger's submission exits 75
end         GPUs are given back a minute after the job ends: what it printed is with the run by then
eviction    preStop asks the ranks for a checkpoint and waits for it; the grace period is longer than that wait
security    PodSecurity `restricted`: no root, no writable image, no capabilities. InfiniBand needs locked memory; without
            the IPC_LOCK capability the nodes must allow it (docs/azure.md)

Names, lengths and combinations that KubeRay or Kueue refuse only after creation are refused by `launcher.checks`, or
mended here (`job_name`). Written for KubeRay 1.5 or newer and Kueue 0.15 or newer.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from launcher.errors import WrongInput
from launcher.jobs import QUIET
from launcher.memory import checkpoint_bytes
from launcher.spec import Kubernetes, RunSpec

HOME = "/home/losscast"
SPEC_FOLDER = "/etc/losscast"
"""Where the entrypoint finds run.json."""
WORK = "/var/losscast"
"""A pod's own disk: checkpoints on their way to the storage, prepared corpora."""
USER_ID = 10001
NAME_LIMIT = 47
"""KubeRay's, for a RayJob: it appends to the name."""
ANNOTATION_LIMIT = 240 * 1024
"""Bytes; the API server allows 256 KiB of annotations an object."""
COMMIT_BYTES_PER_S = 0.25e9
"""A node's slowest upload of a checkpoint that the grace period still covers."""
CLUSTERS_LOST = 3
RUN_LABEL = "losscast/run"
MOUNT_LIMITS = {"tmp": "20Gi", "home": "10Gi"}


def job_name(run: str) -> str:
    """The RayJob's name: the run's, made to fit KubeRay's rules (a letter first, at most 47 characters) where it must be."""
    if len(run) <= NAME_LIMIT and re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", run):
        return run
    tail = hashlib.sha256(run.encode()).hexdigest()[:6]
    return f"r-{run[: NAME_LIMIT - 9].strip('-')}-{tail}"


def commit_wait_s(spec: RunSpec) -> int:
    """How long a pod that is asked to go waits for a commit, in seconds: the node's share of a checkpoint at a slow
    upload, and a minute for the step that is under way. At most ten minutes."""
    share = (checkpoint_bytes(spec) or 0.0) / spec.cluster.nodes.max
    return int(min(600, 60 + share / COMMIT_BYTES_PER_S))


def disk_gib(spec: RunSpec) -> int:
    """Disk a worker asks its node for: three of its shares of a checkpoint, and 20 GiB. A prepared corpus comes on top,
    whose size the spec does not tell; so nothing limits what a pod may use."""
    share = (checkpoint_bytes(spec) or 0.0) / spec.cluster.nodes.max
    return 20 + math.ceil(3 * share / 2**30)


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


def _labels(spec: RunSpec) -> dict[str, str]:
    labels = {"app.kubernetes.io/name": "losscast-run", "app.kubernetes.io/managed-by": "losscast"}
    if re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", spec.name):
        labels[RUN_LABEL] = spec.name
    else:
        labels[RUN_LABEL] = job_name(spec.name)
    return labels | ({"losscast/team": spec.team.strip("-")} if spec.team else {})


def _ray_job(spec: RunSpec, k8s: Kubernetes, text: str) -> dict[str, Any]:
    labels = _labels(spec)
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
            "entrypoint": f"python -m launcher.kuberay_entry {SPEC_FOLDER}/run.json",
            "metadata": {"losscast_run": spec.name},
            "backoffLimit": min(spec.policy.max_restarts, CLUSTERS_LOST),
            "submitterConfig": {"backoffLimit": 20},
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 60,
            "submitterPodTemplate": _submitter(spec, k8s),
            "rayClusterSpec": {
                "rayVersion": k8s.ray_version,
                "authOptions": {"mode": "token"},
                "headGroupSpec": {
                    "rayStartParams": {
                        "dashboard-host": "0.0.0.0",
                        "num-cpus": "0",  # no rank on the head
                        "object-store-memory": "200000000",
                    },
                    "template": _head(spec, k8s, text),
                },
                "workerGroupSpecs": [
                    {
                        "groupName": "workers",
                        "replicas": spec.cluster.nodes.max,
                        "minReplicas": spec.cluster.nodes.min,
                        "maxReplicas": spec.cluster.nodes.max,
                        "rayStartParams": {"object-store-memory": "1000000000"},
                        "template": _worker(spec, k8s),
                    }
                ],
            },
        },
    }


# Pods


def _template(
    spec: RunSpec,
    k8s: Kubernetes,
    containers: list[dict[str, Any]],
    volumes: list[dict[str, Any]],
    **more: Any,
) -> dict[str, Any]:
    """A pod template under PodSecurity `restricted`."""
    labels = _labels(spec)
    if k8s.service_account and _on_azure(spec):
        labels["azure.workload.identity/use"] = "true"
    annotations = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false", **more.pop("annotations", {})}
    pod: dict[str, Any] = {
        **({"serviceAccountName": k8s.service_account} if k8s.service_account else {}),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        **more,
        "containers": containers,
        "volumes": volumes,
    }
    if k8s.priority and not k8s.queue:
        pod["priorityClassName"] = k8s.priority
    return {"metadata": {"labels": labels, "annotations": annotations}, "spec": pod}


def _container(name: str, spec: RunSpec, k8s: Kubernetes, **more: Any) -> dict[str, Any]:
    mounts = [{"name": "tmp", "mountPath": "/tmp"}, {"name": "home", "mountPath": HOME}]
    return {
        "name": name,
        "image": k8s.image,
        "imagePullPolicy": "IfNotPresent" if "@sha256:" in k8s.image else "Always",
        "env": _env(spec, k8s),
        "volumeMounts": [*mounts, *more.pop("mounts", [])],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
        },
        **more,
    }


def _scratch() -> list[dict[str, Any]]:
    return [{"name": name, "emptyDir": {"sizeLimit": limit}} for name, limit in MOUNT_LIMITS.items()]


def _head(spec: RunSpec, k8s: Kubernetes, text: str) -> dict[str, Any]:
    field = {"fieldRef": {"fieldPath": "metadata.annotations['losscast/body']"}}
    volumes = [
        *_scratch(),
        {"name": "work", "emptyDir": {}},
        *_claims(k8s),
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}},
        {"name": "run", "downwardAPI": {"items": [{"path": "run.json", **field}]}},
    ]
    mounts = [
        {"name": "work", "mountPath": WORK},
        {"name": "shm", "mountPath": "/dev/shm"},
        {"name": "run", "mountPath": SPEC_FOLDER, "readOnly": True},
        *_claim_mounts(k8s),
    ]
    size = {"cpu": "4", "memory": "16Gi"}
    container = _container(
        "ray-head",
        spec,
        k8s,
        mounts=mounts,
        resources={"requests": {**size, "ephemeral-storage": "20Gi"}, "limits": size},
        ports=[
            {"name": "gcs", "containerPort": 6379},
            {"name": "dashboard", "containerPort": 8265},
            {"name": "metrics", "containerPort": 8080},
        ],
        lifecycle=_pre_stop(spec),
        **_probes("/api/gcs_healthz", 8265),
    )
    return _template(
        spec, k8s, [container], volumes, annotations={"losscast/body": text},
        terminationGracePeriodSeconds=commit_wait_s(spec) + 60,
    )  # fmt: skip


def _worker(spec: RunSpec, k8s: Kubernetes) -> dict[str, Any]:
    gpus = spec.cluster.gpus_per_node
    ranks = -(-spec.ranks // spec.cluster.nodes.max)
    shm = k8s.shared_memory_gib or (8 * gpus if gpus else ranks)
    size: dict[str, Any] = {
        "cpu": str(k8s.cpus_per_gpu * gpus if gpus else ranks),
        "memory": f"{k8s.memory_gib_per_gpu * gpus if gpus else 4 * ranks}Gi",
    }
    devices: dict[str, Any] = {"nvidia.com/gpu": gpus} if gpus else {}
    devices |= k8s.infiniband
    container = _container(
        "ray-worker",
        spec,
        k8s,
        mounts=[
            {"name": "work", "mountPath": WORK},
            {"name": "shm", "mountPath": "/dev/shm"},
            *_claim_mounts(k8s),
        ],
        resources={
            "requests": {**size, "ephemeral-storage": f"{disk_gib(spec)}Gi", **devices},
            "limits": {**size, **devices},
        },
        ports=[{"name": "metrics", "containerPort": 8080}],
        lifecycle=_pre_stop(spec),
        **_probes("/api/local_raylet_healthz", 52365),
    )
    volumes = [
        *_scratch(),
        {"name": "work", "emptyDir": {}},
        *_claims(k8s),
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{shm}Gi"}},
    ]
    more: dict[str, Any] = {"terminationGracePeriodSeconds": commit_wait_s(spec) + 60}
    if k8s.node_selector:
        more["nodeSelector"] = dict(k8s.node_selector)
    tolerations = [{"key": "nvidia.com/gpu", "operator": "Exists"}] if gpus else []
    tolerations += [t.model_dump(exclude_none=True) for t in k8s.tolerations]
    if tolerations:
        more["tolerations"] = tolerations
    if k8s.topology and k8s.queue:
        more["annotations"] = {"kueue.x-k8s.io/podset-required-topology": k8s.topology}
    elif k8s.topology:
        term = {
            "labelSelector": {"matchLabels": {RUN_LABEL: _labels(spec)[RUN_LABEL]}},
            "topologyKey": k8s.topology,
        }
        more["affinity"] = {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}
    return _template(spec, k8s, [container], volumes, **more)


def _submitter(spec: RunSpec, k8s: Kubernetes) -> dict[str, Any]:
    size = {"cpu": "500m", "memory": "1Gi"}
    container = _container(
        "ray-job-submitter",
        spec,
        k8s,
        env=[{"name": "HOME", "value": HOME}],
        resources={"requests": size, "limits": {**size, "ephemeral-storage": "1Gi"}},
    )
    return _template(spec, k8s, [container], _scratch(), restartPolicy="Never")


def _pre_stop(spec: RunSpec) -> dict[str, Any]:
    command = ["python", "-m", "launcher.kuberay_prestop", str(commit_wait_s(spec))]
    return {"preStop": {"exec": {"command": command}}}


def _probes(path: str, port: int) -> dict[str, Any]:
    """Ray's own health endpoints, which need no token. A rank that hangs is not the kubelet's to find, and a raylet
    that is slow under a full machine must not cost a run: ten minutes of silence, then a restart."""
    get = {"httpGet": {"path": path, "port": port}}
    return {
        "startupProbe": {**get, "periodSeconds": 5, "timeoutSeconds": 5, "failureThreshold": 120},
        "readinessProbe": {**get, "periodSeconds": 10, "timeoutSeconds": 10, "failureThreshold": 6},
        "livenessProbe": {**get, "periodSeconds": 30, "timeoutSeconds": 20, "failureThreshold": 20},
    }


def _env(spec: RunSpec, k8s: Kubernetes) -> list[dict[str, Any]]:
    """Environment of a Ray container: ours, then NCCL's, then the user's, which wins."""
    values = {
        **QUIET,
        "HOME": HOME,
        "LOSSCAST_CACHE": f"{WORK}/cache",
        "LOSSCAST_RUN": f"{spec.checkpoints.url.rstrip('/')}/{spec.name}",
        "LOSSCAST_SCHEDULED_EVENTS": "off",  # pods can't reach it; the node's drain and preStop tell of an eviction
        "LOSSCAST_WORK": f"{WORK}/work",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TORCH_EXTENSIONS_DIR": "/opt/torch_extensions" if spec.cluster.gpus_per_node else f"{HOME}/torch",
    }
    if spec.cluster.gpus_per_node:
        values |= {
            "NCCL_DEBUG": "WARN",
            "NCCL_SOCKET_IFNAME": "eth0",
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
            "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        }
        if k8s.infiniband:
            values |= {"NCCL_IB_PCI_RELAXED_ORDERING": "1", "NCCL_NET_GDR_LEVEL": "SYS"}
        else:
            values["NCCL_IB_DISABLE"] = "1"
    else:
        values["DS_ACCELERATOR"] = "cpu"
    if k8s.working_dir:
        values["PYTHONPATH"] = k8s.working_dir
    values |= k8s.env
    found: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in sorted(values.items())]
    if spec.monitor is not None:
        secret = {"secretKeyRef": {"name": k8s.token_secret, "key": "token"}}
        found.append({"name": spec.monitor.token_env, "valueFrom": secret})
    return found


def _claims(k8s: Kubernetes) -> list[dict[str, Any]]:
    return [
        {"name": f"disk-{n}", "persistentVolumeClaim": {"claimName": v.claim, **({"readOnly": True} if v.read_only else {})}}
        for n, v in enumerate(k8s.volumes)
    ]  # fmt: skip


def _claim_mounts(k8s: Kubernetes) -> list[dict[str, Any]]:
    return [
        {"name": f"disk-{n}", "mountPath": v.path, **({"readOnly": True} if v.read_only else {})}
        for n, v in enumerate(k8s.volumes)
    ]


def _on_azure(spec: RunSpec) -> bool:
    data = spec.data.path if spec.data else ""
    return spec.checkpoints.url.startswith("az://") or data.startswith("az://")


# Network


def _network_policy(spec: RunSpec, k8s: Kubernetes) -> dict[str, Any]:
    """In: the run's own pods, the operator on the dashboard, Prometheus on the metrics. Out: the run's own pods, DNS,
    HTTPS (storage, identity) and the monitor's port. Neighbouring runs can't reach each other, and nothing reaches the
    machine's metadata address, which would hand out the node's own identity."""
    own = {"podSelector": {"matchLabels": {RUN_LABEL: _labels(spec)[RUN_LABEL]}}}

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
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {
            "name": f"{job_name(spec.name)}-pods",
            "namespace": k8s.namespace,
            "labels": _labels(spec),
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
