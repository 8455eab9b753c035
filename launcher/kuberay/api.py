"""The Kubernetes API as a run needs it: a handful of verbs on plain data. What it refuses: `launcher.kuberay.refusals`.

The official client reads kubeconfigs (exec plugins, certificates, tokens that are renewed) and in-cluster credentials; the
requests themselves are a few lines of urllib3, since its generated classes differ from one major version to the next, and
custom resources are plain data in them anyway.

    LOSSCAST_KUBE_CONTEXT   context of the kubeconfig; default its current one

What is read is tried three times when the server is away or busy. What is written is tried once: after an open outcome the
caller looks at what is there.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

from launcher.errors import Failed
from launcher.kuberay.refusals import Away, Changed, Expired, NotThere, asked, refusal

CONNECT_S, READ_S = 5.0, 30.0
WATCH_S = 240
"""How long one watch is asked to last; it is begun again."""
TRIES = 3
BACKOFF_S = 1.0
Object = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """A kind of object in a namespace."""

    group: str
    """`v1` for the core group, else group/version."""
    plural: str

    def path(self, namespace: str, name: str | None = None) -> str:
        root = f"/api/{self.group}" if "/" not in self.group else f"/apis/{self.group}"
        return f"{root}/namespaces/{quote(namespace)}/{self.plural}" + (f"/{quote(name)}" if name else "")


RAY_JOBS = Place("ray.io/v1", "rayjobs")
RAY_CLUSTERS = Place("ray.io/v1", "rayclusters")
WORKLOADS = Place("kueue.x-k8s.io/v1beta2", "workloads")
POLICIES = Place("networking.k8s.io/v1", "networkpolicies")
PODS = Place("v1", "pods")
EVENTS = Place("v1", "events")


class Api:
    """One API server."""

    def __init__(
        self, pool: Any, host: str, headers: Callable[[], Mapping[str, str]], context: str = ""
    ) -> None:
        """pool: urllib3's; headers: asked before every request, since tokens are renewed."""
        self._pool, self.host, self._headers, self.context = pool, host.rstrip("/"), headers, context

    # Verbs

    def get(self, place: Place, namespace: str, name: str) -> Object:
        return self._json("GET", place.path(namespace, name))

    def find(self, place: Place, namespace: str, name: str) -> Object | None:
        """The object, None where there is none."""
        try:
            return self.get(place, namespace, name)
        except NotThere:
            return None

    def list(self, place: Place, namespace: str, labels: str = "", fields: str = "") -> list[Object]:
        query = {"labelSelector": labels, "fieldSelector": fields, "limit": "500"}
        found: list[Object] = []
        while True:
            page = self._json("GET", place.path(namespace), query={k: v for k, v in query.items() if v})
            found += page.get("items") or []
            more = (page.get("metadata") or {}).get("continue")
            if not more:
                return found
            query["continue"] = more

    def create(self, place: Place, namespace: str, body: Object) -> Object:
        return self._json("POST", place.path(namespace), body=body)

    def replace(self, place: Place, namespace: str, body: Object) -> Object:
        """Raises Changed unless the body's resourceVersion is the newest."""
        return self._json("PUT", place.path(namespace, body["metadata"]["name"]), body=body)

    def change(self, place: Place, namespace: str, name: str, edit: Callable[[Object], None]) -> Object:
        """Read, edit, replace, and again when somebody was faster."""
        for _ in range(8):
            found = self.get(place, namespace, name)
            edit(found)
            try:
                return self.replace(place, namespace, found)
            except Changed:
                continue
        raise Changed(f"{place.plural} {namespace}/{name}: somebody else changes it all the time. Try again.")

    def delete(self, place: Place, namespace: str, name: str) -> None:
        """With everything it owns. One that is not there is fine."""
        body = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Foreground"}
        try:
            self._json("DELETE", place.path(namespace, name), body=body)
        except NotThere:
            return

    def watch(
        self, place: Place, namespace: str, name: str, version: str, seconds: int = WATCH_S
    ) -> Iterator[tuple[str, Object]]:
        """Changes of one object after a resource version: (ADDED, MODIFIED or DELETED, object). Ends by itself after
        `seconds`. Raises Expired when the version is too old, Away when the connection breaks."""
        query = {
            "watch": "true", "fieldSelector": f"metadata.name={name}", "resourceVersion": version,
            "allowWatchBookmarks": "true", "timeoutSeconds": str(seconds),
        }  # fmt: skip
        for line in self._lines(place.path(namespace), query, seconds + READ_S):
            try:
                event = json.loads(line)
            except ValueError:
                raise Away(f"{self.host}: a watch broke off in the middle of an answer") from None
            if event.get("type") == "ERROR":
                raise refusal(
                    self.host,
                    int(event.get("object", {}).get("code") or 500),
                    event.get("object") or {},
                    "watch " + place.plural,
                )
            elif event.get("type") != "BOOKMARK":
                yield str(event.get("type")), event["object"]

    def states(self, place: Place, namespace: str, name: str) -> Iterator[Object]:
        """The object now, and after each change, until it is gone. Outlives expired watches and broken connections;
        raises Away when the server stays away."""
        while True:
            found = self.find(place, namespace, name)
            if found is None:
                return
            yield found
            try:
                for kind, newer in self.watch(place, namespace, name, found["metadata"]["resourceVersion"]):
                    if kind == "DELETED":
                        return
                    yield newer
            except Expired:
                continue
            except Away:
                time.sleep(BACKOFF_S)

    def log(
        self, namespace: str, pod: str, *, follow: bool = False, since: str | None = None
    ) -> Iterator[str]:
        """Lines that a pod's first container printed, each with its time before it (RFC 3339, nanoseconds)."""
        query = {
            "timestamps": "true",
            **({"follow": "true"} if follow else {}),
            **({"sinceTime": since} if since else {}),
        }
        path = PODS.path(namespace, pod) + "/log"
        for line in self._lines(path, query, 3600.0 if follow else READ_S):
            yield line.decode(errors="replace")

    # The wire

    def _json(
        self, method: str, path: str, *, query: Mapping[str, str] | None = None, body: Object | None = None
    ) -> Object:
        what = asked(method, path, body)
        for attempt in range(1, TRIES + 1):
            try:
                answer = self._request(method, path, query, body, READ_S)
                data = answer.data
                found = json.loads(data) if data else {}
            except Away:
                if method != "GET" or attempt == TRIES:
                    raise
                time.sleep(BACKOFF_S * attempt)
                continue
            except ValueError:
                raise Failed(f"{self.host}: what answers there is no Kubernetes API server") from None
            if answer.status < 300:
                return found
            busy = answer.status in (429, 502, 503, 504)
            if busy and method == "GET" and attempt < TRIES:
                time.sleep(min(10.0, _seconds(answer.headers.get("Retry-After")) or BACKOFF_S * attempt))
                continue
            raise refusal(self.host, answer.status, found if isinstance(found, dict) else {}, what)
        raise AssertionError("unreachable")

    def _lines(self, path: str, query: Mapping[str, str], read_s: float) -> Iterator[bytes]:
        import urllib3

        answer = self._request("GET", path, query, None, read_s, stream=True)
        try:
            if answer.status >= 300:
                try:
                    said = json.loads(answer.data)
                except ValueError:
                    said = {}
                raise refusal(self.host, answer.status, said, asked("GET", path))
            rest = b""
            for chunk in answer.stream(amt=None, decode_content=True):
                *lines, rest = (rest + chunk).split(b"\n")
                yield from (line for line in lines if line)
            if rest:
                yield rest
        except urllib3.exceptions.HTTPError as error:
            raise Away(f"{self.host}: the connection broke: {error}") from error
        finally:
            answer.release_conn()

    def _request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        body: Object | None,
        read_s: float,
        *,
        stream: bool = False,
    ) -> Any:
        import urllib3

        url = self.host + path + ("?" + urlencode(query) if query else "")
        headers = {"Accept": "application/json", "User-Agent": "losscast", **self._headers()}
        if body is not None:
            headers["Content-Type"] = "application/json"
        try:
            return self._pool.request(
                method, url, headers=headers, body=None if body is None else json.dumps(body),
                timeout=urllib3.Timeout(connect=CONNECT_S, read=read_s), retries=False, preload_content=not stream,
            )  # fmt: skip
        except urllib3.exceptions.HTTPError as error:
            why = " ".join(str(getattr(error, "reason", None) or error).split())[:200]
            raise Away(
                f"the API server {self.host} does not answer: {why}. Is the cluster up, and the VPN?"
            ) from error


