"""The entrypoint of a run's Ray job: takes attempts, starts the ranks, restarts them when they die.

    python -m launcher.driver RUN_FOLDER SUBMISSION

Exit status: 0 finished or stopped on request, 1 failed, 2 wrong input, 75 somebody else holds the run.
A Ray job's entrypoint may be started twice; the run's log lets only one of the two go on.
"""

import logging
import os
import sys
import time
from pathlib import Path

from launcher.data import cache_folder
from launcher.errors import Held, WrongInput
from launcher.output import job_output, note_failure
from launcher.runfolder import RunFolder, last_step, read_json
from launcher.spec import RunSpec
from launcher.worker import Assignment

BACKOFF_S = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
"""Waits before restart 1, 2, ...; the last one repeats."""
SAME_STEP_LIMIT = 3
"""Restarts in a row that gained no step: then the fault is in the run, and trying again only costs."""


def say(message: str) -> None:
    print(f"losscast: {message}", flush=True)


def drive(folder: RunFolder, submission: str) -> int:
    """Run attempts until the run is finished. Returns the exit status."""

    from launcher.group import Group, RankFailed
    from launcher.saving import Ownership, newest_verified

    spec = RunSpec.from_dict(read_json(folder.spec))
    cpus = os.cpu_count() or 1
    threads = 1 if not spec.cluster.gpus_per_node else max(1, cpus // max(1, spec.cluster.gpus_per_node))
    restarts, idle_restarts, best_step, first_error = 0, 0, -1, ""
    with Ownership(folder, spec, submission, say) as owner:
        while True:
            attempt = owner.next_attempt()
            resume = newest_verified(folder, say)
            folder.stop.unlink(missing_ok=True)
            say(
                f"{spec.name}: attempt {attempt} on {spec.ranks} ranks, from step {resume.step if resume else 0} of {spec.total_steps}"
            )
            assignment = Assignment(
                spec=spec.to_dict(),
                folder=str(folder.path),
                attempt=attempt,
                cache=str(cache_folder()),
                resume_step=resume.step if resume else 0,
                resume_from=str(resume.path) if resume else None,
            )
            group = Group(spec, threads)
            try:
                outcome = group.train(assignment)
            except RankFailed as error:
                first_error = first_error or str(error)
                reached = last_step(folder, attempt)
                note_failure(
                    folder, attempt, rank=error.rank, cause=error.cause, message=error.message, step=reached
                )
                idle_restarts = idle_restarts + 1 if reached <= best_step else 0
                best_step = max(best_step, reached)
                restarts += 1
                say(f"{spec.name}: attempt {attempt} failed at step {reached}: {error}")
                owner.tell("restart", attempt, cause=error.cause, step=reached)
                if restarts > spec.policy.max_restarts or idle_restarts >= SAME_STEP_LIMIT:
                    why = (
                        "no step gained"
                        if idle_restarts >= SAME_STEP_LIMIT
                        else "policy.max_restarts reached"
                    )
                    say(
                        f"{spec.name}: given up after {restarts - 1} restarts ({why}). The first error was: {first_error}"
                    )
                    owner.tell("run_ended", attempt, reason="failed", error=first_error)
                    return 1
                time.sleep(BACKOFF_S[min(restarts - 1, len(BACKOFF_S) - 1)])
            else:
                if owner.lost is not None:
                    raise Held(
                        f"{spec.name}: {owner.lost}: stopped at step {outcome.step}, and nothing more was written"
                    )
                how = "finished" if outcome.finished else "stopped"
                loss = (
                    f", validation loss {outcome.val_loss:.4f} nats per token"
                    if outcome.val_loss is not None
                    else ""
                )
                say(f"{spec.name}: {how} at step {outcome.step}{loss}, {outcome.seconds:.1f} s in the loop")
                return 0
            finally:
                group.close()
    raise AssertionError("unreachable")


def main(argv: list[str]) -> int:
    folder, submission = RunFolder(Path(argv[0])), argv[1] if len(argv) > 1 else "by-hand"
    with job_output(folder, submission) as end:
        end.status = work(folder, submission)
        return end.status


def work(folder: RunFolder, submission: str) -> int:
    """Join the cluster and drive the run. Returns the exit status."""
    import ray

    try:
        ray.init(address="auto", logging_level=logging.WARNING, log_to_driver=True)
        return drive(folder, submission)
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
