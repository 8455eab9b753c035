"""A Ray cluster of one machine: started for a person who has none, with token auth, stopped by pid.

Everything of it lies in one folder (`home`): the token, the logs, and `head.json`, which says where it listens.
Ray's own `ray stop` is never used, since it ends every cluster of the machine, not only ours.
"""

import contextlib
import dataclasses
import fcntl
import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher.errors import Failed
from launcher.jobs.cluster import bearer
from launcher.ports import free_port
from launcher.storage.runfolder import read_json, write_whole

START_TIMEOUT_S = 180.0
"""A start takes some five seconds, and a minute was seen where other work had the machine's cores."""
SLOW_S = 20.0
"""A start that takes longer is looked at more closely."""
OBJECT_STORE_BYTES = 100_000_000
"""Nothing of ours travels through Ray's object store; its default would reserve a third of the memory."""
QUIET = {
    # workers, raylet and head report metrics to the node's agent, which serves them at a port that nobody is told of:
    # half of the agent, the dearest of Ray's processes
    "RAY_enable_metrics_collection": "0",
    # every worker reports its tasks, for `ray list tasks` and the timeline: a run's tasks are its driver's polls
    "RAY_task_events_report_interval_ms": "0",
    # the dashboard measures itself and its modules' processes every 5 s, for the same port: half of its head
    "METRICS_RECORD_INTERVAL_S": "60",
    # the agent reads every process of Ray's in /proc every 5 s, for the dashboard's page of nodes
    "REPORTER_UPDATE_INTERVAL_MS": "30000",
    # the log monitor lists the folder of logs ten times a second up to this many files, beyond them twice a second
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
}
"""Of a cluster that has no cores to spare for Ray: what its own processes do beside training, and no run needs. Jobs, output,
placement groups, the memory monitor and the health checks of nodes are as Ray has them. The environment wins."""


@dataclass(frozen=True)
class Head:
    """A running head node."""

    pid: int
    address: str
    """host:port of the GCS, for ray.init."""
    dashboard: str
    """http URL of the Jobs API."""
    token_file: str
    temp: str = ""
    """Ray's own folder, of this cluster alone."""

    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to talk to this cluster and to no other."""
        return {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": self.token_file,
            "RAY_USAGE_STATS_ENABLED": "0",
        }


def listening(address: str, timeout_s: float = 0.5) -> bool:
    """True when host:port takes a connection."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout_s):
            return True
    except OSError:
        return False


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def running(home: Path) -> Head | None:
    """The head whose state lies in `home`, if it still lives."""
    state = read_json(home / "head.json")
    if state is None:
        return None
    head = Head(**state)
    return head if _alive(head.pid) and listening(head.address) else None


