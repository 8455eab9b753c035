"""A run's protocol as the trainer uses it: who holds the run, what is committed, where to go on from.

The rules are those of `launcher.storage.runlog` (the log decides who writes) and `launcher.storage.checkpoints` (what is whole); this
file binds them to a run's folder and to DeepSpeed's writer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.spec.model import RunSpec
from launcher.storage import checkpoints
from launcher.storage.remote import forget_stop, publish, store_of
from launcher.storage.runfolder import RunFolder
from launcher.storage.runlog import Holding, RunLog
from launcher.training.loop import Assignment


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


def refuse_held(folder: RunFolder) -> None:
    """Raise Held, naming the holder, where somebody trains this run now."""
    from launcher.errors import Held

    standing = run_log(folder).standing()
    if standing.alive:
        raise Held(
            f"{folder.name} is held by {standing.who()}. Stop it with `losscast stop`, or submit under another name."
        )


def newest_verified(folder: RunFolder, say: Callable[[str], None]) -> Resume | None:
    """The newest committed checkpoint that verifies, saying why newer ones are skipped. None: start from the seed."""
    into = None if folder.url is None else folder.path
    found = checkpoints.newest_verified(store_of(folder), run_log(folder), say, into)
    return None if found is None else Resume(found.step, folder.path / found.key.rstrip("/"), found.topology)


def write_checkpoint(
    engine: Any, folder: RunFolder, attempt: int, step: int, place: Path | None = None
) -> None:
    """Have every rank write its shards under the attempt's own path, or to a `place` of its own on this machine; returns
    when all have. Not yet a checkpoint."""
    import torch.distributed as dist

    place = place or folder.path / checkpoints.prefix_of(attempt, step)
    engine.save_checkpoint(str(place.parent), tag=place.name, client_state={"step": step}, save_latest=False)
    dist.barrier()


def commit_checkpoint(
    folder: RunFolder,
    attempt: int,
    step: int,
    spec: RunSpec,
    digests: dict[str, tuple[int, str]] | None = None,
) -> None:
    """Make what was written a checkpoint, and in a folder let old ones go. Called by one rank. Raises runlog.Superseded.

    digests  of files that were uploaded: exactly these must be there. Old ones stay until `losscast janitor` runs, as an
             identity that may delete
    """
    store, log, p = store_of(folder), run_log(folder), spec.parallel
    entry = checkpoints.commit_checkpoint(
        store, log, attempt=attempt, step=step, spec_digest=spec.digest,
        topology={"world": spec.ranks, "dp": p.dp, "pp": p.pp, "tp": p.tp, "zero": p.zero},
        digests=digests, expected=digests or (),
    )  # fmt: skip
    if folder.url is None:
        checkpoints.retain(store, log, spec.checkpoints.keep, just_committed=entry)


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
    import sys

    from launcher.storage.runfolder import write_whole

    folder = RunFolder.of(spec.checkpoints.url, spec.name)
    folder.path.mkdir(parents=True, exist_ok=True)

    def say(message: str) -> None:
        print(f"losscast: {message}", file=sys.stderr)

    holding = run_log(folder).take(
        "torchrun", wait=False, on_lost=lambda why: (say(why), folder.stop.touch())[0]
    )
    _held.append(holding)
    write_whole(folder.spec, spec.to_dict())
    publish(folder, folder.spec)
    forget_stop(folder)
    resume = newest_verified(folder, say)
    return Assignment(
        spec=spec.to_dict(),
        folder=folder.address,
        attempt=holding.attempt,
        cache=cache,
        resume_step=resume.step if resume else 0,
        resume_from=str(resume.path) if resume else None,
    )


def release_held() -> None:
    """Let go of what `shared_assignment` took, so that the next start need not wait for the lease."""
    while _held:
        _held.pop().release()
