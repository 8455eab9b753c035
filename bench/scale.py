"""What one more of everything costs: a sample, a run, a log entry, a rank. The figures behind docs/scale.md.

    python bench/scale.py [SAMPLES] [RUNS]

CPU seconds are of the processes themselves, so that a busy machine changes them little; disk is what the store's folder holds
after the service ended in order. One service, one judge process, as shipped. About a minute.
"""

import http.client
import json
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.monitor_ingest import children, used
from launcher.kuberay.manifests import as_yaml, manifests
from launcher.runspec.file import read_spec
from launcher.storage.runlog import RunLog
from launcher.storage.store import FolderStore
from tests.monitor.live import Service


def memory_mib(pid: int) -> float:
    """Resident now."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1024


def post(connection: http.client.HTTPConnection, token: str, body: bytes) -> None:
    while True:
        connection.request("POST", "/v1/events", body, {"Authorization": f"Bearer {token}"})
        answer = connection.getresponse()
        answer.read()
        if answer.status == 200:
            return
        assert answer.status == 429, answer.status
        time.sleep(0.05)


def sample(run: str, step: int) -> bytes:
    return (
        b'{"event":"sample","run":"%s","attempt":1,"seq":%d,"step":%d,"time":1763800001.25,"loss":%.6f,"tokens":%d,"lr":0.0006,"grad_norm":0.81}\n'
        % (run.encode(), step - 1, step, 10 * step**-0.2, step * 524288)
    )


def alone(service: Service, run: int) -> None:
    """A run as the reporter sends it: a request a step, 100 of them; 32 such runs at once share commits."""
    connection = http.client.HTTPConnection("127.0.0.1", service.port)
    for step in range(1, 101):
        post(connection, service.token, sample(f"alone-{run}", step))


def judged(service: Service, run: str, step: int) -> None:
    """Wait until the judge has seen a step."""
    for _ in range(600):
        rows = service.get(f"/v1/runs/{run}/samples?from={step}&max=1")["samples"]
        if rows and rows[-1]["expected"] is not None:
            return
        time.sleep(0.2)
    raise SystemExit(f"the judge never came to step {step} of {run}")


def monitor(samples: int, runs: int) -> dict[str, float]:
    """Costs of a sample, of a run that is active, and of a scrape."""
    out: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        with Service(store) as service:
            assert service.process is not None
            pid = service.process.popen.pid
            judge = children(pid)[0]
            connection = http.client.HTTPConnection("127.0.0.1", service.port)
            before, before_judge = used(pid)[0], used(judge)[0]
            for first in range(1, samples, 1000):
                post(
                    connection, service.token, b"".join(sample("one", s) for s in range(first, first + 1000))
                )
            judged(service, "one", samples - 1)
            out["ingest_us_a_sample"] = 1e6 * (used(pid)[0] - before) / samples
            out["judge_us_a_sample"] = 1e6 * (used(judge)[0] - before_judge) / samples
            before = used(pid)[0]
            crowd = [threading.Thread(target=alone, args=(service, i)) for i in range(32)]
            for thread in crowd:
                thread.start()
            for thread in crowd:
                thread.join()
            out["service_us_a_request_of_one"] = 1e6 * (used(pid)[0] - before) / 3200
            base, base_judge = memory_mib(pid), memory_mib(judge)
            steps = 20
            for step in range(1, steps + 1):
                for first in range(0, runs, 500):
                    post(
                        connection,
                        service.token,
                        b"".join(sample(f"many-{r}", step) for r in range(first, min(first + 500, runs))),
                    )
            judged(service, f"many-{runs - 1}", steps)
            out["service_kib_a_run"] = 1024 * (memory_mib(pid) - base) / runs
            out["judge_kib_a_run"] = 1024 * (memory_mib(judge) - base_judge) / runs
            before = used(pid)[0]
            for _ in range(5):
                _, text = service.ask("/metrics")
            out["scrape_cpu_ms"] = 1e3 * (used(pid)[0] - before) / 5
            out["series"] = sum(not line.startswith(b"#") for line in text.splitlines())
            out["scrape_kib"] = len(text) / 1024
        size = sum(p.stat().st_size for p in store.rglob("*") if p.is_file())
        out["disk_bytes_a_sample"] = size / (samples + 3200 + runs * steps)
    return out


def run_log(entries: int) -> dict[str, float]:
    """A run's log that has grown: what one more entry takes, and what reading all of it takes a newcomer."""
    with tempfile.TemporaryDirectory() as folder:
        log = RunLog(FolderStore(folder), "run")
        holding = log.take("bench")
        before = time.process_time()
        for step in range(entries):
            holding.commit(step, f"attempts/1/checkpoints/step-{step}.manifest.json", "0" * 64)
        append_s = time.process_time() - before
        holding.release()
        before = time.process_time()
        assert len(RunLog(FolderStore(folder), "run").entries()) == entries + 1
        read_s = time.process_time() - before
        size = sum(p.stat().st_size for p in Path(folder, "log").iterdir())
    return {
        "log_append_ms": 1e3 * append_s / entries,
        "log_read_ms_an_entry": 1e3 * read_s / entries,
        "log_bytes_an_entry": size / entries,
    }


def main() -> None:
    samples = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    runs = int(sys.argv[2]) if len(sys.argv) > 2 else 1000
    spec = read_spec(Path(__file__).parents[1] / "examples/gpt-7b-64xH100.yaml")
    found = {**monitor(samples, runs), **run_log(300), "rayjob_bytes": len(as_yaml(manifests(spec)))}
    print(json.dumps({name: round(value, 2) for name, value in found.items()}))


if __name__ == "__main__":
    main()
