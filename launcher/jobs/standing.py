"""Where one run stands, from what its own storage says; the cluster's word is asked for only where that is silent.

    pending    handed in; no rank has its place yet
    starting   the ranks have their places and no step is done yet
    running    its holder lives and makes steps
    finished   trained to the end: result.json is this spec's
    stopped    asked to, and its checkpoint is committed; `resume` goes on
    failed     gave up, or could not begin
    vanished   taken, neither ended nor alive: nobody renews its lease
    ended      vanished, and closed by a person with `losscast end`

`phase` is pure: facts in, one of these words out.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.errors import WrongInput
from launcher.runspec.model import RunSpec
from launcher.storage.carried import bring
from launcher.storage.remote import refresh, store_of
from launcher.storage.runfolder import RunFolder, last_step, read_json
from launcher.storage.runlog import Entry, RunLog, Standing

YOUNG_S = 120.0
"""A submission that no cluster confirms counts as pending for as long; then as vanished."""
LIVE = frozenset({"pending", "starting", "running"})


@dataclass(frozen=True)
class Facts:
    """What storage says of a run at one moment."""

    spec: RunSpec
    folder: RunFolder
    submission: dict[str, Any] | None
    """submission.json; None for a run that torchrun started."""
    entries: tuple[Entry, ...]
    committed: Entry | None
    """The newest committed checkpoint that nobody has found damaged."""
    damaged: tuple[tuple[Entry, str], ...]
    """Newer ones, newest first, and what the attempt that could not go on from them said is wrong."""
    holder: Standing
    end: dict[str, Any] | None
    """How the newest submission's job ended, by its own account."""
    result: dict[str, Any] | None
    attempt: int | None
    """The newest that left anything."""
    attempt_step: int
    """Its last step."""
    step: int
    """The last step of any of the newest few: a new attempt begins at a checkpoint, behind it."""
    last_step_time: float | None
    predicted: dict[str, Any] | None
    now: float

    @property
    def taken(self) -> Entry | None:
        """The newest attempt, if it is the newest submission's own (or there is no submission to compare with)."""
        newest = self.holder.attempt
        if newest is None or self.submission is None:
            return newest
        return newest if newest.fields.get("submission") == self.submission.get("job") else None

    @property
    def released(self) -> bool:
        """The newest holder let go of the run by itself."""
        return bool(self.holder.attempt) and not self.holder.alive and self.holder.released

    @property
    def unfit(self) -> list[dict[str, Any]]:
        """`damaged` as plain data."""
        return [{"step": e.fields.get("step"), "why": why} for e, why in self.damaged]

    @property
    def closed(self) -> bool:
        """A person closed it after its newest attempt."""
        for entry in reversed(self.entries):
            if entry.kind == "end":
                return True
            if entry.kind in ("attempt", "void"):
                return False
        return False

    @property
    def finished(self) -> bool:
        return self.result is not None and self.result.get("digest") == self.spec.digest


def run_log(folder: RunFolder) -> RunLog:
    """The log of the run, wherever it is."""
    return RunLog(store_of(folder), folder.name)


def facts_of(folder: RunFolder) -> Facts:
    """Read them. Raises WrongInput where no run lies there, or what lies there is damaged."""
    bring(folder, logs=False)
    refresh(folder)
    document = read_json(folder.spec)
    if document is None:
        raise WrongInput(f"{folder.path}: no run was submitted from here: there is no spec.json.")
    # A run may end between any two of these reads, here and there. What it writes last is read first, so that whoever is
    # told that it ended is told of the checkpoint it ended with.
    log, submission = run_log(folder), read_json(folder.path / "submission.json")
    end = _end_of(folder, submission["job"]) if submission else None
    result, holder = read_json(folder.result), log.standing()
    commits, bad = log.commits(), log.damaged()
    sound = next((i for i, e in enumerate(commits) if str(e.fields["manifest"]) not in bad), len(commits))
    attempts = folder.attempts()
    curve = folder.curve(attempts[-1]) if attempts else None
    prediction = read_json(folder.prediction)
    return Facts(
        spec=RunSpec.from_dict(document),
        folder=folder,
        submission=submission,
        entries=tuple(log.entries()),
        committed=commits[sound] if sound < len(commits) else None,
        damaged=tuple((e, bad[str(e.fields["manifest"])]) for e in commits[:sound]),
        holder=holder,
        end=end,
        result=result,
        attempt=attempts[-1] if attempts else None,
        attempt_step=last_step(folder, attempts[-1]) if attempts else 0,
        step=max((last_step(folder, a) for a in attempts[-3:]), default=0),
        last_step_time=curve.stat().st_mtime if curve is not None and curve.exists() else None,
        predicted=prediction.get("final_loss") if isinstance(prediction, dict) else None,
        now=time.time(),
    )


