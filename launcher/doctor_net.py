"""Doctor's questions to the services beside a run: the monitor, Prometheus, Kubernetes."""

import email.utils
import http.client
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping

from launcher.doctor import SKEW_S, Finding, State, _line
from launcher.spec import RunSpec

TIMEOUT_S = 4.0
RULE = "LossDiverged"
"""One of the alerts of k8s/rules: where it is loaded, they are."""


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
        return [Finding("monitor", "fail", f"{url}: {_line(getattr(error, 'reason', error))}", fix)]
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
    make = "losscast monitor token create --store DIR --scope ingest"
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
                f"it answers {status}: {_line(said.decode('utf-8', 'replace'))}",
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
                f"{url}: {_line(getattr(error, 'reason', error))}",
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
            Finding("prometheus", "warn", f"can't be asked: {_line(error)}", "is a proxy before it?"),
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
    """That kubectl is here and may create the run's RayJob."""
    if spec.kubernetes is None:
        return []
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        return [
            Finding(
                "kubernetes", "fail", "no kubectl on the PATH", "install kubectl, and log in to the cluster"
            )
        ]
    space = spec.kubernetes.namespace
    done = subprocess.run(
        [kubectl, "auth", "can-i", "create", "rayjobs.ray.io", "-n", space, "--request-timeout=6s"],
        capture_output=True, text=True, timeout=8,
    )  # fmt: skip
    said = _line(done.stdout.strip() or done.stderr)
    if done.stdout.strip().startswith("yes"):
        return [Finding("kubernetes", "pass", f"may create RayJobs in {space}")]
    if "the server doesn't have a resource type" in done.stderr:
        return [
            Finding(
                "kubernetes",
                "fail",
                "the cluster knows no RayJob",
                "install the KubeRay operator (docs/azure.md)",
            )
        ]
    return [
        Finding(
            "kubernetes",
            "fail",
            f"RayJobs in {space}: {said}",
            "az aks get-credentials, or ask for the role in k8s/",
        )
    ]
