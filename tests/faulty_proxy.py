"""An HTTP proxy before a blob service that breaks things: what happens to each request is decided by a function.

Fates: pass; late (answered after a pause); 503, 409, 412 (answered so, and not passed on); done-503, done-412 (passed on,
then answered so); lost (passed on, the connection closed without an answer); refused (closed before anything); cut-up (closed in
the middle of the request's body); cut-down (closed in the middle of the answer's); hole (never answered).
"""

import contextlib
import http.client
import http.server
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

FATES = ("late", "503", "409", "412", "done-503", "done-412", "lost", "refused", "cut-up", "cut-down")
Fate = Callable[[str, str], str]


class FaultyProxy:
    """Passes requests on to a service on 127.0.0.1."""

    def __init__(self, port: int, fate: Fate = lambda method, path: "pass", late_s: float = 0.3) -> None:
        self.target, self.fate, self.late_s = port, fate, late_s
        self.seen: Counter[str] = Counter()
        self.closing = threading.Event()

    def __enter__(self) -> "FaultyProxy":
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def handle_one_request(self) -> None:
                with contextlib.suppress(ConnectionError, TimeoutError, ValueError):
                    return super().handle_one_request()
                self.close_connection = True

            def __getattr__(self, name: str) -> Any:
                if name.startswith("do_"):
                    return self.relay
                raise AttributeError(name)

            def hang_up(self) -> None:
                self.close_connection = True
                with contextlib.suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)

            def relay(self) -> None:
                fate = outer.fate(self.command, self.path)
                outer.seen[fate] += 1
                length = int(self.headers.get("Content-Length") or 0)
                if fate == "refused":
                    return self.hang_up()
                if fate == "cut-up" and length:
                    self.rfile.read(length // 2)
                    return self.hang_up()
                body = self.rfile.read(length)
                if fate == "hole":
                    outer.closing.wait(120)
                    return self.hang_up()
                if fate in ("503", "409", "412"):
                    return self.answer(int(fate), {}, b"")
                if fate == "late":
                    time.sleep(outer.late_s)
                status, headers, data = self.ask(body)
                if fate == "lost":
                    return self.hang_up()
                if fate.startswith("done-"):
                    return self.answer(int(fate[5:]), {}, b"")
                if fate == "cut-down" and data and self.command != "HEAD":
                    self.answer(status, headers, data[: len(data) // 2], len(data))
                    return self.hang_up()
                return self.answer(status, headers, data)

            def ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
                service = http.client.HTTPConnection("127.0.0.1", outer.target, timeout=30)
                try:
                    service.request(self.command, self.path, body, dict(self.headers.items()))
                    answer = service.getresponse()
                    return answer.status, dict(answer.getheaders()), answer.read()
                finally:
                    service.close()

            def answer(
                self, status: int, headers: dict[str, str], data: bytes, length: int | None = None
            ) -> None:
                said = headers.get("Content-Length") if self.command == "HEAD" else None
                self.send_response_only(status)
                for name, value in headers.items():
                    if name.lower() not in (
                        "content-length",
                        "transfer-encoding",
                        "connection",
                        "keep-alive",
                    ):
                        self.send_header(name, value)
                self.send_header("Content-Length", said or str(len(data) if length is None else length))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def url(self, account: str) -> str:
        return f"http://127.0.0.1:{self.port}/{account}"
