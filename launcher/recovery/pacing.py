"""What the driver of a pacer does about the run it paces: waits for it, makes room for it, ends with it.

A pacer (`launcher.training.pacer`) is a run of its own. Its driver looks at two things every `LOOK_S`: the run's log, which
says whether it lives, and Ray's placement groups, which say whether it waits for places. By these it

    waits   until the run has its places, or the cluster has room for both
    rests   commits a checkpoint and gives every place back as soon as the run waits for one, or nobody holds it
    ends    when the run has ended or was stopped, or has left batches out, since from there on it reads others

so that whatever becomes of the pacer, the run does not wait for it. `lead` is pure; the rest asks.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any, Literal

from launcher.runspec.model import RunSpec
from launcher.storage.runfolder import RunFolder, read_json

LOOK_S = 2.0
GONE_S = 600.0
"""How long a run that nobody holds may come back before its pacer ends."""

Lead = Literal["coming", "trains", "gone", "over"]


def lead(
    submission: str | None, by: str | None, *, alive: bool, released: bool, ended: bool, finished: bool
) -> Lead:
    """Where the run that is paced stands.

    submission  the one that the pacer belongs to; None where that is not known, as with a run that torchrun started
    by          the submission of the run's newest attempt; None before its first
    alive       its holder lives;  released: it let go of the run by itself
    ended       that submission's job has ended, or a person has closed the run;  finished: trained to the end
    """
    if finished:
        return "over"
    if alive:
        return "trains"
    if ended:
        return "over"
    if by is None or (submission is not None and by != submission):
        return "coming"
    return "over" if released else "gone"


def left_out(entries: Iterable[Any]) -> bool:
    """A run with these log entries leaves batches of the data order out."""
    return any(e.kind == "rollback" and int(e.fields["skip"][1]) > 0 for e in entries)


class Pace:
    """The run that is paced, looked at from its pacer's driver."""

    def __init__(self, spec: RunSpec, say: Callable[[str], None]) -> None:
        """Raises WrongInput where the spec is no pacer's."""
        assert spec.policy.paces is not None
        self.run = spec.policy.paces
        self._spec, self._say = spec, say
        self._folder = RunFolder.of(spec.checkpoints.url, self.run)
        self._here = spec.cluster.to != "kuberay"
        self._submission: str | None = None
        self._looked, self._since_gone = float("-inf"), 0.0
        self._lead: Lead = "coming"
        self._why = f"{self.run} has ended"

    @classmethod
    def of(cls, spec: RunSpec, say: Callable[[str], None]) -> "Pace | None":
        """None for a run that is no pacer."""
        return None if spec.policy.paces is None else cls(spec, say)

    def wait(self, keep_on: Callable[[], bool]) -> bool:
        """Return when the pacer may take places: True. False when it is over, or `keep_on` says no more."""
        said = False
        while keep_on():
            where = self._look()
            if where == "over":
                self._say(f"{self._spec.name}: {self._why}, and its pacer ends with that")
                return False
            if where == "trains" and not self.short() and (not self._here or self._placed()):
                return True
            if where in ("coming", "trains") and self._here and self._room():
                return True
            if not said:
                self._say(f"{self._spec.name}: waits until {self.run} has its places")
                said = True
            time.sleep(LOOK_S)
        return False

    def rest(self) -> str | None:
        """Why the pacer should give its places back now, in words; None to train on. Asked a few times a second."""
        if time.monotonic() - self._looked < LOOK_S:
            return None
        where = self._look()
        if where == "over":
            return self._why
        if where == "gone":
            return f"nobody holds {self.run}"
        return f"{self.run} waits for places" if self.short() else None

    # what it is asked from

    def _look(self) -> Lead:
        """The run's standing; as it was where its storage does not answer."""
        self._looked = time.monotonic()
        try:
            found = self._stands()
        except Exception:  # whatever the storage's library raises: no news
            return self._lead
        if found == "gone" and self._lead != "gone":
            self._since_gone = self._looked
        self._lead = found
        if found == "gone" and self._looked - self._since_gone > GONE_S:
            self._why = f"nobody has held {self.run} for {GONE_S / 60:.0f} minutes"
            return "over"
        return found

    def _stands(self) -> Lead:
        from launcher.storage.remote import refresh
        from launcher.training.saving import run_log

        refresh(self._folder)
        log = run_log(self._folder)
        entries, standing = log.entries(), log.standing()
        newest = standing.attempt
        by = None if newest is None else str(newest.fields.get("submission"))
        if standing.alive:
            self._submission = by  # a new submission of the run finds this pacer alive, and has it
        elif self._submission is None:
            self._submission = (read_json(self._folder.path / "submission.json") or {}).get("job")
        result, spec = read_json(self._folder.result), read_json(self._folder.spec)
        finished = result is not None and spec is not None and result.get("digest") == _digest(spec)
        if left_out(entries):
            self._why = f"{self.run} has left batches out and reads others from there on"
            return "over"
        closed = next(
            (e.kind == "end" for e in reversed(entries) if e.kind in ("attempt", "void", "end")), False
        )
        return lead(
            self._submission, by, alive=standing.alive, released=standing.released,
            ended=closed or self._job_ended(), finished=finished,
        )  # fmt: skip

    def _job_ended(self) -> bool:
        """The job of our submission wrote down how it ended, or somebody that it was killed."""
        from infra.objects import Missing
        from launcher.storage.remote import store_of

        for kind in ("end", "killed") if self._submission else ():
            try:
                store_of(self._folder).get(f"output/{self._submission}.{kind}.json")
                return True
            except Missing:
                continue
        return False

    def _groups(self) -> list[str]:
        """States of the run's placement groups in this cluster."""
        return states(_table(), self.run)

    def short(self) -> bool:
        """The run waits for places in this cluster."""
        return self._here and any(state != "CREATED" for state in self._groups())

    def _placed(self) -> bool:
        return bool(self._groups())

    def _room(self) -> bool:
        """The cluster has room for the run and for its pacer at the same time."""
        import ray

        body = read_json(self._folder.spec)
        if body is None:
            return False
        both = (RunSpec.from_dict(body), self._spec)
        free = ray.available_resources()
        gpus = sum(s.ranks for s in both if s.cluster.gpus_per_node)
        return free.get("CPU", 0.0) >= sum(s.ranks for s in both) and free.get("GPU", 0.0) >= gpus


def group_name(run: str, number: int) -> str:
    """What a run's placement groups are called in Ray, so that its pacer knows them."""
    return f"losscast/{run}/{number}"


def states(table: Iterable[dict[str, Any]], run: str) -> list[str]:
    """States of a run's placement groups that are not removed."""
    found = [str(g.get("state")) for g in table if str(g.get("name", "")).startswith(f"losscast/{run}/")]
    return [state for state in found if state != "REMOVED"]


def _table() -> list[dict[str, Any]]:
    from ray.util import placement_group_table

    found: Any = placement_group_table()
    return list(found.values())


def _digest(body: Any) -> str:
    return RunSpec.from_dict(body).digest
