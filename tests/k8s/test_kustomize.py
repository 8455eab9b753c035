"""What is applied to a cluster: builds, validates strictly, shuts everything in, and says what the code says."""

import functools
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from monitor.prometheus.alerts import RULES
from monitor.prometheus.operator import _matcher, files

ROOT = Path(__file__).parents[2]
OVERLAYS = ("dev", "azure")
NO_SCHEMA = {("kueue.x-k8s.io/v1beta2", "Topology")}
"""Kinds that neither the published schemas at hand nor kubernetes-validate know. A new one must be put here on purpose, with
a test of its own that says what its schema does."""
CORE = {
    "v1",
    "apps/v1",
    "batch/v1",
    "policy/v1",
    "networking.k8s.io/v1",
    "rbac.authorization.k8s.io/v1",
    "scheduling.k8s.io/v1",
}


class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """A bare `=` is text, as Kubernetes reads it."""


Loader.add_constructor("tag:yaml.org,2002:value", lambda loader, node: node.value)


@functools.cache
def built(overlay: str) -> tuple[dict[str, Any], ...]:
    """Every object of an overlay, as `kubectl kustomize` prints it."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("needs kubectl, of 1.27 or newer")
    done = subprocess.run(
        [kubectl, "kustomize", f"k8s/overlays/{overlay}"], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode and "replacements" in done.stderr:
        pytest.skip(f"this kubectl is too old: {done.stderr.strip()[:200]}")
    assert done.returncode == 0, done.stderr
    return tuple(yaml.load_all(done.stdout, Loader))


def of_kind(overlay: str, kind: str) -> list[dict[str, Any]]:
    return [o for o in built(overlay) if o["kind"] == kind]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_validates_strictly(overlay: str, crds: Any, core: Any) -> None:
    unknown, wrong = set(), []
    for found in built(overlay):
        kind = (found["apiVersion"], found["kind"])
        if kind in NO_SCHEMA:
            unknown.add(kind)
            continue
        errors = (core if found["apiVersion"] in CORE else crds)(found)
        wrong += [f"{found['kind']}/{found['metadata']['name']}: {e}" for e in errors]
    assert not wrong
    assert unknown <= NO_SCHEMA


def test_the_topology_keeps_to_what_kueues_types_say() -> None:
    """apis/kueue/v1beta2/topology_types.go of kubernetes-sigs/kueue: cluster-scoped; 1 to 16 levels, unique, of one label each;
    the host's name only as the lowest."""
    label = r"([a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])"
    (found,) = of_kind("azure", "Topology")
    assert found.keys() == {"apiVersion", "kind", "metadata", "spec"} and found["spec"].keys() == {"levels"}
    assert "namespace" not in found["metadata"]
    assert all(level.keys() == {"nodeLabel"} for level in found["spec"]["levels"])
    names = [level["nodeLabel"] for level in found["spec"]["levels"]]
    assert 1 <= len(names) <= 16 and len(set(names)) == len(names)
    assert all(re.fullmatch(label, name) and len(name) <= 316 for name in names)
    assert "kubernetes.io/hostname" not in names[:-1]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_names_are_there_once(overlay: str) -> None:
    names = [
        (o["apiVersion"], o["kind"], o["metadata"].get("namespace"), o["metadata"]["name"])
        for o in built(overlay)
    ]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_monitors_pod_is_restricted_and_its_namespaces_insist(overlay: str) -> None:
    (found,) = of_kind(overlay, "StatefulSet")
    pod = found["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False and pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["containers"]:
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"]
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys()
        assert {"requests", "limits"} <= container["resources"].keys()
    for namespace in of_kind(overlay, "Namespace"):
        assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_namespace_denies_all_traffic_to_begin_with(overlay: str) -> None:
    policies = of_kind(overlay, "NetworkPolicy")
    for namespace in {n["metadata"]["name"] for n in of_kind(overlay, "Namespace")}:
        deny = next(
            p
            for p in policies
            if p["metadata"]["namespace"] == namespace and p["metadata"]["name"] == "deny-all"
        )
        assert deny["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    monitor = next(p for p in policies if p["metadata"]["name"] == "losscast-monitor")
    assert monitor["spec"]["policyTypes"] == ["Ingress"], "the monitor calls nobody"
    for rule in monitor["spec"]["ingress"]:
        assert all(source["podSelector"]["matchLabels"] for source in rule["from"]), "never a whole namespace"


def test_a_runs_pods_may_speak_to_the_monitor() -> None:
    """Labels of the run's pods, of its namespace, and the policy on either side agree."""
    from launcher.kuberay.manifests import manifests
    from launcher.runspec.file import read_spec

    policy, job = manifests(read_spec(ROOT / "examples/gpt-7b-64xH100.yaml"))
    labels = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["metadata"]["labels"]
    namespace = next(
        n for n in of_kind("azure", "Namespace") if n["metadata"]["name"] == job["metadata"]["namespace"]
    )
    monitor = next(
        p for p in of_kind("azure", "NetworkPolicy") if p["metadata"]["name"] == "losscast-monitor"
    )
    source = monitor["spec"]["ingress"][0]["from"][0]
    assert source["podSelector"]["matchLabels"].items() <= labels.items()
    assert source["namespaceSelector"]["matchLabels"].items() <= namespace["metadata"]["labels"].items()
    port = monitor["spec"]["ingress"][0]["ports"][0]["port"]
    assert any(p["port"] == port for rule in policy["spec"]["egress"] for p in rule.get("ports", []))


def test_the_example_run_fits_the_azure_queue() -> None:
    """Queue, priority, topology, service account and flavor that the example names are the ones that are made, and the quota
    is enough for it: else the first thing a person submits waits for ever."""
    from launcher.kuberay.manifests import manifests
    from launcher.runspec.file import read_spec

    spec = read_spec(ROOT / "examples/gpt-7b-64xH100.yaml")
    assert spec.kubernetes is not None
    job = manifests(spec)[1]
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    pod = group["template"]["spec"]
    queue = next(q for q in of_kind("azure", "LocalQueue") if q["metadata"]["name"] == spec.kubernetes.queue)
    assert queue["metadata"]["namespace"] == spec.kubernetes.namespace
    assert spec.kubernetes.priority in {
        p["metadata"]["name"] for p in of_kind("azure", "WorkloadPriorityClass")
    }
    assert spec.kubernetes.service_account in {
        a["metadata"]["name"] for a in of_kind("azure", "ServiceAccount")
    }
    cluster = next(
        q for q in of_kind("azure", "ClusterQueue") if q["metadata"]["name"] == queue["spec"]["clusterQueue"]
    )
    quota = {
        f["name"]: {r["name"]: _number(r["nominalQuota"]) for r in f["resources"]}
        for f in cluster["spec"]["resourceGroups"][0]["flavors"]
    }
    for name, amount in pod["containers"][0]["resources"]["requests"].items():
        assert _number(amount) * group["replicas"] <= quota["gpu"][name], name
    flavor = next(f for f in of_kind("azure", "ResourceFlavor") if f["metadata"]["name"] == "gpu")
    assert pod["nodeSelector"].items() <= flavor["spec"]["nodeLabels"].items()
    tolerated = {t["key"] for t in pod["tolerations"]}
    assert {t["key"] for t in flavor["spec"]["nodeTaints"]} <= tolerated
    (topology,) = of_kind("azure", "Topology")
    assert flavor["spec"]["topologyName"] == topology["metadata"]["name"]
    assert spec.kubernetes.topology in [level["nodeLabel"] for level in topology["spec"]["levels"]]


def _number(text: Any) -> float:
    units = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "m": 1e-3}
    for unit, factor in units.items():
        if str(text).endswith(unit):
            return float(str(text)[: -len(unit)]) * factor
    return float(text)


def test_nobody_may_more_than_listed() -> None:
    """The one role: what `losscast` calls on the API server, no secrets, no wildcard."""
    (role,) = of_kind("azure", "Role")
    may = {
        (g, r): set(rule["verbs"])
        for rule in role["rules"]
        for g in rule["apiGroups"]
        for r in rule["resources"]
    }
    assert may == {
        ("ray.io", "rayjobs"): {"get", "list", "watch", "create", "update", "delete"},
        ("networking.k8s.io", "networkpolicies"): {"get", "create", "update", "delete"},
        ("kueue.x-k8s.io", "workloads"): {"get", "list", "update"},
        ("kueue.x-k8s.io", "localqueues"): {"get", "list"},
        ("", "pods"): {"get", "list"},
        ("", "events"): {"get", "list"},
        ("", "pods/log"): {"get"},
    }
    assert not of_kind("azure", "ClusterRole") and not of_kind("azure", "ClusterRoleBinding")
    bound = {s["kind"] for b in of_kind("azure", "RoleBinding") for s in b["subjects"]}
    assert bound == {"Group"}, "no service account has a role"
    for account in of_kind("azure", "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False


def test_identities_of_azure_go_to_the_accounts_they_are_for() -> None:
    values = dict(
        line.split("=", 1)
        for line in (ROOT / "k8s/overlays/azure/azure.env").read_text().splitlines()
        if "=" in line and line[0] != "#"
    )
    accounts = {
        a["metadata"]["name"]: (a["metadata"].get("annotations") or {}).get(
            "azure.workload.identity/client-id"
        )
        for a in of_kind("azure", "ServiceAccount")
    }
    assert accounts == {
        "losscast-trainer": values["TRAINER_CLIENT_ID"],
        "losscast-janitor": values["JANITOR_CLIENT_ID"],
        "losscast-monitor": None,
    }
    (found,) = of_kind("azure", "StatefulSet")
    assert found["spec"]["template"]["spec"]["containers"][0]["image"] == values["MONITOR_IMAGE"]


def test_the_rules_and_routes_are_the_tables() -> None:
    for name, text in files(ROOT).items():
        assert (ROOT / "k8s/base/monitor" / name).read_text() == text, "run `make k8s-files`"
    (found,) = of_kind("dev", "PrometheusRule")
    alerts = [r["alert"] for g in found["spec"]["groups"] for r in g["rules"]]
    assert sorted(alerts) == sorted(r.alert for r in RULES)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("severity = critical", ("severity", "=", "critical")),
        ('run =~ ".+"', ("run", "=~", ".+")),
        ("severity != critical", ("severity", "!=", "critical")),
        ('alertname =~ "A|B"', ("alertname", "=~", "A|B")),
    ],
)
def test_matchers_keep_their_meaning(text: str, expected: tuple[str, str, str]) -> None:
    assert tuple(_matcher(text)[k] for k in ("name", "matchType", "value")) == expected