def _end_of(folder: RunFolder, job: str) -> dict[str, Any] | None:
    """How a job ended, by its own account and by that of whoever killed it."""
    own, killed = (read_json(folder.path / "output" / f"{job}.{kind}.json") for kind in ("end", "killed"))
    return {**(own or {}), **(killed or {})} if own or killed else None


def phase(facts: Facts, job_state: str | None = None) -> str:
    """One word for where the run stands.

    job_state   Ray's word for the newest submission's job; None where the cluster was not asked, does not answer, or
                does not know it
    """
    if facts.finished:
        return "finished"
    if facts.taken is not None and facts.end is not None and facts.end.get("by") == "stop --now":
        return "stopped"  # its job is ended, and the lease it could not give back has yet to lapse
    if facts.holder.alive:
        if facts.holder.attempt is None or (facts.attempt or 0) < facts.holder.attempt.attempt:
            return "pending"  # a rank that has its place leaves a log at once
        return "running" if facts.attempt_step else "starting"
    if facts.closed:
        return "ended"
    if facts.end is not None:
        return _ended(facts.end.get("status"), facts.end.get("by"))
    if job_state in ("FAILED", "STOPPED"):
        return job_state.lower()
    if facts.taken is not None:
        return "stopped" if facts.released else "vanished"
    if job_state in ("PENDING", "RUNNING"):
        return "pending"
    if job_state == "SUCCEEDED" or facts.submission is None:
        return "stopped"
    young = facts.now - float(facts.submission.get("time", 0.0)) < YOUNG_S
    return "pending" if young else "vanished"


def _ended(status: int | None, by: str | None) -> str:
    if status == 0 or by == "stop --now":
        return "stopped"
    return "failed"


def answer(facts: Facts, word: str) -> dict[str, Any]:
    """The run's standing as plain data for JSON. Times are seconds since the epoch, losses nats per token."""
    commit, submission = facts.committed, facts.submission or {}
    return {
        "run": facts.spec.name,
        "phase": word,
        "folder": facts.folder.address,
        "finished": facts.finished,
        "step": facts.spec.total_steps if facts.finished else facts.step,
        "total_steps": facts.spec.total_steps,
        "attempt": facts.attempt,
        "last_step_time": facts.last_step_time,
        "checkpoint_step": commit.fields.get("step") if commit else None,
        "damaged": facts.unfit,
        "loss": facts.result["loss"] if facts.finished and facts.result else None,
        "predicted": facts.predicted,
        "holder": facts.holder.who() if facts.holder.attempt and word in LIVE | {"vanished"} else None,
        "job": submission.get("job"),
        "submitted": submission.get("time"),
    }


def line(said: dict[str, Any], now: float) -> str:
    """One line for a person."""
    parts = [f"{said['run']}: {said['phase']}"]
    if said["finished"]:
        parts.append(f"{said['total_steps']} steps")
    elif said["step"] or said["phase"] != "pending":
        parts.append(f"step {said['step']} of {said['total_steps']}")
    if said["phase"] == "running" and said["last_step_time"] is not None:
        parts.append(f"last step {max(0.0, now - said['last_step_time']):.0f} s ago")
    if said["checkpoint_step"] is not None and not said["finished"]:
        parts.append(f"checkpoint at {said['checkpoint_step']}")
    if said.get("damaged") and not said["finished"]:
        parts.append(damage(said["damaged"]))
    if said["loss"] is not None:
        parts.append(f"loss {said['loss']:.4f}")
    q = said["predicted"]
    if q:
        parts.append(f"predicted {q['p50']:.4f} ({q['p05']:.4f} to {q['p95']:.4f})")
    return ", ".join(parts)


def damage(damaged: Sequence[Mapping[str, Any]]) -> str:
    """Newer checkpoints than the one that a resume takes, newest first, in words: each with step and why."""
    newest, more = damaged[0], len(damaged) - 1
    before = f", and {more} more before it" if more else ""
    return f"that of step {newest['step']} is damaged ({newest['why']}){before}"


def dumped(document: Any) -> str:
    """JSON on one line; what JSON has no number for is spelt as a string."""
    return json.dumps(document, default=str)
