"""One network: nodes in a subnet, storage behind a private endpoint in another, and the names that lead there."""

from dataclasses import dataclass

import pulumi
from pulumi_azure_native import network, privatedns

BLOB_ZONE = "privatelink.blob.core.windows.net"


@dataclass(frozen=True)
class Network:
    nodes: pulumi.Output[str]
    endpoints: pulumi.Output[str]
    blob_zone: pulumi.Output[str]


def make_network(prefix: str, group: pulumi.Input[str], location: str) -> Network:
    """The virtual network 10.40.0.0/16. Pods have addresses of their own overlay."""
    net = network.VirtualNetwork(
        f"{prefix}-net",
        resource_group_name=group,
        location=location,
        address_space=network.AddressSpaceArgs(address_prefixes=["10.40.0.0/16"]),
    )
    nodes = network.Subnet(
        f"{prefix}-nodes",
        resource_group_name=group,
        virtual_network_name=net.name,
        address_prefix="10.40.0.0/18",
    )
    endpoints = network.Subnet(
        f"{prefix}-endpoints",
        resource_group_name=group,
        virtual_network_name=net.name,
        address_prefix="10.40.64.0/24",
        private_endpoint_network_policies=network.VirtualNetworkPrivateEndpointNetworkPolicies.DISABLED,
        opts=pulumi.ResourceOptions(depends_on=[nodes]),  # Azure changes one subnet of a network at a time
    )
    zone = privatedns.PrivateZone(
        f"{prefix}-blob-zone", resource_group_name=group, private_zone_name=BLOB_ZONE, location="global"
    )
    privatedns.VirtualNetworkLink(
        f"{prefix}-blob-link",
        resource_group_name=group,
        private_zone_name=zone.name,
        location="global",
        registration_enabled=False,
        virtual_network=privatedns.SubResourceArgs(id=net.id),
    )
    return Network(nodes.id, endpoints.id, zone.id)
