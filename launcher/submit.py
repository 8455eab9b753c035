"""Hand a run to a Ray cluster as a job, and look after it from outside: list, follow, stop.

The run's folder is the truth about the run; Ray is asked only about the job that works on it at present.
"""

import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.doubts import refused
from launcher.errors import Failed, Held, WrongInput
from launcher.jobs import ray_job
from launcher.runfolder import RunFolder, read_json, write_whole
from launcher.spec import RunSpec

ENDED = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})
SHADOWS = ("launcher", "monitor", "infra")
"""Our package names: a user's module of the same name would be imported in their stead."""


@dataclass(frozen=True)
class Submission:
    """A job that was handed to Ray for a run."""

    run: str
    job: str
    dashboard: str
    folder: str


@contextmanager
def environment(extra: Mapping[str, str]) -> Iterator[None]:
    """Ray's client reads its token settings from the environment: set them for as long as it is talked to.
    A RAY_ADDRESS of the user's would win over the address we were given: it is put aside."""
    before = {k: os.environ.get(k) for k in (*extra, "RAY_ADDRESS")}
    os.environ.pop("RAY_ADDRESS", None)
    os.environ.update(extra)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def refuse_shadows(folder: Path) -> None:
    """Raise WrongInput where a working directory holds modules named like ours."""
    for name in SHADOWS:
        for there in (folder / f"{name}.py", folder / name / "__init__.py"):
            if there.exists() and not there.resolve().is_relative_to(Path(__file__).resolve().parents[1]):
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
    ray_env     RAY_* settings to reach it (`launcher.local_ray.Head.environment`)
    prediction  prediction.json as plain data: written down, before anything runs, and never overwritten
    env         more environment for the job, such as a drill

    Raises Held (75) when somebody holds the run, Failed when the cluster can't be reached.
    """
    from launcher.saving import refuse_held

    problems = refused(spec)
    if problems:
        raise WrongInput("\n".join(f"{', '.join(p.keys)}: {p.message}" for p in problems))
    folder = RunFolder.of(spec.checkpoints.url, spec.name)
    folder.path.mkdir(parents=True, exist_ok=True)
    refuse_held(folder)
    refuse_again(folder, spec, ray_env)
    if prediction is not None:
        register_prediction(folder, prediction)
    write_whole(folder.spec, spec.to_dict())
    job = f"{spec.name}-{secrets.token_hex(4)}"
    variables = {"RAY_AUTH_MODE": ray_env.get("RAY_AUTH_MODE", ""), **dict(env or {})}
    if spec.monitor is not None and os.environ.get(spec.monitor.token_env):
        variables.setdefault(spec.monitor.token_env, os.environ[spec.monitor.token_env])
    if os.environ.get("LOSSCAST_CACHE"):
        variables["LOSSCAST_CACHE"] = os.environ["LOSSCAST_CACHE"]
    with environment(ray_env):
        client = _client(dashboard, ray_env)
        try:
            client.submit_job(**ray_job(spec, str(folder.path), job, python=sys.executable, env=variables))
        except Exception as error:
            raise Failed(f"{dashboard} refused the job: {_line(error)}") from error
    done = Submission(spec.name, job, dashboard, str(folder.path))
    write_whole(
        folder.path / "submission.json", {**done.__dict__, "time": time.time(), "digest": spec.digest}
    )
    return done


FREE = frozenset({"team", "eval", "cluster", "kubernetes", "checkpoints", "law", "monitor", "policy"})
"""Sections of a spec that may differ between two submissions of one run: they change nothing of what is trained."""


def refuse_again(folder: RunFolder, spec: RunSpec, ray_env: Mapping[str, str]) -> None:
    """Raise where this submission would train nothing, or another model under the same name.

    Held        a job for the run waits or runs, though no attempt was taken yet
    WrongInput  the run is finished, or it began as something else
    """
    result, old, job = read_json(folder.result), read_json(folder.spec), read_submission(folder)
    if result is not None and result.get("digest") == spec.digest:
        raise WrongInput(
            f"{spec.name}: is finished (loss {result.get('loss')}, {folder.path}). Submit under another name to train again."
        )
    changed = [k for k, v in spec.to_dict().items() if old is not None and k not in FREE and old.get(k) != v]
    if changed and folder.attempts():
        raise WrongInput(
            f"{spec.name}: began with another {', '.join(changed)} ({folder.spec}), and a run does not change what it trains. "
            f"Put {'it' if len(changed) == 1 else 'them'} back to resume it, or submit under another name."
        )
    if job is not None:
        try:
            state = status(job, ray_env)
        except Failed:
            return  # the cluster it was handed to is gone, and the run is held by nobody
        if state not in ENDED:
            raise Held(
                f"{spec.name}: job {job.job} is {state} at {job.dashboard}. Stop it with `losscast stop`, or wait for it."
            )


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
    with environment(ray_env):
        try:
            return str(_client(submission.dashboard, ray_env).get_job_status(submission.job).value)
        except Exception as error:
            raise Failed(
                f"{submission.dashboard} does not answer for job {submission.job}: {_line(error)}"
            ) from error


def logs(submission: Submission, ray_env: Mapping[str, str]) -> str:
    """Everything the job has printed so far."""
    with environment(ray_env):
        try:
            return _client(submission.dashboard, ray_env).get_job_logs(submission.job)
        except Exception as error:
            raise Failed(
                f"{submission.dashboard} gave no logs of job {submission.job}: {_line(error)}"
            ) from error


def wait(
    submissions: list[Submission],
    ray_env: Mapping[str, str],
    tick: Callable[[dict[str, str]], None] = lambda states: None,
    interval_s: float = 0.5,
) -> dict[str, str]:
    """Wait until every job has ended; `tick` is called with run -> state at each look. Returns the last states."""
    with environment(ray_env):
        clients = {s.dashboard: _client(s.dashboard, ray_env) for s in submissions}
        states: dict[str, str] = {}
        while True:
            for s in submissions:
                if states.get(s.run) not in ENDED:
                    states[s.run] = str(clients[s.dashboard].get_job_status(s.job).value)
            tick(states)
            if all(states[s.run] in ENDED for s in submissions):
                return states
            time.sleep(interval_s)


def end_job(submission: Submission, ray_env: Mapping[str, str]) -> None:
    """Stop the Ray job at once, without a checkpoint. Asking the run itself (`ask_to_stop`) is the gentle way."""
    with environment(ray_env):
        try:
            _client(submission.dashboard, ray_env).stop_job(submission.job)
        except Exception as error:
            raise Failed(
                f"{submission.dashboard} did not stop job {submission.job}: {_line(error)}"
            ) from error


def ask_to_stop(folder: RunFolder) -> None:
    """Ask the run to commit a checkpoint and end at its next step."""
    folder.stop.touch()


def read_submission(folder: RunFolder) -> Submission | None:
    """The newest job of a run, None where it was never submitted."""
    found = read_json(folder.path / "submission.json")
    return None if found is None else Submission(*(found[k] for k in ("run", "job", "dashboard", "folder")))


def _client(dashboard: str, ray_env: Mapping[str, str]) -> Any:
    """Ray's own client of the Jobs API. The token goes along as a header: what Ray reads of its settings from the
    environment it reads once, when it is first imported."""
    try:
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise Failed(
            "ray is not installed here. Install the launcher's half: pip install 'losscast[train]'"
        ) from error
    try:
        return JobSubmissionClient(dashboard, headers=_bearer(ray_env))
    except Exception as error:
        raise Failed(f"no Ray cluster answers at {dashboard}: {_line(error)}") from error


def _bearer(ray_env: Mapping[str, str]) -> dict[str, str]:
    token, path = ray_env.get("RAY_AUTH_TOKEN"), ray_env.get("RAY_AUTH_TOKEN_PATH")
    if ray_env.get("RAY_AUTH_MODE") != "token" or not (token or path):
        return {}
    return {"Authorization": f"Bearer {token or Path(str(path)).read_text().strip()}"}


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:300] or type(error).__name__
