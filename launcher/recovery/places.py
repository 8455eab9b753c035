"""Where a run's ranks live: places in Ray's placement groups, an actor on each, kept warm from one attempt to the next.

Each rank has a slot: a place in a placement group and an actor on it. An actor that died is replaced, the others keep
all they have imported. A slot whose host was lost comes back when Ray finds another place for it; an elastic run goes on
without it until then.

On every host that trains one more actor waits with everything imported, a standby: the first slot of its host whose
actor dies gets it, and need not wait for torch and DeepSpeed to be imported anew. It takes no CPU and no GPU from Ray,
only the memory of the imports, and starts once the run makes steps, so that it delays no start.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray import exceptions
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from launcher.errors import Failed, one_line
from launcher.recovery.elastic import fewest_ranks
from launcher.recovery.member import Home, Member
from launcher.recovery.pacing import group_name
from launcher.recovery.rank import Pulse
from launcher.runspec.model import RunSpec

PLACEMENT_PATIENCE_S = 5.0
"""How long an unplaced group waits before it says, once, what it waits for."""
ELASTIC_PATIENCE_S = float(os.environ.get("LOSSCAST_ELASTIC_WAIT_S", "20"))
"""How long an elastic run waits for hosts that are not there before it goes on with fewer."""
START_FAILURES = 5
"""Actors that die in a row before they are ready: then it is no accident."""
STANDBY = os.environ.get("LOSSCAST_STANDBY", "1") != "0"


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
    """Reference to the answer that is waited for."""
    asked: float = -math.inf
    """When that was asked for, by the attempt's `hang.HangWatch.awake_s`."""
    heard: float = 0.0
    """When its actor answered last, by the same."""
    pulse: Pulse | None = None
    notice: bool = False


@dataclass(frozen=True)
class Standby:
    """An actor that waits for a slot of its host to lose its own."""

    member: Any
    ready: Any


