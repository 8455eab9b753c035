"""Everything, in the order that Azure needs it."""

import base64
from typing import Any

import pulumi
import pulumi_kubernetes as k8s
from pulumi_azure_native import consumption, containerregistry, containerservice, keyvault, monitor, resources

from infra.azure.charts import make_charts
from infra.azure.cluster import make_cluster
from infra.azure.identities import ACR_PULL, grant, make_identities
from infra.azure.network import make_network
from infra.azure.settings import Settings
from infra.azure.storage import make_storage


def build(settings: Settings, *, tenant: str, subscription: str) -> dict[str, Any]:
    """Declare the stack. Returns its outputs."""
    prefix = settings.prefix
    made = resources.ResourceGroup(
        f"{prefix}-group", resource_group_name=f"{prefix}-losscast", location=settings.location
    )
    group, suffix = made.name, subscription.replace("-", "")[:8]
    network = make_network(prefix, group, settings.location)
    store = make_storage(settings, group, network, suffix)
    registry = containerregistry.Registry(
        f"{prefix}-images",
        resource_group_name=group,
        location=settings.location,
        registry_name=f"{prefix}{suffix}",
        sku=containerregistry.SkuArgs(name=containerregistry.SkuName.PREMIUM),
        admin_user_enabled=False,
        anonymous_pull_enabled=False,
    )
    vault = keyvault.Vault(
        f"{prefix}-vault",
        resource_group_name=group,
        location=settings.location,
        vault_name=f"{prefix}-{suffix}",
        properties=keyvault.VaultPropertiesArgs(
            tenant_id=tenant,
            sku=keyvault.SkuArgs(family=keyvault.SkuFamily.A, name=keyvault.SkuName.STANDARD),
            enable_rbac_authorization=True,
            enable_soft_delete=True,
            enable_purge_protection=True,
            public_network_access="Enabled",
            network_acls=keyvault.NetworkRuleSetArgs(
                default_action=keyvault.NetworkRuleAction.DENY,
                bypass=keyvault.NetworkRuleBypassOptions.AZURE_SERVICES,
                ip_rules=[keyvault.IPRuleArgs(value=ip) for ip in settings.authorized_ips],
            ),
        ),
    )
    cluster = make_cluster(settings, group, network, subscription)
    grant(
        f"{prefix}-pull",
        role=ACR_PULL,
        scope=registry.id,
        principal=cluster.kubelet,
        group=False,
        subscription=subscription,
    )
    identities = make_identities(settings, group, store, cluster.issuer, subscription)
    if settings.prometheus == "managed":
        monitor.AzureMonitorWorkspace(
            f"{prefix}-metrics", resource_group_name=group, location=settings.location
        )
    _budget(settings, made.id)
    provider = k8s.Provider(
        f"{prefix}-cluster", kubeconfig=_kubeconfig(group, cluster.name), enable_server_side_apply=True
    )
    make_charts(settings, provider)
    return {
        "resource_group": group,
        "cluster": cluster.name,
        "registry": registry.login_server,
        "vault": vault.name,
        "storage_account": store.account,
        "runs_url": pulumi.Output.concat("az://", store.account, "/", settings.containers["runs"]),
        "data_url": pulumi.Output.concat("az://", store.account, "/", settings.containers["data"]),
        "trainer_client_id": identities.client_ids["trainer"],
        "janitor_client_id": identities.client_ids["janitor"],
        "quotas": settings.quotas(),
        "dollars_per_hour": settings.dollars_per_hour(),
    }


def _kubeconfig(group: pulumi.Output[str], cluster: pulumi.Output[str]) -> pulumi.Output[str]:
    """For the charts: the address and certificate of the cluster; who we are says kubelogin, since local accounts are off."""

    def read(names: list[str]) -> pulumi.Output[str]:
        found = containerservice.list_managed_cluster_user_credentials_output(
            resource_group_name=names[0], resource_name=names[1], format="exec"
        )
        return found.apply(
            lambda c: base64.b64decode((c.kubeconfigs or [])[0].value).decode() if c.kubeconfigs else ""
        )

    return pulumi.Output.secret(pulumi.Output.all(group, cluster).apply(read))


def _budget(settings: Settings, scope: pulumi.Input[str]) -> None:
    """A mail at half, at all of the month's money, and when the month is going to cost more than that."""

    def at(percent: float, kind: consumption.ThresholdType) -> consumption.NotificationArgs:
        return consumption.NotificationArgs(
            enabled=True,
            operator=consumption.OperatorType.GREATER_THAN_OR_EQUAL_TO,
            threshold=percent,
            threshold_type=kind,
            contact_emails=settings.budget_emails,
        )

    consumption.Budget(
        f"{settings.prefix}-budget",
        scope=scope,
        budget_name=f"{settings.prefix}-monthly",
        amount=settings.monthly_budget,
        category=consumption.CategoryType.COST,
        time_grain=consumption.TimeGrainType.MONTHLY,
        time_period=consumption.BudgetTimePeriodArgs(start_date=f"{settings.budget_start}T00:00:00Z"),
        notifications={
            "half": at(50, consumption.ThresholdType.ACTUAL),
            "all": at(100, consumption.ThresholdType.ACTUAL),
            "forecast": at(110, consumption.ThresholdType.FORECASTED),
        },
    )
