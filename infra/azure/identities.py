"""Who may do what, and nothing else. Two identities of pods, federated with one service account each; the monitor has none.

    trainer   reads corpora; reads, creates and overwrites in the runs container. Never deletes: a run that goes wild, or
              whoever took it over, can't take checkpoints away, and what it overwrites is kept as a version
    janitor   reads and deletes in the runs container. Never writes: it can't forge a checkpoint

Roles are our own: Azure's "Storage Blob Data Contributor" can delete. `GRANTS` is the whole list; a test compares what the
program asks of Azure with it, entry by entry.
"""

from dataclasses import dataclass

import pulumi
from pulumi_azure_native import authorization, managedidentity

from infra.azure.settings import Settings
from infra.azure.storage import Storage

BLOBS = "Microsoft.Storage/storageAccounts/blobServices/containers/blobs"
ACR_PULL = "7f951dda-4ed3-4680-a7ca-43fe172d538d"
NETWORK_CONTRIBUTOR = "4d97b98b-1d4f-4787-a291-c67834d212e7"
CLUSTER_USER = "4abbcc35-e782-43d8-92c5-2d3f1bd2253f"
SECRETS_USER = "4633458b-17de-408a-b874-0445c86b69e6"
"""Azure's own roles, by id: pull images; join a subnet; read the cluster's address; read a secret."""

ROLES: dict[str, tuple[str, ...]] = {
    "reader": (f"{BLOBS}/read",),
    "writer": (f"{BLOBS}/read", f"{BLOBS}/write", f"{BLOBS}/add/action"),
    "remover": (f"{BLOBS}/read", f"{BLOBS}/delete"),
}
"""Data actions of each role of ours. None has a control-plane action."""

GRANTS: dict[str, tuple[tuple[str, str], ...]] = {
    "trainer": (("writer", "runs"), ("reader", "data")),
    "janitor": (("remover", "runs"),),
}
"""Of each pod identity: role, and the one container it holds for."""

ACCOUNTS = {"trainer": "losscast-trainer", "janitor": "losscast-janitor"}


@dataclass(frozen=True)
class Identities:
    client_ids: dict[str, pulumi.Output[str]]


def make_identities(
    settings: Settings, group: pulumi.Input[str], store: Storage, issuer: pulumi.Input[str], subscription: str
) -> Identities:
    """Identities, their federation with service accounts of the cluster, and their grants."""
    scope = f"/subscriptions/{subscription}"
    roles = {
        name: authorization.RoleDefinition(
            f"{settings.prefix}-{name}",
            scope=scope,
            role_name=f"{settings.prefix} blob {name}",
            description=f"losscast: {', '.join(a.rpartition('/blobs/')[2] for a in actions)} of blobs, nothing else",
            assignable_scopes=[scope],
            permissions=[
                authorization.PermissionArgs(
                    actions=[], not_actions=[], data_actions=list(actions), not_data_actions=[]
                )
            ],
        )
        for name, actions in ROLES.items()
    }
    ids: dict[str, pulumi.Output[str]] = {}
    for who, grants in GRANTS.items():
        identity = managedidentity.UserAssignedIdentity(
            f"{settings.prefix}-{who}", resource_group_name=group, location=settings.location
        )
        managedidentity.FederatedIdentityCredential(
            f"{settings.prefix}-{who}-federation",
            resource_group_name=group,
            resource_name_=identity.name,
            issuer=issuer,
            subject=f"system:serviceaccount:{settings.trainer_namespace}:{ACCOUNTS[who]}",
            audiences=["api://AzureADTokenExchange"],
        )
        for role, container in grants:
            authorization.RoleAssignment(
                f"{settings.prefix}-{who}-{role}-{container}",
                scope=store.containers[container],
                role_definition_id=roles[role].id,
                principal_id=identity.principal_id,
                principal_type=authorization.PrincipalType.SERVICE_PRINCIPAL,
                description=f"losscast: {who} is {role} of {container}",
            )
        ids[who] = identity.client_id
    return Identities(ids)


def grant(
    name: str,
    *,
    role: str,
    scope: pulumi.Input[str],
    principal: pulumi.Input[str],
    group: bool,
    subscription: str,
) -> None:
    """One of Azure's own roles for one principal at one scope."""
    kind = authorization.PrincipalType.GROUP if group else authorization.PrincipalType.SERVICE_PRINCIPAL
    authorization.RoleAssignment(
        name,
        scope=scope,
        role_definition_id=f"/subscriptions/{subscription}/providers/Microsoft.Authorization/roleDefinitions/{role}",
        principal_id=principal,
        principal_type=kind,
    )
