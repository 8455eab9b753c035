"""The runs of a ladder, made: as many at once as their place has room for, followed until each has finished or failed.

One rung that fails does not lose the others. One that still runs, from a ladder that was cut off, is followed. Where the
runs are made is a `Place`: a Ray cluster (`RayPlace`), or Kubernetes (`launcher.kuberay.rungs`).
"""

import contextlib
import csv
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from launcher.errors import Failed, Held, WrongInput
from launcher.jobs.cluster import Cluster, Unknown
from launcher.jobs.submit import AWAY_S, ENDED, Submission, end_job, read_submission, status, submit
from launcher.runspec.model import RunSpec
from launcher.storage.remote import ask_to_stop, refresh
from launcher.storage.runfolder import RunFolder, last_step, read_json

REST_S = 30.0
"""How long an interrupted ladder waits for its runs to commit a checkpoint before it ends them."""
REFRESH_S = 30.0
"""How often the curves of runs that are elsewhere are brought here, for the display."""


@dataclass(frozen=True)
class Rung:
    """One small run and where it stands: waiting, running, finished, failed."""

    spec: RunSpec
    folder: RunFolder
    state: str = "waiting"
    why: str = ""
    """Of one that failed, or that its place lets wait, in a line."""

    @property
    def step(self) -> int:
        attempts = self.folder.attempts()
        return last_step(self.folder, attempts[-1]) if attempts else 0


class Place(Protocol):
    """Where rungs are made. Everything but `outcome` raises Failed while it can't be reached."""

    def room(self) -> Mapping[str, float] | None:
        """CPUs and GPUs that runs can be placed on. None where the place itself has a queue: all are handed in at once."""
        ...

    def start(self, rung: Rung) -> None:
        """Hand the rung in, or find the job that a ladder before this one started for it. Raises WrongInput or Held for one
        that can't be."""
        ...

    def look(self, rung: Rung) -> Rung | None:
        """The rung as it stands, waiting or running; None when its job has ended or is gone."""
        ...

    def outcome(self, rung: Rung) -> str:
        """Why a rung whose job has ended did not finish, in a line."""
        ...

    def rest(self, rungs: Sequence[Rung]) -> None:
        """Have these commit a checkpoint and end; a second Ctrl-C need not wait for it."""
        ...


def finished(folder: RunFolder, spec: RunSpec) -> bool:
    """True when the folder holds the finished run of this very spec."""
    result = read_json(folder.result)
    return result is not None and result.get("digest") == spec.digest


def room_of(cluster: Cluster) -> dict[str, float]:
    """What runs can be placed on: the CPUs and GPUs of all living nodes. Raises Failed."""
    return {k: v for k, v in cluster.resources().items() if k in ("CPU", "GPU")}


def needs(spec: RunSpec) -> dict[str, float]:
    """What a run holds while it trains."""
    return {"CPU": float(spec.ranks), **({"GPU": float(spec.ranks)} if spec.cluster.gpus_per_node else {})}


def fitting(
    queue: Sequence[RunSpec], flying: Sequence[RunSpec], room: Mapping[str, float], at_once: int | None
) -> list[RunSpec]:
    """Which of the waiting runs to start now: in their order, each that still fits beside those in flight. With
    `at_once`, so many and no look at the room: those without a place wait in the cluster, their driver started already.

    One that is larger than all the room starts only when it is alone: an autoscaler may bring what it lacks. Pure.
    """
    if at_once is not None:
        return list(queue[: max(0, at_once - len(flying))])
    free = dict(room)
    for spec in flying:
        for key, amount in needs(spec).items():
            free[key] = free.get(key, 0.0) - amount
    chosen: list[RunSpec] = []
    for spec in queue:
        need = needs(spec)
        if all(free.get(k, 0.0) >= n for k, n in need.items()):
            chosen.append(spec)
            for key, amount in need.items():
                free[key] -= amount
    if queue and not flying and not chosen:
        chosen = [queue[0]]
    return chosen


def standing(specs: Sequence[RunSpec]) -> list[Rung]:
    """The rungs as they are found: finished, or waiting to be made. Raises OSError where a run's storage is away."""
    rungs = [Rung(s, RunFolder.of(s.checkpoints.url, s.name)) for s in specs]
    for rung in rungs:
        refresh(rung.folder)
    return [replace(r, state="finished") if finished(r.folder, r.spec) else r for r in rungs]