def _seconds(text: str | None) -> float:
    try:
        return float(text or 0)
    except ValueError:
        return 0.0


def _current(config: Any) -> str:
    """The kubeconfig's current context."""
    try:
        return config.list_kube_config_contexts()[1]["name"]
    except (config.ConfigException, KeyError, TypeError):
        return ""


def connect(context: str | None = None) -> Api:
    """The API server of the kubeconfig, or of the pod we are in. Raises Failed where neither is found."""
    try:
        import urllib3
        from kubernetes import client, config
    except ImportError as error:
        raise Failed("the Kubernetes client is not installed here: pip install 'losscast[kube]'") from error
    found, name = client.Configuration(), context or os.environ.get("LOSSCAST_KUBE_CONTEXT") or None
    try:
        if "KUBERNETES_SERVICE_HOST" in os.environ and not os.environ.get("KUBECONFIG"):
            config.load_incluster_config(client_configuration=found)
        else:
            config.load_kube_config(context=name, client_configuration=found)
            name = name or str(_current(config))
    except (config.ConfigException, OSError, TypeError, ValueError) as error:
        place = os.environ.get("KUBECONFIG") or "~/.kube/config"
        said = " ".join(str(error).split()).rstrip(".")
        raise Failed(
            f"no cluster to talk to: {place}: {said}. Set KUBECONFIG (az aks get-credentials writes one), or LOSSCAST_KUBE_CONTEXT."
        ) from error

    def headers() -> dict[str, str]:
        token = found.get_api_key_with_prefix("authorization") or found.get_api_key_with_prefix("BearerToken")
        basic = found.get_basic_auth_token() if found.username else None
        said = token or basic
        return {"Authorization": said} if said else {}

    options: dict[str, Any] = {
        "cert_reqs": "CERT_REQUIRED" if found.verify_ssl else "CERT_NONE",
        "ca_certs": found.ssl_ca_cert, "cert_file": found.cert_file, "key_file": found.key_file, "maxsize": 4,
    }  # fmt: skip
    if getattr(found, "tls_server_name", None):
        options["server_hostname"] = found.tls_server_name
    pool = urllib3.ProxyManager(found.proxy, **options) if found.proxy else urllib3.PoolManager(**options)
    return Api(pool, str(found.host), headers, name or "")
