"""What the program asks of Azure, recorded by Pulumi's mocks: everything that is declared, and no identity with more than listed.

`make infra-check` installs Pulumi (half a gigabyte) and runs these; without it they skip.
"""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

pulumi = pytest.importorskip("pulumi", reason="`make infra-check` installs Pulumi")
pytest.importorskip("pulumi_azure_native", reason="`make infra-check` installs Pulumi")

from infra.azure.identities import ACCOUNTS, ACR_PULL, BLOBS, CLUSTER_USER, GRANTS, NETWORK_CONTRIBUTOR, ROLES  # noqa: E402
from infra.azure.settings import read_settings  # noqa: E402
from tests.infra.test_azure_settings import example  # noqa: E402

SUBSCRIPTION = "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee"


class Recorder(pulumi.runtime.Mocks):
    """Remembers every resource; answers with its inputs and an id that says what it is."""

    def __init__(self) -> None:
        self.made: list[tuple[str, str, dict[str, Any]]] = []

    def new_resource(self, args: Any) -> tuple[str, dict[str, Any]]:
        inputs = dict(args.inputs)
        self.made.append((args.typ, args.name, inputs))
        outputs = {"name": inputs.get("accountName") or args.name, **inputs}
        if args.typ.endswith("UserAssignedIdentity"):
            outputs |= {"principalId": f"principal-of-{args.name}", "clientId": f"client-of-{args.name}"}
        if args.typ.endswith("ManagedCluster"):
            outputs |= {
                "oidcIssuerProfile": {"enabled": True, "issuerURL": "https://issuer/"},
                "identityProfile": {"kubeletidentity": {"objectId": "principal-of-kubelet"}},
                "identity": {
                    "type": "UserAssigned",
                    "userAssignedIdentities": {},
                },  # a list going in, a mapping coming out
            }
        if args.typ.endswith("Registry"):
            outputs["loginServer"] = "images.azurecr.io"
        return f"id-of-{args.name}", outputs

    def call(self, args: Any) -> dict[str, Any]:
        return {"kubeconfigs": [{"name": "x", "value": "YXBpVmVyc2lvbjogdjEK"}]}

    def of(self, kind: str) -> dict[str, dict[str, Any]]:
        return {name: inputs for typ, name, inputs in self.made if typ.split(":")[-1] == kind}


def record(**changes: Any) -> tuple[Recorder, dict[str, Any]]:
    """Build the stack under mocks. The recorder, and the outputs as plain data."""
    recorder, outputs = Recorder(), {}
    asyncio.set_event_loop(asyncio.new_event_loop())
    pulumi.runtime.set_mocks(recorder, preview=False)

    @pulumi.runtime.test
    def run() -> Any:
        from infra.azure.program import build

        made = build(read_settings(example(**changes)), tenant="tenant", subscription=SUBSCRIPTION)
        return pulumi.Output.all(**made).apply(outputs.update)

    run()
    return recorder, outputs


@pytest.fixture(scope="module")
def stack() -> Iterator[tuple[Recorder, dict[str, Any]]]:
    yield record()


def test_no_identity_can_do_more_than_listed(stack: Any) -> None:
    """Every role definition and every assignment of the program, entry by entry: a new one fails here until it is listed."""
    recorder, _ = stack
    roles = {
        name.removeprefix("losscast-"): (
            tuple(p[0].get("dataActions") or ()),
            tuple(p[0].get("actions") or ()),
        )
        for name, inputs in recorder.of("RoleDefinition").items()
        for p in [inputs["permissions"]]
    }
    assert roles == {name: (actions, ()) for name, actions in ROLES.items()}
    builtin = f"/subscriptions/{SUBSCRIPTION}/providers/Microsoft.Authorization/roleDefinitions/"
    expected = {
        (f"principal-of-losscast-{who}", f"id-of-losscast-{role}", f"id-of-losscast-{container}")
        for who, grants in GRANTS.items()
        for role, container in grants
    } | {
        ("principal-of-losscast-aks", builtin + NETWORK_CONTRIBUTOR, "id-of-losscast-nodes"),
        ("principal-of-kubelet", builtin + ACR_PULL, "id-of-losscast-images"),
        ("22222222-2222-2222-2222-222222222222", builtin + CLUSTER_USER, "id-of-losscast-aks"),
    }
    found = {
        (a["principalId"], a["roleDefinitionId"], a["scope"]) for a in recorder.of("RoleAssignment").values()
    }
    assert found == expected


