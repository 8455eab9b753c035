"""The ranks of a run as Ray actors in placement groups, kept alive and warm from one attempt to the next.

Ray core and no Ray Train: for the same ZeRO-1 job, actors reach their first step in about a third of the time and
come back from a killed worker in a fraction of it (bench/recovery.py), a death is seen in a tenth of a second, and
`report()` is not paced by a controller's poll. What Ray Train would add (elastic range, preemption grace) is the run's
own recovery here: `launcher.recovery.restarts`, `hang`, `preempt`, `elastic`.

Each rank has a slot: a place in a placement group and an actor on it. A failed attempt ends what trains on every slot,
replaces actors that died, and keeps the others with all they have imported. A slot whose host was lost comes back when
Ray finds another place for it; an elastic run goes on without it until then.
"""

import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import ray
from ray import exceptions
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from launcher.errors import Failed, Held, WrongInput, one_line
from launcher.recovery.elastic import fewest_ranks
from launcher.recovery.failures import RankFailed, blame, seen_in
from launcher.recovery.hang import hung, stacks, suspects
from launcher.recovery.rank import Pulse, RankProcess
from launcher.spec.model import RunSpec
from launcher.training.loop import Assignment, Outcome

PLACEMENT_PATIENCE_S = 5.0
"""How long an unplaced group waits before it says, once, what it waits for."""
ELASTIC_PATIENCE_S = float(os.environ.get("LOSSCAST_ELASTIC_WAIT_S", "20"))
"""How long an elastic run waits for hosts that are not there before it goes on with fewer."""
POLL_S = 0.5
"""Between two looks at the ranks' pulses."""
ANSWER_S = 10.0
"""Within this an actor that lives answers."""
START_FAILURES = 5
"""Actors that die in a row before they are ready: then it is no accident."""


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

    def __init__(self, threads: int) -> None:
        self._rank = RankProcess({"OMP_NUM_THREADS": str(threads)})
        self._sentry: Any = None

    def ready(self) -> Home:
        """Where this is, once everything is imported."""
        from launcher.netif import interface_of

        if not self._rank.wait_ready(300.0):
            raise RuntimeError("torch and deepspeed were not imported within 5 min")
        host = ray.util.get_node_ip_address()
        context = ray.get_runtime_context()
        gpus = tuple(str(g) for g in ray.get_gpu_ids())
        return Home(host, context.get_node_id(), interface_of(host), gpus, os.getpid())

    def port(self) -> int:
        """A port that is free on this machine now, for the group's rendezvous."""
        with socket.socket() as s:
            s.bind(("", 0))
            return s.getsockname()[1]

    def train(self, assignment: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
        """Train to the attempt's end; `launcher.training.warm` names the answers."""
        self._watch_notices(environment)
        return self._rank.train(assignment, environment)

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


@dataclass
class Slot:
    """A place for a rank, and who has it."""

    placement: Any
    index: int
    member: Any = None
    ready: Any = None
    """Reference to the actor's Home, until it is known."""
    home: Home | None = None
    dead: bool = False
    lost: bool = False
    """Its host went: Ray looks for another place."""
    failures: int = 0
    looking: Any = None
    heard: float = 0.0
    """When its actor answered last (monotonic)."""
    pulse: Pulse | None = None
    notice: bool = False


@dataclass
class Seen:
    """What is known of the attempt that runs."""

    reached: int = 0
    age_s: float = 0.0
    """Since `reached` was made."""
    notices: set[str] = field(default_factory=set)
    """Hosts that have had notice."""


class Group:
    """Every slot of a run. Made once; used for attempt after attempt; closed at the end."""

    def __init__(self, spec: RunSpec, threads: int, say: Callable[[str], None]) -> None:
        """`threads` is CPU threads a rank. Returns at once: `assemble` waits."""
        self._spec, self._threads, self._say = spec, threads, say
        self._gpus = 1 if spec.cluster.gpus_per_node else 0
        self._bundle = {"CPU": 1.0, **({"GPU": 1.0} if self._gpus else {})}
        self._placements: list[Any] = []
        self._slots: list[Slot] = []
        self._used: list[Slot] = []
        self.seen = Seen()

    # places

    def _place(self, ranks: int) -> Any:
        placement = placement_group([self._bundle] * ranks, strategy="PACK")
        self._placements.append(placement)
        return placement

    def _drop(self, placement: Any) -> None:
        self._placements.remove(placement)
        remove_placement_group(placement)

    def _open(self) -> None:
        """Find the first places: for all ranks, or, elastic and after a while, for as many as there is room for."""
        whole = self._place(self._spec.ranks)
        fewest = fewest_ranks(self._spec)
        elastic = fewest < self._spec.ranks
        began, said = time.monotonic(), False
        while not ray.wait([whole.ready()], timeout=1.0)[0]:
            waited = time.monotonic() - began
            if not said and waited > PLACEMENT_PATIENCE_S:
                free = {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")}
                self._say(
                    f"waiting for {self._spec.ranks} x {self._bundle}: the cluster has {free or 'nothing'} free"
                )
                said = True
            if elastic and waited > ELASTIC_PATIENCE_S:
                part = self._fewer(whole, fewest)
                if part is not None:
                    rest = self._place(self._spec.ranks - part.bundle_count)  # comes when there is room
                    self._slots = [Slot(part, i) for i in range(part.bundle_count)]
                    self._slots += [Slot(rest, i, lost=True) for i in range(rest.bundle_count)]
                    return
                whole, began = self._place(self._spec.ranks), time.monotonic()
        self._slots = [Slot(whole, i) for i in range(self._spec.ranks)]

    def _fewer(self, whole: Any, fewest: int) -> Any | None:
        """Places for fewer ranks than all, the most that can be had; None when not even the fewest can."""
        self._drop(whole)
        model = self._spec.parallel.pp * self._spec.parallel.tp
        ranks = min(self._spec.ranks, self._room())
        while ranks >= fewest:
            ranks = self._spec.dp_for(ranks) * model
            if ranks < fewest:
                return None
            part = self._place(ranks)
            if ray.wait([part.ready()], timeout=PLACEMENT_PATIENCE_S)[0]:
                self._say(
                    f"going on with {ranks} of {self._spec.ranks} ranks; the others join when there is room"
                )
                return part
            self._drop(part)
            ranks -= model
        return None

    def _room(self) -> int:
        """Ranks that the living hosts could take, others' work not considered."""
        nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]
        return sum(int(min(r.get("CPU", 0), r.get("GPU", 0) if self._gpus else 1e9)) for r in nodes)

    # actors

    def _hire(self, slot: Slot) -> None:
        remote: Any = ray.remote(Member)
        slot.member = remote.options(
            num_cpus=1,
            num_gpus=self._gpus,
            max_restarts=0,
            max_concurrency=8,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                slot.placement, placement_group_bundle_index=slot.index
            ),
        ).remote(self._threads)
        slot.ready, slot.home, slot.dead = slot.member.ready.remote(), None, False
        slot.looking, slot.pulse, slot.notice = None, None, False

    def _greet(self, timeout_s: float) -> None:
        """Learn which actors have become ready."""
        waiting = {slot.ready: slot for slot in self._slots if slot.home is None and slot.ready is not None}
        if not waiting:
            return
        done, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=timeout_s)
        for ref in done:
            slot = waiting[ref]
            try:
                slot.home = ray.get(ref)
                slot.lost, slot.failures = False, 0
            except exceptions.RayError as error:
                slot.failures += 1
                if slot.failures >= START_FAILURES:
                    raise Failed(
                        f"a rank's process ends before it starts: {one_line(error, first=True)}"
                    ) from error
                self._hire(slot)

    def assemble(self) -> int:
        """Wait until every slot is ready, or, elastic, those that can be. Returns how many are."""
        if not self._slots:
            self._open()
        for slot in self._slots:
            if slot.member is None or slot.dead:
                self._hire(slot)
        fewest = fewest_ranks(self._spec)
        began, said = time.monotonic(), False
        while True:
            self._greet(0.2)
            missing = [slot for slot in self._slots if slot.home is None]
            ready = len(self._slots) - len(missing)
            if not missing:
                return ready
            waited = time.monotonic() - began
            gone = all(slot.lost for slot in missing)
            if ready >= fewest and fewest < self._spec.ranks and gone:
                return ready
            if not said and waited > PLACEMENT_PATIENCE_S + 10.0:
                self._say(f"waiting for {len(missing)} of {len(self._slots)} ranks to get a place and start")
                said = True
            alive = self._alive()
            for slot in missing:  # the place itself may have gone with its host
                slot.lost = slot.lost or (waited > ELASTIC_PATIENCE_S and not self._placed(slot, alive))

    def _placed(self, slot: Slot, alive: set[str]) -> bool:
        from ray.util import placement_group_table

        node = placement_group_table(slot.placement).get("bundles_to_node_id", {}).get(slot.index)
        return node in alive

    def _alive(self) -> set[str]:
        return {n["NodeID"] for n in ray.nodes() if n["Alive"]}

    def could_use(self) -> int:
        """How many slots are ready now. More than an attempt uses: it could grow."""
        self._greet(0.0)
        return sum(slot.home is not None and not slot.dead for slot in self._slots)

    # an attempt

    def train(self, assignment: Assignment, ranks: int, tick: Callable[[Seen], None]) -> Outcome:
        """Run the attempt on `ranks` ready slots. `tick` is called a few times a second.

        Raises RankFailed for the failure that came first, WrongInput for the spec's fault, Held when another writer took
        the run.
        """
        ready = sorted(
            (s for s in self._slots if s.home is not None and not s.dead),
            key=lambda s: (_home(s).host, s.index),
        )
        self._used, self.seen = ready[:ranks], Seen(reached=assignment.resume_step)
        first = self._used[0]
        pending: dict[Any, int] = {}
        try:
            port: Any = ray.get(first.member.port.remote(), timeout=ANSWER_S)
            for rank, environment in enumerate(self._environments(port)):
                slot = self._used[rank]
                slot.heard, slot.pulse, slot.looking = time.monotonic(), None, None
                pending[slot.member.train.remote(asdict(assignment), environment)] = rank
        except exceptions.RayError as error:
            raise self._actor_gone(0, error) from error
        outcome: Outcome | None = None
        while pending:
            done, _ = ray.wait(list(pending), num_returns=1, timeout=POLL_S)
            self._look()
            tick(self.seen)
            if not done:
                why = hung(
                    {r: s.pulse for r, s in enumerate(self._used)},
                    {r: time.monotonic() - s.heard for r, s in enumerate(self._used)},
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
            by_host.setdefault(_home(slot).host, []).append(rank)
        found = []
        for rank, slot in enumerate(self._used):
            home = _home(slot)
            neighbours = by_host[home.host]
            env = {
                "RANK": str(rank),
                "WORLD_SIZE": str(len(self._used)),
                "LOCAL_RANK": str(neighbours.index(rank)),
                "LOCAL_WORLD_SIZE": str(len(neighbours)),
                "MASTER_ADDR": _home(self._used[0]).host,
                "MASTER_PORT": str(port),
            }
            if (
                home.gpus
            ):  # each actor was given its own; the ranks of a host see each other's, as NCCL likes it
                env["CUDA_VISIBLE_DEVICES"] = ",".join(
                    g for r in neighbours for g in _home(self._used[r]).gpus
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
        slot.lost = _home(slot).node not in self._alive()
        cause = "preempted" if slot.notice else "host_lost" if slot.lost else "killed"
        what = f"host {_home(slot).host} was lost" if slot.lost else one_line(error, first=True)
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

    def _look(self) -> None:
        """Take in the pulses that have come, and ask for the next. Never waits."""
        now = time.monotonic()
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
                    self.seen.notices.add(_home(slot).host)
                if slot.pulse.step > self.seen.reached:
                    self.seen.reached, self.seen.age_s = slot.pulse.step, slot.pulse.age_s
        for slot in self._used:
            if slot.looking is None:
                slot.looking = slot.member.look.remote()
            elif now - slot.heard > ANSWER_S:
                slot.pulse = None

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
        alive = self._alive()
        for slot in self._used:
            if slot.dead:
                slot.lost = slot.lost or _home(slot).node not in alive
                ray.kill(slot.member, no_restart=True)
                self._hire(slot)
        self._used = []

    def close(self) -> None:
        """End every rank and give their places back."""
        for slot in self._slots:
            if slot.member is not None:
                ray.kill(slot.member, no_restart=True)
        for placement in list(self._placements):
            self._drop(placement)


def _home(slot: Slot) -> Home:
    assert slot.home is not None, "only slots that are ready are used"
    return slot.home
