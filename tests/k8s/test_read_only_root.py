"""The monitor as its pod has it, without the pod: a root that nothing can write to, and its store and /tmp as all that it may.

In a mount namespace of its own, so it needs root and `unshare`.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from tests.k8s.test_kustomize import of_kind

pytestmark = pytest.mark.e2e
SHUT = """
set -e
mount --make-rprivate /
mount --bind "$1" "$1"
mount -t tmpfs -o mode=1777 tmpfs "$2"
mount -o remount,bind,ro /
if touch /etc/losscast-probe 2>/dev/null; then echo "the root can be written to"; exit 9; fi
shift 2
exec "$@"
"""


def test_the_monitor_serves_from_a_root_it_cannot_write_to(tmp_path: Path) -> None:
    if os.geteuid() or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare, for a mount namespace")
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespace can be made here")
    (found,) = of_kind("dev", "StatefulSet")
    container = found["spec"]["template"]["spec"]["containers"][0]
    assert {m["mountPath"] for m in container["volumeMounts"]} == {"/var/lib/losscast", "/tmp"}
    store, scratch = tmp_path / "store", tmp_path / "scratch"
    store.mkdir()
    scratch.mkdir()
    args = [
        a.replace("0.0.0.0:8700", "127.0.0.1:0").replace("/var/lib/losscast", str(store))
        for a in container["args"]
    ]
    command = ["unshare", "-m", "bash", "-c", SHUT, "shut", str(store), str(scratch)]
    monitor = subprocess.Popen(
        [*command, sys.executable, "-m", "launcher.cli", *args],
        env={**os.environ, "HOME": str(scratch), "TMPDIR": str(scratch), "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    said: list[str] = []
    assert monitor.stdout is not None
    lines = monitor.stdout
    threading.Thread(target=lambda: said.extend(lines), daemon=True).start()
    try:
        deadline, address = time.monotonic() + 120, None
        while address is None:
            assert monitor.poll() is None and time.monotonic() < deadline, "".join(said)
            address = re.search(r"monitor on (http://\S+),", "".join(said))
            time.sleep(0.1)
        with urllib.request.urlopen(f"{address[1]}/healthz", timeout=60) as answer:
            assert answer.status == 200
    finally:
        monitor.send_signal(signal.SIGTERM)
        assert monitor.wait(60) == 0, "".join(said)
    assert (store / "losscast.db").exists()
