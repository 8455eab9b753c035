"""A run's protocol as the trainer uses it: who holds the run, what is committed, where to go on from.

The rules are those of `launcher.storage.runlog` (the log decides who writes) and `launcher.storage.checkpoints` (what is whole); this
file binds them to a run's folder and to DeepSpeed's writer.
"""

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import Failed, one_line, say
from launcher.runspec.model import RunSpec
from launcher.storage import checkpoints
from launcher.storage.remote import forget_stop, publish, store_of
from launcher.storage.retention import Retention
from launcher.storage.runfolder import RunFolder
from launcher.storage.runlog import Entry, Holding, RunLog
from launcher.training.assignment import Assignment
from launcher.training.underway import WISH_PATIENCE_S

LAST_PATIENCE_S = 600.0
"""How long a save that must be (the last of a run, or before a host goes) is tried again on a disk that refuses."""
LAST_WAITS_S = (1.0, 2.0, 5.0, 15.0)
FULL_BYTES = 1 << 16
"""A disk on which less is free is full."""


class NotWritten(Failed):
    """A checkpoint could not be written. Raised by every rank alike, so that all go on together."""


@dataclass(frozen=True)
class Resume:
    """A verified checkpoint to go on from."""

    step: int
    path: Path
    topology: dict[str, int]
    """dp, pp, tp and zero of the ranks that wrote it."""


def run_log(folder: RunFolder) -> RunLog:
    """The log of the run in a folder."""
    return RunLog(store_of(folder), folder.name)


def present(folder: RunFolder) -> bool:
    """False where a run's folder is away: its log is not there, though it was. A disk that is not mounted leaves an empty
    folder behind, in which a run would seem to be nobody's and never to have begun. Blobs are always there or say why not."""
    return folder.url is not None or (folder.path / "log").is_dir()


def refuse_held(folder: RunFolder) -> None:
    """Raise Held, naming the holder, where somebody trains this run now."""
    from launcher.errors import Held

    standing = run_log(folder).standing()
    if standing.alive:
        raise Held(
            f"{folder.name} is held by {standing.who()}. Stop it with `losscast stop`, or submit under another name."
        )


def newest_verified(
    folder: RunFolder,
    say: Callable[[str], None],
    unfit: Callable[[int], None] = lambda step: None,
    attempt: int | None = None,
) -> Resume | None:
    """The newest committed checkpoint that verifies, saying why newer ones are skipped. None: start from the seed.

    unfit    told the step of each one that is skipped
    attempt  that goes on from it, and holds the run: what it found damaged is written into the run's log

    Raises runlog.Superseded with `attempt`.
    """
    into, damaged, log = (
        None if folder.url is None else folder.path,
        list[tuple[Entry, str]](),
        run_log(folder),
    )

    def found_unfit(entry: Entry, why: str) -> None:
        damaged.append((entry, why))
        unfit(int(entry.fields.get("step") or 0))

    found = checkpoints.newest_verified(store_of(folder), log, say, into, unfit=found_unfit)
    if attempt is not None:
        try:
            checkpoints.book(log, attempt, damaged, found)
        except OSError as error:  # it was said; the run goes on
            say(f"what is damaged is not written down: {one_line(error)}")
    return None if found is None else Resume(found.step, folder.path / found.key.rstrip("/"), found.topology)


def write_checkpoint(
    engine: Any, folder: RunFolder, attempt: int, step: int, place: Path | None = None
) -> None:
    """Have every rank write its shards under the attempt's own path, or to a `place` of its own on this machine; returns
    when all have. Not yet a checkpoint.

    Raises NotWritten, on every rank, where one of them could not write; what was written is removed, since it would only
    keep a full disk full.
    """
    import torch.distributed as dist

    own = place is not None
    place = place or folder.path / checkpoints.prefix_of(attempt, step)
    why = _agreed(
        None if own or folder.spec.exists() else f"{folder.path} is not there: is its disk mounted?"
    )
    if why is None:
        with _remembered(engine, place.parent) as failed:
            engine.save_checkpoint(
                str(place.parent), tag=place.name, client_state={"step": step}, save_latest=False
            )
        why = _agreed(failed[0] if failed else None)
        if why is not None and (own or dist.get_rank() == 0):
            shutil.rmtree(place, ignore_errors=True)
    if why is not None:
        raise NotWritten(why)


@contextlib.contextmanager
def _remembered(engine: Any, place: Path) -> Iterator[list[str]]:
    """Within it a rank that can't write keeps its error for itself: DeepSpeed's ranks wait for each other inside a save,
    and one that left it would leave the others waiting. The scripts that DeepSpeed copies beside a checkpoint are no part of
    it: where they can't be written, nothing is said."""
    writer, failed, scripts = engine.checkpoint_engine, list[str](), "_copy_recovery_script"

    def tried(work: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **more: Any) -> Any:
            try:
                return work(*args, **more)
            except (OSError, RuntimeError) as error:  # torch's own writer says RuntimeError for a full disk
                there = next(p for p in (place, *place.parents) if p.exists())
                free = shutil.disk_usage(there).free
                room = f"{free / 1e6:,.1f} MB are free at {there}"
                full = free < FULL_BYTES  # torch's own words for it are an "enforce fail ... unexpected pos"
                why = f"the disk is full: {os.strerror(errno.ENOSPC)}" if full else one_line(error)
                failed.append(f"{why} ({room})")

        return guarded

    def tolerated(work: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **more: Any) -> Any:
            with contextlib.suppress(OSError):
                return work(*args, **more)

        return guarded

    guards = [(writer, "save", tried), (writer, "makedirs", tried)]
    guards += [(engine, scripts, tolerated)] if hasattr(engine, scripts) else []
    for owner, name, guard in guards:
        setattr(owner, name, guard(getattr(owner, name)))
    try:
        yield failed
    finally:
        for owner, name, _ in guards:
            delattr(owner, name)  # the class's own again


