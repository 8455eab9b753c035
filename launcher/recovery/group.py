"""One attempt of a run, on Ray actors: started on every rank, watched, and ended with the failure that came first.

Ray core and no Ray Train: for the same ZeRO-1 job, actors reach their first step in about a third of the time and
come back from a killed worker in a fraction of it (bench/recovery.py), a death is seen in a tenth of a second, and
`report()` is not paced by a controller's poll. What Ray Train would add (elastic range, preemption grace) is the run's
own recovery here: `launcher.recovery.restarts`, `hang`, `preempt`, `elastic`. Who trains where is `launcher.recovery.places`.

A failed attempt ends what trains on every slot, replaces actors that died, and keeps the others, warm.
"""

import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import ray
from ray import exceptions

from launcher.errors import Failed, Held, WrongInput, one_line
from launcher.recovery.failures import RankFailed, blame, seen_in
from launcher.recovery.hang import HangWatch, suspects
from launcher.recovery.places import Places, Slot, alive_nodes, home_of
from launcher.runspec.model import RunSpec
from launcher.training.assignment import Assignment, Outcome

POLL_S = 0.5
"""Between two ticks. An end of a rank is not waited for: it wakes the driver."""
LOOK_S = 1.0
"""Between two questions for a rank's pulse: each wakes a dozen threads of Ray's on the rank's host. A hang is told by tens of
seconds."""
ANSWER_S = 10.0
"""Within this an actor that lives answers."""


@dataclass
class Seen:
    """What is known of the attempt that runs."""

    reached: int = 0
    age_s: float = 0.0
    """Since `reached` was made."""
    notices: set[str] = field(default_factory=set)
    """Hosts that have had notice."""


