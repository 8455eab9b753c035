"""Where runs are kept: a storage account without keys and without a public door, whose deletions can be undone."""

from dataclasses import dataclass

import pulumi
from pulumi_azure_native import network as net
from pulumi_azure_native import storage

from infra.azure.network import Network
from infra.azure.settings import Settings


@dataclass(frozen=True)
class Storage:
    account: pulumi.Output[str]
    """Name."""
    account_id: pulumi.Output[str]
    containers: dict[str, pulumi.Output[str]]
    """Resource id by purpose: runs, data."""


def make_storage(
    settings: Settings, group: pulumi.Input[str], network: Network, suffix: pulumi.Input[str]
) -> Storage:
    """The account, its containers, and the private endpoint through which alone they are reached."""
    name = pulumi.Output.concat(settings.prefix, suffix)
    account = storage.StorageAccount(
        f"{settings.prefix}-store",
        resource_group_name=group,
        location=settings.location,
        account_name=name,
        kind=storage.Kind.STORAGE_V2,
        sku=storage.SkuArgs(name=storage.SkuName.STANDARD_ZRS),
        allow_shared_key_access=False,
        default_to_o_auth_authentication=True,
        allow_blob_public_access=False,
        allow_cross_tenant_replication=False,
        public_network_access=storage.PublicNetworkAccess.DISABLED,
        network_rule_set=storage.NetworkRuleSetArgs(
            default_action=storage.DefaultAction.DENY, bypass=storage.Bypass.NONE
        ),
        enable_https_traffic_only=True,
        minimum_tls_version=storage.MinimumTlsVersion.TLS1_2,
        opts=pulumi.ResourceOptions(protect=True),
    )
    keep = storage.DeleteRetentionPolicyArgs(enabled=True, days=settings.keep_deleted_days)
    storage.BlobServiceProperties(
        f"{settings.prefix}-blobs",
        resource_group_name=group,
        account_name=account.name,
        blob_services_name="default",
        is_versioning_enabled=True,
        delete_retention_policy=keep,
        container_delete_retention_policy=keep,
    )
    # versions are what a trainer without the right to delete leaves of what it overwrote
    storage.ManagementPolicy(
        f"{settings.prefix}-versions",
        resource_group_name=group,
        account_name=account.name,
        management_policy_name="default",
        policy=storage.ManagementPolicySchemaArgs(
            rules=[
                storage.ManagementPolicyRuleArgs(
                    name="old-versions",
                    type=storage.RuleType.LIFECYCLE,
                    enabled=True,
                    definition=storage.ManagementPolicyDefinitionArgs(
                        filters=storage.ManagementPolicyFilterArgs(blob_types=["blockBlob"]),
                        actions=storage.ManagementPolicyActionArgs(
                            version=storage.ManagementPolicyVersionArgs(
                                delete=storage.DateAfterCreationArgs(
                                    days_after_creation_greater_than=settings.keep_deleted_days
                                )
                            )
                        ),
                    ),
                )
            ]
        ),
    )
    containers = {
        purpose: storage.BlobContainer(
            f"{settings.prefix}-{purpose}",
            resource_group_name=group,
            account_name=account.name,
            container_name=container,
            public_access=storage.PublicAccess.NONE,
            opts=pulumi.ResourceOptions(protect=True),
        ).id
        for purpose, container in settings.containers.items()
    }
    endpoint = net.PrivateEndpoint(
        f"{settings.prefix}-blob-endpoint",
        resource_group_name=group,
        location=settings.location,
        subnet=net.SubnetArgs(id=network.endpoints),
        private_link_service_connections=[
            net.PrivateLinkServiceConnectionArgs(
                name="blob", private_link_service_id=account.id, group_ids=["blob"]
            )
        ],
    )
    net.PrivateDnsZoneGroup(
        f"{settings.prefix}-blob-names",
        resource_group_name=group,
        private_endpoint_name=endpoint.name,
        private_dns_zone_group_name="default",
        private_dns_zone_configs=[
            net.PrivateDnsZoneConfigArgs(name="blob", private_dns_zone_id=network.blob_zone)
        ],
    )
    return Storage(account.name, account.id, containers)
