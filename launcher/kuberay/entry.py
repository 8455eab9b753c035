"""The entrypoint of a run's RayJob: puts what the job carries into the run's folder, and starts its driver.

    python -m launcher.kuberay.entry /etc/losscast/run.json

run.json holds the spec, its prediction and the submission's id (`launcher.kuberay.manifests`). KubeRay starts this again after the
head was lost, and can't tell that from a run that was given up: so what a driver of the same submission left as its end
is looked at first, and where trying again can't help, nothing is tried. What the job prints is copied to a run that lives
at az:// while it runs, since the cluster goes a minute after the job. Exit status: the driver's.
"""

import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from infra.objects import Missing
from launcher.runspec.model import RunSpec
from launcher.storage.runfolder import RunFolder, read_json, write_whole

COPY_S = 30.0
"""Between two copies of the job's output; longer where it is long, since a copy is the whole file."""
BYTES_PER_S = 100_000
"""Of output, copied on average at most."""


def final(end: dict[str, Any] | None) -> int | None:
    """The exit status with which an earlier driver of this submission ended for good; None where trying again may help.

    Final: finished or stopped (0), given up (1, with no exception behind it), wrong input (2), held by another (75).
    """
    if not isinstance(end, dict):
        return None
    status = end.get("status")
    if status in (0, 2, 75) or (status == 1 and "type" not in end):
        return int(status)
    return None


def prepare(body: dict[str, Any]) -> tuple[RunFolder, str, int | None]:
    """Write spec and prediction into the run's folder, where no newer ones are due. The folder, the submission's id,
    and the status to leave with at once."""
    from launcher.jobs.submit import register_prediction
    from launcher.storage.remote import publish, refresh, store_of

    spec, submission = RunSpec.from_dict(body["spec"]), str(body["submission"])
    folder = RunFolder.of(spec.checkpoints.url, spec.name)
    folder.path.mkdir(parents=True, exist_ok=True)
    refresh(folder)
    try:
        end = json.loads(store_of(folder).get(f"output/{submission}.end.json"))
    except (Missing, ValueError):
        end = None
    result = read_json(folder.result)
    if result is not None and result.get("digest") == spec.digest:
        return folder, submission, 0
    status = final(end)
    if status is None:
        if body.get("prediction") is not None:
            register_prediction(folder, body["prediction"])
        write_whole(folder.spec, spec.to_dict())
        publish(folder, folder.spec, folder.prediction)
    return folder, submission, status


def main(argv: list[str]) -> int:
    try:
        body = json.loads(Path(argv[0]).read_text())
        if not isinstance(body, dict) or not {"spec", "submission"} <= body.keys():
            raise ValueError("it has no spec and submission")
    except (OSError, ValueError, IndexError) as error:
        print(f"losscast: the job carries no run: {error}", flush=True)
        return 2
    try:
        folder, submission, status = prepare(body)
    except Exception as error:
        known = getattr(error, "exit_status", 1 if isinstance(error, OSError) else None)
        if known is None:
            raise
        print(f"losscast: {error}", flush=True)
        return known
    if status is not None:
        print(
            f"losscast: {folder.name}: submission {submission} ended with status {status} before; not tried again",
            flush=True,
        )
        return status
    work = (body["spec"].get("kubernetes") or {}).get("working_dir")
    return drive(
        [sys.executable, "-m", "launcher.recovery.driver", folder.address, submission],
        folder,
        submission,
        work,
    )


def drive(
    command: list[str], folder: RunFolder, submission: str, cwd: str | None = None, copy_s: float = COPY_S
) -> int:
    """Run the driver, hand it what signals come, and copy its output to the run. Its exit status."""
    child = subprocess.Popen(command, cwd=cwd)
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda number, frame: _pass_on(child, number)) for number in numbers]
    try:
        copied, due, status = 0, time.monotonic() + copy_s, child.poll()
        while status is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.05, min(1.0, due - time.monotonic())))
            status = child.poll()
            if status is None and time.monotonic() >= due:
                copied = copy_output(folder, submission, copied)
                due = time.monotonic() + max(copy_s, copied / BYTES_PER_S)
        copy_output(folder, submission, -1)
        return status if status >= 0 else 128 - status
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def copy_output(folder: RunFolder, submission: str, copied: int) -> int:
    """Put the job's output, and its end where there is one, to where the run's truth is. Returns the bytes that are there
    now; `copied` bytes are not sent again. Never raises: a log is not worth a run."""
    from launcher.storage.output import job_log
    from launcher.storage.remote import publish

    path = job_log(folder, submission)
    try:
        size = path.stat().st_size
        if size != copied:
            publish(folder, path, path.with_suffix(".end.json"))
        return size
    except Exception as error:  # whatever the storage's library raises
        print(f"losscast: the job's output is not copied: {error}", flush=True)
        return copied


def _pass_on(child: "subprocess.Popen[bytes]", number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        child.send_signal(number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
