"""What is handed to Ray's Jobs API for a run: a pure function, so that `plan` shows what `submit` sends."""

import shlex
from collections.abc import Mapping
from typing import Any

from launcher.runspec.model import RunSpec

QUIET = {
    "RAY_DEDUP_LOGS": "0",
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
    "PYTHONUNBUFFERED": "1",
}
"""Ray would leave lines out of a trace that it saw before, and repeat every rank's error after the driver has told the
first."""


def ray_job(
    spec: RunSpec, folder: str, job: str, *, python: str = "python", env: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Arguments of `JobSubmissionClient.submit_job`.

    folder   the run's folder, as the cluster sees it
    job      the submission's id; a rerun of one id takes over its own run, another id is refused while it is held
    python   interpreter on the cluster
    env      environment of the job; empty values are left out
    """
    return {
        "entrypoint": f"{shlex.quote(python)} -m launcher.recovery.driver {shlex.quote(folder)} {job}",
        "submission_id": job,
        "runtime_env": {"env_vars": {**QUIET, **{k: v for k, v in (env or {}).items() if v}}},
        "metadata": {"losscast_run": spec.name},
    }


def planned_job(spec: RunSpec) -> dict[str, Any] | None:
    """The job that `submit` would send, what is drawn or read at submit in angle brackets. None for kuberay."""
    if spec.cluster.to == "kuberay":
        return None
    url = spec.checkpoints.url.rstrip("/")
    env = {"RAY_AUTH_MODE": "<of the cluster>"}
    if spec.monitor is not None:
        env[spec.monitor.token_env] = "<from your environment>"
    return {
        "address": spec.cluster.to,
        "submit_job": ray_job(spec, f"{url}/{spec.name}", f"{spec.name}-<8 hex digits>", env=env),
        "placement": {
            "bundles": spec.ranks,
            "each": {"CPU": 1, "GPU": 1} if spec.cluster.gpus_per_node else {"CPU": 1},
            "strategy": "PACK",
            "nodes": spec.cluster.nodes.model_dump(),
        },
    }
