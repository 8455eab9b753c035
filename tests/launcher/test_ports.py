"""Ports for what listens a while later."""

import errno
import socket

import pytest

from launcher import ports
from launcher.errors import Failed


def test_a_port_is_never_one_that_the_system_gives_to_connections_and_not_one_that_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as taken:
        port = ports.free_port()
        assert port in ports.PORTS
        taken.bind(("127.0.0.1", port))
        monkeypatch.setattr(ports, "PORTS", range(port - 50, port + 50))
        assert all(ports.free_port() != port for _ in range(20))


def test_none_that_is_free_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: socket.socket, address: object) -> None:
        raise OSError(errno.EADDRINUSE, "Address already in use")

    monkeypatch.setattr(ports.socket.socket, "bind", refuse)
    with pytest.raises(Failed, match="no free port among 20000 to 29999"):
        ports.free_port()
