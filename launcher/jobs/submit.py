"""Hand a run to a Ray cluster as a job, and look after it from outside: follow, stop.

The run's folder is the truth about the run; Ray is asked only about the job that works on it at present.
"""

import importlib.machinery
import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.data.tokens import WORKING_DIR
from launcher.errors import Failed, Held, WrongInput
from launcher.jobs.cluster import Cluster, Unknown
from launcher.jobs.job import ray_job
from launcher.runspec.doubts import refused
from launcher.runspec.model import RunSpec
from launcher.storage.output import job_log
from launcher.storage.remote import ask_to_stop as ask_there
from launcher.storage.remote import publish, refresh
from launcher.storage.runfolder import RunFolder, last_step, read_json, write_whole

ENDED = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})
AWAY_S = 60.0
"""How long a dashboard may be silent before whoever waits for a job gives up on it."""
FORWARDED = (
    "LOSSCAST_CACHE",
    "LOSSCAST_WORK",
    "LOSSCAST_AZ_ENDPOINT",
    "LOSSCAST_HANG_FLOOR_S",
    "LOSSCAST_HANG_LONG_S",
)
"""Variables that a job gets as they are where it is submitted."""
SHADOWS = ("launcher", "monitor", "infra")
"""Our package names: a user's module of the same name would be imported in their stead."""


@dataclass(frozen=True)
class Submission:
    """A job that was handed to Ray for a run."""

    run: str
    job: str
    dashboard: str
    folder: str


def refuse_shadows(folder: Path) -> None:
    """Raise WrongInput where a working directory holds modules named like ours."""
    ours = Path(__file__).resolve().parents[2]
    endings = [*importlib.machinery.all_suffixes(), "/__init__.py"]
    for there in (folder / f"{name}{ending}" for name in SHADOWS for ending in endings):
        if there.exists() and not there.resolve().is_relative_to(ours):
            raise WrongInput(
                f"{there}: a module of this name would be imported instead of losscast's own. Rename it, or submit from another folder."
            )


