"""The entrypoint of a run's Ray job: takes attempts, starts the ranks, restarts them when they die.

    python -m launcher.recovery.driver RUN_FOLDER SUBMISSION

Exit status: 0 finished or stopped on request, 1 failed, 2 wrong input, 75 somebody else holds the run.
SIGUSR1 has the ranks commit a checkpoint at their next step and go on: what a pod that has to go sends (`launcher.kuberay.prestop`).
A Ray job's entrypoint may be started twice; the run's log lets only one of the two go on. A driver that is killed is begun
again (`launcher.recovery.keeper`); one whose cluster is gone lets go of the run and says so (`launcher.recovery.lifeline`).
"""

import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from infra.objects import Missing
from launcher.errors import Held, WrongInput
from launcher.recovery.attempts import Driver, LeaseGone, must_be_there, patiently, say
from launcher.recovery.keeper import Killed, kept
from launcher.recovery.lifeline import ClusterLost, Lifeline, under_this_driver
from launcher.recovery.owning import (
    AlreadyOver,
    Ownership,
    bury,
    tell_lease_lost,
    wait_for_turn,
)
from launcher.recovery.restarts import HOST_LOST
from launcher.runspec.model import RunSpec
from launcher.storage.output import ECHO_S, end_when_asked, job_log, job_output, note_end, note_failure
from launcher.storage.remote import refresh, store_of
from launcher.storage.runfolder import RunFolder, read_json
from launcher.training.saving import present

END_PATIENCE_S = 30.0
"""How long a second start of the entrypoint waits for the first one's last word."""


BY_HAND = "by-hand"
"""The submission of a driver that was given none: no two starts of it are the same."""


def _spec_of(folder: RunFolder) -> dict[str, Any]:
    """What was submitted. An OSError where it is not there: whoever submitted wrote it, so the disk is away."""
    body = read_json(folder.spec)
    if body is None:
        raise FileNotFoundError(f"{folder.spec} is not there: is its disk mounted?")
    return body


def drive(
    folder: RunFolder,
    submission: str,
    join: Callable[[Callable[[str], None]], Lifeline | None],
    died: Killed | None = None,
) -> int:
    """Run attempts until the run is finished. Returns the exit status.

    join  joins the cluster; called once it is known that nobody else has the run. It is given what to call when the
          cluster is gone
    died  the driver that this one is begun in the place of
    """
    patiently(lambda: refresh(folder), "bring the run's documents")
    spec = RunSpec.from_dict(patiently(lambda: _spec_of(folder), "read the spec"))
    if died is not None:
        say(f"{spec.name}: {died}: begun again")
        patiently(lambda: bury(folder, spec, submission, died), "let go of what the one before held")
    try:
        patiently(lambda: wait_for_turn(folder, submission, say), "see who holds the run")
        if submission != BY_HAND and read_end(folder, submission) == 0:
            raise AlreadyOver("the run was finished or stopped")
    except AlreadyOver as over:
        status = ended_with(folder, submission)
        say(f"{spec.name}: {over} under this very submission, with status {status}: nothing is begun again")
        return status
    except Held as held:
        tell_lease_lost(folder, spec, held)
        raise
    driver: Driver | None = None
    owner: Ownership | None = None

    def lost(why: str) -> None:
        """From a thread: the main one may wait for Ray for ever."""
        end_here(folder, submission, spec, why, owner, driver)

    lifeline = join(lost)
    try:
        while True:
            owner = Ownership(folder, spec, submission, say)
            if driver is not None:  # it was there before
                patiently(lambda: must_be_there(folder), "take the run again")
            try:
                patiently(owner.take, "take the run")
            except Held as held:
                tell_lease_lost(folder, spec, held)
                raise
            try:
                driver = driver or Driver(folder, spec)
                signal.signal(signal.SIGUSR1, lambda number, frame, ours=driver: ours.save())
                return driver.run(owner)
            except Held:
                if present(folder):
                    raise
                say(
                    f"{spec.name}: stopped: {folder.path} is not there"
                )  # and so nobody's, which is no news of the run
            except LeaseGone as gone:
                # somebody else has it, and then `take` says who; or storage was away for longer than the lease lasts
                say(f"{spec.name}: {gone}: stopped, and nothing more was written")
            finally:
                owner.close()
    finally:
        if driver is not None:
            driver.close()
        if lifeline is not None:
            lifeline.close()


def end_here(
    folder: RunFolder,
    submission: str,
    spec: RunSpec,
    why: str,
    owner: Ownership | None,
    driver: Driver | None,
) -> None:
    """The cluster is gone: say so wherever it is looked for, let go of the run, and end this process at once."""
    attempt, at = (driver.attempt, driver.reached()) if driver is not None else (0, 0)
    say(
        f"{spec.name}: {why}. Committed checkpoints are safe: `losscast resume {spec.name}` goes on from the newest"
    )
    if attempt:
        note_failure(folder, attempt, rank=None, cause=HOST_LOST, message=why, step=at)
        if owner is not None:
            owner.tell("restart", attempt, cause=HOST_LOST, step=at)
    note_end(folder, submission, 1, ClusterLost(why))
    if owner is not None:
        owner.close(over=False)
    time.sleep(2 * ECHO_S)  # the last words reach the job's own output
    os._exit(1)


def ended_with(folder: RunFolder, submission: str) -> int:
    """The status that another start of this submission's entrypoint ended with; waits a little for it to be written."""
    until = time.monotonic() + END_PATIENCE_S
    while time.monotonic() < until:
        if (status := read_end(folder, submission)) is not None:
            return status
        time.sleep(0.5)
    return 0


def read_end(folder: RunFolder, submission: str) -> int | None:
    """The status that an earlier start of this submission's entrypoint ended with; None where none is known."""
    key = job_log(folder, submission).with_suffix(".end.json").relative_to(folder.path).as_posix()
    with contextlib.suppress(Missing, OSError, ValueError):
        said = json.loads(store_of(folder).get(key))
        if isinstance(said, dict) and isinstance(status := said.get("status"), int):
            return status
    return None


def main(argv: list[str]) -> int:
    folder, submission = RunFolder.at(argv[0]), argv[1] if len(argv) > 1 else BY_HAND

    def driven(died: Killed | None) -> int:
        with job_output(folder, submission) as end:
            end.status = work(folder, submission, died)
            return end.status

    def given_up(died: Killed) -> None:
        with job_output(folder, submission) as end:
            say(f"{folder.name}: {died}, as the ones before it: not begun again")
            end.status = 128 + died.number

    return kept(driven, given_up)


ORDINARY = {"RAY_worker_niceness": "0"}
"""Ray gives its actors' processes a niceness of 15, and training would give way to anything else on its host. For the
whole job, so that the workers which Ray starts ahead for it serve."""


def work(folder: RunFolder, submission: str, died: Killed | None = None) -> int:
    """Join the cluster and drive the run. Returns the exit status."""
    import ray

    def join(lost: Callable[[str], None]) -> Lifeline:
        ray.init(
            address="auto",
            runtime_env={"env_vars": ORDINARY},
            logging_level=logging.WARNING,
            log_to_driver=True,
        )
        end_when_asked()
        return under_this_driver(lost)

    try:
        return drive(folder, submission, join, died)
    except WrongInput as error:
        say(str(error))
        return 2
    except Exception as error:
        status = getattr(error, "exit_status", None)
        if status is None:
            raise
        say(str(error))
        return status
    finally:
        ray.shutdown()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
