"""One attempt at a run: what it is to do, what it tells the monitor, and what comes of it."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launcher.runspec.accounting import flops_per_token, parameter_count, total_flops
from launcher.runspec.model import RunSpec
from launcher.storage.runfolder import RunFolder, read_json
from launcher.training.pacer import control_of


@dataclass(frozen=True)
class Assignment:
    """What one attempt is to do. Plain data: it travels to actors on other machines."""

    spec: dict[str, Any]
    folder: str
    attempt: int
    cache: str
    """Folder for prepared corpora on this machine."""
    resume_step: int = 0
    resume_from: str | None = None
    """A verified checkpoint of `resume_step`; None starts from the seed."""
    universal: bool = False
    """`resume_from` was converted to DeepSpeed's universal form: another layout wrote it."""
    skips: Sequence[Sequence[int]] = ()
    """[step, count]: from `step` on, `count` batches of the data order are left out (after a rollback)."""
    digest: str | None = None
    """Of the spec that was submitted, where an elastic run trains on fewer ranks than it says."""

    def batch(self, step: int) -> int:
        """Index in the data order of the batch that `step` trains on."""
        return step - 1 + sum(count for first, count in self.skips if step >= first)


@dataclass(frozen=True)
class Outcome:
    """How the attempt ended."""

    step: int
    finished: bool
    val_loss: float | None
    """Nats per token over the whole held-out slice, at the end of a finished run."""
    seconds: float
    """From the first step to the last."""


def result_row(
    spec: RunSpec, assignment: Assignment, val: float | None, seconds: float, step: int
) -> dict[str, Any]:
    """The finished run as one row of a law's points."""
    return {
        "run": spec.name,
        "params": parameter_count(spec),
        "tokens": step * spec.train.batch_tokens,
        "flops": total_flops(spec),
        "flops_per_token": flops_per_token(spec),
        "loss": val,
        "steps": step,
        "attempt": assignment.attempt,
        "seconds": round(seconds, 3),
        "digest": assignment.digest or spec.digest,
        "ended": time.time(),
    }


def open_reporter(spec: RunSpec, folder: RunFolder, assignment: Assignment, params: int | None) -> Any:
    """The run's line to the monitor, opened; None where the spec names no monitor."""
    if spec.monitor is None:
        return None
    from launcher.reporter import Reporter

    reporter = Reporter(
        spec.monitor.url,
        os.environ.get(spec.monitor.token_env, ""),
        spec.name,
        assignment.attempt,
        folder.path / "spool",
    )
    reporter.start(
        spec_digest=assignment.digest or spec.digest,
        resume_step=assignment.resume_step,
        team=spec.team,
        target_loss=spec.policy.target_loss,
        price_per_hour=(spec.cluster.price_per_gpu_hour or 0.0) * max(1, spec.gpus) or None,
        params=params,
        total_tokens=spec.total_steps * spec.train.batch_tokens,
        total_steps=spec.total_steps,
        batch_tokens=spec.train.batch_tokens,
        prediction=read_json(folder.prediction),
        control=None if any(count for _, count in assignment.skips) else control_of(spec),
        **({} if spec.policy.paces is None else {"paces": spec.policy.paces}),
    )
    return reporter