def submit(
    spec: RunSpec,
    dashboard: str,
    ray_env: Mapping[str, str],
    *,
    prediction: dict[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
) -> Submission:
    """Register the run and start its job. Returns at once.

    dashboard   URL of the cluster's Jobs API
    ray_env     RAY_* settings to reach it (`launcher.jobs.local_ray.Head.environment`)
    prediction  prediction.json as plain data: written down, before anything runs, and never overwritten
    env         more environment for the job, such as a drill

    Raises Held (75) when somebody holds the run, Failed when the cluster can't be reached.
    """
    folder = may_submit(spec)
    make_folder(folder)
    try:
        refuse_again(folder, spec, ray_env)
    except Held:
        _note(folder, "held")
        raise
    if prediction is not None:
        register_prediction(folder, prediction)
    write_whole(folder.spec, spec.to_dict())
    job = f"{spec.name}-{secrets.token_hex(4)}"
    variables = {"RAY_AUTH_MODE": ray_env.get("RAY_AUTH_MODE", ""), **dict(env or {})}
    if spec.monitor is not None and os.environ.get(spec.monitor.token_env):
        variables.setdefault(spec.monitor.token_env, os.environ[spec.monitor.token_env])
    for name in FORWARDED:
        if os.environ.get(name):
            variables[name] = os.environ[name]
    variables.setdefault(
        WORKING_DIR, os.getcwd()
    )  # where entrypoints and relative paths of the spec are looked for
    handed = ray_job(spec, folder.address, job, python=sys.executable, env=variables)
    done = Submission(spec.name, job, dashboard, folder.address)
    # before the job: who dies in between leaves a submission that no cluster knows, and never a job nobody knows
    before = read_json(folder.path / "submission.json")
    write_whole(
        folder.path / "submission.json", {**done.__dict__, "time": time.time(), "digest": spec.digest}
    )
    publish(folder, folder.spec, folder.prediction, folder.path / "submission.json")
    cluster = Cluster(dashboard, ray_env)
    try:
        cluster.submit(handed)
    except Failed:
        if not _has(cluster, job):
            _take_back(folder, before)
            _note(folder, "failed")
            raise
    _note(folder, "accepted")
    return done


def _has(cluster: Cluster, job: str) -> bool:
    """Whether a job that nothing was heard of was taken all the same: its answer may be what got lost."""
    try:
        return cluster.job(job).status != "FAILED"  # as Ray books one that no agent was there for
    except Failed:
        return False


def _take_back(folder: RunFolder, before: Any) -> None:
    """The submission that was not taken is none: what was there before is put back, at az:// too."""
    path = folder.path / "submission.json"
    if before is not None or folder.url is not None:
        write_whole(path, before)  # at az:// nobody need be allowed to delete
        publish(folder, path)
    else:
        path.unlink(missing_ok=True)


def untold(spec: RunSpec, scope: str) -> str | None:
    """A warning where the monitor's token is not set here; `scope` is that of a token that would do. On Kubernetes a secret
    has it."""
    monitor = spec.monitor
    if spec.cluster.to == "kuberay" or monitor is None or os.environ.get(monitor.token_env):
        return None
    return (
        f"monitor.token_env: {monitor.token_env} is not set here. Unless the cluster's hosts have it, what the run "
        f"reports waits on their disks. A token: losscast monitor token create --store DIR --scope {scope}"
    )


def may_submit(spec: RunSpec) -> RunFolder:
    """The run's folder, if this spec can be submitted as far as its own storage tells. Touches nothing but a count.

    Raises WrongInput for what this version can't run and for a run that is finished or began as another, Held.
    """
    from launcher.training.saving import refuse_held

    problems = refused(spec)
    if problems:
        raise WrongInput("\n".join(f"{', '.join(p.keys)}: {p.message}" for p in problems))
    if spec.kubernetes is not None and spec.kubernetes.working_dir is not None:
        refuse_shadows(Path(spec.kubernetes.working_dir).expanduser())
    folder = RunFolder.of(spec.checkpoints.url, spec.name)
    try:
        refuse_held(folder)
    except Held:
        _note(folder, "held")
        raise
    refresh(folder)
    refuse_other(folder, spec)
    return folder


def make_folder(folder: RunFolder) -> None:
    """Create the run's folder. Raises WrongInput where that can't be."""
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WrongInput(
            f"checkpoints.url: {folder.path} can't be made ({error.strerror}). Give a folder that you may write."
        ) from None


def _note(folder: RunFolder, outcome: str) -> None:
    """Count a submission: accepted, held (somebody else has the run), failed (the cluster did not take it)."""
    line = json.dumps({"time": time.time(), "outcome": outcome}) + "\n"
    try:
        with (folder.path / "submissions.jsonl").open("a") as file:
            file.write(line)
    except OSError:
        pass  # a count is not worth a run


FREE = frozenset({"team", "eval", "cluster", "kubernetes", "checkpoints", "law", "monitor", "policy"})
"""Sections of a spec that may differ between two submissions of one run: they change nothing of what is trained."""


def refuse_other(folder: RunFolder, spec: RunSpec) -> None:
    """Raise WrongInput where this submission would train nothing, or another model under the same name."""
    result, old = read_json(folder.result), _as_now(read_json(folder.spec))
    if result is not None and result.get("digest") == spec.digest:
        loss = result.get("loss")
        ended = f"loss {loss:.4f}, " if isinstance(loss, (int, float)) else ""
        raise WrongInput(
            f"{spec.name}: is finished ({ended}{folder.path}). Submit under another name to train again."
        )
    changed = [k for k, v in spec.to_dict().items() if old is not None and k not in FREE and old.get(k) != v]
    if changed and any(last_step(folder, attempt) for attempt in folder.attempts()):
        raise WrongInput(
            f"{spec.name}: began with another {', '.join(changed)} ({folder.spec}), and a run does not change what it trains. "
            f"Put {'it' if len(changed) == 1 else 'them'} back to resume it, or submit under another name."
        )


def refuse_again(folder: RunFolder, spec: RunSpec, ray_env: Mapping[str, str]) -> None:
    """Raise Held where a job for the run waits or runs, though no attempt was taken yet."""
    job = read_submission(folder)
    if job is None:
        return
    try:
        state = status(job, ray_env)
    except Failed:
        return  # the cluster it was handed to is gone, or never heard of it, and the run is held by nobody
    if state not in ENDED:
        raise Held(
            f"{spec.name}: job {job.job} is {state} at {job.dashboard}. Stop it with `losscast stop {spec.name}`, or wait for it."
        )


def _as_now(old: Any) -> Any:
    """A spec that an older losscast wrote, with the keys that it did not know yet at their defaults."""
    try:
        return None if old is None else RunSpec.from_dict(old).to_dict()
    except WrongInput:
        return old


def register_prediction(folder: RunFolder, prediction: dict[str, Any]) -> None:
    """Write prediction.json down. One that differs supersedes the old one, which is kept beside it under its digest."""
    old = read_json(folder.prediction)
    if old is not None and old.get("digest") != prediction.get("digest"):
        name = str(old.get("digest", "unknown")).removeprefix("sha256:")[:16]
        write_whole(folder.path / "superseded" / f"prediction-{name}.json", old)
    if old is None or old.get("digest") != prediction.get("digest"):
        write_whole(folder.prediction, prediction)


def status(submission: Submission, ray_env: Mapping[str, str]) -> str:
    """Ray's word for the job: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED. Raises Failed when Ray is away."""
    return Cluster(submission.dashboard, ray_env).job(submission.job).status


def logs(submission: Submission, ray_env: Mapping[str, str]) -> str:
    """Everything the job has printed so far that the cluster still has. The run's own folder keeps it for longer."""
    return Cluster(submission.dashboard, ray_env).log(submission.job)


def wait(
    submissions: list[Submission],
    ray_env: Mapping[str, str],
    tick: Callable[[dict[str, str]], None] = lambda states: None,
    interval_s: float = 0.5,
) -> dict[str, str]:
    """Wait until every job has ended; `tick` is called with run -> state at each look. Returns the last states."""
    states: dict[str, str] = {}
    heard = time.monotonic()
    while True:
        try:
            for s in submissions:
                if states.get(s.run) not in ENDED:
                    states[s.run] = status(s, ray_env)
            heard = time.monotonic()
        except Unknown:
            raise
        except Failed:
            if time.monotonic() - heard > AWAY_S:
                raise
            time.sleep(interval_s)
            continue
        tick(states)
        if all(states[s.run] in ENDED for s in submissions):
            return states
        time.sleep(interval_s)


def end_job(submission: Submission, ray_env: Mapping[str, str]) -> None:
    """Stop the Ray job without a checkpoint, and wait until Ray has. Asking the run itself (`ask_to_stop`) is the gentle way.

    Raises Failed where the job is still there after half a minute: Ray sends TERM, and KILL three seconds later.
    """
    cluster = Cluster(submission.dashboard, ray_env)
    cluster.stop(submission.job)
    until = time.monotonic() + 30
    while (status := cluster.job(submission.job).status) in ("PENDING", "RUNNING"):
        if time.monotonic() > until:
            raise Failed(f"{submission.job}: Ray was asked to end it and still counts it as {status}.")
        time.sleep(0.2)


def ask_to_stop(folder: RunFolder) -> None:
    """Ask the run to commit a checkpoint and end at its next step."""
    ask_there(folder)


def note_stopped(folder: RunFolder, submission: Submission) -> None:
    """Write down that a person ended the job at once: it was killed, and can't say so itself."""
    path = job_log(folder, submission.job).with_suffix(".killed.json")
    write_whole(path, {"submission": submission.job, "by": "stop --now", "time": time.time()})


def read_submission(folder: RunFolder) -> Submission | None:
    """The newest job of a run, None where it was never submitted."""
    found = read_json(folder.path / "submission.json")
    return None if found is None else Submission(*(found[k] for k in ("run", "job", "dashboard", "folder")))
