"""The run as the user's own training sees it: resume, batches of the run's data order, and one call a step that records,
reports, saves when it is due, and says when to stop. One on every rank; the process group has been joined.
"""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from launcher.errors import WrongInput, say
from launcher.runspec.model import Entrypoint, RunSpec
from launcher.runspec.schedule import lr_at
from launcher.storage.record import Record, StopRequest
from launcher.storage.runfolder import RunFolder
from launcher.training.fence import Fence
from launcher.training.health import Apart
from launcher.training.pace import Pace

GO_ON, SAVE, STOP, STOP_NOW = range(4)
"""What ranks may wish: STOP is a person's, which may wait for a script's own save; STOP_NOW is for who has to go."""


class Run:
    """The run that this process is a rank of."""

    def __init__(
        self, assignment: Any, stop: Callable[[], bool], save: Callable[[], bool], beat: Any
    ) -> None:
        from launcher.runspec.accounting import parameter_count
        from launcher.training.upload import Saver

        self.spec = RunSpec.from_dict(assignment.spec)
        """run.yaml, as `launcher.runspec.model.RunSpec`."""
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.attempt: int = assignment.attempt
        self.total_steps = self.spec.total_steps
        """train.tokens over train.batch_tokens."""
        self.last_step = 0
        """The newest step that was told."""
        self.asked = False
        """A person asked the run to stop."""
        self.stopped = False
        """It ends, or has ended, because somebody asked."""
        self.awaits_save = False
        """Set by whoever watches a script that saves: a person's wish to stop waits for the next save."""
        self.val_loss: float | None = None
        """The newest that was told: at the end, the run's own."""
        self._assignment, self._stop, self._save, self._beat = assignment, stop, save, beat
        self._folder = RunFolder.at(assignment.folder)
        self._person = StopRequest(self._folder.stop, lambda: False)
        self._saver = Saver(self._folder, self.attempt, self.spec, self.rank, self.world)
        self._params = parameter_count(self.spec)
        curve = self._folder.curve(self.attempt)
        self._record = Record(curve, self.spec.name, self._params) if self.rank == 0 else None
        self._reporter: Any = None
        self._feed: Any = None
        self.saved_step: int | None = None
        """The newest that this attempt saved."""
        self._pace = Pace(assignment.resume_step, time.monotonic())
        self._apart = Apart()
        self._fence = Fence(self._folder, self.attempt, self.say)

    def begin(self, resume_step: int) -> None:
        """Training goes on after this step: the monitor is told."""
        from launcher.training.assignment import open_reporter

        if self.rank == 0 and self._reporter is None:
            here = replace(self._assignment, resume_step=resume_step)
            self._pace.step = resume_step
            self._reporter = open_reporter(self.spec, self._folder, here, self._params)

    @property
    def resume_step(self) -> int:
        """The step of the newest committed checkpoint when this attempt began, 0 without one."""
        return self._assignment.resume_step

    def committed_checkpoint(self) -> Path | None:
        """The files of that checkpoint, on this machine. Called by all ranks."""
        from launcher.storage.remote import at_hand

        place = self._assignment.resume_from
        return None if place is None else at_hand(self._folder, Path(place), self.attempt)

    @property
    def args(self) -> Any:
        """workload.args."""
        workload = self.spec.workload
        return workload.args if isinstance(workload, Entrypoint) else {}

    def lr(self, step: int) -> float:
        """The learning rate of a step by train.schedule, which the run's prediction assumes."""
        return lr_at(step, self.spec)

    def resume(self, engine: Any) -> int:
        """Load the newest committed checkpoint into a DeepSpeed engine. Returns its step, 0 where there is none."""
        place = self.committed_checkpoint()
        if place is None:
            return 0
        loaded, _ = engine.load_checkpoint(str(place.parent), tag=place.name)
        if loaded is None:
            raise WrongInput(
                f"{place}: DeepSpeed found no checkpoint there. Was it written at another world size?"
            )
        self.last_step = self._assignment.resume_step
        return self.last_step

    def batch(self, step: int) -> Any:
        """This rank's share of the batch that `step` trains on: (inputs, targets), token ids (sequences, context).
        Every data-parallel rank gets its own; ranks that share a model (pp, tp) get the same."""
        from launcher.data.feed import text_feed

        spec, p = self.spec, self.spec.parallel
        if self._feed is None:
            self._feed = text_feed(spec, Path(self._assignment.cache))
        share = spec.batch_sequences // p.dp
        replica = self.rank % p.dp if p.pp > 1 else self.rank // p.tp
        first = self._assignment.batch(step) * spec.batch_sequences + replica * share
        inputs, targets = self._feed.train(first, share)
        return inputs[0], targets

    def step(
        self,
        step: int,
        loss: Any,
        *,
        engine: Any = None,
        lr: float | None = None,
        grad_norm: float | None = None,
        val_loss: float | None = None,
    ) -> bool:
        """Tell of a step that has been made, on every rank. True: return now, a checkpoint has been made.

        step      optimizer updates so far, this one included
        loss      this rank's mean loss in nats per token, a number or a tensor; the mean over ranks is reported
        engine    a DeepSpeed engine: saved every checkpoints.every_steps, at the last step, and before a stop
        lr        learning rate used; default what train.schedule says
        val_loss  where one was measured
        """
        import torch
        import torch.distributed as dist

        superseded = self._reporter is not None and self._fence(self._reporter.superseded)
        now, person = superseded or self._stop(), self._person()
        wish = STOP_NOW if now else STOP if person else SAVE if self._save() else GO_ON
        device = loss.device if isinstance(loss, torch.Tensor) else "cpu"
        if dist.get_backend() == "nccl":
            device = torch.device("cuda", torch.cuda.current_device())
        value = loss.detach() if isinstance(loss, torch.Tensor) else float(loss)
        mine = torch.zeros(2, device=device)
        mine[0], mine[1] = value, wish
        every = torch.zeros(2 * self.world, device=device)
        dist.all_gather_into_tensor(every, mine)
        rows = every.view(self.world, 2).tolist()
        losses = [row[0] for row in rows]
        wish = int(max(row[1] for row in rows))
        mean = sum(losses) / len(losses)
        self.last_step, self.asked = step, wish >= STOP
        self.stopped = self.asked and not (wish == STOP and self.awaits_save)
        self.val_loss = val_loss if val_loss is not None else self.val_loss
        if self.rank == 0 and (news := self._apart.add(losses, time.monotonic())) is not None:
            self.say(f"step {step}: {news}")
        self._beat(step, "step")
        self._tell(step, mean, max(abs(x - mean) for x in losses), lr, grad_norm, val_loss)
        last = step == self.total_steps
        if engine is not None and (step % self.spec.checkpoints.every_steps == 0 or last or wish):
            self.save(engine, step, wait=bool(last or wish), must=last or self.asked)
            if wish and self.saved_step == step:
                self._save()  # a rank that was asked since this step began has what it was asked for
        self._tell_committed()
        self._beat(step, "own")
        return self.stopped

    def save(self, engine: Any, step: int, *, wait: bool, must: bool = True) -> None:
        """Save a step that has been told, on every rank; with `wait`, return when it is committed, or where it need not be
        (`must`), soon."""
        alive = partial(self._beat, step, "checkpoint")
        alive()
        if self._record is not None:
            self._record.flush()  # what a checkpoint holds is never trained again, so its curve must be there
        if self._saver.save(engine, step, wait=wait, must=must, beat=alive):
            self.saved_step = step
        self._beat(step, "step")

    def say(self, message: str) -> None:
        """Tell the person, once for all ranks."""
        if self.rank == 0:
            say(message)

    def _tell_committed(self) -> None:
        for committed in self._saver.committed():
            if self._reporter is not None:
                self._reporter.event("checkpoint", step=committed)

    def _tell(
        self, step: int, loss: float, spread: float, lr: float | None, norm: float | None, val: float | None
    ) -> None:
        if self._record is None:
            return
        now, batch = time.monotonic(), self.spec.train.batch_tokens
        rate = self.lr(step) if lr is None else lr
        tokens_per_s = self._pace.tokens_per_s(step, batch, now)  # a run may tell of every 100th step alone
        self._record.add(step, step * batch, loss, val, rate, norm)
        if self._reporter is not None:
            extra = {k: v for k, v in (("val_loss", val), ("grad_norm", norm)) if v is not None}
            self._reporter.report(
                step=step, loss=loss, tokens=step * batch, lr=rate, spread=spread,
                tokens_per_s=tokens_per_s, **extra,
            )  # fmt: skip

    def close(self, finished: bool) -> None:
        """The training is over, well or not."""
        self._tell_committed()
        self._saver.close()
        if self._record is not None:
            self._record.close()
        if self._reporter is not None:
            self._reporter.close(reason="finished" if finished else "stopped" if self.stopped else "failed")
