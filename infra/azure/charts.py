"""The operators: KubeRay with token authentication at hand, Kueue with RayJobs among its integrations, Prometheus, and what makes
GPUs and InfiniBand resources of a node: NVIDIA's device plugin (AKS installs the driver only) and network operator. Each by
one pinned version of its chart."""

from typing import Any

import pulumi
import pulumi_kubernetes as k8s

from infra.azure.settings import Settings

KUEUE_CONFIG = """\
apiVersion: config.kueue.x-k8s.io/v1beta2
kind: Configuration
health: {healthProbeBindAddress: ":8081"}
metrics: {bindAddress: ":8443"}
webhook: {port: 9443}
manageJobsWithoutQueueName: false
internalCertManagement: {enable: true}
# all pods of a run are ready in 15 minutes (a GPU node takes up to 10), or it goes back to the queue. In v1beta2 the section
# itself turns it on, and there is no `enable`
waitForPodsReady: {timeout: 15m, recoveryTimeout: 10m, blockAdmission: false, requeuingStrategy: {backoffLimitCount: 10}}
integrations: {frameworks: [ray.io/rayjob]}
"""


def values(settings: Settings) -> dict[str, dict[str, Any]]:
    """What each chart is told."""
    return {
        "kuberay-operator": {
            "resources": {
                "requests": {"cpu": "200m", "memory": "512Mi"},
                "limits": {"cpu": "1", "memory": "1Gi"},
            },
            "leaderElectionEnabled": True,
            "batchScheduler": {"enabled": False},
            "securityContext": {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "runAsNonRoot": True,
                "capabilities": {"drop": ["ALL"]},
                "seccompProfile": {"type": "RuntimeDefault"},
            },
        },
        "kueue": {
            "enableKueueViz": False,
            "enablePrometheus": False,
            "managerConfig": {"controllerManagerConfigYaml": KUEUE_CONFIG},
        },
        "kube-prometheus-stack": {
            "prometheus": {
                "prometheusSpec": {
                    # ours are labelled for people, not for a release
                    "podMonitorSelectorNilUsesHelmValues": False,
                    "ruleSelectorNilUsesHelmValues": False,
                    "retention": "30d",
                    "storageSpec": {
                        "volumeClaimTemplate": {
                            "spec": {
                                "storageClassName": "managed-csi-premium",
                                "accessModes": ["ReadWriteOnce"],
                                "resources": {"requests": {"storage": "64Gi"}},
                            }
                        }
                    },
                }
            },
            "alertmanager": {
                "alertmanagerSpec": {
                    "alertmanagerConfigSelector": {"matchLabels": {"app.kubernetes.io/name": "losscast"}},
                    "alertmanagerConfigNamespaceSelector": {
                        "matchLabels": {"kubernetes.io/metadata.name": "losscast"}
                    },
                    # our alerts carry no namespace
                    "alertmanagerConfigMatcherStrategy": {"type": "None"},
                }
            },
            "grafana": {"sidecar": {"dashboards": {"enabled": True, "searchNamespace": "losscast"}}},
        },
        "nvidia-device-plugin": {
            "nodeSelector": {"losscast/pool": "gpu"},
            "tolerations": [{"operator": "Exists", "effect": "NoSchedule"}],
        },
        "network-operator": {"sriovNetworkOperator": {"enabled": False}, "nfd": {"enabled": True}},
    }


def make_charts(settings: Settings, provider: k8s.Provider) -> list[k8s.helm.v3.Release]:
    """The releases. They need the cluster, and none needs a GPU node."""
    told, c = values(settings), settings.charts
    wanted: list[tuple[str, str, str | None, str, str]] = [
        (
            "kuberay-operator",
            "kuberay-operator",
            "https://ray-project.github.io/kuberay-helm/",
            c.kuberay,
            "kuberay-system",
        ),
        ("kueue", "oci://registry.k8s.io/kueue/charts/kueue", None, c.kueue, "kueue-system"),
    ]
    repo = "https://nvidia.github.io/k8s-device-plugin"
    wanted.append(("nvidia-device-plugin", "nvidia-device-plugin", repo, c.device_plugin, "gpu-resources"))
    if settings.prometheus == "self":
        repo = "https://prometheus-community.github.io/helm-charts"
        wanted.append(("kube-prometheus-stack", "kube-prometheus-stack", repo, c.prometheus, "monitoring"))
    if settings.infiniband:
        repo = "https://helm.ngc.nvidia.com/nvidia"
        wanted.append(("network-operator", "network-operator", repo, c.network_operator, "network-operator"))
    made: list[k8s.helm.v3.Release] = []
    for name, chart, repo, version, namespace in wanted:
        made.append(
            k8s.helm.v3.Release(
                name,
                name=name,
                chart=chart,
                version=version,
                namespace=namespace,
                create_namespace=True,
                atomic=True,
                timeout=900,
                values=told[name],
                repository_opts=k8s.helm.v3.RepositoryOptsArgs(repo=repo) if repo else None,
                opts=pulumi.ResourceOptions(provider=provider, depends_on=made[-1:]),
            )
        )
    return made
