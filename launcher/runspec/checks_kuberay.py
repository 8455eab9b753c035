"""Combinations of keys that a Kubernetes cluster would refuse, or lose a run by. Pure; part of `launcher.runspec.checks`."""

import re
from collections.abc import Iterator

from launcher.runspec.cluster import Kubernetes
from launcher.runspec.problem import Problem
from launcher.runspec.sections import Sections

RAY_WITH_TOKENS = (2, 52, 0)
OWN_PATHS = ("/tmp", "/home/losscast", "/dev/shm", "/etc/losscast", "/var/losscast", "/proc", "/sys", "/dev")
"""Where a run's pods mount their own things."""
QUALIFIED = re.compile(r"([a-z0-9]([a-z0-9.-]*[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
"""Names of labels and of device resources."""


def impossible_on_kubernetes(spec: Sections) -> Iterator[Problem]:
    """Nothing for a spec without `kubernetes`."""
    k8s, nodes = spec.kubernetes, spec.cluster.nodes
    if k8s is None or spec.cluster.to != "kuberay":
        return
    if k8s.queue and nodes.min < nodes.max:
        yield Problem(
            ("kubernetes.queue", "cluster.nodes.min", "cluster.nodes.max"),
            f"Kueue lets all {nodes.max} nodes in or none, and a run that goes on with {nodes.min} was not tried under it. "
            f"Set nodes to {nodes.max}, or leave queue out.",
        )
    if tuple(int(n) for n in k8s.ray_version.split(".")) < RAY_WITH_TOKENS:
        yield Problem(
            ("kubernetes.ray_version",),
            f"Ray {k8s.ray_version} knows no token, and its jobs API runs anybody's code (CVE-2023-48022). "
            "Use an image with 2.52.0 or newer.",
        )
    if k8s.working_dir and not k8s.working_dir.startswith("/"):
        yield Problem(
            ("kubernetes.working_dir",),
            f"{k8s.working_dir!r} is a folder here, and nothing carries it to the pods. Give the absolute path of a folder in "
            "the image or on a volume.",
        )
    shm, memory = k8s.shared_memory_gib, k8s.memory_gib_per_gpu * spec.cluster.gpus_per_node
    if shm is not None and memory and shm >= memory:
        yield Problem(
            ("kubernetes.shared_memory_gib", "kubernetes.memory_gib_per_gpu"),
            f"/dev/shm counts against the pod's memory, {memory} GiB. Set shared_memory_gib to {8 * spec.cluster.gpus_per_node}.",
        )
    for group in ("node_selector", "infiniband"):
        for name in getattr(k8s, group):
            if not QUALIFIED.fullmatch(name):
                yield Problem(
                    (f"kubernetes.{group}",),
                    f"{name!r} is no name that Kubernetes takes, such as rdma/shared_ib.",
                )
    yield from _volumes(spec, k8s)


def _volumes(spec: Sections, k8s: Kubernetes) -> Iterator[Problem]:
    seen: set[str] = set()
    for n, volume in enumerate(k8s.volumes):
        key, path = f"kubernetes.volumes.{n}.path", volume.path.rstrip("/") or "/"
        if path == "/" or any(path == own or path.startswith(own + "/") for own in OWN_PATHS):
            yield Problem((key,), f"{path} is taken in a run's pods. Mount it below /mnt.")
        elif path in seen:
            yield Problem((key,), f"{path} is mounted twice.")
        seen.add(path)
    url = spec.checkpoints.url
    if url.startswith("/") and not any(_below(url, v.path) and not v.read_only for v in k8s.volumes):
        yield Problem(
            ("checkpoints.url", "kubernetes.volumes"),
            f"{url} lies on no volume that pods can write to: it would go with the pod. "
            f"Add volumes: [{{claim: NAME, path: {url}}}], or use az://account/container/prefix.",
        )


def _below(path: str, folder: str) -> bool:
    return (path.rstrip("/") + "/").startswith(folder.rstrip("/") + "/")