class Places:
    """Every slot of a run. Made once; closed at the end."""

    def __init__(self, spec: RunSpec, threads: int, say: Callable[[str], None]) -> None:
        """`threads` is CPU threads a rank. Returns at once: `assemble` waits."""
        self._spec, self._threads, self._say = spec, threads, say
        self._gpus = 1 if spec.cluster.gpus_per_node else 0
        self._bundle = {"CPU": 1.0, **({"GPU": 1.0} if self._gpus else {})}
        self._placements: list[Any] = []
        self._made = 0
        self._standby: dict[str, Standby] = {}
        """By node."""
        self.slots: list[Slot] = []

    def _place(self, ranks: int) -> Any:
        self._made += 1
        name = group_name(self._spec.name, self._made)
        placement = placement_group([self._bundle] * ranks, strategy="PACK", name=name)
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
                    self.slots = [Slot(part, i) for i in range(part.bundle_count)]
                    self._await_others()
                    return
                whole, began = self._place(self._spec.ranks), time.monotonic()
        self.slots = [Slot(whole, i) for i in range(self._spec.ranks)]

    def _await_others(self) -> None:
        """Places for the ranks that have none yet, a host's worth at a time, so that each host is of use when it comes."""
        a_host = -(-self._spec.ranks // self._spec.cluster.nodes.max)
        while (missing := self._spec.ranks - len(self.slots)) > 0:
            place = self._place(min(a_host, missing))
            self.slots += [Slot(place, i, lost=True) for i in range(place.bundle_count)]

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

    def _actor(self, slot: Slot, cpus: int, gpus: int) -> Any:
        remote: Any = ray.remote(Member)
        return remote.options(
            num_cpus=cpus,
            num_gpus=gpus,
            max_restarts=0,
            max_concurrency=8,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                slot.placement, placement_group_bundle_index=slot.index
            ),
        )

    def hire(self, slot: Slot) -> None:
        """Start a new actor for a slot. Returns at once."""
        slot.member = self._actor(slot, 1, self._gpus).remote(self._threads)
        slot.ready, slot.home, slot.dead = slot.member.ready.remote(), None, False
        slot.looking, slot.pulse, slot.notice = None, None, False

    def _greet(self, timeout_s: float) -> None:
        """Learn which actors have become ready."""
        waiting = {slot.ready: slot for slot in self.slots if slot.home is None and slot.ready is not None}
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
                self.hire(slot)

    def assemble(self) -> int:
        """Wait until every slot is ready, or, elastic, those that can be. Returns how many are."""
        if not self.slots:
            self._open()
        for slot in self.slots:
            if slot.member is None or slot.dead:
                self.hire(slot)
        fewest = fewest_ranks(self._spec)
        began, said = time.monotonic(), False
        while True:
            self._greet(0.2)
            missing = [slot for slot in self.slots if slot.home is None]
            ready = len(self.slots) - len(missing)
            if not missing:
                return ready
            waited = time.monotonic() - began
            gone = all(slot.lost for slot in missing)
            if ready >= fewest and fewest < self._spec.ranks and gone:
                return ready
            if not said and waited > PLACEMENT_PATIENCE_S + 10.0:
                self._say(f"waiting for {len(missing)} of {len(self.slots)} ranks to get a place and start")
                said = True
            alive = alive_nodes()
            for slot in missing:  # the place itself may have gone with its host
                slot.lost = slot.lost or (waited > ELASTIC_PATIENCE_S and not self._placed(slot, alive))

    def _placed(self, slot: Slot, alive: set[str]) -> bool:
        from ray.util import placement_group_table

        node = placement_group_table(slot.placement).get("bundles_to_node_id", {}).get(slot.index)
        return node in alive

    def could_use(self) -> int:
        """How many slots are ready now. More than an attempt uses: it could grow."""
        self._greet(0.0)
        return sum(slot.home is not None and not slot.dead for slot in self.slots)

    # between attempts

    def ready(self) -> list[Slot]:
        """Slots that can train now, neighbours side by side."""
        found = [s for s in self.slots if s.home is not None and not s.dead]
        return sorted(found, key=lambda s: (home_of(s).host, s.index))

    def stand_by(self, used: Sequence[Slot]) -> None:
        """Have one more actor import everything on every host that these slots are on. Returns at once."""
        if not STANDBY or self._spec.policy.paces is not None:
            return  # a pacer takes no more of a host than it needs
        for slot in used:
            home = home_of(slot)
            if home.node in self._standby:
                continue
            gpus = tuple(g for s in used if home_of(s).node == home.node for g in home_of(s).gpus)
            member = self._actor(slot, cpus=0, gpus=0).remote(self._threads, gpus)
            self._standby[home.node] = Standby(member, member.ready.remote())

    def bring_ahead(self, address: str) -> None:
        """Have the actors that stand by bring the newest checkpoint to their hosts, where there is more than one: a lone host
        has it, since its own ranks wrote it. Returns at once."""
        for waiting in self._standby.values() if len(self._standby) > 1 else ():
            waiting.member.bring_ahead.remote(address)

    def replace(self, slot: Slot, alive: set[str]) -> None:
        """Give a slot whose actor is dead another one: its host's standby, else a new one. Returns at once."""
        old = home_of(slot)
        ray.kill(slot.member, no_restart=True)
        waiting = self._standby.pop(old.node, None)
        if waiting is not None and old.node in alive:
            try:
                home: Any = ray.get(waiting.ready, timeout=0.0)
            except exceptions.RayError:  # not ready yet, or dead as well
                ray.kill(waiting.member, no_restart=True)
            else:
                slot.member, slot.ready, slot.dead = waiting.member, None, False
                slot.home = replace(home, gpus=old.gpus)
                slot.looking, slot.pulse, slot.notice = None, None, False
                return
        self.hire(slot)

    def close(self) -> None:
        """End every actor and give the places back. `assemble` finds new ones."""
        for holder in [*self.slots, *self._standby.values()]:
            if holder.member is not None:
                ray.kill(holder.member, no_restart=True)
        for placement in list(self._placements):
            self._drop(placement)
        self.slots, self._standby = [], {}


def alive_nodes() -> set[str]:
    """Ids of the hosts that Ray takes for alive."""
    return {n["NodeID"] for n in ray.nodes() if n["Alive"]}


def home_of(slot: Slot) -> Home:
    assert slot.home is not None, "only slots that are ready are used"
    return slot.home