def run_ladder(
    found: Sequence[Rung],
    place: Place,
    *,
    at_once: int | None = None,
    tick: Callable[[list[Rung]], None] = lambda rungs: None,
    interval_s: float = 0.5,
) -> list[Rung]:
    """Make the runs that are not finished yet, the longest first, `at_once` or as many as fit. Returns all rungs as they
    ended: finished, or failed with the reason.

    A rung that can't be submitted has failed, and the others go on. An interruption has the runs commit a checkpoint and
    end; the next call goes on from there. Raises Failed when the place has been silent for a minute: what runs there goes
    on, and the next call follows it.
    """
    rungs = {r.spec.name: r for r in found}
    queue = sorted((r.spec for r in rungs.values() if r.state == "waiting"), key=lambda s: -s.total_steps)
    if not queue:
        tick(list(rungs.values()))
        return list(rungs.values())
    room = place.room()
    if room is None:
        room, at_once = {}, at_once or len(queue)
    flying: list[str] = []
    heard = brought = time.monotonic()
    try:
        while queue or flying:
            try:
                for spec in fitting(queue, [rungs[n].spec for n in flying], room, at_once):
                    rung = rungs[spec.name]
                    try:
                        place.start(rung)
                        rungs[spec.name] = replace(rung, state="running")
                        flying.append(spec.name)
                    except (WrongInput, Held) as error:
                        rungs[spec.name] = replace(rung, state="failed", why=str(error).splitlines()[0])
                    queue.remove(spec)
                for name in list(flying):
                    now = place.look(rungs[name])
                    rungs[name] = now or _outcome(rungs[name], place)
                    if now is None:
                        flying.remove(name)
                heard = time.monotonic()
            except (Failed, OSError) as error:  # OSError: of a run's storage
                if time.monotonic() - heard > AWAY_S:
                    raise Failed(f"{error} What runs there goes on; the same command follows it.") from None
            if time.monotonic() - brought > REFRESH_S:
                brought = time.monotonic()
                for name in flying:
                    with contextlib.suppress(
                        Exception
                    ):  # whatever a storage's library raises: only the display needs it
                        refresh(rungs[name].folder)
            tick(list(rungs.values()))
            if flying or queue:
                time.sleep(interval_s)
    except KeyboardInterrupt:
        place.rest([rungs[n] for n in flying])
        raise
    return list(rungs.values())


def _outcome(rung: Rung, place: Place) -> Rung:
    """A rung whose job has ended."""
    refresh(rung.folder)
    if finished(rung.folder, rung.spec):
        return replace(rung, state="finished", why="")
    return replace(rung, state="failed", why=place.outcome(rung))


def told_by_storage(rung: Rung) -> str:
    """Why a rung did not finish, as its own storage tells it. Raises WrongInput where nothing of it lies there."""
    from launcher.jobs.standing import facts_of, phase
    from launcher.jobs.why import failed

    facts = facts_of(rung.folder)
    word = phase(facts)
    return failed(facts, None).headline if word == "failed" else f"{word} at step {facts.step}"


class RayPlace:
    """A Ray cluster, by the URL of its Jobs API."""

    def __init__(
        self, dashboard: str, ray_env: Mapping[str, str], env: Mapping[str, str] | None = None
    ) -> None:
        """ray_env: RAY_* settings to reach it; env: more environment for the jobs, such as a drill."""
        self._dashboard, self._ray_env, self._env = dashboard, ray_env, env
        self._jobs: dict[str, Submission] = {}

    def room(self) -> Mapping[str, float]:
        return room_of(Cluster(self._dashboard, self._ray_env))

    def start(self, rung: Rung) -> None:
        self._jobs[rung.spec.name] = self._there(rung) or submit(
            rung.spec, self._dashboard, self._ray_env, env=self._env
        )

    def _there(self, rung: Rung) -> Submission | None:
        """A job of this very spec that is under way already."""
        old = read_json(rung.folder.path / "submission.json")
        job = read_submission(rung.folder)
        if job is None or old is None or old.get("digest") != rung.spec.digest:
            return None
        with contextlib.suppress(Unknown):
            if job.dashboard == self._dashboard and status(job, self._ray_env) not in ENDED:
                return job
        return None

    def look(self, rung: Rung) -> Rung | None:
        try:
            ended = status(self._jobs[rung.spec.name], self._ray_env) in ENDED
        except Unknown:
            ended = True  # the cluster is there and has lost the job
        return None if ended else rung

    def outcome(self, rung: Rung) -> str:
        return told_by_storage(rung)

    def rest(self, rungs: Sequence[Rung]) -> None:
        """End at once those that have not ended within `REST_S`, or at a second Ctrl-C."""
        for rung in rungs:
            ask_to_stop(rung.folder)
        until, left = time.monotonic() + REST_S, list(rungs)
        try:
            while left and time.monotonic() < until:
                left = [r for r in left if self.look(r) is not None]
                time.sleep(0.5)
        except (KeyboardInterrupt, Failed):
            pass
        for rung in left:
            end_job(self._jobs[rung.spec.name], self._ray_env)


POINT = ("run", "params", "tokens", "loss", "flops")


def result_of(rung: Rung) -> dict[str, Any]:
    """A finished rung as one row of points: run, params, tokens, loss in nats per token, flops."""
    result = read_json(rung.folder.result) or {}
    return {key: result.get(key) for key in POINT}


def write_points(rungs: list[Rung], points: Path, curves: Path) -> int:
    """Write the finished rungs as a law's points and curves (CSV). Returns how many there are."""
    done = [r for r in rungs if r.state == "finished"]
    with points.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(POINT)
        for rung in done:
            rows.writerow(list(result_of(rung).values()))
    with curves.open("w", newline="") as file:
        rows = csv.writer(file)
        for number, rung in enumerate(done):
            heading, *steps = rung.folder.whole_curve()
            rows.writerows([heading, *steps] if number == 0 else steps)
    return len(done)