def test_the_trainer_never_deletes_the_janitor_never_writes_and_the_monitor_is_nobody(stack: Any) -> None:
    recorder, _ = stack
    can = {who: {a for role, _ in grants for a in ROLES[role]} for who, grants in GRANTS.items()}
    assert not any("delete" in a.lower() for a in can["trainer"]) and f"{BLOBS}/write" in can["trainer"]
    assert can["janitor"] == {f"{BLOBS}/read", f"{BLOBS}/delete"}
    assert [c for role, c in GRANTS["trainer"] if role == "writer"] == ["runs"], "one container"
    assert not any("*" in a for actions in ROLES.values() for a in actions)
    assert set(recorder.of("UserAssignedIdentity")) == {
        "losscast-trainer",
        "losscast-janitor",
        "losscast-aks",
    }


def test_each_identity_is_federated_with_one_service_account_that_exists(stack: Any) -> None:
    import yaml

    from tests.k8s.test_kustomize import ROOT

    recorder, _ = stack
    subjects = {name: f["subject"] for name, f in recorder.of("FederatedIdentityCredential").items()}
    assert subjects == {
        f"losscast-{who}-federation": f"system:serviceaccount:training:{account}"
        for who, account in ACCOUNTS.items()
    }
    made = {
        d["metadata"]["name"]
        for d in yaml.safe_load_all((ROOT / "k8s/base/training/serviceaccount.yaml").read_text())
    }
    assert set(ACCOUNTS.values()) <= made
    for found in recorder.of("FederatedIdentityCredential").values():
        assert found["issuer"] == "https://issuer/" and found["audiences"] == ["api://AzureADTokenExchange"]


def test_storage_has_no_keys_no_public_door_and_deletions_can_be_undone(stack: Any) -> None:
    recorder, _ = stack
    (account,) = recorder.of("StorageAccount").values()
    assert account["allowSharedKeyAccess"] is False and account["allowBlobPublicAccess"] is False
    assert account["publicNetworkAccess"] == "Disabled" and account["minimumTlsVersion"] == "TLS1_2"
    assert account["networkRuleSet"]["defaultAction"] == "Deny" and len(account["accountName"]) <= 24
    (blobs,) = recorder.of("BlobServiceProperties").values()
    assert blobs["isVersioningEnabled"] is True
    assert (
        blobs["deleteRetentionPolicy"]
        == {"enabled": True, "days": 14}
        == blobs["containerDeleteRetentionPolicy"]
    )
    assert {c["publicAccess"] for c in recorder.of("BlobContainer").values()} == {"None"}
    (endpoint,) = recorder.of("PrivateEndpoint").values()
    assert endpoint["privateLinkServiceConnections"][0]["groupIds"] == ["blob"]


def test_people_come_through_entra_and_pods_through_workload_identity(stack: Any) -> None:
    recorder, _ = stack
    (cluster,) = recorder.of("ManagedCluster").values()
    assert cluster["disableLocalAccounts"] is True and cluster["enableRBAC"] is True
    assert (
        cluster["oidcIssuerProfile"]["enabled"] and cluster["securityProfile"]["workloadIdentity"]["enabled"]
    )
    assert cluster["apiServerAccessProfile"]["authorizedIPRanges"] == ["203.0.113.7/32"]
    assert cluster["networkProfile"]["networkPolicy"] == "cilium", "else network policies are only words"
    assert "nodeTaints" not in cluster["agentPoolProfiles"][0]


