"""The process around the monitor: socket, TLS, signals, and an end that leaves nothing unwritten."""

import contextlib
import gc
import ipaddress
import os
import re
import resource
import signal
import socket
import sys
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import h11
import uvicorn

from monitor.errors import Failed, WrongInput
from monitor.judging.apart import SELDOM
from monitor.prometheus.alerts import STALE_LEAST_S
from monitor.service.api import build
from monitor.service.monitor import Monitor

GRACE_S = 3
LOOK_S = 5
"""Seconds between two looks at requests that don't come to their end."""
MOST_FILES = 65536
SLOWEST_S = 60
"""How long the head of a request, and then its body, may take to arrive."""
PAGE_URL = re.compile(r"https?://[A-Za-z0-9.\-_\[\]:]+(/[A-Za-z0-9./\-_~]*)?")


def address(listen: str) -> tuple[str, int]:
    """Host and port of `127.0.0.1:8700` or `[::1]:8700`. Raises WrongInput."""
    host, colon, port = listen.rpartition(":")
    host = host.strip("[]")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise WrongInput(f"--listen {listen}: need HOST:PORT, such as 127.0.0.1:8700")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """True when every address of the host is this machine's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, None)
    except OSError as error:
        raise Failed(f"--listen {host}: {error.strerror or error}") from error
    return bool(found) and all(ipaddress.ip_address(entry[4][0]).is_loopback for entry in found)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises Failed in one line when the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise Failed(
            f"can't listen on {host}:{port}: {error.strerror or error}; choose another --listen"
        ) from error
    listener.set_inheritable(False)
    return listener


def _allow_files() -> None:
    """As many open connections as the system lets this process have, within reason: 1024, the usual limit, is soon used up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, MOST_FILES)), hard))


class Dawdlers:
    """Closes connections whose request does not come to its end: without it, whoever can reach the port could hold open as
    many as the system allows, with no token at all. One that waits for its next request is the server's own business."""

    def __init__(self, slowest_s: float = SLOWEST_S):
        self.slowest_s = slowest_s
        self._since: dict[Any, tuple[object, float]] = {}

    def look(self, connections: Iterable[Any], now: float) -> int:
        """Look at uvicorn's connections; how many were closed. `now`: seconds of any clock that only goes forward."""
        still: dict[Any, tuple[object, float]] = {}
        closed = 0
        for one in list(connections):
            if one.timeout_keep_alive_task is not None or one.conn.their_state not in (
                h11.IDLE,
                h11.SEND_BODY,
            ):
                continue
            request, since = self._since.get(one, (one.cycle, now))
            if request is not one.cycle:
                since = now
            if now - since > self.slowest_s:
                one.transport.abort()
                closed += 1
            else:
                still[one] = (one.cycle, since)
        self._since = still
        return closed


class _Server(uvicorn.Server):
    """Ends its long answers when it is told to end, and requests that never end."""

    def __init__(self, config: uvicorn.Config, monitor: Monitor):
        super().__init__(config)
        self._monitor = monitor
        self._dawdlers = Dawdlers()

    async def on_tick(self, counter: int) -> bool:
        if counter % (10 * LOOK_S) == 0:  # ticks come ten a second
            self._dawdlers.look(self.server_state.connections, time.monotonic())
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: object) -> None:
        self._monitor.stopping.set()
        super().handle_exit(sig, frame)  # type: ignore[arg-type]


def serve(
    folder: Path,
    listen: str,
    *,
    cert: str | None = None,
    key: str | None = None,
    behind_proxy: bool = False,
    url: str | None = None,
    teams: frozenset[str] = frozenset(),
    keep_days: float = 0.0,
    stalled_after_s: float = STALE_LEAST_S,
) -> int:
    """Serve until SIGTERM or SIGINT. Raises WrongInput and Failed before it listens."""
    host, port = address(listen)
    if key and not cert:
        raise WrongInput("--tls-key without --tls-cert: give both")
    for path in (cert, key):
        if path and not os.access(path, os.R_OK):
            raise WrongInput(f"{path}: can't be read; give a PEM file")
    if not cert and not behind_proxy and not is_loopback(host):
        raise WrongInput(
            f"--listen {listen}: tokens would travel in the clear. Give --tls-cert and --tls-key, listen on 127.0.0.1, "
            f"or say --behind-proxy when a proxy does the TLS"
        )
    if url is not None and not PAGE_URL.fullmatch(url):
        raise WrongInput(f"--url {url}: need http:// or https://, a host, and perhaps a path")
    listener = bind(host, port)
    _allow_files()
    if url is None:
        url = f"{'https' if cert else 'http'}://{listen if port else f'{host}:{listener.getsockname()[1]}'}"
    try:
        try:
            number = version("losscast")
        except PackageNotFoundError:
            number = "0"
        monitor = Monitor(
            folder,
            teams=teams,
            version=number,
            keep_days=keep_days,
            apart=True,
            url=url.rstrip("/"),
            stalled_after_s=stalled_after_s,
        )
    except BaseException:
        listener.close()
        raise
    config = uvicorn.Config(
        build(monitor, tls=cert is not None), log_level="warning", access_log=False, server_header=False,
        lifespan="off", ws="none", timeout_graceful_shutdown=GRACE_S, timeout_keep_alive=75, proxy_headers=False,
        ssl_certfile=cert, ssl_keyfile=key, http="h11",
    )  # fmt: skip
    try:
        server = _Server(config, monitor)
        config.load()
    except (OSError, ValueError) as error:
        listener.close()
        monitor.store.close()
        raise WrongInput(f"{cert}: no usable certificate and key ({error}); give PEM files") from error
    # uvicorn raises the signal that ended it once more: it has been obeyed by then
    before = {s: signal.signal(s, lambda *_: None) for s in (signal.SIGTERM, signal.SIGINT)}
    monitor.start()
    gc.freeze()
    gc.set_threshold(*SELDOM)
    scheme = "https" if cert else "http"
    print(
        f"losscast: monitor on {scheme}://{listen if port else f'{host}:{listener.getsockname()[1]}'}, store {folder}",
        file=sys.stderr,
        flush=True,
    )
    if not monitor.tokens.path.exists():
        print(
            f"losscast: nobody has a token yet: losscast monitor token create --store {folder}",
            file=sys.stderr,
            flush=True,
        )
    try:
        server.run(sockets=[listener])
    finally:
        monitor.stop()
        with contextlib.suppress(OSError):
            listener.close()
        for s, handler in before.items():
            signal.signal(s, handler)
    return 0
