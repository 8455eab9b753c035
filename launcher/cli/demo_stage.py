"""What the demo puts up around itself, and takes down again: monitor, local Ray, Prometheus where there is one.

Every process here is a child of the demo in a session of its own, so that Ctrl-C reaches the demo alone, which then
ends them in order. Nothing listens on anything but loopback.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

from launcher.errors import Failed
from launcher.jobs import local_ray

NEEDED_MEMORY_BYTES = 3 << 30
"""Two runs of two ranks with torch and DeepSpeed imported, Ray, and the monitor: 2.5 GB were seen."""


def check_machine() -> dict[str, Any]:
    """This machine in a few words. Raises Failed for what would stop the demo half-way."""
    missing = [name for name in ("torch", "deepspeed", "ray") if not _importable(name)]
    if missing:
        raise Failed(
            f"{', '.join(missing)}: not installed here. `make demo` installs everything, or: pip install 'losscast[train,plot]'"
        )
    free = available_memory_bytes()
    if free is not None and free < NEEDED_MEMORY_BYTES:
        raise Failed(
            f"the demo needs about {NEEDED_MEMORY_BYTES >> 30} GiB of free memory and {free / 2**30:.1f} GiB are free. "
            f"Close something, or run it on a larger machine."
        )
    return {"cpus": os.cpu_count(), "memory_gib": _total_memory_gib(), "python": sys.version.split()[0]}


def _importable(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


def available_memory_bytes() -> int | None:
    """Memory that a new process could take now; None where the system does not say."""
    return _meminfo("MemAvailable")


def _total_memory_gib() -> float | None:
    total = _meminfo("MemTotal")
    return None if total is None else round(total / 2**30, 1)


def _meminfo(key: str) -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None


def _end(process: subprocess.Popen[bytes], grace_s: float = 5.0) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(grace_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class MonitorProcess:
    """`losscast monitor serve` on loopback, and questions to it."""

    def __init__(self, store: Path, log: Path) -> None:
        """Start it and wait until it answers. Raises Failed with its own last words."""
        self.token = _output(
            [
                sys.executable,
                "-m",
                "launcher.cli",
                "monitor",
                "token",
                "create",
                "--store",
                str(store),
                "--scope",
                "ingest,read",
            ]
        )
        self.port = local_ray.free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [
            sys.executable,
            "-m",
            "launcher.cli",
            "monitor",
            "serve",
            "--listen",
            f"127.0.0.1:{self.port}",
            "--store",
            str(store),
        ]
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True
            )
        try:
            deadline = time.monotonic() + 30
            while True:
                try:
                    with urllib.request.urlopen(self.url + "/healthz", timeout=2):
                        return
                except OSError:
                    if self._process.poll() is not None or time.monotonic() > deadline:
                        self.close()
                        tail = log.read_text(errors="replace").strip().splitlines()[-1:]
                        raise Failed(
                            f"the monitor did not start: {' '.join(tail) or 'it said nothing'}. Its log: {log}"
                        ) from None
                    time.sleep(0.05)
        except BaseException:  # an interruption while it starts must not leave it behind
            _end(self._process)
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def get(self, path: str) -> Any:
        """The JSON answer of one GET, None for a 404."""
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {self.token}"})
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise Failed(f"the monitor answered {error.code} to {path}") from error

    def metrics(self) -> str:
        """What Prometheus would scrape."""
        request = urllib.request.Request(
            self.url + "/metrics", headers={"Authorization": f"Bearer {self.token}"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read().decode()

    def close(self) -> None:
        _end(self._process)


class PrometheusProcess:
    """A real Prometheus with the shipped rules, scraping the monitor every second."""

    def __init__(self, binary: str, folder: Path, monitor: MonitorProcess, rules: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "losscast.rules.yaml").write_text(rules)
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(monitor.token)
        (folder / "prometheus.yml").write_text(
            "global: {scrape_interval: 1s, evaluation_interval: 1s}\n"
            "rule_files: [losscast.rules.yaml]\n"
            "scrape_configs:\n"
            f"  - {{job_name: losscast, authorization: {{credentials_file: token}}, static_configs: [{{targets: ['127.0.0.1:{monitor.port}']}}]}}\n"
        )
        self.url = f"http://127.0.0.1:{local_ray.free_port()}"
        command = [
            binary, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address={self.url.removeprefix('http://')}", "--log.level=warn",
        ]  # fmt: skip
        with (folder / "prometheus.log").open("wb") as out:
            self._process = subprocess.Popen(
                command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True
            )

    def firing(self) -> list[dict[str, str]]:
        """Labels of every alert that fires now; empty while Prometheus is away."""
        try:
            with urllib.request.urlopen(self.url + "/api/v1/alerts", timeout=5) as answer:
                alerts = json.loads(answer.read())["data"]["alerts"]
        except (OSError, ValueError, KeyError):
            return []
        return [a["labels"] for a in alerts if a["state"] == "firing"]

    def close(self) -> None:
        _end(self._process)


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Failed(
            f"{' '.join(command[2:5])}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'failed'}"
        )
    return done.stdout.strip().splitlines()[-1]


class Stage:
    """Everything the demo stands on, as one context: what was started is ended, whatever happens."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._monitor: MonitorProcess | None = None
        self._head: local_ray.Head | None = None
        self.prometheus: PrometheusProcess | None = None
        self.peak_memory_bytes = 0
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch_memory, daemon=True)

    @property
    def monitor(self) -> MonitorProcess:
        """The live monitor. Only after `start`."""
        assert self._monitor is not None
        return self._monitor

    @property
    def head(self) -> local_ray.Head:
        """The local Ray's head. Only after `start`."""
        assert self._head is not None
        return self._head

    def __enter__(self) -> "Stage":
        self._watcher.start()
        return self

    def start(self, cpus: int) -> None:
        """Put up monitor and Ray side by side, then Prometheus where the machine has one."""
        trouble: list[Exception] = []

        def ray() -> None:
            try:
                self._head = local_ray.start(self.folder / "ray", cpus)
            except Exception as error:
                trouble.append(error)

        starting = threading.Thread(target=ray)
        starting.start()
        try:
            self._monitor = MonitorProcess(self.folder / "store", self.folder / "monitor.log")
            binary = shutil.which("prometheus")
            if binary:
                from monitor.prometheus.alerts import rules_yaml

                self.prometheus = PrometheusProcess(
                    binary, self.folder / "prometheus", self.monitor, rules_yaml()
                )
        finally:
            starting.join()
        if trouble:
            raise trouble[0]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        before = signal.signal(
            signal.SIGINT, signal.SIG_IGN
        )  # a second Ctrl-C must not leave half of it standing
        try:
            self._done.set()
            if self._head is not None:
                local_ray.stop(self._head)
            for process in (self.prometheus, self._monitor):
                if process is not None:
                    process.close()
        finally:
            signal.signal(signal.SIGINT, before)

    def _watch_memory(self) -> None:
        while not self._done.wait(2.0):
            total = sum(
                _proportional_bytes(pid) for pid in [os.getpid(), *local_ray.descendants(os.getpid())]
            )
            self.peak_memory_bytes = max(self.peak_memory_bytes, total)


def _proportional_bytes(pid: int) -> int:
    """Memory of one process, pages shared with others divided among them (PSS)."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return 0