def test_gpu_pools_grow_from_nothing_with_the_labels_and_taints_of_their_flavors(stack: Any) -> None:
    from tests.k8s.test_kustomize import of_kind

    recorder, _ = stack
    pools = recorder.of("AgentPool")
    for pool in pools.values():
        assert (
            pool["minCount"] == pool["count"] == 0
            and pool["enableAutoScaling"]
            and pool["gpuProfile"] == {"driver": "Install"}
        )
    assert (
        pools["losscast-h100spot"]["scaleSetPriority"] == "Spot"
        and pools["losscast-h100spot"]["scaleSetEvictionPolicy"] == "Delete"
    )
    flavors = {f["metadata"]["name"]: f["spec"] for f in of_kind("azure", "ResourceFlavor") if "spec" in f}
    for flavor, pool in (("gpu", pools["losscast-h100"]), ("gpu-spot", pools["losscast-h100spot"])):
        assert flavors[flavor]["nodeLabels"].items() <= pool["nodeLabels"].items()
        assert not any(key.startswith("kubernetes.azure.com/") for key in pool["nodeLabels"]), (
            "AKS refuses these"
        )
        taints = {f"{t['key']}={t['value']}:{t['effect']}" for t in flavors[flavor]["nodeTaints"]}
        assert taints == set(pool["nodeTaints"])


def test_charts_are_pinned_and_know_each_other(stack: Any) -> None:
    import yaml

    from infra.azure.charts import KUEUE_CONFIG

    recorder, _ = stack
    releases = recorder.of("Release")
    assert set(releases) == {
        "kuberay-operator",
        "kueue",
        "kube-prometheus-stack",
        "network-operator",
        "nvidia-device-plugin",
    }
    assert all(r["version"].count(".") == 2 and r["atomic"] for r in releases.values())
    config = yaml.safe_load(KUEUE_CONFIG)
    assert config["integrations"]["frameworks"] == ["ray.io/rayjob"]
    assert config["apiVersion"].endswith("/v1beta2")
    known = {"timeout", "blockAdmission", "requeuingStrategy", "recoveryTimeout"}
    assert config["waitForPodsReady"].keys() <= known, (
        "v1beta2 of Kueue's configuration has no other keys there"
    )
    spec = releases["kube-prometheus-stack"]["values"]["alertmanager"]["alertmanagerSpec"]
    assert spec["alertmanagerConfigMatcherStrategy"] == {"type": "None"}
    assert releases["kube-prometheus-stack"]["namespace"] == "monitoring", (
        "the monitor's network policy names it"
    )


def test_a_budget_speaks_up_before_and_after(stack: Any) -> None:
    recorder, _ = stack
    (budget,) = recorder.of("Budget").values()
    assert budget["amount"] == 5000 and set(budget["notifications"]) == {"half", "all", "forecast"}
    assert all(n["contactEmails"] == ["oncall@example.com"] for n in budget["notifications"].values())


def test_registry_and_vault_are_closed(stack: Any) -> None:
    recorder, _ = stack
    (registry,) = recorder.of("Registry").values()
    (vault,) = recorder.of("Vault").values()
    assert registry["adminUserEnabled"] is False and registry["anonymousPullEnabled"] is False
    assert vault["properties"]["enableRbacAuthorization"] and vault["properties"]["enablePurgeProtection"]
    assert vault["properties"]["networkAcls"]["defaultAction"] == "Deny"


def test_the_outputs_are_what_the_guide_reads(stack: Any) -> None:
    _, outputs = stack
    assert {
        "resource_group", "cluster", "registry", "vault", "storage_account", "runs_url", "data_url",
        "trainer_client_id", "janitor_client_id", "quotas", "dollars_per_hour",
    } == set(outputs)  # fmt: skip
    assert outputs["trainer_client_id"] == "client-of-losscast-trainer"
    assert outputs["runs_url"] == "az://losscastaaaaaaaa/runs"


def test_switches_do_what_they_say() -> None:
    recorder, _ = record(
        prometheus="managed",
        gpu_pools=[{"name": "nc", "vm_size": "Standard_NC40ads_H100_v5", "max": 1, "dollars_per_hour": 7}],
    )
    assert set(recorder.of("Release")) == {"kuberay-operator", "kueue", "nvidia-device-plugin"}
    assert len(recorder.of("AzureMonitorWorkspace")) == 1
    (cluster,) = recorder.of("ManagedCluster").values()
    assert cluster["azureMonitorProfile"]["metrics"]["enabled"] is True
