"""A run's pacer as a job of its own: handed in with the run, ended with it. What becomes of it is said, and never raised:
the run does not depend on it. Which twin it is says `launcher.training.pacer`; what it does beside the run, `launcher.recovery.pacing`.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from launcher.errors import Failed, Held, WrongInput
from launcher.jobs.standing import LIVE, facts_of, phase
from launcher.jobs.submit import Submission, end_job, note_stopped, read_submission, submit
from launcher.recovery.pacing import left_out
from launcher.runspec.model import RunSpec
from launcher.storage.runfolder import RunFolder, read_json
from launcher.training.pacer import Twin, twin_of
from launcher.training.saving import run_log

SETTLE_S = 20.0
"""How long a pacer of the run's last submission may take to end before it counts as this one's."""


@dataclass(frozen=True)
class Started:
    """What became of a run's pacer at its submission."""

    submission: Submission | None
    said: str


def spec_of_pacer(spec: RunSpec) -> RunSpec:
    """The pacer's own spec. Raises WrongInput where the run has none."""
    if spec.policy.pacer == "off":
        raise WrongInput(f"policy.pacer: {spec.name} asks for no pacer. Set it to auto.")
    twin: Twin = twin_of(spec)
    if twin.spec is None:
        raise WrongInput(f"policy.pacer: {spec.name} has no pacer: {twin.why}.")
    return twin.spec


def start(
    spec: RunSpec, dashboard: str, ray_env: Mapping[str, str], *, wait_s: float = SETTLE_S
) -> Started | None:
    """Hand a run's pacer in, once the run itself was: None where it asks for none. A pacer that is there already stays."""
    if spec.policy.pacer == "off":
        return None
    try:
        twin = spec_of_pacer(spec)
        if left_out(run_log(RunFolder.of(spec.checkpoints.url, spec.name)).entries()):
            raise WrongInput(
                f"{spec.name} has left batches out of its data order, and a pacer would read others."
            )
        result = read_json(RunFolder.of(twin.checkpoints.url, twin.name).result)
        if result is not None and result.get("digest") == twin.digest:
            return Started(None, f"its pacer {twin.name} is finished: all of it is there to be held against")
        until = time.monotonic() + wait_s
        while True:
            try:
                done = submit(twin, dashboard, ray_env)
                return Started(done, f"pacer {done.job}")
            except Held as held:
                if time.monotonic() >= until:
                    return Started(None, f"its pacer is there already: {held}")
                time.sleep(2.0)  # it may be of the run's last submission, and about to end
    except (Failed, Held, WrongInput, OSError) as error:
        return Started(None, f"warning: no pacer was started, and the run goes on without: {error}")


def folder_of_pacer(spec: RunSpec) -> RunFolder | None:
    """Where the pacer of this run is, if one was ever submitted."""
    twin = twin_of(spec).spec
    if twin is None:
        return None
    folder = RunFolder.of(twin.checkpoints.url, twin.name)
    return folder if read_submission(folder) is not None else None


def end(spec: RunSpec, reach: Callable[[str], Mapping[str, str]], *, now: bool, wait_s: float) -> str | None:
    """See a stopped run's pacer end: by itself, or with `now` at once. What became of it, None where there is none.

    reach   RAY_* settings for a cluster, by the URL of its Jobs API
    """
    try:
        folder = folder_of_pacer(spec)
        if folder is None or phase(facts_of(folder)) not in LIVE:
            return None
        job = read_submission(folder)
        if now and job is not None:
            end_job(job, reach(job.dashboard))
            note_stopped(folder, job)
            return f"{folder.name}: its job is ended too"
        until = time.monotonic() + wait_s
        while phase(facts := facts_of(folder)) in LIVE:
            if time.monotonic() >= until:
                return f"{folder.name}: has not ended yet; it will by itself, with the run"
            time.sleep(0.5)
        return f"{folder.name}: {phase(facts)} too, at step {facts.step}"
    except (Failed, Held, WrongInput, OSError) as error:
        return f"warning: the run's pacer: {error}"
