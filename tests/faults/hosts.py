"""Several hosts on one machine: a raylet in each of a few network namespaces, joined by a bridge in one more. Not a test.

Nothing outside these namespaces is touched. Every name carries the process id, so that suites side by side do not meet.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from launcher.jobs.local_ray import descendants, still_runs


def refusal() -> str | None:
    """Why hosts can't be made here; None when they can."""
    if not sys.platform.startswith("linux") or shutil.which("ip") is None:
        return "needs Linux and iproute2"
    if os.geteuid() != 0:
        return "needs root for network namespaces"
    name = f"lc-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode != 0:
        return f"network namespaces are not allowed here: {made.stderr.strip()}"
    try:
        veth = subprocess.run(
            ["ip", "-n", name, "link", "add", "a0", "type", "veth", "peer", "name", "a1"],
            capture_output=True,
            text=True,
        )
        if veth.returncode != 0:
            return f"veth is not allowed here: {veth.stderr.strip()}"
        own = subprocess.run(
            ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, text=True
        )
        return (
            None if own.returncode == 0 else f"a host's own mounts are not allowed here: {own.stderr.strip()}"
        )
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True, text=True)


class Hosts:
    """A head that computes nothing and any number of hosts, each with a cable that can be pulled."""

    PORT = 6399

    def __init__(self, home: Path) -> None:
        self.home, self._tag = home, f"lc{os.getpid() % 100000}"
        self._names: list[str] = []
        self._added: dict[str, tuple[int, int]] = {}
        """Number and CPUs of each host that is neither cut off nor killed."""
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._temp = tempfile.mkdtemp(prefix="lc-ray-", dir="/tmp")  # short: Ray's sockets lie in it
        token = home / "ray.token"
        token.write_text(secrets.token_hex(32))
        self.env = {
            **os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DISABLE_DOCKER_CPU_WARNING": "1", "RAY_ADDRESS": f"10.213.7.1:{self.PORT}",
            # a lost host is known after five seconds instead of a minute
            "RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "3000",
            "RAY_health_check_failure_threshold": "5", "RAY_health_check_initial_delay_ms": "2000",
        }  # fmt: skip
        self._switch = self._netns("sw")
        _ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "br0", "up")
        self._cable("head", 1)
        self._ray("head", 1, "--head", f"--port={self.PORT}", "--num-cpus=0", "--include-dashboard=false",
                  f"--temp-dir={self._temp}")  # fmt: skip

    def _netns(self, name: str) -> str:
        full = f"{self._tag}-{name}"
        _ip("netns", "add", full)
        self._names.append(full)
        _ip("-n", full, "link", "set", "lo", "up")
        return full

    def _cable(self, name: str, number: int) -> None:
        full, plug = self._netns(name), f"p{number}"
        _ip("-n", full, "link", "add", "eth0", "type", "veth", "peer", "name", plug, "netns", self._switch)
        _ip("-n", full, "addr", "add", f"10.213.7.{number}/24", "dev", "eth0")
        _ip("-n", full, "link", "set", "eth0", "up")
        _ip("-n", full, "route", "add", "default", "dev", "eth0")  # Ray asks the routes for its own address
        _ip("-n", self._switch, "link", "set", plug, "master", "br0", "up")

    def run(self, name: str, command: list[str], log: Path, **env: str) -> "subprocess.Popen[bytes]":
        """Start a command on a host."""
        with log.open("ab") as out:
            return subprocess.Popen(
                ["ip", "netns", "exec", f"{self._tag}-{name}", *command],
                stdout=out, stderr=out, stdin=subprocess.DEVNULL, env={**self.env, **env}, start_new_session=True,
            )  # fmt: skip

    def _ray(self, name: str, number: int, *args: str) -> None:
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats",
            f"--node-ip-address=10.213.7.{number}", "--object-store-memory=80000000",
            *args,
        ]  # fmt: skip
        if (
            name != "head"
        ):  # a place of its own for Ray's sockets: two hosts that start at once would pick one name
            own = f'mount -t tmpfs tmpfs {self._temp} && exec "$@"'
            command = ["unshare", "-m", "sh", "-c", own, "sh", *command]
        env = {"RAY_ADDRESS": ""}
        self._processes[name] = self.run(name, command, self.home / f"{name}.log", **env)

    def add(self, name: str, number: int, cpus: int = 1) -> None:
        """A host with its raylet. Returns at once: the cluster takes it in when it is there."""
        self._cable(name, number)
        self._added[name] = number, cpus
        self._join(name, number, cpus)

    def _join(self, name: str, number: int, cpus: int) -> None:
        self._ray(name, number, f"--address=10.213.7.1:{self.PORT}", f"--num-cpus={cpus}")

    def look_after(self) -> None:
        """Start those again that ended by themselves: on a busy machine a raylet gives up before its agent is there."""
        for name, (number, cpus) in self._added.items():
            process = self._processes.get(name)
            if process is not None and process.poll() is not None:
                self._end(name, signal.SIGKILL)
                self._clear(f"{self._tag}-{name}")
                self._join(name, number, cpus)

    def cut(self, name: str) -> None:
        """Pull the host's cable: nothing it sends arrives, and nobody is told."""
        self._added.pop(name, None)
        _ip("-n", f"{self._tag}-{name}", "link", "set", "eth0", "down")

    def kill(self, name: str) -> None:
        """The host's power fails: every process on it is gone at once, its cable dead."""
        self.cut(name)
        self._end(name, signal.SIGKILL)

    def _end(self, name: str, number: int) -> None:
        process = self._processes.pop(name, None)
        if process is None:
            return
        family = [process.pid, *descendants(process.pid)]
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + 5.0
        while time.monotonic() < deadline and any(still_runs(p) for p in family[1:]):
            time.sleep(0.05)
        for pid in [*family, *descendants(process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()

    def _clear(self, full: str) -> None:
        """End whatever still runs in a namespace."""
        pids = subprocess.run(["ip", "netns", "pids", full], capture_output=True, text=True).stdout.split()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def close(self) -> None:
        """End every process and take every namespace away."""
        for name in [n for n in self._processes if n != "head"] + ["head"]:
            self._end(name, signal.SIGTERM)
        for full in self._names:
            self._clear(full)
            subprocess.run(["ip", "netns", "del", full], capture_output=True)
        shutil.rmtree(self._temp, ignore_errors=True)


@contextlib.contextmanager
def hosts(home: Path) -> Iterator[Hosts]:
    made = Hosts(home)
    try:
        yield made
    finally:
        made.close()