def _agreed(why: str | None) -> str | None:
    """What hinders any rank, the same on all: the lowest rank's word. None when nothing hinders anybody."""
    import torch.distributed as dist

    said: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(said, why)
    return next((f"rank {rank}: {word}" for rank, word in enumerate(said) if word is not None), None)


def save_here(
    engine: Any,
    folder: RunFolder,
    attempt: int,
    step: int,
    spec: RunSpec,
    *,
    wait: bool,
    must: bool = True,
    log: RunLog | None = None,
    retention: Retention | None = None,
) -> str | None:
    """Write and commit a checkpoint in a run's own folder; called by all ranks together. None when it is committed, else why not.

    A disk that is full, or away, costs this checkpoint and not the run: training goes on and the next one is tried when
    it is due. With `wait` it is tried again, for LAST_PATIENCE_S where it `must` be, and then NotWritten; else for
    WISH_PATIENCE_S. Raises runlog.Superseded.
    """
    import torch.distributed as dist

    began, tries, patience_s = time.monotonic(), 0, LAST_PATIENCE_S if must else WISH_PATIENCE_S
    while True:
        why: str | None = None
        writing = time.monotonic()
        try:
            write_checkpoint(engine, folder, attempt, step)
            if dist.get_rank() == 0:
                took = {"write": time.monotonic() - writing}
                try:
                    commit_checkpoint(folder, attempt, step, spec, retention=retention, seconds=took, log=log)
                except OSError as error:
                    why = one_line(error)
            if wait:
                why = _agreed(why)
        except NotWritten as error:
            why = str(error)
        if why is None or not wait:
            return why
        if _agreed("over" if time.monotonic() - began > patience_s else None):
            if not must:
                return why
            raise NotWritten(f"step {step}: no checkpoint after {patience_s:.0f} s: {why}")
        if tries == 0 and dist.get_rank() == 0:
            print(f"losscast: step {step}: no checkpoint yet, and it is tried again: {why}", flush=True)
        time.sleep(LAST_WAITS_S[min(tries, len(LAST_WAITS_S) - 1)])
        tries += 1


def commit_checkpoint(
    folder: RunFolder,
    attempt: int,
    step: int,
    spec: RunSpec,
    digests: dict[str, tuple[int, str]] | None = None,
    retention: Retention | None = None,
    seconds: Mapping[str, float] | None = None,
    leisurely: bool = False,
    log: RunLog | None = None,
) -> None:
    """Make what was written a checkpoint, and in a folder let old ones go. Called by one rank. Raises runlog.Superseded.

    retention  of a caller that keeps one from commit to commit, and must not wait for the monitor
    digests  of files that were uploaded: exactly these must be there. Old ones stay until `losscast janitor` runs, as an
             identity that may delete
    leisurely  training goes on meanwhile: see `checkpoints.commit_checkpoint`
    log        of a caller that keeps one from commit to commit: only what is new in it is read then
    """
    store, log, p = store_of(folder), log or run_log(folder), spec.parallel
    entry = checkpoints.commit_checkpoint(
        store, log, attempt=attempt, step=step, spec_digest=spec.digest,
        topology={"world": spec.ranks, "dp": p.dp, "pp": p.pp, "tp": p.tp, "zero": p.zero},
        digests=digests, expected=digests or (), seconds=seconds, leisurely=leisurely,
    )  # fmt: skip
    if folder.url is None:
        with contextlib.suppress(OSError):  # committed it is; what stays longer goes after the next one
            if retention is None:
                Retention(spec.to_dict(), folder.name).after(store, log, entry)
            else:
                retention.beside(store, log, entry)


def shared_assignment(spec: RunSpec) -> Assignment:
    """The next attempt of a run that torchrun started: rank 0 takes it in the log, all ranks get the same. Joins the group."""
    import torch.distributed as dist

    from launcher.data.tokens import cache_folder
    from launcher.training.engine import join

    join()
    told: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            told[0] = _take(spec, str(cache_folder()))
        except Exception as error:
            if getattr(error, "exit_status", None) is None:
                raise
            told[0] = error  # every rank ends with the same words, and none waits for a rank that left
    dist.broadcast_object_list(told, src=0)
    if isinstance(told[0], Exception):
        raise told[0]
    return told[0]


_held: list[Holding] = []
"""What this process holds, until it ends: torchrun has no driver to hold it."""


def _take(spec: RunSpec, cache: str) -> Assignment:
    from launcher.storage.runfolder import write_whole

    folder = RunFolder.of(spec.checkpoints.url, spec.name)
    folder.path.mkdir(parents=True, exist_ok=True)

    holding = run_log(folder).take("torchrun", wait=False, on_lost=say)  # `lost` tells the loop
    _held.append(holding)
    write_whole(folder.spec, spec.to_dict())
    publish(folder, folder.spec)
    forget_stop(folder)
    resume = newest_verified(folder, say, attempt=holding.attempt)
    return Assignment(
        spec=spec.to_dict(),
        folder=folder.address,
        attempt=holding.attempt,
        cache=cache,
        resume_step=resume.step if resume else 0,
        resume_from=str(resume.path) if resume else None,
    )


def lost() -> bool:
    """True when what this process holds can't be kept: it has to stop. No file says so, since whoever has the run by now would
    find it in the folder they share."""
    return any(holding.lost is not None for holding in _held)


def release_held() -> None:
    """Let go of what `shared_assignment` took, so that the next start need not wait for the lease."""
    while _held:
        _held.pop().release()
