"""Doctor's questions to what lies outside this machine: the cluster, the storage, the monitor, Prometheus, Kubernetes."""

import email.utils
import http.client
import json
import re
import secrets
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any

from launcher.doctor.checks import RAY_WITH_AUTH, SKEW_S, Finding, State
from launcher.errors import one_line
from launcher.runspec.model import RunSpec

TIMEOUT_S = 4.0
RULE = "LossDiverged"
"""One of the alerts of k8s/rules: where it is loaded, they are."""


def ray_findings(spec: RunSpec | None, local: Any, settings: Mapping[str, str]) -> list[Finding]:
    """The cluster: that it answers, that it takes our token, and that it takes nobody without one.

    local   the local Ray's Head, None while it is down
    """
    from launcher.errors import Failed
    from launcher.jobs.cluster import Cluster

    to = spec.cluster.to if spec is not None else "local"
    if to == "kuberay":
        return [Finding("ray", "skip", "kuberay makes its own for each run")]
    if to == "local" and local is None:
        return [
            Finding(
                "ray", "pass", "no local Ray runs; submit starts one, with token authentication, on loopback"
            )
        ]
    address, env = (local.dashboard, local.environment()) if to == "local" else (to, settings)
    cluster = Cluster(address, env)
    try:
        version, resources = cluster.version(5.0), cluster.resources()
    except Failed as error:
        return [
            Finding(
                "ray",
                "fail",
                one_line(error),
                "is the address the dashboard's, and RAY_AUTH_TOKEN_PATH its token's?",
            )
        ]
    told = ", ".join(f"{resources[k]:g} {k}" for k in ("CPU", "GPU") if k in resources)
    found = [Finding("ray", "pass", f"{version} at {cluster.address}: {told}")]
    if tuple(int(p) for p in re.findall(r"\d+", version)[:2]) < RAY_WITH_AUTH:
        found.append(Finding("ray", "fail", f"{version} knows no authentication", "upgrade to 2.52 or newer"))
    try:
        Cluster(cluster.address, {}).get("/api/jobs/", 5.0)
    except Failed:
        found.append(Finding("ray auth", "pass", "refuses whoever has no token"))
    else:
        loopback = re.match(r"https?://(127\.|localhost|\[::1\])", cluster.address)
        fix = "start every node with RAY_AUTH_MODE=token (docs/kubernetes.md), or keep it on loopback"
        state: State = "warn" if loopback else "fail"
        found.append(Finding("ray auth", state, "runs the code of anyone who reaches it", fix))
    return found


def storage(url: str) -> list[Finding]:
    """Write, the lease's put-if-absent, read and delete, on one scratch key."""
    from infra.objects import Exists, Missing
    from launcher.storage.store import open_store

    fix = (
        "give this identity the role Storage Blob Data Contributor on the container"
        if url.startswith("az://")
        else ("choose a folder that you may write")
    )
    store, key = open_store(url), f".doctor-{secrets.token_hex(6)}/probe"
    done, began = [], time.monotonic()
    try:
        store.put_new(key, b"one")
        done.append("write")
        try:
            store.put_new(key, b"two")
        except Exists:
            done.append("lease")
        else:
            return [
                Finding(
                    "storage",
                    "fail",
                    f"{url}: a key could be created twice: two runs could both own one",
                    "use another storage",
                )
            ]
        if store.get(key) != b"one":
            return [
                Finding(
                    "storage",
                    "fail",
                    f"{url}: what was written reads back as something else",
                    "use another storage",
                )
            ]
        done.append("read")
        store.delete(key)
        try:
            store.get(key)
            return [
                Finding(
                    "storage", "fail", f"{url}: a deleted key is still there", "retention needs to delete"
                )
            ]
        except Missing:
            done.append("delete")
    except Exception as error:
        after = f" after {', '.join(done)}" if done else ""
        return [Finding("storage", "fail", f"{url}: {one_line(error)}{after}", fix)]
    return [
        Finding("storage", "pass", f"{url}: {', '.join(done)} in {1000 * (time.monotonic() - began):.0f} ms")
    ]


