"""Training goes on and nothing is lost: the monitor is killed, cut off mid-answer, slow, and comes back.

LOSSCAST_FAULTS=long runs more rounds; LOSSCAST_SEED=N replays one.
"""

import gzip
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher import spool
from launcher.ports import free_port
from launcher.reporter import Reporter
from launcher.spool import Spool

pytestmark = pytest.mark.faults

LONG = os.environ.get("LOSSCAST_FAULTS") == "long"
KILLS = 60 if LONG else 6

MONITOR = r"""
import gzip, json, os, random, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
port, record, seed = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
rng = random.Random(seed)
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        lines = gzip.decompress(self.rfile.read(int(self.headers["Content-Length"]))).splitlines()
        fate = rng.random()
        if fate < 0.1:
            self.send_response(503); self.send_header("Content-Length", "0"); self.end_headers(); return
        with open(record, "ab", buffering=0) as file:
            file.write(b"".join(line + b"\n" for line in lines))
        if fate < 0.2:  # taken, and the answer is cut off
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Le"); self.wfile.flush(); self.connection.close(); return
        if fate < 0.3:
            time.sleep(0.3)
        self.send_response(200); self.send_header("Content-Length", "0"); self.end_headers()
    def log_message(self, *args): pass
    def handle_error(self, *args): pass
HTTPServer.allow_reuse_address = True
server = HTTPServer(("127.0.0.1", port), Handler)
server.handle_error = lambda *args: None
server.serve_forever()
"""


def test_a_monitor_killed_again_and_again_misses_nothing(tmp_path: Path) -> None:
    seed = int(os.environ.get("LOSSCAST_SEED", "0"))
    rng = random.Random(seed)
    port, record = free_port(), tmp_path / "record.ndjson"

    def start(n: int) -> "subprocess.Popen[bytes]":
        return subprocess.Popen([sys.executable, "-c", MONITOR, str(port), str(record), str(seed * 1000 + n)])

    voice = Reporter(
        f"http://127.0.0.1:{port}", "t", "run-a", 1, tmp_path / "spool", timeout_s=1.0, quiet=True
    )
    monitor, step, slowest = start(0), 0, []
    voice.start()
    for kill in range(1, KILLS + 1):
        until = time.monotonic() + 0.3 + rng.random()
        while time.monotonic() < until:
            step += 1
            began = time.perf_counter()
            voice.report(step=step, loss=1.0 / step)
            slowest.append(time.perf_counter() - began)
            time.sleep(0.001)
        monitor.send_signal(signal.SIGKILL)
        monitor.wait()
        time.sleep(rng.random() * 0.3)
        monitor = start(kill)
    delivered = voice.close(timeout_s=30)
    monitor.kill()
    monitor.wait()
    assert delivered, voice.stats()
    seen = [json.loads(line) for line in record.read_bytes().splitlines() if line.endswith(b"}")]
    steps = {e["step"] for e in seen if e["event"] == "sample"}
    assert steps == set(range(1, step + 1))
    assert seen[0]["event"] == "run_started" and seen[-1]["event"] == "run_ended"
    slowest.sort()
    assert slowest[int(len(slowest) * 0.99)] < 0.001, "P3: the step thread's p99 stays under 1 ms"


def test_a_trainer_killed_at_any_moment_loses_at_most_its_last_half_second(tmp_path: Path) -> None:
    for seed in range(20 if LONG else 3):
        rng = random.Random(seed)
        folder = tmp_path / str(seed)
        said, told = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                voice = Reporter(f"http://127.0.0.1:{free_port()}", "t", "run-a", 1, folder, quiet=True)
                step = 0
                while True:
                    voice.report(step=step, loss=1.0)
                    os.write(told, f"{step} {time.time()}\n".encode())
                    step += 1
                    time.sleep(0.002)
            finally:
                os._exit(1)
        os.close(told)
        time.sleep(0.6 + rng.random())
        killed = time.time()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with os.fdopen(said) as file:
            reported = [(int(a), float(b)) for a, b in (line.split() for line in file if line.endswith("\n"))]
        spool = Spool(folder, "run-a", 2)
        kept = set()
        while (taken := spool.take()) is not None:
            kept |= {json.loads(line)["step"] for line in taken[1]}
            spool.drop(taken[0])
        lost = [step for step, at in reported if step not in kept and at < killed - 0.75]
        assert not lost, f"seed {seed}"
        assert kept == set(range(len(kept))), "what is kept has no hole"