class Group:
    """A run's ranks together. Made once; used for attempt after attempt; closed at the end."""

    def __init__(self, spec: RunSpec, threads: int, say: Callable[[str], None]) -> None:
        """`threads` is CPU threads a rank. Returns at once: `assemble` waits."""
        self._places = Places(spec, threads, say)
        self._used: list[Slot] = []
        self._watch = HangWatch()
        self.seen = Seen()

    def assemble(self) -> int:
        """Wait until every slot is ready, or, elastic, those that can be. Returns how many are."""
        return self._places.assemble()

    def trains_here(self) -> bool:
        """Some rank of the attempt is on this process's own host."""
        here = ray.get_runtime_context().get_node_id()
        return any(home_of(slot).node == here for slot in self._used)

    def could_use(self) -> int:
        """How many slots are ready now. More than an attempt uses: it could grow."""
        return self._places.could_use()

    def train(self, assignment: Assignment, ranks: int, tick: Callable[[Seen], None]) -> Outcome:
        """Run the attempt on `ranks` ready slots. `tick` is called a few times a second.

        Raises RankFailed for the failure that came first, WrongInput for the spec's fault, Held when another writer took
        the run.
        """
        self._used, self.seen = self._places.ready()[:ranks], Seen(reached=assignment.resume_step)
        self._watch = HangWatch()
        first, now = self._used[0], self._watch.awake_s(time.monotonic())
        pending: dict[Any, int] = {}
        try:
            port: Any = ray.get(first.member.port.remote(), timeout=ANSWER_S)
            for rank, environment in enumerate(self._environments(port)):
                slot = self._used[rank]
                slot.heard, slot.pulse, slot.looking, slot.asked = now, None, None, -math.inf
                pending[slot.member.train.remote(asdict(assignment), environment)] = rank
        except exceptions.RayError as error:
            raise self._actor_gone(0, error) from error
        outcome: Outcome | None = None
        while pending:
            done, _ = ray.wait(list(pending), num_returns=1, timeout=POLL_S)
            now = self._look()
            tick(self.seen)
            if self.seen.reached > assignment.resume_step:
                self._places.stand_by(self._used)
            if not done:
                why = self._watch.hung(
                    {r: s.pulse for r, s in enumerate(self._used)},
                    {r: now - s.heard for r, s in enumerate(self._used)},
                )
                if why is not None:
                    raise self._hung(why)
                continue
            rank = pending.pop(done[0])
            answer = self._answer(rank, done[0])
            if isinstance(answer, RankFailed):
                raise blame([answer, *self._echoes(pending)])
            if "wrong_input" in answer:
                raise WrongInput(answer["wrong_input"])
            if rank == 0:
                outcome = Outcome(**answer["outcome"])
        if outcome is None:
            raise Failed("every rank ended and rank 0 gave no answer")
        return outcome

    def _environments(self, port: int) -> list[dict[str, str]]:
        """Of each rank: who it is, whom it meets and on which devices."""
        by_host: dict[str, list[int]] = {}
        for rank, slot in enumerate(self._used):
            by_host.setdefault(home_of(slot).host, []).append(rank)
        found = []
        for rank, slot in enumerate(self._used):
            home = home_of(slot)
            neighbours = by_host[home.host]
            env = {
                "RANK": str(rank),
                "WORLD_SIZE": str(len(self._used)),
                "LOCAL_RANK": str(neighbours.index(rank)),
                "LOCAL_WORLD_SIZE": str(len(neighbours)),
                "MASTER_ADDR": home_of(self._used[0]).host,
                "MASTER_PORT": str(port),
            }
            if (
                home.gpus
            ):  # each actor was given its own; the ranks of a host see each other's, as NCCL likes it
                env["CUDA_VISIBLE_DEVICES"] = ",".join(
                    g for r in neighbours for g in home_of(self._used[r]).gpus
                )
            if home.interface and "GLOO_SOCKET_IFNAME" not in os.environ:
                env["GLOO_SOCKET_IFNAME"] = home.interface
            found.append(env)
        return found

    def _answer(self, rank: int, ref: Any) -> dict[str, Any] | RankFailed:
        try:
            answer: Any = ray.get(ref)
        except exceptions.RayActorError as error:
            return self._actor_gone(rank, error)
        except exceptions.RayError as error:
            return RankFailed(rank, "raised", one_line(error, first=True))
        if answer.get("raised", {}).get("superseded"):
            raise Held(answer["raised"]["message"])
        return seen_in(rank, answer, notice=self._used[rank].notice) or answer

    def _actor_gone(self, rank: int, error: BaseException) -> RankFailed:
        """The actor itself does not answer any more: its process, or its host."""
        slot = self._used[rank]
        slot.dead = True
        slot.lost = home_of(slot).node not in alive_nodes()
        cause = "preempted" if slot.notice else "host_lost" if slot.lost else "killed"
        what = f"host {home_of(slot).host} was lost" if slot.lost else one_line(error, first=True)
        return RankFailed(rank, cause, what)

    def _echoes(self, pending: dict[Any, int]) -> list[RankFailed]:
        """A rank that ends takes its neighbours' collectives down with it, and their complaint may arrive first:
        what else fails within a second."""
        found: list[RankFailed] = []
        deadline = time.monotonic() + 1.0
        while pending and not any(f.cause != "raised" for f in found):
            left = deadline - time.monotonic()
            done, _ = ray.wait(list(pending), num_returns=1, timeout=max(0.0, left))
            if not done:
                break
            rank = pending.pop(done[0])
            answer = self._answer(rank, done[0])
            if isinstance(answer, RankFailed):
                found.append(answer)
        return found

    def _look(self) -> float:
        """Take in the pulses that have come, and ask for the next. Never waits. Returns how long this has been awake."""
        now = self._watch.awake_s(time.monotonic())
        asked = {slot.looking: slot for slot in self._used if slot.looking is not None}
        if asked:
            for ref in ray.wait(list(asked), num_returns=len(asked), timeout=0.0)[0]:
                slot = asked[ref]
                slot.looking = None
                try:
                    slot.pulse, slot.notice = ray.get(ref)
                except exceptions.RayError:
                    continue  # its `train` fails too, and says more
                slot.heard = now
                assert slot.pulse is not None
                if slot.notice:
                    self.seen.notices.add(home_of(slot).host)
                if slot.pulse.step > self.seen.reached:
                    self.seen.reached, self.seen.age_s = slot.pulse.step, slot.pulse.age_s
        for slot in self._used:
            if slot.looking is None:
                if now - slot.asked >= LOOK_S:
                    slot.looking, slot.asked = slot.member.look.remote(), now
            elif now - slot.heard > ANSWER_S:
                slot.pulse = None
        return now

    def _hung(self, why: str) -> RankFailed:
        """Have every rank's stacks taken, and say whom the others wait for."""
        refs = [slot.member.stacks.remote() for slot in self._used]
        done = set(ray.wait(refs, num_returns=len(refs), timeout=2 * ANSWER_S)[0])
        dumps: dict[int, str] = {}
        for rank, ref in enumerate(refs):
            try:
                dumps[rank] = ray.get(ref) if ref in done else ""
            except exceptions.RayError:
                dumps[rank] = ""
        named = suspects(dumps)
        who = f"; the others wait for rank {', '.join(map(str, named))}" if named else ""
        for rank in named:
            slot = self._used[rank]
            if not dumps[rank]:
                slot.dead, slot.lost = True, True
        failure = RankFailed(named[0] if named else None, "hung", why + who)
        failure.dumps = dumps
        return failure

    def bring_ahead(self, address: str) -> None:
        """Something was committed: have it on every host before an attempt needs it. Returns at once."""
        self._places.bring_ahead(address)

    # between attempts

    def save(self) -> None:
        """Have the attempt commit at its next step and go on. One rank's wish is enough, and two could make two of it."""
        for slot in self._used[:1]:
            slot.member.save.remote()

    def stop(self) -> None:
        """Have the attempt commit at its next step and end."""
        for slot in self._used:
            slot.member.stop.remote()

    def halt(self) -> None:
        """Kill what trains on every slot, and start to replace actors that died. Actors that live stay, warm."""
        self._look()
        ends = {slot.member.end.remote(): slot for slot in self._used if not slot.dead}
        done = set(ray.wait(list(ends), num_returns=len(ends), timeout=ANSWER_S)[0]) if ends else set()
        for ref, slot in ends.items():
            try:
                slot.dead = ref not in done or not ray.get(ref)
            except exceptions.RayError:
                slot.dead = True
        alive = alive_nodes()
        for slot in self._used:
            if slot.dead:
                slot.lost = slot.lost or home_of(slot).node not in alive
                self._places.replace(slot, alive)
        self._used = []

    def close(self) -> None:
        """End every rank and give their places back."""
        self._places.close()
