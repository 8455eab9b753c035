"""Where a trainer's callback tells of its steps: to the losscast run it is part of, or straight to a monitor.

In a run (`losscast submit` with an entrypoint) the callback is given the entrypoint's `run`: steps are recorded, reported and
counted there, and it says when to stop. Outside one a `MonitorLine` keeps the same record in a folder, and reports from
rank 0; every start of the same name in that folder is a new attempt.

Losses are nats per token, steps optimizer updates.
"""

import os
import re
from pathlib import Path
from typing import Any, Protocol, TypedDict, Unpack

from launcher.errors import WrongInput
from launcher.runspec.model import NAME
from launcher.storage.record import Record
from launcher.storage.runfolder import RunFolder, read_json


class More(TypedDict, total=False):
    """What a trainer may know of a step beside its loss; None is not known."""

    lr: float | None
    grad_norm: float | None
    val_loss: float | None
    """Where one was measured since the last step."""


class Line(Protocol):
    """What a callback needs."""

    def told(self, step: int, loss: float, **more: Unpack[More]) -> bool:
        """Tell of a step, on every rank. True: stop after it."""
        ...

    def close(self, finished: bool, val_loss: float | None = None) -> None:
        """The training is over. `val_loss`: one that no step carried any more."""
        ...


class RunLine:
    """Tells the run that the callback's training is the entrypoint of."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def told(self, step: int, loss: float, **more: Unpack[More]) -> bool:
        return bool(self._run.step(step, loss, **more))

    def close(self, finished: bool, val_loss: float | None = None) -> None:
        if val_loss is not None:
            self._run.val_loss = val_loss


class MonitorLine:
    """Keeps a record in a folder, and tells a monitor.

    name          the run's name: lower-case letters, digits, hyphens
    folder        where the record and unsent samples go: FOLDER/NAME/attempts/<k>
    url           of `losscast monitor serve`; None keeps the record alone
    token_env     environment variable that holds the monitor's token
    batch_tokens  tokens of a step, over all ranks: what runs are compared over; without it, steps are
    prediction    a prediction.json to hold the run against
    """

    def __init__(
        self,
        name: str,
        folder: str | os.PathLike[str],
        url: str | None = None,
        *,
        token_env: str = "LOSSCAST_TOKEN",
        batch_tokens: int | None = None,
        total_steps: int | None = None,
        params: int | None = None,
        prediction: str | os.PathLike[str] | None = None,
        resume_step: int = 0,
        main: bool | None = None,
    ) -> None:
        """main: whether this process tells; default the one with RANK 0."""
        if not re.fullmatch(NAME, name):
            raise WrongInput(
                f"{name!r} can't name a run: lower-case letters, digits and hyphens, at most 63."
            )
        self._batch = batch_tokens
        self._record: Record | None = None
        self._reporter: Any = None
        if not (os.environ.get("RANK", "0") == "0" if main is None else main):
            return
        run = RunFolder(Path(folder).expanduser().resolve() / name)
        attempt = max(run.attempts(), default=0) + 1
        self._record = Record(run.curve(attempt), name, params)
        if url is None:
            return
        from launcher.reporter import Reporter

        foretold = None if prediction is None else read_json(Path(prediction))
        if prediction is not None and foretold is None:
            raise WrongInput(f"{prediction}: no such file")
        self._reporter = Reporter(url, os.environ.get(token_env, ""), name, attempt, run.path / "spool")
        known = {"params": params, "total_steps": total_steps, "batch_tokens": batch_tokens}
        if batch_tokens and total_steps:
            known["total_tokens"] = batch_tokens * total_steps
        said = {k: v for k, v in known.items() if v is not None}
        self._reporter.start(resume_step=resume_step, prediction=foretold, **said)

    def told(self, step: int, loss: float, **more: Unpack[More]) -> bool:
        if self._record is None:
            return False
        tokens = step * self._batch if self._batch else None
        known = [more.get(key) for key in ("val_loss", "lr", "grad_norm")]
        self._record.add(step, tokens or step, loss, *known)
        if self._reporter is None:
            return False
        said = {"tokens": tokens, **more}
        self._reporter.report(step=step, loss=loss, **{k: v for k, v in said.items() if v is not None})
        return bool(self._reporter.superseded)

    def close(self, finished: bool, val_loss: float | None = None) -> None:
        if self._record is not None:
            self._record.close()
        if self._reporter is not None:
            self._reporter.close(reason="finished" if finished else "failed")


def line_of(run: Any) -> Line:
    """A line from what a callback was given: an entrypoint's `run`, or a line as it is."""
    return run if hasattr(run, "told") else RunLine(run)
