"""What a Ray cluster says over HTTP: its jobs, its nodes, what waits for a place, the autoscaler's words.

Ray's Jobs REST API and the dashboard's state API, spoken with the standard library: importing ray takes two seconds, and
`status`, `why` and `submit` should not. A ray:// address is resolved by Ray itself, once.

The token goes along as a header; what is sent where is `address` and `environment`'s business, never this process's own
RAY_* settings, so that one process can look at two clusters.
"""

import contextlib
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.errors import Failed, one_line

TIMEOUT_S = 15.0
STATE_LIMIT = 10_000
"""Rows asked of the state API; what it keeps at most."""
NO_AGENT = "No available agent"
AGENT_WAIT_S = 60.0


class Refused(Failed):
    """The cluster is there and does not take our token."""


class Unknown(Failed):
    """The cluster is there and knows nothing of the thing we asked for."""


@dataclass(frozen=True)
class Node:
    """One machine that is alive. Resources by Ray's names: CPU, GPU, ..."""

    name: str
    total: Mapping[str, float]
    used: Mapping[str, float]

    def free(self, resource: str) -> float:
        return self.total.get(resource, 0.0) - self.used.get(resource, 0.0)


@dataclass(frozen=True)
class Waiting:
    """A placement group that has no place yet."""

    job_id: str
    bundles: tuple[Mapping[str, float], ...]
    strategy_state: str
    """Ray's word for why: NO_RESOURCES, INFEASIBLE, ..."""


@dataclass(frozen=True)
class Job:
    """A job as Ray tells of it."""

    submission: str
    job_id: str
    status: str
    message: str
    run: str | None
    """Which run it works on, if losscast handed it in."""
    started: float | None = None
    ended: float | None = None


