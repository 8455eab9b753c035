"""A run of a million steps: to read it thinned, to follow it, and to start again with it.

    python bench/monitor_million.py [SAMPLES] [SAMPLES_A_COMMIT]

The samples are put into the store by the service's own writer, in commits as small as a live run makes them.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from monitor.store.ingest import Ingest
from monitor.store.store import Store
from monitor.wire import parse
from tests.monitor.live import Service


def main() -> None:
    """Run it and print one JSON line."""
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    size = int(sys.argv[2]) if len(sys.argv) > 2 else 50
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "store")
        store.connection.execute("PRAGMA synchronous=OFF")  # only to fill it quickly
        ingest = Ingest(store)
        ingest.start()
        waiting = []
        for start in range(0, n, size):
            body = b"".join(
                b'{"event":"sample","run":"long","attempt":1,"seq":%d,"step":%d,"time":%d,"loss":%.6f,"tokens":%d}\n'
                % (s, s + 1, 1700000000 + s, 5 * (s + 10) ** -0.1 + (s * 7919 % 1000) / 1e5, s * 512)
                for s in range(start, start + size)
            )
            waiting.append(ingest.submit(parse(body)))
            if len(waiting) >= 200:
                for one in waiting:
                    one.result()
                waiting.clear()
        ingest.stop()
        store.close()
        out: dict[str, object] = {"samples": n, "samples_a_commit": size}
        service = Service(Path(folder) / "store")
        out["first_start_s"] = round(service.start(60), 2)
        began = time.monotonic()
        while True:
            status, text = service.ask(f"/v1/runs/long/samples?from={n - 1}")
            assert status == 200, text[:500]
            rows = json.loads(text)["samples"]
            if rows and rows[-1]["expected"] is not None:
                break
            time.sleep(0.5)
        out["judged_from_nothing_s"] = round(time.monotonic() - began, 1)
        for name, query in [
            ("thinned_s", "max=3000"),
            ("zoomed_s", f"from={n // 2}&to={n // 2 + 20000}&max=3000"),
            ("tail_s", f"from={n - 20}"),
        ]:
            best = 1e9
            for _ in range(3):
                began = time.monotonic()
                service.ask(f"/v1/runs/long/samples?{query}")
                best = min(best, time.monotonic() - began)
            out[name] = round(best, 3)
        out["store_mib"] = round(
            sum(p.stat().st_size for p in service.folder.glob("losscast.db*")) / 2**20, 1
        )
        time.sleep(1.0)
        service.kill()
        out["ready_after_kill_s"] = round(service.start(60), 2)
        began = time.monotonic()
        service.ask("/v1/events", b'{"event":"sample","run":"long","attempt":1,"seq":5,"step":6,"loss":1}\n')
        out["first_duplicate_s"] = round(time.monotonic() - began, 3)
        service.stop()
        print(json.dumps(out))


if __name__ == "__main__":
    main()
