"""The pods of a run's RayJob: head, workers, submitter, each under PodSecurity `restricted`. Pure, part of `launcher.kuberay.manifests`.

No root, no capability, no writable image: what a pod writes goes to /tmp, its home, and its own disk, which are empty when it
starts. Ray's token is put in by the operator; ours would win over it, so there is none here.
"""

import hashlib
import ipaddress
import math
import re
from typing import Any
from urllib.parse import urlsplit

from launcher.jobs.job import QUIET
from launcher.runspec.model import Kubernetes, RunSpec
from launcher.training.memory import checkpoint_bytes

HOME = "/home/losscast"
SPEC_FOLDER = "/etc/losscast"
"""Where the entrypoint finds run.json."""
WORK = "/var/losscast"
"""A pod's own disk: checkpoints on their way to the storage, prepared corpora."""
USER_ID = 10001
NAME_LIMIT = 47
"""KubeRay's, for a RayJob: it appends to the name."""
COMMIT_BYTES_PER_S = 0.25e9
"""A node's slowest upload of a checkpoint that the grace period still covers."""
RUN_LABEL = "losscast/run"
EVENTS = "LOSSCAST_SCHEDULED_EVENTS"
"""Variable of `launcher.recovery.preempt`: the address that tells of evictions, or `off`."""
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


def notices_at(k8s: Kubernetes) -> tuple[str, int] | None:
    """IP address and port where run.yaml has the workers ask for notices of eviction; None where they don't ask.

    Azure's are at the metadata address, which hands out the node's own identity to whoever reaches it: so it is opened to a
    run only where its own `kubernetes.env` names it.
    """
    found = urlsplit(k8s.env.get(EVENTS, ""))
    try:
        address = ipaddress.ip_address(found.hostname or "")
        return str(address), found.port or (443 if found.scheme == "https" else 80)
    except ValueError:  # off, nothing, or a name, which a policy can't let through
        return None


def labels_of(spec: RunSpec) -> dict[str, str]:
    labels = {"app.kubernetes.io/name": "losscast-run", "app.kubernetes.io/managed-by": "losscast"}
    if re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", spec.name):
        labels[RUN_LABEL] = spec.name
    else:
        labels[RUN_LABEL] = job_name(spec.name)
    return labels | ({"losscast/team": spec.team.strip("-")} if spec.team else {})


def _template(
    spec: RunSpec,
    k8s: Kubernetes,
    containers: list[dict[str, Any]],
    volumes: list[dict[str, Any]],
    **more: Any,
) -> dict[str, Any]:
    """A pod template under PodSecurity `restricted`."""
    labels = labels_of(spec)
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


def head_pod(spec: RunSpec, k8s: Kubernetes, text: str) -> dict[str, Any]:
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


def worker_pod(spec: RunSpec, k8s: Kubernetes) -> dict[str, Any]:
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
            "labelSelector": {"matchLabels": {RUN_LABEL: labels_of(spec)[RUN_LABEL]}},
            "topologyKey": k8s.topology,
        }
        more["affinity"] = {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}
    return _template(spec, k8s, [container], volumes, **more)


def submitter_pod(spec: RunSpec, k8s: Kubernetes) -> dict[str, Any]:
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
    command = ["python", "-m", "launcher.kuberay.prestop", str(commit_wait_s(spec))]
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
        EVENTS: "off",  # the node's drain and preStop tell of an eviction; `notices_at` opens the way to hear it earlier
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
