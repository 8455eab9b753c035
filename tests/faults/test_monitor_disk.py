"""P2: a disk that takes no more gives no 2xx, says so in /metrics, and when it takes again nothing needs a restart."""

import resource
from pathlib import Path

import pytest

from tests.monitor.live import Service
from tests.monitor.test_ingest import sample

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
