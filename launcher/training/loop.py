"""One rank of one attempt: the training loop, the same under a Ray actor and under torchrun.

    torchrun --nproc-per-node 2 -m launcher.worker run.yaml

Each step: a batch that is a pure function of (seed, step), forward, backward, update, and one line to the record on
disk and to the reporter. Losses of all ranks are gathered while the gradients are computed, so that knowing
the true mean, and which rank stands apart, costs the step next to nothing. Training never waits for the monitor.
"""

import argparse
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from launcher.errors import WrongInput, say
from launcher.runspec.accounting import parameter_count
from launcher.runspec.model import Entrypoint, RunSpec
from launcher.runspec.schedule import lr_at
from launcher.storage.record import Record, StopRequest
from launcher.storage.runfolder import RunFolder, write_whole
from launcher.training.assignment import Assignment, Outcome, open_reporter, result_row
from launcher.training.drill import VARIABLE, Drill, read_drill
from launcher.training.fence import Fence
from launcher.training.health import Apart, Stopwatch, Stragglers
from launcher.training.pace import Pace
from launcher.training.preflight import preflight

VALIDATED_AT_ONCE = 32
"""Held-out sequences that one forward pass takes."""


class Trainer:
    """The state of one rank's training. Built after the process group has been joined."""

    def __init__(self, spec: RunSpec, assignment: Assignment, drill: Drill) -> None:
        import torch
        import torch.distributed as dist

        from launcher.data.feed import feed_for
        from launcher.training.engine import build_engine
        from launcher.training.layouts import layout_of

        self.spec, self.assignment, self.drill = spec, assignment, drill
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        if self.world != spec.ranks:
            raise WrongInput(
                f"parallel: dp x pp x tp is {spec.ranks} ranks and {self.world} were started. "
                f"Start {spec.ranks}, or set parallel.dp to {self.world}."
            )
        self.feed = feed_for(spec, Path(assignment.cache))
        self.engine = build_engine(spec, assignment.universal)
        self.device = self.engine.device
        self.layout = layout_of(self.engine, spec.parallel.pp, spec.parallel.tp)
        self.share = spec.batch_sequences // spec.parallel.dp
        self._mine = torch.zeros(3, device=self.device)
        self._all = torch.zeros(3 * self.world, device=self.device)
        self._watch = Stopwatch(self.device.type == "cuda")
        self.own_s: list[float] = []
        """Each rank's own seconds in the newest step, see `launcher.training.health`."""
        self.losses: list[float] = []
        """Each rank's loss in it."""

    def restore(self, folder: RunFolder) -> None:
        """Load the verified checkpoint that the assignment names."""
        from launcher.storage.remote import at_hand

        if self.assignment.resume_from is None:
            return
        path = at_hand(folder, Path(self.assignment.resume_from), self.assignment.attempt)
        loaded, _ = self.engine.load_checkpoint(str(path.parent), tag=path.name)
        if loaded is None:
            raise WrongInput(
                f"{path}: DeepSpeed found no checkpoint there, though it verified. Was it written at another world size?"
            )

    def step(self, step: int, wish: int) -> tuple[float, float, int]:
        """One optimizer update. Returns the mean loss over ranks, its largest departure on one rank, and the strongest
        wish of any rank: 0 go on, SAVE a checkpoint now, STOP after one."""
        import torch.distributed as dist

        from launcher.training.engine import set_lr

        spec = self.spec
        self.drill.strike(step, self.rank, self.assignment.attempt)
        self._watch.start()
        set_lr(self.engine, self.drill.lr(step, lr_at(step, spec)))
        first = self.assignment.batch(step) * spec.batch_sequences + self.layout.replica * self.share
        gathered: list[Any] = []

        def tell(loss: Any) -> None:
            self._mine[0], self._mine[1], self._mine[2] = loss, wish, self._watch.seconds
            gathered.append(dist.all_gather_into_tensor(self._all, self._mine, async_op=True))

        self.layout.update(self._parts(first), self.drill.poisons(step), self._watch.lap, tell)
        gathered[0].wait()
        table = self._all.view(self.world, 3).tolist()
        self.losses = losses = [row[0] for row in table]
        self.own_s = [row[2] for row in table]
        mean = sum(losses) / len(losses)
        spread = max((abs(x - mean) for x in losses), default=0.0)
        return mean, spread, int(max(row[1] for row in table))

    def _parts(self, first: int) -> list[Any]:
        """This replica's share of a batch, in micro-batches."""
        inputs, targets = self._moved(self.feed.train(first, self.share))
        size = self.spec.micro_batch
        return [
            (tuple(x[i : i + size] for x in inputs), targets[i : i + size])
            for i in range(0, self.share, size)
        ]

    def _moved(self, arrays: Any) -> Any:
        import torch

        inputs, targets = arrays
        moved = tuple(torch.from_numpy(x).to(self.device) for x in inputs)
        return moved, torch.from_numpy(targets).to(self.device)

    def validate(self, sequences: int) -> float:
        """Mean loss over the first `sequences` held-out sequences, shared out over replicas. The same text every time,
        for every layout: a ladder's runs are compared on it. NaN where nothing is held out.

        Every replica computes equally often, since ZeRO 3 and pipelines meet in every forward pass; one that has nothing
        left computes the first sequences again and counts nothing.
        """
        import torch
        import torch.distributed as dist

        have, dp = min(sequences, self.feed.holdout), self.spec.parallel.dp
        tally = torch.zeros(2, dtype=torch.float64, device=self.device)
        for turn in range(-(-have // (VALIDATED_AT_ONCE * dp))):
            first = (turn * dp + self.layout.replica) * VALIDATED_AT_ONCE
            count = max(0, min(VALIDATED_AT_ONCE, have - first))
            arrays = (
                self.feed.held_out(first, count)
                if count
                else self.feed.held_out(0, min(VALIDATED_AT_ONCE, have))
            )
            loss = self.layout.loss(self._moved(arrays))
            if loss is not None and count:
                tally[0] += loss.double() * count
                tally[1] += count
        dist.all_reduce(tally)
        return float(tally[0] / tally[1])


SAVE, STOP = 1, 2
"""What a rank may wish of all ranks at a step."""


def train(
    assignment: Assignment,
    stop: Callable[[], bool] = lambda: False,
    save: Callable[[], bool] = lambda: False,
    beat: Callable[[int, str], None] = lambda step, phase: None,
) -> Outcome:
    """Train one rank until the run is finished, or until any rank's `stop` says so, leaving a checkpoint behind.

    save  asked once a step: true makes all ranks commit a checkpoint at that step and go on
    beat  told every step this rank has made, and when something longer begins ("validate", "checkpoint"), so that
          somebody can see that it lives

    The process group is described by RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and LOCAL_RANK.
    """
    import torch

    from launcher.storage.remote import publish
    from launcher.training.engine import grad_norm, join
    from launcher.training.upload import Saver

    spec = RunSpec.from_dict(assignment.spec)
    folder = RunFolder.at(assignment.folder)
    drill = read_drill(os.environ.get(VARIABLE))
    if not torch.cuda.is_available():
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.manual_seed(spec.train.seed)
    # DeepSpeed and we use the one name that every supported torch knows; newer ones warn at each call
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\..*is deprecated", category=FutureWarning)
    # gloo sends gradients between stages by a broadcast inside backward, which is not differentiated
    warnings.filterwarnings("ignore", message=r"c10d::broadcast_: an autograd kernel", category=UserWarning)
    join()
    if isinstance(spec.workload, Entrypoint):
        from launcher.training.userrun import train_user

        return train_user(assignment, stop, save, beat)
    trainer = Trainer(spec, assignment, drill)
    preflight(trainer.device, say)
    trainer.restore(folder)
    saver = Saver(folder, assignment.attempt, spec, trainer.rank, trainer.world)
    params, total = parameter_count(spec), spec.total_steps
    asked = StopRequest(folder.stop, stop)
    stragglers, apart = Stragglers(), Apart()
    fence = Fence(folder, assignment.attempt, say)
    record = Record(folder.curve(assignment.attempt), spec.name, params) if trainer.rank == 0 else None
    reporter = open_reporter(spec, folder, assignment, params) if trainer.rank == 0 else None
    if drill.step is not None and trainer.rank == 0:
        print(f"drill: {os.environ[VARIABLE]}: a fault is put in on purpose", file=sys.stderr)
    holdout = spec.data.holdout_tokens // spec.context if spec.data else 0
    some = spec.eval.batches * spec.batch_sequences if spec.eval else 0
    began = time.monotonic()
    pace = Pace(assignment.resume_step, began)
    step, finished, val = assignment.resume_step, False, None
    saved = step
    try:
        if step == total:  # everything was trained and committed, and only the last word was lost
            val, finished = trainer.validate(holdout), True
        while step < total:
            step += 1
            superseded = reporter is not None and fence(reporter.superseded)
            wish = STOP if superseded or asked() else SAVE if save() else 0
            loss, spread, wish = trainer.step(step, wish)
            stopping = wish >= STOP
            beat(step, "step")
            val = None
            if step == total or (spec.eval and step % spec.eval.every_steps == 0):
                beat(step, "validate")
                finished, validates = step == total, time.monotonic()
                val = trainer.validate(holdout if finished else some)
                pace.leave_out(time.monotonic() - validates)
            if record is not None:
                norm, now = grad_norm(trainer.engine), time.monotonic()
                rate = pace.tokens_per_s(step, spec.train.batch_tokens, now)
                tokens, lr = step * spec.train.batch_tokens, drill.lr(step, lr_at(step, spec))
                record.add(step, tokens, loss, val, lr, norm)
                extra: dict[str, Any] = stragglers.add(trainer.own_s)
                for news in (stragglers.news(now), apart.add(trainer.losses, now)):
                    if news is not None:
                        say(f"step {step}: {news}")
                if reporter is not None:
                    if val is not None:
                        extra["val_loss"] = val
                    if norm is not None:
                        extra["grad_norm"] = norm
                    reporter.report(
                        step=step, loss=loss, tokens=tokens, lr=lr, spread=spread,
                        tokens_per_s=rate, **extra,
                    )  # fmt: skip
            if step % spec.checkpoints.every_steps == 0 or finished or wish:
                beat(step, "checkpoint")
                if record is not None:
                    record.flush()  # what a checkpoint holds is never trained again, so its curve must be there
                alive, must = partial(beat, step, "checkpoint"), finished or stopping
                if saver.save(trainer.engine, step, wait=bool(must or wish), must=must, beat=alive):
                    saved = step
                    if wish:
                        save()  # a rank that was asked since this step began has what it was asked for
                beat(step, "step")
            for committed in saver.committed():
                if reporter is not None:
                    reporter.event("checkpoint", step=committed)
            if stopping:
                break
    finally:
        seconds = time.monotonic() - began
        saver.close()
        if record is not None:
            record.close()
        if reporter is not None:
            reporter.close(reason="finished" if finished else "stopped" if step == saved else "failed")
    if finished and trainer.rank == 0:
        write_whole(folder.result, result_row(spec, assignment, val, seconds, step))
        publish(folder, folder.result, folder.curve(assignment.attempt))
    return Outcome(step=step, finished=finished, val_loss=val, seconds=seconds)


def main(argv: list[str] | None = None) -> int:
    """What torchrun starts: read the spec, take the run's next attempt, train."""
    from launcher.runspec.file import read_spec

    parser = argparse.ArgumentParser(
        prog="torchrun -m launcher.worker", description="Train one rank of a run, without Ray."
    )
    parser.add_argument("spec", help="run.yaml")
    args = parser.parse_args(argv)
    if "RANK" not in os.environ:
        print(
            "losscast: no RANK in the environment. Start with: torchrun --nproc-per-node N -m launcher.worker run.yaml",
            file=sys.stderr,
        )
        return 2
    try:
        spec = read_spec(args.spec)
        from launcher.training.saving import lost, release_held, shared_assignment

        stopping: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, _: stopping.append(number))
        try:
            outcome = train(shared_assignment(spec), stop=lambda: bool(stopping) or lost())
        finally:
            release_held()
    except Exception as error:
        status = getattr(error, "exit_status", None)
        if status is None:
            raise
        print(f"losscast: {error}", file=sys.stderr)
        return status
    if int(os.environ["RANK"]) == 0:
        print(
            json.dumps(
                {
                    "run": spec.name,
                    "step": outcome.step,
                    "finished": outcome.finished,
                    "val_loss": outcome.val_loss,
                }
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
