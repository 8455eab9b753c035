"""One driver's work on one run: attempt after attempt on one warm group of ranks, until the run is finished, stopped or
given up.

What ends an attempt before its time is told in words, counted by its cause, and followed by another attempt from the newest
checkpoint that verifies (`launcher.recovery.restarts` decides). Storage that is away is waited for.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from launcher.data.tokens import cache_folder
from launcher.recovery.elastic import fewest_ranks, fitted, needs_universal, to_universal
from launcher.recovery.failures import RankFailed
from launcher.recovery.goodput import Ledger
from launcher.recovery.owning import (
    last_commit,
    oldest_commit,
)
from launcher.recovery.pacing import Pace
from launcher.recovery.restarts import RESIZED, ROLLBACK, Failure, Restarts
from launcher.recovery.rollback import Adviser, RollBack, Rollbacks
from launcher.runspec.model import RunSpec
from launcher.storage.ahead import Ahead
from launcher.storage.output import note_failure
from launcher.storage.remote import KEPT_HERE, forget_stop, stop_asked, within_reach
from launcher.storage.runfolder import RunFolder, last_step, steps_after
from launcher.training.assignment import Assignment, Outcome
from launcher.training.saving import newest_verified, present

T = TypeVar("T")

GROW_CHECK_S = 5.0
"""How often a run on fewer ranks than it asked for looks for more."""
STORAGE_WAITS_S = (1.0, 2.0, 5.0, 15.0)
STORAGE_PATIENCE_S = float(os.environ.get("LOSSCAST_STORAGE_WAIT_S", "3600"))
"""How long the driver waits for storage that is gone before it gives up."""

TELL_BOOKS_S = 300.0
"""Between two words to the monitor on what became of the run's time, while all goes well."""


def say(message: str) -> None:
    print(f"losscast: {message}", flush=True)


class LeaseGone(Exception):
    """The run could not be held: whoever takes it next may be us."""


def patiently(work: Callable[[], T], what: str) -> T:
    """Do something with the run's storage, again and again while the storage is gone. Raises its error in the end."""
    began, tries = time.monotonic(), 0
    while True:
        try:
            return work()
        except OSError as error:
            if time.monotonic() - began > STORAGE_PATIENCE_S:
                raise
            if tries == 0:
                say(f"storage fails to {what}, and is tried again: {error}")
            time.sleep(STORAGE_WAITS_S[min(tries, len(STORAGE_WAITS_S) - 1)])
            tries += 1


def must_be_there(folder: RunFolder) -> None:
    """Raise FileNotFoundError where the run's folder is away: what an empty mount point says of a run is not true."""
    if not present(folder):
        raise FileNotFoundError(f"{folder.path} is not there: is its disk mounted?")


