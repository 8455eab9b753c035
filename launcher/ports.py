"""A port for something that will listen a while later."""

import contextlib
import random
import socket

from launcher.errors import Failed

PORTS = range(20_000, 30_000)
"""Above those of Ray's workers, below those of Kubernetes' nodes and those that Linux gives to connections: one of the latter is
easily taken in the seconds until it is bound. An agent of Ray's without its port takes no job, and a rank 0 without its own
ends an attempt."""


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nobody uses now, and that nobody is given by chance before it is bound.

    host  the address to listen at; "" for all of this machine

    Raises Failed where none is free.
    """
    for port in random.SystemRandom().sample(PORTS, 100):
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind((host, port))
            return port
    raise Failed(f"no free port among {PORTS[0]} to {PORTS[-1]}. What listens there: ss -ltn")
