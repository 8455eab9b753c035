"""AKS: a system pool that stays, GPU pools that grow from nothing, Entra for people, workload identity for pods."""

from dataclasses import dataclass

import pulumi
from pulumi_azure_native import containerservice as aks
from pulumi_azure_native import managedidentity

from infra.azure.identities import CLUSTER_USER, NETWORK_CONTRIBUTOR, grant
from infra.azure.network import Network
from infra.azure.settings import GpuPool, Settings

TAINT = "nvidia.com/gpu=present:NoSchedule"
SPOT_TAINT = "kubernetes.azure.com/scalesetpriority=spot:NoSchedule"
"""AKS adds it to spot pools by itself; said here so that a plan shows it."""


@dataclass(frozen=True)
class Cluster:
    name: pulumi.Output[str]
    id: pulumi.Output[str]
    issuer: pulumi.Output[str]
    kubelet: pulumi.Output[str]
    """Object id of the nodes' identity, which pulls images."""
    pools: list[aks.AgentPool]


def make_cluster(
    settings: Settings, group: pulumi.Input[str], network: Network, subscription: str
) -> Cluster:
    """The cluster and its pools. The control plane's own identity may join the nodes' subnet, and nothing else."""
    prefix = settings.prefix
    control = managedidentity.UserAssignedIdentity(
        f"{prefix}-aks", resource_group_name=group, location=settings.location
    )
    grant(
        f"{prefix}-aks-subnet",
        role=NETWORK_CONTRIBUTOR,
        scope=network.nodes,
        principal=control.principal_id,
        group=False,
        subscription=subscription,
    )
    cluster = aks.ManagedCluster(
        f"{prefix}-aks",
        resource_group_name=group,
        location=settings.location,
        dns_prefix=prefix,
        kubernetes_version=settings.kubernetes_version,
        sku=aks.ManagedClusterSKUArgs(
            name=aks.ManagedClusterSKUName.BASE, tier=aks.ManagedClusterSKUTier.STANDARD
        ),
        identity=aks.ManagedClusterIdentityArgs(
            type=aks.ResourceIdentityType.USER_ASSIGNED, user_assigned_identities=[control.id]
        ),
        disable_local_accounts=True,
        enable_rbac=True,
        aad_profile=aks.ManagedClusterAADProfileArgs(
            managed=True, enable_azure_rbac=False, admin_group_object_ids=[settings.admin_group]
        ),
        api_server_access_profile=aks.ManagedClusterAPIServerAccessProfileArgs(
            authorized_ip_ranges=settings.authorized_ips, disable_run_command=True
        ),
        oidc_issuer_profile=aks.ManagedClusterOIDCIssuerProfileArgs(enabled=True),
        security_profile=aks.ManagedClusterSecurityProfileArgs(
            workload_identity=aks.ManagedClusterSecurityProfileWorkloadIdentityArgs(enabled=True)
        ),
        network_profile=aks.ContainerServiceNetworkProfileArgs(
            network_plugin=aks.NetworkPlugin.AZURE,
            network_plugin_mode=aks.NetworkPluginMode.OVERLAY,
            network_dataplane=aks.NetworkDataplane.CILIUM,
            network_policy=aks.NetworkPolicy.CILIUM,
            pod_cidr="10.244.0.0/16",
            service_cidr="10.41.0.0/16",
            dns_service_ip="10.41.0.10",
        ),
        auto_scaler_profile=aks.ManagedClusterPropertiesAutoScalerProfileArgs(
            scale_down_unneeded_time="10m",
            skip_nodes_with_local_storage="false",
            max_graceful_termination_sec="660",
        ),
        auto_upgrade_profile=aks.ManagedClusterAutoUpgradeProfileArgs(
            upgrade_channel=aks.UpgradeChannel.PATCH, node_os_upgrade_channel=aks.NodeOSUpgradeChannel.NONE
        ),
        azure_monitor_profile=aks.ManagedClusterAzureMonitorProfileArgs(
            metrics=aks.ManagedClusterAzureMonitorProfileMetricsArgs(enabled=settings.prometheus == "managed")
        ),
        agent_pool_profiles=[
            aks.ManagedClusterAgentPoolProfileArgs(
                name="system",
                mode=aks.AgentPoolMode.SYSTEM,
                vm_size=settings.system_vm_size,
                count=settings.system_min,
                min_count=settings.system_min,
                max_count=settings.system_max,
                enable_auto_scaling=True,
                os_type=aks.OSType.LINUX,
                os_sku=aks.OSSKU.UBUNTU,
                os_disk_type=aks.OSDiskType.EPHEMERAL,
                vnet_subnet_id=network.nodes,
                enable_encryption_at_host=True,
            )
        ],
        opts=pulumi.ResourceOptions(ignore_changes=["agentPoolProfiles[0].count", "kubernetesVersion"]),
    )
    pools = [_pool(pool, settings, group, cluster, network) for pool in settings.gpu_pools]
    grant(
        f"{prefix}-submitters",
        role=CLUSTER_USER,
        scope=cluster.id,
        principal=settings.submitters_group,
        group=True,
        subscription=subscription,
    )
    issuer = cluster.oidc_issuer_profile.apply(lambda p: p.issuer_url if p else "")
    kubelet = cluster.identity_profile.apply(lambda p: (p["kubeletidentity"].object_id or "") if p else "")
    return Cluster(cluster.name, cluster.id, issuer, kubelet, pools)


def _pool(
    pool: GpuPool, settings: Settings, group: pulumi.Input[str], cluster: aks.ManagedCluster, network: Network
) -> aks.AgentPool:
    """GPU machines with Azure's driver, labelled and tainted as k8s/overlays/azure expects."""
    spot = pool.spot
    return aks.AgentPool(
        f"{settings.prefix}-{pool.name}",
        resource_group_name=group,
        resource_name_=cluster.name,
        agent_pool_name=pool.name,
        mode=aks.AgentPoolMode.USER,
        vm_size=pool.vm_size,
        count=pool.min,
        min_count=pool.min,
        max_count=pool.max,
        enable_auto_scaling=True,
        scale_down_mode=aks.ScaleDownMode.DELETE,
        os_type=aks.OSType.LINUX,
        os_sku=aks.OSSKU.UBUNTU,
        os_disk_size_gb=pool.os_disk_gib,
        vnet_subnet_id=network.nodes,
        gpu_profile=aks.GPUProfileArgs(driver=aks.GPUDriver.INSTALL),
        # AKS keeps the prefix kubernetes.azure.com to itself; NVIDIA's device plugin looks for its own
        node_labels={
            "losscast/pool": "gpu",
            "losscast/priority": "spot" if spot else "regular",
            "nvidia.com/gpu.present": "true",
        },
        node_taints=[TAINT, *([SPOT_TAINT] if spot else [])],
        scale_set_priority=aks.ScaleSetPriority.SPOT if spot else aks.ScaleSetPriority.REGULAR,
        scale_set_eviction_policy=aks.ScaleSetEvictionPolicy.DELETE if spot else None,
        spot_max_price=pool.spot_max_price if spot else None,
        tags={"losscast-pool": pool.name},
        opts=pulumi.ResourceOptions(ignore_changes=["count"]),
    )
