"""What `report()` costs the step thread: monitor up, hung, refused, unresolvable.

    python bench/reporter.py [--steps N] [--json OUT]

The step thread computes (pure Python, the worst case for the interpreter's lock) and reports once a millisecond; each call
is timed. The monitor runs in another process. Goal: p50 <= 10 us, p99 <= 200 us, no exception, nothing lost.
"""

import argparse
import json
import multiprocessing
import shutil
import socket
import sys
import tempfile
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from launcher.ports import free_port
from launcher.reporter import Reporter


def serve(pipe: Any) -> None:
    """A monitor that says 200 to everything."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    pipe.send(server.server_address[1])
    server.serve_forever()


def measure(url: str, steps: int, folder: str) -> dict[str, float]:
    """Microseconds a call of `report`, and what became of the samples."""
    voice = Reporter(url, "token", "bench", 1, folder, quiet=True, timeout_s=5.0)
    voice.start()
    costs = []
    for step in range(steps):
        until = time.perf_counter() + 0.001
        while time.perf_counter() < until:
            pass
        began = time.perf_counter_ns()
        voice.report(
            step=step, loss=2.0 + 1e-6 * step, tokens=step * 4096, lr=1e-3, grad_norm=0.5, tokens_per_s=1e5
        )
        costs.append(time.perf_counter_ns() - began)
    delivered = voice.close(timeout_s=1.0)
    stats = voice.stats()
    costs.sort()
    return {
        "p50_us": costs[steps // 2] / 1e3,
        "p99_us": costs[int(steps * 0.99)] / 1e3,
        "max_us": costs[-1] / 1e3,
        "delivered": float(delivered),
        "kept": float(stats.sent + stats.waiting),
        "lost": float(stats.dropped + stats.thinned + stats.refused),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--json", metavar="OUT", help="write the table as JSON")
    args = parser.parse_args()
    ours, theirs = multiprocessing.Pipe()
    monitor = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs,), daemon=True)
    monitor.start()
    hung = socket.create_server(("127.0.0.1", 0), backlog=128)
    cases = {
        "up": f"http://127.0.0.1:{ours.recv()}",
        "hung": f"http://127.0.0.1:{hung.getsockname()[1]}",
        "refused": f"http://127.0.0.1:{free_port()}",
        "unresolvable": "http://monitor.invalid:8700",
    }
    table, fine = {}, True
    for name, url in cases.items():
        folder = tempfile.mkdtemp(prefix="losscast-bench-")
        row = table[name] = measure(url, args.steps, folder)
        shutil.rmtree(folder)
        fine &= row["p50_us"] <= 10 and row["p99_us"] <= 200 and row["lost"] == 0
        print(
            f"monitor {name:<13} p50 {row['p50_us']:6.2f} us   p99 {row['p99_us']:7.2f} us   max {row['max_us']:8.1f} us   "
            f"kept {row['kept']:.0f} lines, lost {row['lost']:.0f}"
        )
    monitor.terminate()
    if args.json:
        with open(args.json, "w") as file:
            json.dump(table, file, indent=1)
    print("within the goal" if fine else "OUTSIDE the goal: p50 <= 10 us, p99 <= 200 us, none lost")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
