"""The small runs of a law: one base spec, rungs that change a few keys of it, all on the same data order.

    name: gpt-bytes
    tokens_per_param: 60          # optional: train.tokens of a rung that states none
    at_once: 2                    # runs in flight, wherever they wait; default as many as the cluster has room for
    base: {...}                   # a run.yaml without what the rungs say
    rungs:
      - {workload: {width: 8}}
      - {workload: {width: 12}}

A rung's name is the ladder's and what it changes, so a second `losscast ladder` finds the runs that are finished,
follows those that still run, and makes only the others. One rung that fails does not lose the rest.
"""

import copy
import csv
import difflib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from launcher.errors import Failed, Held, WrongInput
from launcher.jobs.cluster import Cluster, Unknown
from launcher.jobs.submit import AWAY_S, ENDED, Submission, end_job, read_submission, status, submit
from launcher.spec.accounting import parameter_count
from launcher.spec.file import Complaint, Document, describe, read_document
from launcher.spec.model import NAME, RunSpec
from launcher.storage.remote import ask_to_stop, refresh
from launcher.storage.runfolder import RunFolder, last_step, read_json

REST_S = 30.0
"""How long an interrupted ladder waits for its runs to commit a checkpoint before it ends them."""


class Ladder(BaseModel):
    """A ladder file, checked but not yet expanded."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=NAME)]
    tokens_per_param: Annotated[float, Field(gt=0)] | None = None
    at_once: Annotated[int, Field(ge=1)] | None = None
    base: dict[str, Any]
    rungs: Annotated[list[dict[str, Any]], Field(min_length=1), BeforeValidator(lambda v: v)]


@dataclass(frozen=True)
class Rung:
    """One small run and where it stands: waiting, running, finished, failed."""

    spec: RunSpec
    folder: RunFolder
    state: str = "waiting"
    why: str = ""
    """Of one that failed, in a line."""

    @property
    def step(self) -> int:
        attempts = self.folder.attempts()
        return last_step(self.folder, attempts[-1]) if attempts else 0


def merged(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with every key of `change`, sections merged key by key."""
    out = copy.deepcopy(dict(base))
    for key, value in change.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = merged(out[key], value) if both else copy.deepcopy(value)
    return out


def specs_of(ladder: Ladder, document: Document | None = None) -> list[RunSpec]:
    """Every rung as a run of its own, in the ladder's order.

    document   the file it was read from: problems then have their line. Raises WrongInput naming the rung that can't be.
    """
    specs: list[RunSpec] = []
    complaints: list[Complaint] = []
    for number, rung in enumerate(ladder.rungs):
        data = merged(ladder.base, rung)
        data.setdefault("name", f"{ladder.name}-{_tail(rung) or number}")
        try:
            specs.append(RunSpec.model_validate(_with_tokens(ladder, data)))
        except ValidationError as error:
            found = describe(error, data)
            if document is None:
                lines = "\n".join(f"{c.path}: {c.message}" for c in found)
                raise WrongInput(f"rungs[{number}]: {lines}") from None
            complaints += [_placed(c, number, document) for c in found]
        except WrongInput as error:
            raise WrongInput(f"rungs[{number}]: {error}") from None
    if complaints and document is not None:
        raise document.refuse(
            list(dict.fromkeys(complaints))
        )  # one of the base is one, however many rungs there are
    names = [s.name for s in specs]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise WrongInput(f"rungs: {', '.join(twice)}: two rungs of that name. Give each a `name`.")
    return specs


def _with_tokens(ladder: Ladder, data: dict[str, Any]) -> dict[str, Any]:
    """The rung with its tokens, where the ladder gives them by the parameter and it states none itself."""
    train = data.get("train")
    if not ladder.tokens_per_param or not isinstance(train, dict) or "tokens" in train:
        return data
    probe = RunSpec.model_validate(merged(data, {"train": {"tokens": train.get("batch_tokens")}}))
    params = parameter_count(probe)
    if params is None:
        raise WrongInput(
            "tokens_per_param needs a workload whose parameters are known; give train.tokens instead"
        )
    batch = probe.train.batch_tokens
    steps = max(1, round(ladder.tokens_per_param * params / batch))
    return merged(data, {"train": {"tokens": steps * batch}})


def _placed(complaint: Complaint, number: int, document: Document) -> Complaint:
    """A complaint about a rung where its key was written: in the rung itself, or in the base."""
    for start in (("rungs", number), ("base",)):
        loc = (*start, *complaint.loc)
        if loc in document.keys or loc in document.values:
            return replace(complaint, loc=loc)
    return replace(complaint, loc=("base", *complaint.loc))


def _tail(change: Mapping[str, Any]) -> str:
    """A rung's changes as the end of a name: {workload: {width: 8}} is w8."""
    parts = []
    for key, value in change.items():
        if isinstance(value, Mapping):
            parts.append(_tail(value))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            parts.append(f"{key[0]}{value:g}".replace(".", "-").replace("+", ""))
    return "-".join(p for p in parts if p)


def read_ladder(data: Any, source: str, document: Document | None = None) -> Ladder:
    """The ladder in plain data. Raises WrongInput with every problem, at its line where the document is given."""
    if isinstance(data, dict) and "rungs" not in data and "train" in data:
        raise WrongInput(f"{source}: this is a run, not a ladder. Give it to `losscast submit`.")
    try:
        return Ladder.model_validate(data)
    except ValidationError as error:
        complaints = [
            Complaint(e["loc"], _said(e), at_key=e["type"] == "extra_forbidden") for e in error.errors()
        ]
        if document is not None:
            raise document.refuse([*document.complaints, *complaints]) from None
        raise WrongInput("\n".join(f"{source}: {c.path}: {c.message}" for c in complaints)) from None


