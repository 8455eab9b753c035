"""Ten thousand active runs, one sample a second each, judged: what that costs the service.

    python bench/monitor_runs.py [RUNS] [SECONDS] [WARM]

Samples come in requests of 1,000 runs each (as from a gateway); each run has its own judge, all of them share one
process beside the service's. Printed: CPU seconds a second of the service and of the judges' process, whether they kept
up, the time of a scrape and of a restart. All is measured after WARM seconds, 60 unless said: before, all runs end their warm-up
at once, and each verdict that changes is written down and told at once. With 10 that second is within what is measured.
"""

import http.client
import json
import math
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.monitor_ingest import children, used
from tests.monitor.live import Service


def threads(*pids: int) -> dict[str, float]:
    """CPU seconds of each thread."""
    out: dict[str, float] = {}
    for task in [task for pid in pids for task in Path(f"/proc/{pid}/task").iterdir()]:
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        out[task.name] = (int(fields[11]) + int(fields[12])) / 100
    return out


def main() -> None:
    """Run it and print one JSON line."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    seconds = int(sys.argv[2]) if len(sys.argv) > 2 else 30
    noise = random.Random(0)
    with tempfile.TemporaryDirectory() as folder, Service(Path(folder) / "store") as service:
        connection = http.client.HTTPConnection("127.0.0.1", service.port)
        assert service.process is not None
        pid = service.process.popen.pid
        judge = children(pid)[0]
        late, before, began, judge_s = 0.0, {}, 0.0, 0.0
        warm = int(sys.argv[3]) if len(sys.argv) > 3 else 60
        for step in range(1, seconds + warm + 1):
            if step == warm + 1:
                before, began, judge_s = threads(pid), time.time(), used(judge)[0]
            second = time.time()
            for first in range(0, runs, 1000):
                body = b"".join(
                    b'{"event":"sample","run":"run-%d","attempt":1,"seq":%d,"step":%d,"time":%.3f,"loss":%.6f,"tokens":%d}\n'
                    % (r, step - 1, step, second, 3 * step**-0.1 + noise.gauss(0, 0.02), step * 512)
                    for r in range(first, min(first + 1000, runs))
                )
                connection.request("POST", "/v1/events", body, {"Authorization": f"Bearer {service.token}"})
                answer = connection.getresponse()
                answer.read()
                assert answer.status == 200, answer.status
            spent = time.time() - second
            late = max(late, spent - 1.0)
            time.sleep(max(0.0, 1.0 - spent))
        wall = time.time() - began
        judge_cores = (used(judge)[0] - judge_s) / wall
        after = threads(pid)
        cores = sorted(((after[t] - before.get(t, 0.0)) / wall for t in after), reverse=True)
        scrape = time.time()
        _, text = service.ask("/metrics")
        scrape = time.time() - scrape
        series = sum(not line.startswith(b"#") for line in text.splitlines())
        listed = time.time()
        found = service.get("/v1/runs")["runs"]
        listed = time.time() - listed
        behind = sum(r["expected"] is None for r in found)
        lag = next(
            float(line.split()[1])
            for line in text.decode().splitlines()
            if line.startswith("losscast_judge_lag_seconds")
        )
        rss = next(
            int(line.split()[1])
            for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            if line.startswith("VmHWM")
        )
        judge_peak = used(judge)[1]
        service.kill()
        ready = service.start(60)
        print(
            json.dumps(
                {
                    "runs": runs,
                    "samples_per_s": round(runs * seconds / wall),
                    "cores_used": round(sum(cores), 2),
                    "cores_by_thread": [round(u, 2) for u in cores[:4]],
                    "latest_second_late_s": round(max(late, 0.0), 2),
                    "judge_cores": round(judge_cores, 2),
                    "judge_lag_s": round(lag, 1),
                    "unjudged_runs": behind,
                    "scrape_ms": math.ceil(scrape * 1e3),
                    "series": series,
                    "list_ms": math.ceil(listed * 1e3),
                    "rss_peak_mib": rss // 1024,
                    "judge_rss_peak_mib": round(judge_peak),
                    "ready_after_kill_s": round(ready, 2),
                }
            )
        )


if __name__ == "__main__":
    main()
