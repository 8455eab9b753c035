"""A small Kubernetes API server: objects with resource versions, watches with a history that can expire, pod logs, and
refusals as the real one words them. What is created is held against the published schemas where they are at hand.

Only what a client of it can tell apart is here: it schedules nothing and has no controllers; a test plays those.
"""

import copy
import itertools
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

Object = dict[str, Any]
TOKEN = "stub-token"


class Refusal(Exception):
    def __init__(self, code: int, reason: str, message: str) -> None:
        self.code, self.reason, self.message = code, reason, message


class Stub:
    """`with Stub() as stub: stub.url`."""

    def __init__(self, check: Callable[[Object], list[str]] | None = None) -> None:
        """check: errors of an object that is created or replaced; None takes everything."""
        self.objects: dict[tuple[str, str, str], Object] = {}
        """(plural, namespace, name)"""
        self.logs: dict[str, list[str]] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Callable[[str, str], Refusal | str | None]] = []
        """Asked in turn about method and path: a Refusal to answer with, `drop` to hang up before, `late` after the work."""
        self.break_logs_after: int | None = None
        self._check, self._versions = check, itertools.count(1000)
        self._history: list[tuple[int, str, str, Object]] = []
        self._oldest = 0
        self.changed = threading.Condition()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def _do(self) -> None:
                stub._answer(self)

            do_GET = do_POST = do_PUT = do_DELETE = _do

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "Stub":
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    # What a controller or a person does

    def put(self, plural: str, body: Object) -> Object:
        """Create or change an object from inside, past every check."""
        with self.changed:
            key = (plural, body["metadata"]["namespace"], body["metadata"]["name"])
            kind = "MODIFIED" if key in self.objects else "ADDED"
            return self._keep(kind, plural, body)

    def status(self, plural: str, namespace: str, name: str, **status: Any) -> None:
        with self.changed:
            body = copy.deepcopy(self.objects[(plural, namespace, name)])
            body["status"] = {**body.get("status", {}), **status}
            self._keep("MODIFIED", plural, body)

    def started(self, namespace: str, name: str) -> None:
        """Kueue lets the job in, KubeRay starts it, Ray runs it."""
        with self.changed:
            body = copy.deepcopy(self.objects[("rayjobs", namespace, name)])
            body["spec"]["suspend"] = False
            body["status"] = {
                **body.get("status", {}),
                "jobDeploymentStatus": "Running",
                "jobStatus": "RUNNING",
            }
            self._keep("MODIFIED", "rayjobs", body)

    def remove(self, plural: str, namespace: str, name: str) -> None:
        with self.changed:
            self._keep("DELETED", plural, self.objects[(plural, namespace, name)])

    def compact(self) -> None:
        """Forget history: watches from before are answered with 410."""
        with self.changed:
            self._oldest = next(self._versions)
            self._history.clear()

    def _keep(self, kind: str, plural: str, body: Object) -> Object:
        version = next(self._versions)
        body = copy.deepcopy(body)
        meta = body["metadata"]
        meta["resourceVersion"] = str(version)
        meta.setdefault("uid", f"uid-{version}")
        meta.setdefault("creationTimestamp", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
        key = (plural, meta["namespace"], meta["name"])
        if kind == "DELETED":
            self.objects.pop(key, None)
        else:
            self.objects[key] = body
        self._history.append((version, kind, plural, body))
        self.changed.notify_all()
        return body

    # The wire

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        url, method = urlsplit(request.path), request.command
        query = {k: v[0] for k, v in parse_qs(url.query).items()}
        length = int(request.headers.get("Content-Length") or 0)
        body = json.loads(request.rfile.read(length)) if length else None
        self.requests.append((method, url.path))
        said = next((s for fault in self.faults if (s := fault(method, url.path)) is not None), None)
        try:
            if said == "drop":
                request.close_connection = True
                request.connection.close()
                return
            if isinstance(said, Refusal):
                raise said
            if request.headers.get("Authorization") != f"Bearer {TOKEN}":
                raise Refusal(401, "Unauthorized", "Unauthorized")
            parts = url.path.strip("/").split("/")
            at = parts.index("namespaces")
            namespace, plural = parts[at + 1], parts[at + 2]
            name, sub = [*parts[at + 3 :], None, None][:2]
            if sub == "log":
                self._log(request, str(name), query)
                return
            if query.get("watch") == "true":
                self._watch(request, plural, namespace, query)
                return
            with self.changed:
                answer = self._work(method, plural, namespace, name, body, query)
            if said == "late":
                request.close_connection = True
                request.connection.close()
                return
            self._send(request, 201 if method == "POST" else 200, answer)
        except Refusal as refusal:
            document = {
                "kind": "Status", "apiVersion": "v1", "status": "Failure",
                "code": refusal.code, "reason": refusal.reason, "message": refusal.message,
            }  # fmt: skip
            self._send(request, refusal.code, document)

    def _work(
        self,
        method: str,
        plural: str,
        namespace: str,
        name: str | None,
        body: Object | None,
        query: dict[str, str],
    ) -> Object:
        if method == "POST":
            assert body is not None
            name = body["metadata"]["name"]
            if (plural, namespace, name) in self.objects:
                raise Refusal(409, "AlreadyExists", f'{plural} "{name}" already exists')
            self._admit(body)
            return self._keep("ADDED", plural, body)
        if name is None:
            found = [
                o
                for (p, n, _), o in self.objects.items()
                if (p, n) == (plural, namespace) and _selected(o, query)
            ]
            return {
                "kind": "List",
                "items": found,
                "metadata": {"resourceVersion": str(next(self._versions))},
            }
        found = self.objects.get((plural, namespace, name))
        if found is None:
            raise Refusal(404, "NotFound", f'{plural} "{name}" not found')
        if method == "PUT":
            assert body is not None
            if body["metadata"].get("resourceVersion") != found["metadata"]["resourceVersion"]:
                raise Refusal(
                    409,
                    "Conflict",
                    f'Operation cannot be fulfilled on {plural} "{name}": the object has been modified',
                )
            self._admit(body)
            return self._keep("MODIFIED", plural, body)
        if method == "DELETE":
            return self._keep("DELETED", plural, found)
        return found

    def _admit(self, body: Object) -> None:
        plain = copy.deepcopy(body)
        for key in ("uid", "resourceVersion", "creationTimestamp"):
            plain["metadata"].pop(key, None)
        plain.pop("status", None)
        wrong = self._check(plain) if self._check else []
        if wrong:
            raise Refusal(422, "Invalid", f"{body['kind']} is invalid: {wrong[0]}")

    def _watch(
        self, request: BaseHTTPRequestHandler, plural: str, namespace: str, query: dict[str, str]
    ) -> None:
        after, until = (
            int(query["resourceVersion"]),
            time.monotonic() + float(query.get("timeoutSeconds", 10)),
        )
        self._begin(request)
        with self.changed:
            while time.monotonic() < until:
                if after < self._oldest:
                    gone = {
                        "kind": "Status",
                        "code": 410,
                        "reason": "Expired",
                        "message": "too old resource version",
                    }
                    self._chunk(request, json.dumps({"type": "ERROR", "object": gone}) + "\n")
                    break
                for version, kind, which, body in self._history:
                    if (
                        version > after
                        and which == plural
                        and body["metadata"]["namespace"] == namespace
                        and _selected(body, query)
                    ):
                        self._chunk(request, json.dumps({"type": kind, "object": body}) + "\n")
                after = max([after, *(h[0] for h in self._history)])
                self.changed.wait(0.2)
        self._chunk(request, "")

    def _log(self, request: BaseHTTPRequestHandler, pod: str, query: dict[str, str]) -> None:
        if pod not in self.logs:
            raise Refusal(404, "NotFound", f'pods "{pod}" not found')
        self._begin(request)
        since, sent = query.get("sinceTime", ""), 0
        for line in self.logs[pod]:
            if line.partition(" ")[0] >= since:
                self._chunk(request, line + "\n")
                sent += 1
                if self.break_logs_after is not None and sent >= self.break_logs_after:
                    self.break_logs_after = None
                    request.close_connection = True
                    request.connection.close()
                    return
        self._chunk(request, "")

    def _begin(self, request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Type", "application/json")
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()

    def _chunk(self, request: BaseHTTPRequestHandler, text: str) -> None:
        data = text.encode()
        try:
            request.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            request.wfile.flush()
        except OSError:
            request.close_connection = True

    def _send(self, request: BaseHTTPRequestHandler, code: int, document: Object) -> None:
        data = json.dumps(document).encode()
        request.send_response(code)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)


def kubeconfig(url: str) -> str:
    """The text of a kubeconfig for the stub at `url`."""
    return (
        f'{{apiVersion: v1, kind: Config, current-context: x, clusters: [{{name: c, cluster: {{server: "{url}"}}}}], '
        f"users: [{{name: u, user: {{token: {TOKEN}}}}}], contexts: [{{name: x, context: {{cluster: c, user: u}}}}]}}"
    )


def _selected(body: Object, query: dict[str, str]) -> bool:
    labels = body["metadata"].get("labels") or {}
    for term in filter(None, query.get("labelSelector", "").split(",")):
        key, _, value = term.partition("=")
        if labels.get(key) != value:
            return False
    for term in filter(None, query.get("fieldSelector", "").split(",")):
        key, _, value = term.partition("=")
        found: Any = body
        for part in key.split("."):
            found = (found or {}).get(part)
        if found != value:
            return False
    return True