@dataclass(frozen=True)
class Picture:
    """A cluster at one moment."""

    nodes: tuple[Node, ...] = ()
    waiting: tuple[Waiting, ...] = ()
    jobs: tuple[Job, ...] = ()
    placed: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Resources that placed groups hold, by job_id."""
    autoscaler: str = ""
    """Its own words about nodes that come, or failed to; empty without one."""


class Cluster:
    """One Ray cluster, by the URL of its dashboard. Holds no connection."""

    def __init__(self, address: str, environment: Mapping[str, str]) -> None:
        """environment: RAY_AUTH_MODE and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, as Ray reads them."""
        self.address = address.rstrip("/")
        self._environment = dict(environment)
        self._headers = bearer(environment)

    def get(self, path: str, timeout_s: float = TIMEOUT_S) -> Any:
        """JSON at a path. Raises Failed in words for a person: Refused, Unknown, or what the network said."""
        return self._ask("GET", path, None, timeout_s)

    def version(self, timeout_s: float = TIMEOUT_S) -> str:
        with self._understood():
            return str(self.get("/api/version", timeout_s)["ray_version"])

    def submit(self, job: Mapping[str, Any]) -> None:
        """Hand a job in: the arguments of Ray's `submit_job`."""
        runtime = job.get("runtime_env") or {}
        if any(_is_folder(runtime.get(key)) for key in ("working_dir", "py_modules")):
            return self._submit_with_files(job)  # only Ray's own client packs folders
        deadline = time.monotonic() + AGENT_WAIT_S
        while True:
            try:
                with self._understood():
                    str(self._ask("POST", "/api/jobs/", dict(job), 60.0)["submission_id"])
                return None
            except (
                Failed
            ) as error:  # a head that has just started: its dashboard is up before the agent that runs jobs
                if NO_AGENT not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    def job(self, submission: str) -> Job:
        """Raises Unknown where the cluster has never heard of it."""
        with self._understood():
            return _job(self.get(f"/api/jobs/{submission}"))

    def jobs(self, timeout_s: float = TIMEOUT_S) -> tuple[Job, ...]:
        with self._understood():
            return tuple(_job(j) for j in self.get("/api/jobs/", timeout_s))

    def log(self, submission: str) -> str:
        """Everything the job has printed that the cluster still has."""
        with self._understood():
            return str(self.get(f"/api/jobs/{submission}/logs", 60.0)["logs"])

    def stop(self, submission: str) -> None:
        """End the job's processes: TERM, then KILL."""
        self._ask("POST", f"/api/jobs/{submission}/stop", {}, 30.0)

    def picture(self) -> Picture:
        """Nodes, jobs, and what waits for a place."""
        with self._understood():
            jobs = self.jobs()
            status = self.get("/api/cluster_status")["data"]
            groups = self.get(f"/api/v0/placement_groups?detail=true&limit={STATE_LIMIT}")["data"]["result"][
                "result"
            ]
            nodes = self.get(f"/api/v0/nodes?detail=true&limit={STATE_LIMIT}")["data"]["result"]["result"]
            return picture_of(jobs, status, groups, nodes)

    def resources(self) -> dict[str, float]:
        """Resources of all living nodes together."""
        with self._understood():
            nodes = self.get(f"/api/v0/nodes?detail=true&limit={STATE_LIMIT}")["data"]["result"]["result"]
            total: dict[str, float] = {}
            for node in nodes:
                if node.get("state") == "ALIVE":
                    for key, amount in (node.get("resources_total") or {}).items():
                        total[key] = total.get(key, 0.0) + float(amount)
            return total

    @contextlib.contextmanager
    def _understood(self) -> Iterator[None]:
        """An answer of another shape is no traceback: something else listens there, or a Ray of another time."""
        try:
            yield
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise Failed(
                f"{self.address} answers, and not as a Ray dashboard does ({type(error).__name__}: {one_line(error)}). "
                "Is this its address, and its Ray 2.52 or newer?"
            ) from error

    def _ask(self, method: str, path: str, body: Any, timeout_s: float) -> Any:
        request = urllib.request.Request(
            self._url() + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={**self._headers, "Content-Type": "application/json"},
            method=method,
        )
        opener = urllib.request.build_opener(
            _NoRedirect
        )  # a token must not follow a redirect to another host
        try:
            with opener.open(request, timeout=timeout_s) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            said = one_line(error.read(4096).decode("utf-8", "replace")) or error.reason
            if error.code in (401, 403):
                raise Refused(
                    f"{self.address} refuses our token ({error.code}). Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH "
                    f"to the file that holds the cluster's."
                ) from None
            if error.code == 404:
                raise Unknown(f"{self.address}: {said}") from None
            raise Failed(f"{self.address}: {error.code} {said}") from None
        except (OSError, ValueError) as error:
            why = one_line(getattr(error, "reason", error)) or type(error).__name__
            raise Failed(
                f"no Ray cluster answers at {self.address}: {why}. Is it up, and is this its dashboard's address?"
            ) from None
        try:
            return json.loads(text) if text else None
        except ValueError:
            raise Failed(
                f"{self.address} answers, and not as a Ray dashboard does: {one_line(text[:80].decode('utf-8', 'replace'))!r}"
            ) from None

    def _url(self) -> str:
        if not self.address.startswith("ray://"):
            return self.address
        try:
            from ray.dashboard.utils import ray_client_address_to_api_server_url

            self.address = ray_client_address_to_api_server_url(self.address).rstrip("/")
        except ImportError:
            raise Failed(
                f"{self.address}: a ray:// address needs ray here: pip install 'losscast[train]'. Or give the dashboard's http:// address."
            ) from None
        except Exception as error:
            raise Failed(f"no Ray cluster answers at {self.address}: {one_line(error)}") from error
        return self.address

    def _submit_with_files(self, job: Mapping[str, Any]) -> None:
        try:
            from ray.job_submission import JobSubmissionClient
        except ImportError:
            raise Failed("sending a folder along needs ray here: pip install 'losscast[train]'") from None
        address = self._url()
        theirs = os.environ.pop("RAY_ADDRESS", None)  # it would win over the address we were given
        try:
            JobSubmissionClient(address, headers=self._headers).submit_job(**job)
        except Exception as error:
            raise Failed(f"{self.address} refused the job: {one_line(error)}") from error
        finally:
            if theirs is not None:
                os.environ["RAY_ADDRESS"] = theirs