def _said(error: Any) -> str:
    """One of pydantic's errors about a ladder's own keys, in our words."""
    keys, key = ", ".join(Ladder.model_fields), str(error["loc"][-1]) if error["loc"] else ""
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, Ladder.model_fields, 1)
        return f"unknown key. {f'Did you mean {near[0]}?' if near else f'A ladder has {keys}.'}"
    if error["type"] == "missing":
        return f"is missing. A ladder has {keys}."
    return f"{error['msg'][0].lower()}{error['msg'][1:]}; got {error['input']!r}"[:300]


def read_file(path: str) -> tuple[Ladder, list[RunSpec]]:
    """A ladder file and its runs. Raises WrongInput with every problem, each as file:line:col."""
    document = read_document(path)
    if document.complaints:
        raise document.refuse(document.complaints)
    ladder = read_ladder(document.data, path, document)
    return ladder, specs_of(ladder, document)


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


def run_ladder(
    specs: list[RunSpec],
    dashboard: str,
    ray_env: Mapping[str, str],
    *,
    at_once: int | None = None,
    env: Mapping[str, str] | None = None,
    tick: Callable[[list[Rung]], None] = lambda rungs: None,
    interval_s: float = 0.5,
) -> list[Rung]:
    """Make the runs that are not finished yet, the longest first, `at_once` or as many as fit. Returns
    all rungs as they ended: finished, or failed with the reason.

    A rung that can't be submitted has failed, and the others go on. One that still runs, from a ladder that was cut
    off, is followed. An interruption has the runs commit a checkpoint and end; the next call goes on from there. Raises
    Failed when the cluster has been silent for a minute: what runs there goes on, and the next call follows it.
    """
    rungs = {s.name: Rung(s, RunFolder.of(s.checkpoints.url, s.name)) for s in specs}
    for name, rung in rungs.items():
        refresh(rung.folder)
        if finished(rung.folder, rung.spec):
            rungs[name] = replace(rung, state="finished")
    queue = sorted((r.spec for r in rungs.values() if r.state == "waiting"), key=lambda s: -s.total_steps)
    if not queue:
        tick(list(rungs.values()))
        return list(rungs.values())
    room = room_of(Cluster(dashboard, ray_env))
    flying: dict[str, Submission] = {}
    heard = time.monotonic()
    try:
        while queue or flying:
            try:
                for spec in fitting(queue, [rungs[n].spec for n in flying], room, at_once):
                    rung = rungs[spec.name]
                    try:
                        flying[spec.name] = _start(rung, dashboard, ray_env, env)
                        rungs[spec.name] = replace(rung, state="running")
                    except (WrongInput, Held) as error:
                        rungs[spec.name] = replace(rung, state="failed", why=str(error).splitlines()[0])
                    queue.remove(spec)
                for name in list(flying):
                    ended = _ended(flying[name], ray_env)
                    if ended:
                        rungs[name] = _outcome(rungs[name])
                        del flying[name]
                heard = time.monotonic()
            except Failed as error:
                if time.monotonic() - heard > AWAY_S:
                    flying.clear()  # they may well go on there: the next call follows them
                    raise Failed(f"{error} What runs there goes on; the same command follows it.") from None
            tick(list(rungs.values()))
            if flying or queue:
                time.sleep(interval_s)
    except KeyboardInterrupt:
        _rest([(rungs[n], s) for n, s in flying.items()], ray_env)
        raise
    return list(rungs.values())


def _start(
    rung: Rung, dashboard: str, ray_env: Mapping[str, str], env: Mapping[str, str] | None
) -> Submission:
    """Submit the rung, or find the job that a ladder before this one started for it."""
    old = read_json(rung.folder.path / "submission.json")
    job = read_submission(rung.folder)
    if job is not None and old is not None and old.get("digest") == rung.spec.digest:
        try:
            if job.dashboard == dashboard and status(job, ray_env) not in ENDED:
                return job
        except Unknown:
            pass
    return submit(rung.spec, dashboard, ray_env, env=env)


def _ended(submission: Submission, ray_env: Mapping[str, str]) -> bool:
    try:
        return status(submission, ray_env) in ENDED
    except Unknown:
        return True  # the cluster is there and has lost the job


def _outcome(rung: Rung) -> Rung:
    """A rung whose job has ended."""
    from launcher.jobs.standing import facts_of, phase
    from launcher.jobs.why import failed

    refresh(rung.folder)
    if finished(rung.folder, rung.spec):
        return replace(rung, state="finished")
    facts = facts_of(rung.folder)
    word = phase(facts)
    why = failed(facts, None).headline if word == "failed" else f"{word} at step {facts.step}"
    return replace(rung, state="failed", why=why)


def _rest(flying: list[tuple[Rung, Submission]], ray_env: Mapping[str, str]) -> None:
    """Have every run commit a checkpoint and end; end at once those that have not within `REST_S`, or at a second Ctrl-C."""
    for rung, _ in flying:
        ask_to_stop(rung.folder)
    until = time.monotonic() + REST_S
    left = [s for _, s in flying]
    try:
        while left and time.monotonic() < until:
            left = [s for s in left if not _ended(s, ray_env)]
            time.sleep(0.5)
    except (KeyboardInterrupt, Failed):
        pass
    for submission in left:
        end_job(submission, ray_env)


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