class Driver:
    """One driver's work on one run: attempt after attempt on one warm group."""

    def __init__(self, folder: RunFolder, spec: RunSpec) -> None:
        from launcher.recovery.group import Group

        cpus, gpus = os.cpu_count() or 1, spec.cluster.gpus_per_node
        self.folder, self.spec = folder, spec
        self.group = Group(spec, max(1, cpus // gpus) if gpus else 1, say)
        self.restarts = Restarts(spec.policy)
        self.ledger = self._books()
        self.rollbacks = Rollbacks.read(folder, spec)
        self.adviser = Adviser.of(spec, say)
        self.pace = Pace.of(spec, say)
        self.owner: Any = None
        self.attempt = 0
        self._looked = 0.0
        self._told = time.monotonic()
        self._growing = self._resting = False
        self._began, self._from = 0.0, 0
        self._saving = False
        self._ahead, self._ahead_at = Ahead(folder.address, say, keep=KEPT_HERE), 0

    def save(self) -> None:
        """Have the attempt that trains, or else the next one, commit a checkpoint. For a signal's handler: returns at once."""
        self._saving = True

    def run(self, owner: Any) -> int:
        """Attempts until the run is finished, stopped or given up. Returns the exit status; raises LeaseGone."""
        if self.owner is not None and self.owner.lost is not None:
            self.ledger = self._books()  # somebody else may have kept them meanwhile
        self.owner = owner
        if self.pace is not None:
            patiently(lambda: forget_stop(self.folder), "clear the wish to stop")  # it meant the one before
        while True:
            if self.pace is not None and not self.pace.wait(lambda: owner.lost is None and not self._asked()):
                if owner.lost is not None:
                    raise LeaseGone(owner.lost)
                return 0
            try:
                outcome = self._attempt()
            except RankFailed as error:
                if (status := self._failed(error)) is not None:
                    return status
            except RollBack as ask:
                self._rolled_back(ask)
            else:
                if owner.lost is not None:
                    raise LeaseGone(owner.lost)
                if self._resting and not outcome.finished:
                    self.group.close()
                    continue
                if outcome.finished or not self._growing:
                    return self._over(outcome)
                say(f"{self.spec.name}: stopped at step {outcome.step} to go on with more ranks")
                self._count(RESIZED, outcome.step)
            if owner.lost is not None:
                raise LeaseGone(owner.lost)

    def _attempt(self) -> Outcome:
        """One attempt, from its place in the log to its end."""
        patiently(lambda: must_be_there(self.folder), "take the run")
        self._ahead.stop()
        self._ahead_at = 0
        self.attempt = patiently(self.owner.next_attempt, "take the run")
        resume = patiently(
            lambda: newest_verified(self.folder, say, self._unfit, self.attempt), "read checkpoints"
        )
        step = resume.step if resume else 0
        lost = self.ledger.settle(step, time.monotonic()) + self._take_over(step)
        if lost:
            say(f"{self.spec.name}: {lost} steps since the last commit are trained again")
        if self.ledger.total_s:
            self.ledger.write(self.folder.path / "goodput.json")
        waited = time.monotonic()
        ready = self.group.assemble()
        here = fitted(self.spec, ready)
        self.ledger.idle(here.ranks, time.monotonic() - waited)
        universal = resume is not None and needs_universal(resume.topology, here)
        path = resume.path if resume else None
        if universal and path is not None:
            target = self.folder.attempt(self.attempt) / "universal"
            path = to_universal(path, target, say)
            self._share(path)
        patiently(lambda: forget_stop(self.folder), "clear the wish to stop")
        on = f"{here.ranks} ranks" if here is self.spec else f"{here.ranks} of {self.spec.ranks} ranks"
        say(f"{self.spec.name}: attempt {self.attempt} on {on}, from step {step} of {self.spec.total_steps}")
        assignment = Assignment(
            spec=here.to_dict(),
            folder=self.folder.address,
            attempt=self.attempt,
            cache=str(cache_folder()),
            resume_step=step,
            resume_from=str(path) if path else None,
            universal=universal,
            skips=self.rollbacks.skips,
            digest=self.spec.digest,
        )
        self._growing = self._resting = False
        self._looked = time.monotonic()
        self._began, self._from = self._looked, step
        self.ledger.begin(here.ranks, step, time.monotonic(), self.attempt)
        self.ledger.write(self.folder.path / "goodput.json")  # whoever goes on after us knows what was open
        try:
            return self.group.train(assignment, here.ranks, lambda seen: self._tick(seen, here))
        finally:
            now = time.monotonic()
            self.ledger.saw(self.reached(), now, self.group.seen.age_s)
            self.ledger.end(now)
            self.group.halt()

    def _books(self) -> Ledger:
        return Ledger.read(self.folder.path / "goodput.json", self.spec.cluster.price_per_gpu_hour)

    def _take_over(self, step: int) -> int:
        """Book what a driver before this one, which went without a word, had open. Returns the steps lost."""
        left = self.ledger.left
        if left is None:
            return 0
        return self.ledger.take_over(steps_after(self.folder, left.number, left.start_step), step)

    def _asked(self) -> bool:
        """Somebody asked the run to stop while no attempt trains."""
        try:
            return self.folder.stop.exists() or stop_asked(self.folder)
        except Exception:  # whatever the storage's library raises: it is asked again
            return False

    def _unfit(self, step: int) -> None:
        """A committed checkpoint is not what was committed: somebody has to know, though the run goes on from an older one."""
        self.owner.tell("checkpoint", self.attempt, step=step, ok=False)

    def _share(self, converted: Path) -> None:
        """Put what this machine converted where the ranks of other hosts can bring it from."""
        patiently(
            lambda: within_reach(self.folder, converted, self.attempt), "share the converted checkpoint"
        )

    def reached(self) -> int:
        """The newest step that this attempt has made, as far as is known."""
        return max(self.group.seen.reached, last_step(self.folder, self.attempt))

    def _tick(self, seen: Any, here: RunSpec) -> None:
        """A few times a second while an attempt trains."""
        now = time.monotonic()
        self.ledger.saw(seen.reached, now, seen.age_s)
        if self.owner.lost is not None:
            raise LeaseGone(self.owner.lost)
        if (committed := self.owner.committed()) > self._ahead_at and self.folder.url is not None:
            self._ahead_at = committed
            self.group.bring_ahead(self.folder.url)
            if not self.group.trains_here():
                self._ahead.look()
        if self.ledger.keep(committed):
            self._keep_books(now)
        if self._saving:
            self._saving = False
            say(f"{self.spec.name}: asked for a checkpoint: at the next step")
            self.group.save()
        if self.pace is not None and not self._resting and (why := self.pace.rest()) is not None:
            say(f"{self.spec.name}: {why}: a checkpoint, then its places are given back")
            self._resting = True
            self.group.stop()
        if self.adviser is not None:
            ask = self.adviser.ask(
                self._began, self._from, seen.reached, lambda: oldest_commit(self.folder), self.rollbacks
            )
            if ask is not None:
                raise ask
        if here.ranks < self.spec.ranks and not self._growing and now - self._looked > GROW_CHECK_S:
            self._looked = now
            more = self.group.could_use()
            if fewest_ranks(self.spec) <= more and fitted(self.spec, more).ranks > here.ranks:
                say(
                    f"{self.spec.name}: room for {fitted(self.spec, more).ranks} ranks: a checkpoint, then all of them"
                )
                self._growing = True
                self.group.stop()

    def _failed(self, error: RankFailed) -> int | None:
        """What follows from a failure: None to try again, or the exit status."""
        name, reached = self.spec.name, self.reached()
        note_failure(
            self.folder, self.attempt, rank=error.rank, cause=error.cause, message=error.message, step=reached
        )
        say(f"{name}: attempt {self.attempt} failed at step {reached}: {error.cause}: {error}")
        for line in error.trace.strip().splitlines()[-20:]:
            print(f"    {line}", flush=True)
        self._keep_stacks(error)
        verdict = self.restarts.failed(Failure(error.cause, error.message, reached, error.rank))
        self.owner.tell("restart", self.attempt, cause=error.cause, step=reached, **self.ledger.fields())
        if verdict.give_up is not None:
            first = f"{verdict.error.cause}: {verdict.error}" if verdict.error else str(error)
            say(
                f"{name}: given up: {verdict.give_up}. Failures: {self.restarts.told()}. The first error was: {first}"
            )
            self._close_books()
            self.owner.tell("run_ended", self.attempt, reason="failed", error=first, **self.ledger.fields())
            return 1
        if verdict.wait_s:
            say(f"{name}: tried again in {verdict.wait_s:.0f} s")
            time.sleep(verdict.wait_s)
        return None

    def _keep_stacks(self, error: RankFailed) -> None:
        """A hung attempt's stacks, one file a rank; those that the others wait for also in the job's own output."""
        folder = self.folder.attempt(self.attempt) / "output"
        for rank, dump in error.dumps.items():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"rank-{rank}.stacks.txt").write_text(dump or "its host gave no answer\n")
            except OSError as why:
                say(f"rank {rank}'s stacks are not kept: {why}")
        if error.dumps:
            say(f"stacks of every rank are in {folder}")
            for line in error.dumps.get(error.rank if error.rank is not None else 0, "").splitlines()[:40]:
                print(f"    {line}", flush=True)

    def _rolled_back(self, ask: RollBack) -> None:
        """Make a rollback part of the run: checkpoints from the onset on are void, the batches after it left out."""
        patiently(lambda: self.rollbacks.add(self.folder, self.attempt, ask), "write the rollback down")
        say(
            f"{self.spec.name}: rolled back: {ask.why}. Checkpoints from step {ask.onset} on are void, and batches "
            f"{ask.onset} to {ask.called} are left out ({self.rollbacks.told()})"
        )
        self._count(ROLLBACK, ask.called)

    def _count(self, cause: str, step: int) -> None:
        self.restarts.failed(Failure(cause, cause, step))
        self.owner.tell("restart", self.attempt, cause=cause, step=step, **self.ledger.fields())

    def _over(self, outcome: Outcome) -> int:
        how = "finished" if outcome.finished else "stopped"
        loss = "" if outcome.val_loss is None else f", validation loss {outcome.val_loss:.4f} nats per token"
        say(f"{self.spec.name}: {how} at step {outcome.step}{loss}, {outcome.seconds:.1f} s in the loop")
        self.ledger.saw(outcome.step, time.monotonic())
        self.ledger.settle(outcome.step, time.monotonic())
        self._close_books()
        self.owner.tell("goodput", self.attempt, step=outcome.step, **self.ledger.fields())
        return 0

    def _keep_books(self, now: float) -> None:
        """A commit was booked: write the books down, and tell the monitor of them, less often."""
        self.ledger.write(self.folder.path / "goodput.json")
        if now - self._told > TELL_BOOKS_S:
            self._told = now
            self.owner.tell("goodput", self.attempt, step=self.owner.committed(), **self.ledger.fields())

    def _close_books(self) -> None:
        self.ledger.settle(last_commit(self.folder), time.monotonic())
        say(f"{self.spec.name}: {self.ledger.told()}; restarts: {self.restarts.told()}")
        self.ledger.write(self.folder.path / "goodput.json")

    def close(self) -> None:
        """Give every place back, and keep the books, unless the run has become somebody else's, whose books they are now."""
        if self.owner is None or self.owner.lost is None:
            self.ledger.settle(last_commit(self.folder), time.monotonic())
            self.ledger.write(self.folder.path / "goodput.json")
        self._ahead.stop()
        self.group.close()