def bearer(environment: Mapping[str, str]) -> dict[str, str]:
    """The header that carries the cluster's token; none where RAY_AUTH_MODE is not token. Raises Failed."""
    if environment.get("RAY_AUTH_MODE") != "token":
        return {}
    token = environment.get("RAY_AUTH_TOKEN")
    if not token:
        path = Path(environment.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
        try:
            token = path.read_text().strip()
        except OSError as error:
            raise Failed(
                f"RAY_AUTH_MODE is token and {path} can't be read ({error.strerror}). Set RAY_AUTH_TOKEN_PATH."
            ) from None
    return {"Authorization": f"Bearer {token}"}


def picture_of(
    jobs: tuple[Job, ...],
    status: Mapping[str, Any],
    groups: list[dict[str, Any]],
    nodes: list[dict[str, Any]],
) -> Picture:
    """The dashboard's answers as one picture. What it leaves out is left out here."""
    cluster = status.get("clusterStatus") or {}
    load = cluster.get("loadMetricsReport") or {}
    used_by_node = load.get("usageByNode") or {}
    alive = [n for n in nodes if n.get("state") == "ALIVE"]
    placed: dict[str, dict[str, float]] = {}
    waiting = []
    for group in groups:
        bundles = tuple(
            {k: float(v) for k, v in (b.get("unit_resources") or {}).items()}
            for b in group.get("bundles") or ()
        )
        job = str(group.get("creator_job_id"))
        if group.get("state") == "CREATED":
            held = placed.setdefault(job, {})
            for bundle in bundles:
                for key, amount in bundle.items():
                    held[key] = held.get(key, 0.0) + amount
        elif group.get("state") in ("PENDING", "RESCHEDULING"):
            why = str((group.get("stats") or {}).get("scheduling_state", ""))
            waiting.append(Waiting(job, bundles, why))
    return Picture(
        nodes=tuple(
            Node(
                str(n.get("node_name") or n.get("node_ip")),
                {k: float(v) for k, v in (n.get("resources_total") or {}).items()},
                {k: float(v[0]) for k, v in (used_by_node.get(n.get("node_id")) or {}).items()},
            )
            for n in alive
        ),
        waiting=tuple(waiting),
        jobs=jobs,
        placed=placed,
        autoscaler=autoscaler_words(status),
    )


def autoscaler_words(status: Mapping[str, Any]) -> str:
    """What an autoscaler does about it: launches under way, and its last failures. Empty where there is none."""
    report = (status.get("clusterStatus") or {}).get("autoscalerReport") or {}
    said = []
    launches = report.get("pendingLaunches") or {}
    if launches:
        said.append("launching " + ", ".join(f"{n} x {kind}" for kind, n in launches.items()))
    pending = report.get("pendingNodes") or []
    if pending:
        said.append("coming: " + ", ".join(" ".join(str(p) for p in node[1:]) for node in pending[:8]))
    unavailable = ((report.get("nodeAvailabilitySummary") or {}).get("nodeAvailabilities")) or {}
    for kind, record in unavailable.items():
        info = (record or {}).get("unavailableNodeInformation") or {}
        said.append(f"{kind} can't be had: {info.get('category', '')} {info.get('description', '')}".strip())
    failed = report.get("failedNodes") or []
    if failed:
        said.append("failed: " + ", ".join(" ".join(str(p) for p in node) for node in failed[:8]))
    if status.get("autoscalingError"):
        said.append(one_line(status["autoscalingError"]))
    return "; ".join(said)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _job(said: Mapping[str, Any]) -> Job:
    return Job(
        submission=str(said.get("submission_id")),
        job_id=str(said.get("job_id")),
        status=str(said["status"]),
        message=str(said.get("message") or ""),
        run=(said.get("metadata") or {}).get("losscast_run"),
        started=None if said.get("start_time") is None else said["start_time"] / 1000,
        ended=None if said.get("end_time") is None else said["end_time"] / 1000,
    )


def _is_folder(value: Any) -> bool:
    values = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(v, str) and "://" not in v and os.path.exists(v) for v in values)
