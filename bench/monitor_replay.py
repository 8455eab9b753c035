"""After an outage: how fast a run's spool comes in, and whether another run's page stays fresh meanwhile.

    python bench/monitor_replay.py [SAMPLES]

One reporter has SAMPLES in its spool when the monitor comes up; another run reports ten samples a second. Printed: samples a
second from the first request to the last acknowledged, how old the other run's newest step and newest verdict ever were,
and how long after the last sample the judge had seen all.
"""

import json
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from launcher.reporter import Reporter
from tests.monitor.live import Service, wait_for


def main() -> None:
    """Run it and print one JSON line."""
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 2_000_000
    folder = Path(tempfile.mkdtemp())
    service = Service(folder / "store")
    spooled = Reporter(
        service.url, service.token, "spooled", 1, folder / "spool", quiet=True, spool_limit_bytes=2 << 30
    )
    began = time.monotonic()
    for step in range(1, n + 1):
        spooled.report(step=step, loss=3.0 * step**-0.05, tokens=step * 512, lr=6e-4, grad_norm=0.8)
        while step % 10_000 == 0 and len(spooled._queue) > 20_000:
            time.sleep(0.05)  # a full queue would drop some
    while spooled._queue:
        time.sleep(0.05)
    out: dict[str, object] = {"samples": n, "reported_in_s": round(time.monotonic() - began, 1)}
    service.start(60)
    began = time.monotonic()
    done = threading.Event()
    worst = {"step": 0.0, "verdict": 0.0}

    def other() -> None:
        live = Reporter(service.url, service.token, "live", 1, None, quiet=True)
        at: dict[int, float] = {}
        step = 0
        while not done.is_set():
            step += 1
            at[step] = time.monotonic()
            live.report(step=step, loss=3.0 * step**-0.05)
            time.sleep(0.1)
            if step % 10 == 0 and step >= 20:
                found = service.get("/v1/runs/live") or {}
                now = time.monotonic()
                if found.get("step"):
                    worst["step"] = max(worst["step"], now - at[found["step"]])
                rows = (service.get(f"/v1/runs/live/samples?from={step - 200}") or {"samples": []})["samples"]
                seen = [s["step"] for s in rows if s["expected"] is not None]
                worst["verdict"] = max(worst["verdict"], now - at[max(seen)] if seen else now - at[1])
        live.close()

    thread = threading.Thread(target=other)
    thread.start()
    wait_for(lambda: (service.get("/v1/runs/spooled") or {}).get("samples", 0) >= n, 3600, 0.25)
    took = time.monotonic() - began
    ended = time.monotonic()

    def judged() -> bool:  # the lag of all runs is hardly ever nought while another one reports
        rows = (service.get(f"/v1/runs/spooled/samples?from={n}") or {"samples": []})["samples"]
        return bool(rows) and rows[-1]["expected"] is not None

    wait_for(judged, 3600, 0.25)
    lag = time.monotonic() - ended
    done.set()
    thread.join()
    out |= {
        "samples_per_s": round(n / took),
        "oldest_step_of_the_live_run_s": round(worst["step"], 1),
        "oldest_verdict_of_the_live_run_s": round(worst["verdict"], 1),
        "judge_done_after_s": round(lag, 1),
    }
    spooled.close()
    service.stop()
    shutil.rmtree(folder)
    print(json.dumps(out))


if __name__ == "__main__":
    main()
