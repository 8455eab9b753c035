"""P2: a disk that takes no more gives no 2xx, says so in /metrics, and when it takes again nothing needs a restart."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from monitor.store.reading import rows, samples
from monitor.store.store import Store
from tests.faults.failing_writes import EACH
from tests.monitor.live import Service, wait_for
from tests.monitor.test_ingest import sample

LONG = os.environ.get("LOSSCAST_FAULTS") == "long"
HERE = Path(__file__).parent

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("cut", range(4))
def test_a_disk_that_refuses_writes_refuses_samples_and_recovers(tmp_path: Path, cut: int) -> None:
    with Service(tmp_path / "store") as service:
        assert service.process is not None
        pid = service.process.popen.pid
        acknowledged = 0

        def send(count: int) -> int:
            nonlocal acknowledged
            seqs = range(acknowledged, acknowledged + count)
            status, text = service.ask(
                "/v1/events", b"".join(sample("a", 1, s, s + 1, 2.0 + s) for s in seqs)
            )
            if status == 200:
                acknowledged += count
            else:
                assert status in (503, 507) and b"nothing was stored" in text, (status, text)
            return status

        for _ in range(5):
            assert send(40) == 200
        size = max(p.stat().st_size for p in service.folder.glob("losscast.db*"))
        hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size + cut * 1500, hard))
        refused = [send(400) for _ in range(6)]
        assert refused[-1] in (503, 507)
        metrics = service.ask("/metrics")[1].decode()
        assert "losscast_store_failing 1.0" in metrics
        found = service.get("/v1/runs/a/samples")["samples"]
        assert len(found) == acknowledged
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))
        assert [send(400) for _ in range(3)] == [200] * 3
        assert "losscast_store_failing 0.0" in service.ask("/metrics")[1].decode()
        found = service.get("/v1/runs/a/samples")["samples"]
        assert [s["loss"] for s in found] == [2.0 + s for s in range(acknowledged)]
        service.kill()
        service.start()
        assert len(service.get("/v1/runs/a/samples")["samples"]) == acknowledged


# each single write fails


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C compiler to make writes fail")
    made = tmp_path_factory.mktemp("shim") / "failing_writes.so"
    source = str(HERE / "failing_writes.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(made), source, "-ldl"], check=True)
    return made


@pytest.mark.parametrize(
    ("code", "count"), [(errno.EIO, 1), (errno.EIO, 7), (errno.ENOSPC, 1), (errno.ENOSPC, 25)]
)
def test_whichever_write_fails_nothing_acknowledged_is_lost_and_it_goes_on(
    tmp_path: Path, shim: Path, code: int, count: int
) -> None:
    every = 170 if LONG or count == 1 else 60
    done = subprocess.run(
        [sys.executable, str(HERE / "failing_writes.py"), str(tmp_path), str(code), str(count), "0", str(every)],
        env={**os.environ, "LD_PRELOAD": str(shim)}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(said) == every, done.stderr[-2000:]
    hit = 0
    for one in said:
        assert "error" not in one, one
        assert set(one["refused"]) <= {503, 507}, one
        assert one["after"] == 5, "it did not recover without a restart"
        store = Store(tmp_path / str(one["nth"]))
        facts = store.run("a")
        assert facts is not None
        table = [row for block in rows(samples(store, facts, [])) for row in block]
        steps = [row["step"] for row in table]
        acknowledged = [s + 1 for batch in one["taken"] for s in range(batch * EACH, (batch + 1) * EACH)]
        assert set(steps) == set(acknowledged), (one, "lost, or there though it was refused")
        assert len(steps) == len(set(steps)) == facts.samples == one["counted"], (one, "counted twice")
        assert all(row["loss"] == 1.0 + row["step"] for row in table)
        store.close()
        hit += bool(one["refused"])
    print(f"{every} places: {hit} refused requests, 0 lost, 0 twice, all went on")
    assert hit > every // 10


# a real file system that is full


def test_a_full_file_system_takes_nothing_says_so_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "losscast-test", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("needs root and the right to mount a small file system")
    try:
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(1 << 20))
        with Service(disk / "store") as service:
            acknowledged = 0

            def send() -> int:
                nonlocal acknowledged
                body = b"".join(
                    sample("a", 1, s, s + 1, 2.0 + s) for s in range(acknowledged, acknowledged + 300)
                )
                status, text = service.ask("/v1/events", body)
                if status == 200:
                    acknowledged += 300
                else:
                    assert status in (503, 507), (status, text)
                return status

            said = [send() for _ in range(200)]
            assert 507 in said and said[-1] in (503, 507), "it never filled up"
            assert said.count(200) > 3
            assert "losscast_store_failing 1.0" in service.ask("/metrics")[1].decode()
            assert len(service.get("/v1/runs/a/samples")["samples"]) == acknowledged
            ballast.unlink()
            wait_for(lambda: send() == 200, 10)
            found = service.get("/v1/runs/a/samples")["samples"]
            assert [s["loss"] for s in found] == [2.0 + s for s in range(acknowledged)]
            service.kill()
            service.start()
            assert len(service.get("/v1/runs/a/samples")["samples"]) == acknowledged
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