def test_the_monitor_is_scraped_under_the_name_its_rules_expect() -> None:
    from monitor.prometheus.alerts import JOB

    (scrape,) = of_kind("dev", "PodMonitor")
    (found,) = of_kind("dev", "StatefulSet")
    labels = found["spec"]["template"]["metadata"]["labels"]
    assert labels[scrape["spec"]["jobLabel"]] == JOB
    assert scrape["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert "authorization" in scrape["spec"]["podMetricsEndpoints"][0], "/metrics takes a token"


def test_the_monitor_starts_with_the_arguments_it_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    from launcher.cli import parser

    (found,) = of_kind("azure", "StatefulSet")
    args = parser().parse_args(found["spec"]["template"]["spec"]["containers"][0]["args"])
    mounts = {m["mountPath"] for m in found["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]}
    assert args.store in mounts and args.behind_proxy
    values = dict(
        line.split("=", 1) for line in (ROOT / "k8s/overlays/azure/azure.env").read_text().splitlines()[1:]
    )
    assert args.url == values["MONITOR_URL"], "links in alerts lead to where people open it"


def test_the_janitor_is_the_identity_that_may_delete_and_starts_as_it_is_told() -> None:
    from launcher.cli import parser

    (found,) = of_kind("azure", "CronJob")
    template = found["spec"]["jobTemplate"]["spec"]["template"]
    pod = template["spec"]
    assert (
        pod["serviceAccountName"] == "losscast-janitor"
        and template["metadata"]["labels"]["azure.workload.identity/use"] == "true"
    )
    assert parser().parse_args(pod["containers"][0]["args"]).place.startswith("az://")
    assert (
        pod["containers"][0]["securityContext"]["readOnlyRootFilesystem"]
        and found["metadata"]["namespace"] == "training"
    )
    policy = next(p for p in of_kind("azure", "NetworkPolicy") if p["metadata"]["name"] == "losscast-janitor")
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    assert not policy["spec"].get("ingress")


def test_grafana_gets_the_dashboard_as_it_is() -> None:
    found = next(c for c in of_kind("dev", "ConfigMap") if c["metadata"]["name"] == "losscast-dashboard")
    assert json.loads(found["data"]["losscast.json"]) == json.loads(
        (ROOT / "k8s/dashboard/losscast.json").read_text()
    )
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"


def lifted() -> list[dict[str, Any]]:
    """Pod templates out of RayJobs and the StatefulSet, as pods: what checkov looks into."""
    from launcher.kuberay.manifests import manifests
    from launcher.runspec.file import read_spec

    pods = []
    for name in ("gpt-7b-64xH100", "gpt-125m-kuberay"):
        job = manifests(read_spec(ROOT / "examples" / f"{name}.yaml"))[1]["spec"]
        templates = {
            "head": job["rayClusterSpec"]["headGroupSpec"]["template"],
            "worker": job["rayClusterSpec"]["workerGroupSpecs"][0]["template"],
            "submitter": job["submitterPodTemplate"],
        }
        for role, template in templates.items():
            meta = {
                "name": f"{name.lower()}-{role}",
                "namespace": "training",
                "labels": template["metadata"]["labels"],
            }
            pods.append({"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": template["spec"]})
    return pods


CHECKOV_PASSED_OVER = {
    "CKV_K8S_43": ("", "images by digest: the examples name a registry that does not exist"),
    "CKV_K8S_35": (
        "Pod.training.",
        "the token is an environment variable: run.yaml names it so (`monitor.token_env`)",
    ),
    "CKV_K8S_8": ("-submitter", "a submitter has no liveness: it follows a log and ends"),
    "CKV_K8S_9": ("-submitter", "a submitter has no readiness"),
    "CKV_K8S_15": (
        "losscast-monitor",
        "IfNotPresent for a version: a registry that is away must not keep the monitor down",
    ),
}
"""Check: the only resources it may fail for (a part of the name), and why."""


@pytest.mark.skipif(
    "LOSSCAST_CHECKOV" not in os.environ, reason="`make k8s-check` installs checkov and sets LOSSCAST_CHECKOV"
)
def test_checkov_finds_nothing_but_what_is_listed(tmp_path: Path) -> None:
    found = [
        o
        for o in built("azure")
        if o["kind"]
        in ("StatefulSet", "CronJob", "Role", "RoleBinding", "ServiceAccount", "NetworkPolicy", "Service")
    ]
    for n, one in enumerate([*lifted(), *found]):
        (tmp_path / f"{n}.yaml").write_text(yaml.safe_dump(one))
    command = [
        os.environ["LOSSCAST_CHECKOV"],
        "-d",
        str(tmp_path),
        "--framework",
        "kubernetes",
        "--skip-download",
        "-o",
        "json",
        "--quiet",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    said = json.loads(done.stdout)
    assert said["summary"]["passed"] > 100, "it looked at something"
    failed = {(c["check_id"], c["resource"]): c["check_name"] for c in said["results"]["failed_checks"]}
    assert not {k: v for k, v in failed.items() if CHECKOV_PASSED_OVER.get(k[0], ("\0", ""))[0] not in k[1]}
    assert {check for check, _ in failed} == set(CHECKOV_PASSED_OVER), (
        "the list has no entry that is not needed"
    )