def _ask(
    url: str, token: str | None = None, body: bytes | None = None
) -> tuple[int, bytes, Mapping[str, str]]:
    """Status, start of the body, headers. Raises OSError where nobody answers."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    if body is not None:
        headers["Content-Type"] = "application/x-ndjson"
    request = urllib.request.Request(url, data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            return answer.status, answer.read(1 << 20), dict(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read(4096), dict(error.headers)
    except http.client.HTTPException as error:
        raise OSError(f"it does not speak HTTP: {error!r}") from None


def monitor(url: str, token_env: str, token: str) -> list[Finding]:
    """That it answers, that our token may report, that its clock is ours."""
    url = url.rstrip("/")
    try:
        status, _, headers = _ask(url + "/healthz")
    except (OSError, ValueError) as error:
        fix = "losscast monitor serve, or mend monitor.url; a run spools to its disk meanwhile"
        return [Finding("monitor", "fail", f"{url}: {one_line(getattr(error, 'reason', error))}", fix)]
    if status != 200:
        return [
            Finding(
                "monitor",
                "fail",
                f"{url}/healthz answers {status}",
                "is this the address of `losscast monitor serve`?",
            )
        ]
    found = [Finding("monitor", "pass", f"{url} answers")]
    found += skew(headers.get("Date") or headers.get("date"), time.time())
    make = "losscast monitor token create --store DIR --scope ingest,read"
    if not token:
        return [
            *found,
            Finding("monitor token", "fail", f"{token_env} is not set", f"export {token_env}=$({make})"),
        ]
    status, said, _ = _ask(url + "/v1/events", token, b"")
    if status in (401, 403):
        why = "is not known to it" if status == 401 else "may not report"
        return [*found, Finding("monitor token", "fail", f"the token in {token_env} {why}", make)]
    if status >= 500:
        return [
            *found,
            Finding(
                "monitor token",
                "fail",
                f"it answers {status}: {one_line(said.decode('utf-8', 'replace'))}",
                "see its own log",
            ),
        ]
    return [*found, Finding("monitor token", "pass", f"the token in {token_env} may report")]


def skew(date: str | None, now: float) -> list[Finding]:
    """Our clock against the Date of an answer; no finding where there is none. Pure."""
    try:
        theirs = email.utils.parsedate_to_datetime(date or "").timestamp()
    except (ValueError, TypeError):
        return []
    ahead = now - theirs - 0.5  # a Date is cut to seconds
    if abs(ahead) > SKEW_S:
        words = "ahead of" if ahead > 0 else "behind"
        return [
            Finding(
                "clock skew", "warn", f"{abs(ahead):.0f} s {words} the monitor's", "let NTP keep both clocks"
            )
        ]
    return [Finding("clock skew", "pass", f"within {SKEW_S:.0f} s of the monitor's")]


def prometheus(url: str, *, asked_for: bool) -> list[Finding]:
    """That it is ready, has our alert rules, and scrapes the monitor. Silence is a failure only where it was asked for."""
    url = url.rstrip("/")
    try:
        status, _, _ = _ask(url + "/-/ready")
    except (OSError, ValueError) as error:
        if not asked_for:
            return [Finding("prometheus", "skip", f"none at {url}; name yours with --prometheus URL")]
        return [
            Finding(
                "prometheus",
                "fail",
                f"{url}: {one_line(getattr(error, 'reason', error))}",
                "is it up, and is this its address?",
            )
        ]
    if status != 200:
        state: State = "fail" if asked_for else "skip"
        return [
            Finding(
                "prometheus",
                state,
                f"{url}/-/ready answers {status}",
                "is this its address?" if asked_for else "",
            )
        ]
    found = [Finding("prometheus", "pass", f"{url} is ready")]
    try:
        rules = json.loads(_ask(url + "/api/v1/rules?type=alert")[1])["data"]["groups"]
        names = {rule["name"] for group in rules for rule in group["rules"]}
        query = urllib.parse.urlencode({"query": "losscast_build_info"})
        seen = json.loads(_ask(f"{url}/api/v1/query?{query}")[1])["data"]["result"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [
            *found,
            Finding("prometheus", "warn", f"can't be asked: {one_line(error)}", "is a proxy before it?"),
        ]
    if RULE not in names:
        fix = "load k8s/rules/losscast.rules.yaml (rule_files, or the PrometheusRule in k8s)"
        found.append(Finding("alert rules", "warn", f"{RULE} is not loaded: nobody will be paged", fix))
    else:
        found.append(Finding("alert rules", "pass", f"{sum(1 for n in names)} alerts, {RULE} among them"))
    if not seen:
        fix = "add the monitor's /metrics to scrape_configs"
        found.append(
            Finding("scrape", "warn", "it has no losscast_build_info: it does not scrape the monitor", fix)
        )
    else:
        found.append(
            Finding("scrape", "pass", f"it scrapes {len(seen)} monitor{'s' if len(seen) > 1 else ''}")
        )
    return found


def kubernetes(spec: RunSpec) -> list[Finding]:
    """That the API server answers, knows RayJobs, and lets us create the run's."""
    if spec.kubernetes is None:
        return []
    from launcher.errors import Failed
    from launcher.kuberay.api import RAY_JOBS, connect
    from launcher.kuberay.refusals import Forbidden, NotThere

    space = spec.kubernetes.namespace
    try:
        api = connect()
        api.list(RAY_JOBS, space)
        group, _, _ = RAY_JOBS.group.partition("/")
        wish = {"namespace": space, "verb": "create", "group": group, "resource": RAY_JOBS.plural}
        allowed = api._json(
            "POST",
            "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews",
            body={
                "apiVersion": "authorization.k8s.io/v1",
                "kind": "SelfSubjectAccessReview",
                "spec": {"resourceAttributes": wish},
            },
        )
    except NotThere:
        fix = "install the KubeRay operator (docs/kubernetes.md)"
        return [Finding("kubernetes", "fail", "the cluster knows no RayJob, or no such namespace", fix)]
    except Forbidden as error:
        return [Finding("kubernetes", "fail", one_line(error), f"ask for the role of k8s/ in {space}")]
    except Failed as error:
        return [Finding("kubernetes", "fail", one_line(error), "az aks get-credentials, or set KUBECONFIG")]
    if not (allowed.get("status") or {}).get("allowed"):
        return [
            Finding(
                "kubernetes", "fail", f"may not create RayJobs in {space}", "ask for the role of k8s/ there"
            )
        ]
    return [Finding("kubernetes", "pass", f"{api.host}: may create RayJobs in {space}")]
