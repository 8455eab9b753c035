"""What a person decides about the infrastructure, checked before anything is asked of Azure. Imports no Pulumi.

Money in US dollars, memory and disks in GiB. No price is known here: what a machine costs depends on region, contract and day, so
whoever writes the settings says it (docs/azure.md has the command that asks Azure's own price list); the bill is Azure's.
"""

import ipaddress
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

Uuid = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")]
Version = Annotated[str, StringConstraints(pattern=r"^\d+\.\d+\.\d+$")]


@dataclass(frozen=True)
class Machine:
    """A GPU size that AKS takes."""

    gpus: int
    gpu: str
    cores: int
    infiniband: bool
    quota: str
    """The family, as the subscription's quota page calls it; its spelling could not be checked against a subscription."""


MACHINES: dict[str, Machine] = {
    "Standard_ND96isr_H100_v5": Machine(8, "H100", 96, True, "Standard NDSH100v5 Family vCPUs"),
    "Standard_ND96isr_H200_v5": Machine(8, "H200", 96, True, "Standard NDISRH200V5 Family vCPUs"),
    "Standard_ND96amsr_A100_v4": Machine(8, "A100", 96, True, "Standard NDAMSv4_A100Family vCPUs"),
    "Standard_NC40ads_H100_v5": Machine(1, "H100-NVL", 40, False, "Standard NCadsH100v5 Family vCPUs"),
    "Standard_NC80adis_H100_v5": Machine(2, "H100-NVL", 80, False, "Standard NCadsH100v5 Family vCPUs"),
    "Standard_NC24ads_A100_v4": Machine(1, "A100", 24, False, "Standard NCADSA100v4 Family vCPUs"),
}
SPOT_QUOTA = "Total Regional Spot vCPUs"


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GpuPool(Part):
    """Machines of one size in one scale set: one InfiniBand fabric. Grows from nothing when a run is let in."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9]{0,11}$")]
    """AKS allows twelve letters and digits."""
    vm_size: str
    """One of MACHINES."""
    max: int = Field(ge=1, le=1000)
    """Machines at most."""
    dollars_per_hour: float = Field(gt=0)
    """Of one machine on demand, in your region and contract: what plans, warnings and the budget are compared with."""
    min: int = Field(default=0, ge=0, le=1000)
    """Machines that stay though nobody uses them."""
    spot: bool = False
    """Cheaper, and taken away at 30 s notice."""
    spot_max_price: float = Field(default=-1, ge=-1)
    """Dollars an hour; -1 pays up to the price on demand."""
    os_disk_gib: int = Field(default=512, ge=128, le=4096)

    @property
    def machine(self) -> Machine:
        return MACHINES[self.vm_size]

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.vm_size not in MACHINES:
            raise ValueError(f"vm_size: {self.vm_size} is not known here. Use one of {', '.join(MACHINES)}.")
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}. Swap them.")
        if self.spot and self.min:
            raise ValueError(
                f"min {self.min}: a spot machine stays only as long as Azure likes. Set min to 0."
            )
        if not self.spot and self.spot_max_price != -1:
            raise ValueError("spot_max_price is for spot: true. Leave it out, or set spot to true.")
        return self


class Charts(Part):
    """Helm charts by version, none of which was installed by us. Each was seen in public use as of 2026-11-25, and newer ones of
    some exist: raise one at a time, and read its notes."""

    kuberay: Version = "1.6.2"
    """ray-project/kuberay-helm, release kuberay-operator-1.6.2."""
    kueue: Version = "0.17.2"
    """kubernetes-sigs/kueue, release v0.17.2; its configuration is version v1beta2, as `infra.azure.charts` writes it."""
    prometheus: Version = "75.15.1"
    """prometheus-community/helm-charts, kube-prometheus-stack: operator v0.83.0."""
    device_plugin: Version = "0.17.4"
    """NVIDIA/k8s-device-plugin, v0.17.4."""
    network_operator: Version = "25.7.0"
    """Mellanox/network-operator, v25.7.0."""


class Settings(Part):
    """Everything the program is told."""

    prefix: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9]{2,11}$")]
    """Begins every name; with a suffix of the subscription's it makes the storage account's, which is global."""
    location: str = "westeurope"
    admin_group: Uuid
    """Entra group that administers the cluster. Local accounts are off."""
    submitters_group: Uuid
    """Entra group that may submit runs, and read the cluster's address."""
    kubernetes_version: Annotated[str, StringConstraints(pattern=r"^1\.\d{2}$")]
    """One of `az aks get-versions`: AKS supports each for about a year, so no default would stay right."""
    authorized_ips: list[str] = Field(min_length=1)
    """Networks that may reach the API server, as CIDR."""
    system_vm_size: str = "Standard_D8ds_v5"
    system_min: int = Field(default=2, ge=1, le=20)
    system_max: int = Field(default=4, ge=1, le=50)
    gpu_pools: list[GpuPool] = Field(min_length=1)
    containers: dict[Literal["runs", "data"], str] = Field(
        default_factory=lambda: {"runs": "runs", "data": "corpora"}
    )
    """Blob containers: what runs write, what they read."""
    keep_deleted_days: int = Field(default=14, ge=1, le=365)
    """How long a deleted or overwritten blob can be had back."""
    prometheus: Literal["self", "managed"] = "self"
    """self: the operator in the cluster, which takes our rules as they are. managed: Azure Monitor's."""
    monthly_budget: float = Field(gt=0)
    budget_emails: list[str] = Field(min_length=1)
    budget_start: Annotated[str, StringConstraints(pattern=r"^20\d\d-(0[1-9]|1[0-2])-01$")]
    """First day of the month in which the stack is made, or of a later one."""
    trainer_namespace: str = "training"
    charts: Charts = Charts()

    @model_validator(mode="after")
    def _possible(self) -> Self:
        names = [p.name for p in self.gpu_pools]
        if len(set(names)) < len(names) or "system" in names:
            raise ValueError(
                f"gpu_pools: names must differ, and none may be `system`; got {', '.join(names)}."
            )
        if self.system_min > self.system_max:
            raise ValueError(
                f"system_min {self.system_min} is above system_max {self.system_max}. Swap them."
            )
        for text in self.authorized_ips:
            network = ipaddress.ip_network(text)
            if network.prefixlen == 0:
                raise ValueError(
                    f"authorized_ips: {text} is everybody. Name the networks that people work from."
                )
        for email in self.budget_emails:
            if email.count("@") != 1 or email.startswith("@") or email.endswith("@"):
                raise ValueError(f"budget_emails: {email!r} is no address.")
        if set(self.containers) != {"runs", "data"} or len(set(self.containers.values())) < 2:
            raise ValueError(
                "containers: need two that differ, runs and data: who may write one must not write the other."
            )
        return self

    @property
    def infiniband(self) -> bool:
        return any(p.machine.infiniband for p in self.gpu_pools)

    def quotas(self) -> dict[str, int]:
        """Cores to ask for, by quota's name."""
        found: dict[str, int] = {}
        for pool in self.gpu_pools:
            name = SPOT_QUOTA if pool.spot else pool.machine.quota
            found[name] = found.get(name, 0) + pool.machine.cores * pool.max
        return found

    def dollars_per_hour(self) -> dict[str, float]:
        """What stands idle, and what everything on demand costs at its largest."""
        idle = sum(p.dollars_per_hour * p.min for p in self.gpu_pools)
        full = sum(p.dollars_per_hour * p.max for p in self.gpu_pools if not p.spot)
        return {"gpu_idle": idle, "gpu_full_on_demand": full}


class WrongSettings(ValueError):
    """Said in full: every key, what is wrong, what instead."""


def read_settings(data: Any) -> Settings:
    """The settings from plain data. Raises WrongSettings naming each key."""
    try:
        return Settings.model_validate(data)
    except ValidationError as error:
        lines = [
            f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg'].removeprefix('Value error, ')}"
            for e in error.errors()
        ]
        raise WrongSettings("losscast-azure:settings can't be used:\n" + "\n".join(lines)) from None
