"""Real processes for tests: the monitor, Prometheus, Alertmanager, and a webhook receiver. Loopback, ports of their own."""

import contextlib
import http.server
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from launcher.ports import free_port

PROMETHEUS = shutil.which("prometheus")
ALERTMANAGER = shutil.which("prometheus-alertmanager") or shutil.which("alertmanager")
PROMTOOL = shutil.which("promtool")


def wait_for(what: Callable[[], Any], seconds: float = 10.0, every: float = 0.05) -> Any:
    """The first true answer. Raises AssertionError when none comes in time."""
    until = time.monotonic() + seconds
    while True:
        found = what()
        if found:
            return found
        assert time.monotonic() < until, f"not in {seconds} s"
        time.sleep(every)


class Process:
    """A child that is ended with the test."""

    def __init__(self, command: list[str], log: Path) -> None:
        with log.open("ab") as out:
            self.popen = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
        self.log = log

    def end(self, sig: int = signal.SIGTERM, within: float = 10.0) -> int:
        if self.popen.poll() is None:
            self.popen.send_signal(sig)
        return self.popen.wait(within)


class Service:
    """`losscast monitor serve`, on a port that stays its own over restarts."""

    def __init__(self, folder: Path, *flags: str) -> None:
        """`flags`: more of `monitor serve`'s."""
        self.folder, self.port, self.flags = folder, free_port(), flags
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder.with_suffix(".log")
        command = [
            *self._losscast,
            "monitor",
            "token",
            "create",
            "--store",
            str(folder),
            "--scope",
            "ingest,read",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        self.token = done.stdout.splitlines()[-1]
        self.process: Process | None = None

    _losscast = (sys.executable, "-m", "launcher.cli")

    def start(self, within: float = 15.0) -> float:
        """Start it; seconds until it answered."""
        began = time.monotonic()
        listen = f"127.0.0.1:{self.port}"
        self.process = Process(
            [
                *self._losscast,
                "monitor",
                "serve",
                "--listen",
                listen,
                "--store",
                str(self.folder),
                *self.flags,
            ],
            self.log,
        )
        wait_for(self._answers, within, 0.02)
        return time.monotonic() - began

    def _answers(self) -> bool:
        assert self.process is not None and self.process.popen.poll() is None, self.log.read_text()
        with contextlib.suppress(OSError), urllib.request.urlopen(self.url + "/healthz", timeout=2):
            return True
        return False

    def kill(self) -> None:
        assert self.process is not None
        self.process.end(signal.SIGKILL)

    def stop(self) -> int:
        return 0 if self.process is None else self.process.end()

    def ask(self, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        request = urllib.request.Request(
            self.url + path, data=body, headers={"Authorization": f"Bearer {self.token}", **headers}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def get(self, path: str) -> Any:
        status, body = self.ask(path)
        return json.loads(body) if status == 200 else None

    def __enter__(self) -> "Service":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None and self.process.popen.poll() is None:
            self.process.end(signal.SIGKILL)


class ForkedService(Service):
    """The same, started in a fraction of a second; for what kills it a hundred times."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        listen = f"127.0.0.1:{self.port}"
        command = [
            sys.executable,
            "-m",
            "tests.monitor.forked",
            "monitor",
            "serve",
            "--listen",
            listen,
            "--store",
            str(folder),
        ]
        with self.log.open("ab") as out:
            self.parent = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=out, text=True,
                cwd=Path(__file__).parents[2],
            )  # fmt: skip
        self.pid = 0

    def start(self, within: float = 15.0) -> float:
        began = time.monotonic()
        assert self.parent.stdin is not None and self.parent.stdout is not None
        self.parent.stdin.write("start\n")
        self.parent.stdin.flush()
        self.pid = int(self.parent.stdout.readline())
        wait_for(self._answers, within, 0.01)
        return time.monotonic() - began

    def _answers(self) -> bool:
        assert Path(f"/proc/{self.pid}").exists(), self.log.read_text()
        with contextlib.suppress(OSError), urllib.request.urlopen(self.url + "/healthz", timeout=2):
            return True
        return False

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        self._end(signal.SIGTERM)
        return 0

    def _end(self, sig: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, sig)
        wait_for(lambda: not Path(f"/proc/{self.pid}").exists(), 20, 0.01)

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self.pid:
                os.kill(self.pid, signal.SIGKILL)
        self.parent.kill()
        self.parent.wait()


class Webhook:
    """Keeps what Alertmanager sends, with when it came."""

    def __init__(self) -> None:
        self.got: list[tuple[float, dict[str, Any]]] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.got.extend((time.time(), alert) for alert in body["alerts"])
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/"

    def firing(self, name: str, run: str | None = None) -> list[float]:
        """When this alert came in, firing."""
        return [
            at
            for at, a in list(self.got)
            if a["status"] == "firing" and a["labels"]["alertname"] == name and a["labels"].get("run") == run
        ]


@contextlib.contextmanager
def alertmanager(folder: Path, webhook: Webhook, config: str | None = None) -> Iterator["Restartable"]:
    """A real Alertmanager, which without a configuration of its own sends everything to the webhook at once."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "alertmanager.yml").write_text(
        config
        or "route: {receiver: hook, group_by: [alertname, run], group_wait: 0s, group_interval: 1s, repeat_interval: 1h,\n"
        "  routes: [{receiver: nobody, matchers: ['alertname = Watchdog']}]}\n"
        "inhibit_rules:\n"
        "  - {source_matchers: ['alertname = LossNonFinite'], target_matchers: ['alertname =~ \"Loss(OffLine|Diverged|AbovePrediction|BelowPrediction|Spike)\"'], equal: [run]}\n"
        f"receivers: [{{name: nobody}}, {{name: hook, webhook_configs: [{{url: '{webhook.url}', send_resolved: true}}]}}]\n"
    )
    port = free_port()
    command = [
        str(ALERTMANAGER), f"--config.file={folder}/alertmanager.yml", f"--storage.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}", "--cluster.listen-address=", "--data.maintenance-interval=5s",
        "--log.level=warn",
    ]  # fmt: skip
    with Restartable(command, folder / "log", f"http://127.0.0.1:{port}") as found:
        yield found


@contextlib.contextmanager
def prometheus(
    folder: Path, service: Service, rules: str, alertmanager_url: str | None = None
) -> Iterator["Restartable"]:
    """A real Prometheus with the rules, scraping and evaluating every second."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "losscast.rules.yaml").write_text(rules)
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(service.token)
    target = "" if alertmanager_url is None else alertmanager_url.removeprefix("http://")
    alerting = (
        f"alerting: {{alertmanagers: [{{static_configs: [{{targets: ['{target}']}}]}}]}}\n" if target else ""
    )
    (folder / "prometheus.yml").write_text(
        "global: {scrape_interval: 1s, evaluation_interval: 1s}\n"
        "rule_files: [losscast.rules.yaml]\n" + alerting + "scrape_configs:\n"
        "  - {job_name: losscast, authorization: {credentials_file: token}, static_configs: "
        f"[{{targets: ['127.0.0.1:{service.port}']}}]}}\n"
    )
    port = free_port()
    command = [
        str(PROMETHEUS), f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn", "--rules.alert.resend-delay=1s",
    ]  # fmt: skip
    with Restartable(command, folder / "log", f"http://127.0.0.1:{port}") as found:
        yield found


class Restartable:
    """A server that can be killed and started again."""

    def __init__(self, command: list[str], log: Path, url: str) -> None:
        self.command, self.log, self.url = command, log, url
        self.start()

    def start(self) -> None:
        self.process = Process(self.command, self.log)
        wait_for(self._ready, 20)

    def _ready(self) -> bool:
        assert self.process.popen.poll() is None, self.log.read_text()[-2000:]
        with contextlib.suppress(OSError), urllib.request.urlopen(self.url + "/-/ready", timeout=2) as answer:
            return answer.status == 200
        return False

    def kill(self) -> None:
        self.process.end(signal.SIGKILL)

    def json(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=5) as answer:
            return json.loads(answer.read())

    def __enter__(self) -> "Restartable":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.popen.poll() is None:
            self.process.end(signal.SIGKILL)


os.environ.setdefault("OMP_NUM_THREADS", "1")
