"""Where a run runs: how many machines with what GPUs, and what a RayJob needs to know of its Kubernetes cluster."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from launcher.runspec.keys import NAME, Natural, Part, Positive, Text, as_tuple, whole


class Nodes(Part):
    """How many machines; `min` below `max` makes the run elastic."""

    min: Annotated[Positive, Field(le=100_000)]
    """Go on with this many when others are lost."""
    max: Annotated[Positive, Field(le=100_000)]
    """Start with this many."""


def _nodes(value: Any) -> Any:
    value = whole(value)
    return {"min": value, "max": value} if isinstance(value, int) and not isinstance(value, bool) else value


class Cluster(Part):
    """Where it runs."""

    to: Annotated[str, Field(pattern=r"^(local|kuberay|(ray|https?)://\S+)$")] = "local"
    """`local`, the address of a Ray cluster (ray:// or its dashboard's http://), or `kuberay`."""
    nodes: Annotated[Nodes, BeforeValidator(_nodes)] = Nodes(min=1, max=1)
    """A number, or {min, max}."""
    gpus_per_node: Annotated[Natural, Field(le=64)] = 0
    """0 trains on CPU."""
    gpu: Text | None = None
    """Model name, such as H100: gives peak FLOP/s, memory, and whether bf16 works."""
    price_per_gpu_hour: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """In dollars."""


class Toleration(Part):
    """A taint that the workers put up with, as Kubernetes writes it."""

    key: Text
    """Of the taint, such as kubernetes.azure.com/scalesetpriority."""
    operator: Literal["Exists", "Equal"] = "Exists"
    """Exists: whatever its value."""
    value: Text | None = None
    """With Equal."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """None: every effect."""


class Volume(Part):
    """A PersistentVolumeClaim of the namespace, mounted into every pod."""

    claim: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")]
    """The claim's name. Checkpoints need one that many nodes may write (ReadWriteMany)."""
    path: Annotated[str, Field(pattern=r"^/[^\s:]+$")]
    """Where pods find it."""
    read_only: bool = False
    """Mounted for reading only."""


class Kubernetes(Part):
    """What a RayJob needs to know of its cluster; read with `cluster.to: kuberay` only."""

    namespace: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")] = "default"
    """Where the RayJob is made."""
    queue: Text | None = None
    """Kueue's LocalQueue."""
    image: Text
    """Container image with losscast, torch and the CUDA that fits the nodes."""
    service_account: Text | None = None
    """What pods run as; with workload identity, what may reach the storage."""
    env: dict[str, str] = Field(default_factory=dict)
    """More environment for every rank. No secrets: specs are kept and shared."""
    working_dir: Text | None = None
    """Folder that travels with the job: where entrypoints are imported from and relative paths start."""
    ray_version: Annotated[str, Field(pattern=r"^\d+\.\d+\.\d+$")] = "2.60.0"
    """The image's Ray. 2.52.0 or newer: older ones know no token."""
    priority: Annotated[str, Field(pattern=NAME)] | None = None
    """Kueue's WorkloadPriorityClass with a queue, a PriorityClass without."""
    topology: Text | None = None
    """Node label inside one value of which all workers must lie, such as kubernetes.azure.com/agentpool: one InfiniBand fabric."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    """Labels of the workers' nodes."""
    tolerations: Annotated[tuple[Toleration, ...], BeforeValidator(as_tuple)] = ()
    """More taints the workers put up with; nvidia.com/gpu is always among them."""
    infiniband: dict[str, Annotated[Positive, Field(le=64)]] = Field(default_factory=dict)
    """Device resources a worker takes, such as {rdma/shared_ib: 1}; empty talks over Ethernet."""
    cpus_per_gpu: Annotated[Positive, Field(le=512)] = 8
    """CPU cores a worker asks for, per GPU (per rank without GPUs: 1)."""
    memory_gib_per_gpu: Annotated[Positive, Field(le=4096)] = 100
    """Memory a worker asks for, shared memory included, per GPU (per rank without GPUs: 4)."""
    shared_memory_gib: Annotated[Positive, Field(le=4096)] | None = None
    """/dev/shm of a worker; default 8 per GPU, counted against its memory."""
    volumes: Annotated[tuple[Volume, ...], BeforeValidator(as_tuple)] = ()
    """Shared disks, for paths that are not az://."""
    token_secret: Annotated[str, Field(pattern=NAME)] = "losscast-token"
    """Secret of the namespace whose key `token` is the monitor's bearer token."""
