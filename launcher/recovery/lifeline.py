"""Whether the Ray cluster under a driver is still there.

A driver outlives the raylet of its machine and the cluster's head, and can go on with neither: its calls wait, or Ray ends
the process a minute later without a word, while its lease says that all is well. So a thread knocks at both. A raylet that
refuses is dead, and its driver can't join another. A head that is silent may be a new one coming up in the old one's
place, which gets nearly the minute that Ray itself allows.
"""

import os
import socket
import threading
import time
from collections.abc import Callable

KNOCK_S = 1.0
REFUSALS = 3
"""Of a raylet, one after the other."""
RAYS_OWN_S = float(os.environ.get("RAY_gcs_rpc_server_reconnect_timeout_s", "60"))  # noqa: SIM112  (Ray's name)
HEAD_PATIENCE_S = max(5.0, RAYS_OWN_S - 10.0)


class ClusterLost(Exception):
    """The Ray cluster that a run was on is gone. Another start of its submission may find one."""

    exit_status = 1


class Lifeline:
    """Knocks until closed, or until what it knocks at is gone: then `lost` is called, once, from the thread."""

    def __init__(
        self, head: str, raylet: str | None, lost: Callable[[str], None], patience_s: float = HEAD_PATIENCE_S
    ) -> None:
        """head, raylet   host:port each; a raylet that is not known is not asked"""
        self._head, self._raylet, self._lost, self._patience_s = head, raylet, lost, patience_s
        self._stop = threading.Event()
        threading.Thread(target=self._knock, name="losscast-lifeline", daemon=True).start()

    def close(self) -> None:
        self._stop.set()

    def _knock(self) -> None:
        refused, heard = 0, time.monotonic()
        while not self._stop.wait(KNOCK_S):
            refused = refused + 1 if self._raylet is not None and _knocked(self._raylet) is False else 0
            if refused >= REFUSALS:
                return self._lost(f"its Ray cluster is gone: nothing answers at the raylet's {self._raylet}")
            now = time.monotonic()
            if _knocked(self._head):
                heard = now
            elif now - heard > self._patience_s:
                return self._lost(
                    f"its Ray cluster is gone: the head at {self._head} has not answered for {now - heard:.0f} s"
                )
        return None


def _knocked(address: str) -> bool | None:
    """True: somebody listens. False: nobody does. None: no answer, which may be a slow machine."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), 5.0).close()
    except ConnectionRefusedError:
        return False
    except OSError:
        return None
    return True


def under_this_driver(lost: Callable[[str], None]) -> Lifeline:
    """The lifeline of the cluster that this process has joined."""
    import ray

    context = ray.get_runtime_context()
    mine = next((n for n in ray.nodes() if n["NodeID"] == context.get_node_id()), {})
    port = mine.get("NodeManagerPort")
    raylet = f"{mine['NodeManagerAddress']}:{port}" if port else None
    return Lifeline(context.gcs_address, raylet, lost)