def test_a_spool_replays_at_ten_thousand_samples_a_second(tmp_path: Path) -> None:
    port, record = free_port(), tmp_path / "record.ndjson"
    voice = Reporter(f"http://127.0.0.1:{port}", "t", "run-a", 1, tmp_path / "spool", quiet=True)
    for step in range(40_000):
        voice.report(step=step, loss=1.0, tokens=step * 4096, lr=1e-3, grad_norm=0.3)
    while voice.stats().spool_bytes < 1_000_000 or voice._queue:
        time.sleep(0.05)
    program = MONITOR.replace("fate = rng.random()", "fate = 1.0")
    monitor = subprocess.Popen([sys.executable, "-c", program, str(port), str(record), "0"])
    while not record.exists():
        time.sleep(0.01)
    began = time.monotonic()
    assert voice.close(timeout_s=60)
    seconds = time.monotonic() - began
    monitor.kill()
    monitor.wait()
    assert len(record.read_bytes().splitlines()) >= 40_001
    assert seconds < 4.0, f"{40_000 / seconds:.0f} samples a second"


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux")
def test_a_disk_that_fills_up_costs_no_exception_and_no_recent_sample(tmp_path: Path) -> None:
    """A file size limit stands in for a full disk: writes beyond it fail with EFBIG."""
    import resource

    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
            voice = Reporter(f"http://127.0.0.1:{free_port()}", "t", "run-a", 1, tmp_path, quiet=True)
            for step in range(3000):
                voice.report(step=step, loss=1.0)
                if step % 500 == 0:
                    time.sleep(0.3)
            time.sleep(0.6)
            stats = voice.stats()
            good = stats.waiting == 3000 and stats.dropped == 0 and stats.refused == 0
            status = 0 if good else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_spool_goes_back_to_its_disk_and_says_what_no_disk_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk that was full for a moment, as while a checkpoint is written, keeps what comes after again."""
    lines = [b'{"event":"sample","step":%d,"loss":1.0}\n' % step for step in range(50)]
    monkeypatch.setattr(spool, "AGAIN_S", 0.05)
    kept = spool.Spool(tmp_path / "spool", "run-a", 1)
    kept.append(lines[:10])
    home = next((tmp_path / "spool").iterdir())
    real, full = Path.write_bytes, [True]

    def write_bytes(path: Path, data: bytes) -> int:
        if full[0]:
            raise OSError(28, "No space left on device")
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    kept._to_memory(OSError(28, "No space left on device"))
    kept.append(lines[10:20])
    time.sleep(0.06)
    kept.append(lines[20:30])
    assert kept.disk_error is not None and kept.waiting == 30
    full[0] = False
    time.sleep(0.06)
    kept.append(lines[30:])
    assert kept.disk_error is None and len(list(home.glob("*.seg"))) >= 2
    taken = kept.take()
    assert taken is not None and taken[1] == lines[:10]
    kept.close()
    again = spool.Spool(tmp_path / "spool", "run-a", 2)
    found = list[bytes]()
    while (one := again.take()) is not None:
        found += one[1]
        again.drop(one[0])
    assert found == lines
    again.close()

    voice = Reporter(f"http://127.0.0.1:{free_port()}", "t", "run-a", 1, None)
    voice.report(step=1, loss=1.0)
    assert not voice.close(timeout_s=0.5)
    assert "are lost, since no disk keeps them (no spool folder was given)" in capsys.readouterr().err


def test_a_body_is_what_the_wire_says_it_is(tmp_path: Path) -> None:
    """Gzip, newline-delimited JSON, a bearer token; checked against the bytes on a plain socket."""
    listener = socket.create_server(("127.0.0.1", 0))
    voice = Reporter(
        f"http://127.0.0.1:{listener.getsockname()[1]}/", "tok", "run-a", 3, tmp_path, quiet=True
    )
    voice.report(step=1, loss=float("nan"))
    connection, _ = listener.accept()
    data = b""
    while b"\r\n\r\n" not in data or len(data) < data.index(b"\r\n\r\n") + 4 + 20:
        data += connection.recv(65536)
    head, body = data.split(b"\r\n\r\n", 1)
    length = int(
        next(h for h in head.split(b"\r\n") if h.lower().startswith(b"content-length")).split(b":")[1]
    )
    while len(body) < length:
        body += connection.recv(65536)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    assert voice.close(None)
    assert head.startswith(b"POST /v1/events HTTP/1.1") and b"Authorization: Bearer tok" in head
    event = json.loads(gzip.decompress(body))
    assert event["loss"] == "NaN" and (event["attempt"], event["seq"], event["step"]) == (3, 0, 1)
    connection.close()
    listener.close()
