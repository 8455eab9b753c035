"""One rank's Ray actor: says where it lives, trains in a process of its own, and answers while that process trains."""

import os
from dataclasses import dataclass
from typing import Any

import ray

from launcher.ports import free_port
from launcher.recovery.hang import stacks
from launcher.recovery.rank import Pulse, RankProcess
from launcher.storage.ahead import Ahead


@dataclass(frozen=True)
class Home:
    """Where an actor lives."""

    host: str
    node: str
    interface: str | None
    """Network interface that has the host's address: gloo would otherwise go by the host's name."""
    gpus: tuple[str, ...]
    pid: int


class Member:
    """One slot's actor. Trains nothing itself: a process of its own does, so that no attempt inherits from another."""

    def __init__(self, threads: int, gpus: tuple[str, ...] | None = None) -> None:
        """`gpus`: for one that stands by beside ranks that train, was given none by Ray, and is to train on these. None: on
        those that Ray gave."""
        env = {"OMP_NUM_THREADS": str(threads)}
        if gpus:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        self._rank, self._gpus = RankProcess(env, aside=gpus is not None), gpus
        self._sentry: Any = None
        self._ahead: Ahead | None = None

    def ready(self) -> Home:
        """Where this is, once everything is imported."""
        from launcher.netif import interface_of

        if not self._rank.wait_ready(300.0):
            ended = self._rank.died
            raise RuntimeError(
                "torch and deepspeed were not imported within 5 min"
                if ended is None
                else f"torch and deepspeed can't be imported here: that process ended with {ended}, see its output above"
            )
        host = ray.util.get_node_ip_address()
        context = ray.get_runtime_context()
        gpus = tuple(str(g) for g in ray.get_gpu_ids()) if self._gpus is None else self._gpus
        return Home(host, context.get_node_id(), interface_of(host), gpus, os.getpid())

    def port(self) -> int:
        """A port that is free on this machine now, for the group's rendezvous."""
        return free_port("")

    def train(self, assignment: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
        """Train to the attempt's end; `launcher.training.warm` names the answers."""
        if self._ahead is not None:
            self._ahead.stop()
        self._watch_notices(environment)
        return self._rank.train(assignment, environment)

    def bring_ahead(self, address: str) -> None:
        """Bring the newest checkpoint of the run at an address to this host, for the next attempt. Returns at once."""
        self._ahead = self._ahead or Ahead(address, lambda line: print(f"losscast: {line}", flush=True))
        self._ahead.look()

    def _watch_notices(self, environment: dict[str, str]) -> None:
        """One rank a host asks whether the host will be taken away."""
        from launcher.recovery.preempt import Sentry, source

        base = source() if environment.get("LOCAL_RANK") == "0" else None
        if base is not None and self._sentry is None:
            self._sentry = Sentry(
                base, self._rank.ask_to_save, lambda line: print(f"losscast: {line}", flush=True)
            )
        elif base is None and self._sentry is not None:
            self._sentry.close()
            self._sentry = None

    def look(self) -> tuple[Pulse, bool]:
        """The rank's pulse, and whether its host has notice."""
        return self._rank.pulse(), bool(self._sentry and self._sentry.last)

    def save(self) -> None:
        """Commit at the next step and go on."""
        self._rank.ask_to_save()

    def stop(self) -> None:
        """Commit at the next step and end."""
        self._rank.ask_to_stop()

    def end(self) -> bool:
        """Kill what trains."""
        return self._rank.end()

    def stacks(self) -> str:
        """What every thread of the training process does now."""
        pid = self._rank.pid
        return stacks(pid) if pid is not None else "nothing trains here\n"
