"""The entrypoint of a run's RayJob: puts what the job carries into the run's folder, and becomes its driver.

    python -m launcher.kuberay_entry /etc/losscast/run.json

run.json holds the spec, its prediction and the submission's id (`launcher.kuberay`). KubeRay starts this again after the
head was lost, and can't tell that from a run that was given up: so what a driver of the same submission left as its end
is looked at first, and where trying again can't help, nothing is tried. Exit status: the driver's.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from launcher.runfolder import RunFolder, read_json, write_whole
from launcher.spec import RunSpec
from launcher.storage import Missing


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
    from launcher.remote import publish, refresh, store_of
    from launcher.submit import register_prediction

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
    if work:
        os.chdir(work)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "launcher.driver", folder.address, submission])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
