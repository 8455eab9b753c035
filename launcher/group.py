"""The ranks of one attempt as Ray actors in one placement group: all of them, or none.

Ray core and no Ray Train: for the same ZeRO-1 job, actors reach their first step in about a third of the time and
come back from a killed worker in half of it, a death is seen in a tenth of a second, and `report()` is not paced by a
controller's poll. What Ray Train would add (elastic range, preemption grace) belongs to the run's own recovery here.
"""

import os
import socket
import time
from dataclasses import asdict
from typing import Any

import ray
from ray import exceptions
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from launcher.errors import Failed, WrongInput
from launcher.spec import RunSpec
from launcher.worker import Assignment, Outcome

PLACEMENT_PATIENCE_S = 5.0
"""How long an unplaced group waits before it says, once, what it waits for."""


class RankFailed(RuntimeError):
    """One rank ended before the others: which, and its error. The rest of the group is of no use any more."""

    def __init__(self, rank: int, cause: str, message: str) -> None:
        super().__init__(f"rank {rank}: {cause}: {message}")
        self.rank, self.cause, self.message = rank, cause, message


class Member:
    """One rank. Lives in a process of its own; holds nothing that another attempt could inherit."""

    def place(self) -> tuple[str, int]:
        """This machine's address and a port that is free on it now, for the group's rendezvous."""
        with socket.socket() as s:
            s.bind(("", 0))
            port = s.getsockname()[1]
        return ray.util.get_node_ip_address(), port

    def train(self, assignment: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
        """Train to the end. A mistake of the spec comes back as an answer, since trying again can't help."""
        from launcher import worker
        from launcher.output import rank_output

        os.environ.update(environment)
        try:
            with rank_output(assignment["folder"], assignment["attempt"], int(environment["RANK"])):
                return {"outcome": asdict(worker.train(Assignment(**assignment)))}
        except WrongInput as error:
            return {"wrong_input": str(error)}


class Group:
    """All ranks of one attempt."""

    def __init__(self, spec: RunSpec, threads: int) -> None:
        """`threads` is CPU threads a rank. Waits until every rank has its place; raises Failed when none can come."""
        gpus = 1 if spec.cluster.gpus_per_node else 0
        bundle = {"CPU": 1.0, **({"GPU": 1.0} if gpus else {})}
        self._placement = placement_group([bundle] * spec.ranks, strategy="PACK")
        ready = self._placement.ready()
        if not ray.wait([ready], timeout=PLACEMENT_PATIENCE_S)[0]:
            print(
                f"waiting for {spec.ranks} x {bundle}: the cluster has {ray.available_resources()} free",
                flush=True,
            )
            ray.get(ready)
        remote: Any = ray.remote(Member)
        self._members: list[Any] = [
            remote.options(
                num_cpus=1,
                num_gpus=gpus,
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._placement, placement_group_bundle_index=i
                ),
                runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads)}},
            ).remote()
            for i in range(spec.ranks)
        ]

    def train(self, assignment: Assignment) -> Outcome:
        """Run the attempt on every rank. Raises RankFailed at the first rank that fails, WrongInput for the spec's fault."""
        host, port = ray.get(self._members[0].place.remote())
        homes = ray.get([m.place.remote() for m in self._members])
        local: dict[str, int] = {}
        pending = {}
        for rank, (member, (home, _)) in enumerate(zip(self._members, homes, strict=True)):
            local[home] = local.get(home, -1) + 1
            environment = {
                "RANK": str(rank),
                "WORLD_SIZE": str(len(self._members)),
                "LOCAL_RANK": str(local[home]),
                "MASTER_ADDR": host,
                "MASTER_PORT": str(port),
            }
            pending[member.train.remote(asdict(assignment), environment)] = rank
        outcome: Outcome | None = None
        while pending:
            done, _ = ray.wait(list(pending), num_returns=1)
            rank = pending.pop(done[0])
            try:
                answer = ray.get(done[0])
            except exceptions.RayActorError as error:
                raise self._first(pending, RankFailed(rank, "died", str(error).splitlines()[0])) from error
            except exceptions.RayTaskError as error:
                lines = [line for line in str(error).splitlines() if line.strip()]
                raise self._first(
                    pending, RankFailed(rank, "raised", lines[-1] if lines else "no message")
                ) from error
            if "wrong_input" in answer:
                raise WrongInput(answer["wrong_input"])
            if rank == 0:
                outcome = Outcome(**answer["outcome"])
        if outcome is None:
            raise Failed("every rank ended and rank 0 gave no answer")
        return outcome

    def _first(self, pending: dict[Any, int], seen: RankFailed) -> RankFailed:
        """A rank that died takes its neighbours' collectives down with it, and their complaint may arrive first:
        prefer a death that shows within a second over an exception."""
        if seen.cause == "died" or not pending:
            return seen
        deadline = time.monotonic() + 1.0
        while pending and time.monotonic() < deadline:
            done, _ = ray.wait(list(pending), num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                break
            rank = pending.pop(done[0])
            try:
                ray.get(done[0])
            except exceptions.RayActorError as error:
                return RankFailed(rank, "died", str(error).splitlines()[0])
            except exceptions.RayTaskError:
                continue
        return seen

    def close(self) -> None:
        """End every rank and give their place back."""
        for member in self._members:
            ray.kill(member, no_restart=True)
        remove_placement_group(self._placement)