def running_or_started(home: Path, say: Callable[[str], None] = lambda text: None) -> Head:
    """The head whose state lies in `home`, started where there is none: once, however many ask at a time. Raises as `start`."""
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (home / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        head = running(home)
        if head is None:
            say("starting a local Ray (end it with: losscast ray down)")
            head = start(home, max(2, os.cpu_count() or 2))
        return head


def start(home: Path, cpus: int, extra_env: dict[str, str] | None = None, *, tries: int = 2) -> Head:
    """Start a head with `cpus` logical CPUs on loopback and wait until its Jobs API answers. One that was slow, and whose own
    parts gave up on each other for that, is started again.

    Raises Failed where Ray is not installed, and, with the end of Ray's own log, when it does not within three.
    """
    if importlib.util.find_spec("ray") is None:
        raise Failed(
            "a local Ray needs ray here: pip install 'losscast[train]', beside the torch build for this machine. "
            "A run for a cluster needs none: cluster: {to: http://HEAD:8265} or {to: kuberay}."
        )
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    token_file = home / "ray.token"
    if not token_file.exists():
        descriptor = os.open(token_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.write(descriptor, secrets.token_hex(32).encode())
        os.close(descriptor)
    gcs, dashboard, agent, client = (free_port() for _ in range(4))
    # A folder of its own, since a job's driver is sent to the cluster that this folder's `ray_current_cluster` names: in
    # Ray's shared default that is whichever cluster of the machine started last. Short, since Ray's sockets lie in
    # it and a socket's path has at most 107 bytes.
    temp = tempfile.mkdtemp(prefix="lc-ray-", dir="/tmp")
    head = Head(0, f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", str(token_file), temp)
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats",
        "--node-ip-address=127.0.0.1", f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}",
        f"--metrics-export-port={free_port()}", f"--num-cpus={cpus}", f"--object-store-memory={OBJECT_STORE_BYTES}", f"--temp-dir={temp}",
    ]  # fmt: skip
    env = {
        **QUIET,
        **os.environ,
        **head.environment(),
        "RAY_DISABLE_DOCKER_CPU_WARNING": "1",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        **(extra_env or {}),
    }
    env.pop("RAY_ADDRESS", None)
    log = home / "ray.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=env, start_new_session=True
        )
    head = dataclasses.replace(head, pid=process.pid)
    began = time.monotonic()
    # it takes jobs when its dashboard does and the agent that starts them is there
    asked = (f"{head.dashboard}/api/jobs/", f"http://127.0.0.1:{agent}/api/local_raylet_healthz")

    def ready() -> bool:
        # The client server, which nobody here uses, waits 30 s for the others, and Ray ends the whole cluster with it.
        whole = time.monotonic() - began < SLOW_S or listening(f"127.0.0.1:{client}")
        return listening(head.address) and all(_answers(head, url) for url in asked) and whole

    while not ready():
        died = process.poll() is not None
        if died or time.monotonic() > began + START_TIMEOUT_S:
            stop(head)
            if died and tries > 1 and time.monotonic() > began + SLOW_S:
                return start(home, cpus, extra_env, tries=tries - 1)
            tail = " | ".join(log.read_text(errors="replace").strip().splitlines()[-3:])
            raise Failed(f"the local Ray did not start ({tail or 'it said nothing'}). Its log: {log}")
        time.sleep(0.1)
    write_whole(home / "head.json", asdict(head))
    return head


def _answers(head: Head, url: str) -> bool:
    """True when it takes our token and answers."""
    import urllib.request

    request = urllib.request.Request(url, headers=bearer(head.environment()))
    try:
        with urllib.request.urlopen(request, timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


def descendants(pid: int) -> list[int]:
    """Every living process below `pid`, nearest first, itself not among them."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int(entry.joinpath("stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError, ValueError):
                continue  # it ended while we looked
            children.setdefault(parent, []).append(int(entry.name))
    found, frontier = [], [pid]
    while frontier:
        frontier = [c for p in frontier for c in children.get(p, [])]
        found += frontier
    return found


def stop(head: Head, grace_s: float = 5.0) -> None:
    """End the head and every process below it: asked first, then made to. Others' processes are not touched.

    What its jobs printed is kept beside the token, in `jobs/`; Ray's own folder goes.
    """
    family = [head.pid, *descendants(head.pid)]
    for pid in family[:1]:
        _signal(pid, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline and any(still_runs(p) for p in family):
        time.sleep(0.05)
    for pid in family:
        if still_runs(pid):
            _signal(pid, signal.SIGKILL)
    _reap(head.pid)
    if head.temp:
        jobs = Path(head.token_file).parent / "jobs"
        for log in Path(head.temp).glob("session_2*/logs/job-driver-*.log"):
            with contextlib.suppress(OSError):
                jobs.mkdir(exist_ok=True)
                shutil.copy(log, jobs / log.name.removeprefix("job-driver-"))
        shutil.rmtree(head.temp, ignore_errors=True)


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def still_runs(pid: int) -> bool:
    """True for a living process; a zombie has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return False


def _reap(pid: int) -> None:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
