"""How many durable samples a second the monitor takes, with its load generator beside it.

    python bench/monitor_ingest.py [SECONDS] [SAMPLES_A_REQUEST] [SENDERS]

Each sender is a process with one kept connection: it sends a batch, waits for the 200 that means "on disk", and sends the
next. Printed: acknowledged samples a second, the latency of a request, CPU and memory of the service and of the judge's
process, how long after the last sample the judge had seen everything, and how long a reader waited meanwhile: for the end of a
run, and for the whole of it thinned to 3,000 points.
"""

import http.client
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.monitor.live import Service

MOST_BEHIND_S = 600.0


def send(
    port: int,
    token: str,
    run: str,
    size: int,
    until: float,
    out: "multiprocessing.Queue[tuple[str, int, list[float]]]",
) -> None:
    """One sender; the bodies are made of a template, so that it costs less than what it measures."""
    head = b'{"event":"sample","run":"%s","attempt":1,"seq":' % run.encode()
    connection = http.client.HTTPConnection("127.0.0.1", port)
    seq, took = 0, []
    headers = {"Authorization": f"Bearer {token}"}
    while time.time() < until:
        body = b"".join(
            b'%s%d,"step":%d,"time":1763800001.25,"loss":2.345678,"tokens":%d,"lr":0.0006,"grad_norm":0.81}\n'
            % (head, s, s + 1, s * 524288)
            for s in range(seq, seq + size)
        )
        began = time.perf_counter()
        connection.request("POST", "/v1/events", body, headers)
        answer = connection.getresponse()
        answer.read()
        if answer.status == 429:
            time.sleep(0.05)
            continue
        assert answer.status == 200, answer.status
        took.append(time.perf_counter() - began)
        seq += size
    out.put((run, seq, took))


def children(pid: int) -> list[int]:
    """Processes that this one started: the judge's."""
    return [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]


def used(pid: int) -> tuple[float, float]:
    """CPU seconds so far, and the largest memory in MiB."""
    cpu = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    status = Path(f"/proc/{pid}/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return (int(cpu[11]) + int(cpu[12])) / os.sysconf("SC_CLK_TCK"), peak / 1024


def main() -> None:
    """Run it and print a JSON line of the ingest, then one of what was behind it."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 10.0
    size = int(sys.argv[2]) if len(sys.argv) > 2 else 1000
    senders = int(sys.argv[3]) if len(sys.argv) > 3 else 4
    with tempfile.TemporaryDirectory() as folder, Service(Path(folder) / "store") as service:
        out: multiprocessing.Queue[tuple[str, int, list[float]]] = multiprocessing.Queue()
        until = time.time() + seconds
        processes = [
            multiprocessing.Process(
                target=send, args=(service.port, service.token, f"run-{i}", size, until, out)
            )
            for i in range(senders)
        ]
        began = time.time()
        for p in processes:
            p.start()
        sent = {run: (n, took) for run, n, took in (out.get() for _ in processes)}
        wall = time.time() - began
        for p in processes:
            p.join()
        total = sum(n for n, _ in sent.values())
        took = sorted(t for _, list_ in sent.values() for t in list_)
        assert service.process is not None
        pid = service.process.popen.pid
        judge = children(pid)[0]
        cpu_s, peak = used(pid)
        judge_cpu_s, judge_peak = used(judge)
        print(
            json.dumps(
                {
                    "durable_samples_per_s": round(total / wall),
                    "request_p50_ms": round(1e3 * took[len(took) // 2], 1),
                    "request_p99_ms": round(1e3 * took[int(len(took) * 0.99)], 1),
                    "samples_a_request": size,
                    "senders": senders,
                    "seconds": round(wall, 1),
                    "service_cpu_us_a_sample": round(1e6 * cpu_s / total, 1),
                    "load_average": os.getloadavg()[0],
                    "rss_peak_mib": round(peak),
                    "judge_cores": round(judge_cpu_s / wall, 2),
                    "judge_rss_peak_mib": round(judge_peak),
                }
            ),
            flush=True,
        )
        ended = time.time()
        reads: dict[str, list[float]] = {"end": [], "whole": []}
        unjudged = set(sent)

        def read(query: str, which: str) -> list[dict[str, Any]]:
            asked = time.perf_counter()
            rows = service.get(query)["samples"]
            reads[which].append(time.perf_counter() - asked)
            return rows

        while unjudged and time.time() < ended + MOST_BEHIND_S:  # until the judge has seen everything
            for run in sorted(unjudged):
                rows = read(f"/v1/runs/{run}/samples?from={sent[run][0] - 2 * size}&max=10", "end")
                if rows[-1]["step"] == sent[run][0] and rows[-1]["expected"] is not None:
                    unjudged.discard(run)
            read("/v1/runs/run-0/samples?max=3000", "whole")
            time.sleep(0.2)
        lag = time.time() - ended
        print(
            json.dumps(
                {
                    "judge_done_after_s": None if unjudged else round(lag, 1),
                    "read_end_worst_ms": round(1e3 * max(reads["end"])),
                    "read_whole_worst_ms": round(1e3 * max(reads["whole"])),
                }
            )
        )


if __name__ == "__main__":
    main()
