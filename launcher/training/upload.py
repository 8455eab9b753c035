"""Saving without stopping: every rank writes its shards to this machine, a process beside it carries them to the store.

    step thread    write to local disk (or memory, where LOSSCAST_WORK is on /dev/shm), and go on
    carrier        one process a rank, of low priority while training goes on, no torch: upload and hash, say what was
                   uploaded (parts/<rank>.json); rank 0's waits for every rank's part, then commits

The carrier is a process and no thread, since hashing and the SDK would take turns with the training loop for one
interpreter. At most one snapshot a rank is under way: a save that is due while one is still travelling is skipped, by all
ranks, said and counted. Carriers end with their trainer; what they had not committed does not exist. Files that were
uploaded stay where a resume looks for them, so that a restart on the same machine fetches nothing.

A run in a folder writes where its checkpoints are: there is nothing to carry, and a thread of rank 0's commits
(`launcher.training.underway`).

    python -m launcher.training.upload ADDRESS      orders on stdin, answers on stdout, one JSON object a line
"""

import contextlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from infra.objects import Missing, Store
from launcher.errors import Failed, WrongInput, say
from launcher.runspec.model import RunSpec
from launcher.storage.checkpoints import parts_of, prefix_of
from launcher.storage.remote import publish, stop_asked, store_of, tidy
from launcher.storage.retention import Retention
from launcher.storage.runfolder import RunFolder
from launcher.storage.runlog import RunLog, Superseded
from launcher.training.carrier import Carrier
from launcher.training.underway import WISH_PATIENCE_S, Committer, Underway

PATIENCE_S = 900.0
"""How long the last save of a run keeps trying, and rank 0 waits for the parts of other ranks."""
POLL_S = 0.5
STOP_POLL_S = 5.0
PROGRESS_S = 15.0
LOOK_S = 2.0
"""How often who waits for a checkpoint looks how far it is."""
LEISURE = 19
"""Niceness of an upload beside training: a seventieth of a core that both want."""
ASKING_S = 15.0
"""How long the end of an attempt waits for old checkpoints to go: a monitor that does not answer is asked for 10 s."""
AT_ONCE_BYTES = 32 << 20
"""A checkpoint in a folder up to this size is committed before the next step: hashing it takes some 20 ms."""


class Saver:
    """A rank's side of saving. Every method but `committed` is called by all ranks together."""

    def __init__(
        self,
        folder: RunFolder,
        attempt: int,
        spec: RunSpec,
        rank: int,
        world: int,
        say: Callable[[str], None] = say,
    ) -> None:
        self._folder, self._attempt, self._spec, self._rank, self._world = folder, attempt, spec, rank, world
        self._say, self._done, self.skipped = say, list[int](), 0
        """skipped: saves that were due while another was under way."""
        self._said: int | None = None
        if folder.url is not None:
            # what an attempt before this one was asked: the driver clears only its own host. A wish that stands comes again
            folder.stop.unlink(missing_ok=True)
        self._carrier = None if folder.url is None else Carrier(folder, attempt, spec, rank, world, say)
        self._log = RunLog(store_of(folder), folder.name) if folder.url is None and rank == 0 else None
        """For its commits, of which there is one at a time."""
        self._retention = Retention(spec.to_dict(), folder.name)
        self._wrote_s = 0.0
        """How long the ranks took to write the save that is under way."""
        self._committer = Committer(self._commit_here) if folder.url is None and rank == 0 else None

    def save(
        self,
        engine: Any,
        step: int,
        *,
        wait: bool,
        must: bool = True,
        beat: Callable[[], None] = lambda: None,
    ) -> bool:
        """Save this step; with `wait`, return only when it is committed. False: skipped.

        must  of one that is waited for: without it the run can't go on, or end. False: where it is not to be had, nor gets on,
              in a moment, it is passed over as any other
        beat  called every few seconds in which it gets on, on whichever rank: a large checkpoint on a slow way takes longer than
              anybody would wait for a rank without a sign of life

        Raises runlog.Superseded when the run is somebody else's, Failed when `wait` was asked and can't be had, though it `must`.
        """
        from launcher.training.saving import NotWritten, write_checkpoint

        if self._carrier is None:
            return self._save_here(engine, step, wait, must, beat)
        carrier = self._carrier
        held_up = not _all_idle(carrier, beat, must) if wait else _any(carrier.busy)[0]
        if held_up:
            return self._still(step, carrier)
        carrier.raise_if_superseded()
        place = staging(self._folder, self._attempt, self._rank, step)
        began = time.monotonic()
        try:
            with _shown(beat, place):
                write_checkpoint(engine, self._folder, self._attempt, step, place=place)
        except NotWritten as error:  # on every rank alike
            if wait and must:
                raise
            return self._passed_over(step, str(error))
        wrote_s = time.monotonic() - began
        patience_s = 0.0 if not wait else PATIENCE_S if must else WISH_PATIENCE_S
        carrier.carry(step, place, patience_s=patience_s, wrote_s=wrote_s)
        if wait:
            if not _all_idle(carrier, beat, must):
                return self._passed_over(step, "it does not get on; it may be committed yet")
            why = _told(carrier.outcome(step) if self._rank == 0 else None)
            if why is not None and must:
                raise Failed(f"the checkpoint was not committed: {why}")
            if why is not None:  # `committed` says it
                self.skipped += 1
                return False
        return True

    def _save_here(self, engine: Any, step: int, wait: bool, must: bool, beat: Callable[[], None]) -> bool:
        """A run in a folder: all ranks write where the checkpoint belongs, rank 0 makes it one. A small one at once; a large
        one is hashed while training goes on."""
        from launcher.training.saving import NotWritten, save_here, write_checkpoint

        committer = self._committer  # rank 0's
        place = self._folder.path / prefix_of(self._attempt, step)
        if wait:
            _all_idle(committer, beat, must=True)  # it says nothing of how it gets on
        elif _any(committer is not None and committer.busy)[0]:
            return self._still(step, committer)
        if committer is not None:
            committer.raise_if_superseded()
        if wait:
            with _shown(beat, place):
                why = save_here(
                    engine, self._folder, self._attempt, step, self._spec,
                    wait=True, must=must, log=self._log, retention=self._retention,
                )  # fmt: skip
            if why is not None:
                return self._passed_over(step, why)
            self._hear()
            if self._rank == 0:
                self._done.append(step)
            return True
        began = time.monotonic()
        try:
            with _shown(beat, place):
                write_checkpoint(engine, self._folder, self._attempt, step)
        except NotWritten as error:  # on every rank alike
            return self._passed_over(step, str(error))
        self._wrote_s = time.monotonic() - began
        if committer is not None:
            small = _bytes_in(place) <= AT_ONCE_BYTES
            committer.carry(step, at_once=small)
            committer.raise_if_superseded()
        return True

    def _commit_here(self, step: int, at_once: bool) -> None:
        from launcher.training.saving import commit_checkpoint

        commit_checkpoint(
            self._folder, self._attempt, step, self._spec, retention=self._retention,
            seconds={"write": self._wrote_s}, leisurely=not at_once, log=self._log,
        )  # fmt: skip

    def _still(self, step: int, carrier: Underway | None) -> bool:
        """Training goes on without this checkpoint, since another is still on its way."""
        self.skipped += 1
        if (
            self._rank == 0 and carrier is not None and self._said != carrier.step
        ):  # once for each that is late
            self._said = carrier.step
            self._say(
                f"step {step}: no checkpoint, that of step {carrier.step} is still on its way after "
                f"{carrier.seconds:.0f} s{carrier.how_far()}. {self.skipped} skipped so far: save less often, or closer by."
            )
        return False

    def _passed_over(self, step: int, why: str) -> bool:
        """Training goes on without this checkpoint, and says so: the first, second, fourth, eighth ... time."""
        self.skipped += 1
        if self._rank == 0 and self.skipped & (self.skipped - 1) == 0:
            self._say(f"step {step}: no checkpoint, training goes on: {why}. {self.skipped} skipped so far.")
        return False

    def committed(self) -> list[int]:
        """Steps committed since the last call, on rank 0. Says what failed. Never waits."""
        self._hear()
        done, self._done = self._done, []
        return done

    def _hear(self) -> None:
        carrier = self._carrier or self._committer
        if carrier is not None and self._rank == 0:
            for step, why in carrier.news():
                if why is None:
                    self._done.append(step)
                else:
                    self._say(f"step {step}: the checkpoint was not committed, training goes on: {why}")

    def close(self) -> None:
        """End what carries. What is still on its way to another place is dropped; a commit in a folder, and
        what goes after it, are waited for a little."""
        if (carrier := self._carrier or self._committer) is not None:
            carrier.close()
        self._retention.idle(ASKING_S)


def _bytes_in(place: Path) -> int:
    return sum(path.lstat().st_size for path in place.rglob("*"))


def staging(folder: RunFolder, attempt: int, rank: int, step: int) -> Path:
    """Where a rank writes its shards of a step before they are carried away."""
    return folder.path / "staged" / str(attempt) / f"rank-{rank}" / f"step-{step}"


def _any(*flags: bool) -> list[bool]:
    """Of each flag whether it is set on any rank. Called by all ranks together."""
    import torch
    import torch.distributed as dist

    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    tensor = torch.tensor([1.0 if flag else 0.0 for flag in flags], device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return [value > 0 for value in tensor.tolist()]


def _all_idle(mine: Underway | None, beat: Callable[[], None], must: bool) -> bool:
    """True when nothing is under way on any rank. They look together, so that who has nothing left to do still shows that it
    lives while another gets on. Where none gets on for twice PATIENCE_S, and it `must`, it raises Failed on every rank; where it
    need not, False after WISH_PATIENCE_S. Raises Superseded."""
    seen, since, limit_s = "", time.monotonic(), PATIENCE_S * 2 if must else WISH_PATIENCE_S
    while True:
        busy = mine is not None and not mine.idle(LOOK_S)
        far = mine.how_far() if mine is not None else ""
        late = time.monotonic() - since > limit_s
        busy, moved, late = _any(busy, far != seen, late)
        if not busy:
            break
        if moved:
            seen, since = far, time.monotonic()
            beat()
        elif late and not must:
            return False
        elif late:
            step = "before" if mine is None else f"of step {mine.step}"
            raise Failed(f"the checkpoint {step} is still on its way and has not got on for {limit_s:.0f} s")
    if mine is not None:
        mine.raise_if_superseded()
    return True


@contextlib.contextmanager
def _shown(beat: Callable[[], None], place: Path) -> Iterator[None]:
    """Within it a thread calls `beat` every few seconds in which what lies under `place` has changed."""
    over = threading.Event()

    def look() -> None:
        seen = 0
        while not over.wait(LOOK_S):
            with contextlib.suppress(OSError):  # a file that is just going
                if (size := _bytes_in(place)) != seen:
                    seen = size
                    beat()

    thread = threading.Thread(target=look, name="losscast-saving", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()  # no beat of this save after the next step's


def _told(why: str | None) -> str | None:
    """What rank 0 says, on every rank."""
    import torch.distributed as dist

    told = [why]
    dist.broadcast_object_list(told, src=0)
    return told[0]


class Carriage:
    """What the carrier does with its orders. Runs in a process of its own."""

    def __init__(
        self, folder: RunFolder, first: dict[str, Any], tell: Callable[[dict[str, Any]], None]
    ) -> None:
        self._folder, self._tell = folder, tell
        self._attempt, self._rank, self._world = first["attempt"], first["rank"], first["world"]
        self._spec = RunSpec.from_dict(first["spec"])
        self._told = 0.0
        self._log: RunLog | None = None

    @property
    def _store(self) -> Store:
        return store_of(self._folder)

    def carry(self, order: dict[str, Any]) -> None:
        """One order, to its answer."""
        step, began = order["step"], time.monotonic()
        deadline, uploaded, took = began + order["patience_s"], False, {"write": order.get("wrote_s", 0.0)}
        while True:
            try:
                if not uploaded:
                    self._upload(step, Path(order["place"]))
                    uploaded = True
                    took["upload"] = time.monotonic() - began
                if self._rank == 0:
                    self._commit(step, took)
            except Superseded as error:
                return self._tell({"step": step, "failed": str(error), "superseded": str(error)})
            except (OSError, Failed, WrongInput, Missing) as error:
                if isinstance(error, OSError) and time.monotonic() < deadline:
                    time.sleep(2.0)
                    continue
                return self._tell({"step": step, "failed": " ".join(str(error).split())})
            self._tidy()
            return self._tell({"step": step})

    def _upload(self, step: int, place: Path) -> None:
        self._told = time.monotonic()
        prefix = prefix_of(self._attempt, step)
        home = self._folder.path / prefix
        files = {p.relative_to(place).as_posix(): p for p in sorted(place.rglob("*")) if p.is_file()}
        digests = self._store.upload({prefix + name: path for name, path in files.items()}, self._moved)
        part = {name: digests[prefix + name] for name in files}
        self._store.put(f"{parts_of(prefix)}{self._rank}.json", json.dumps(part).encode())
        for name, path in files.items():
            target = home / name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
        shutil.rmtree(place.parent, ignore_errors=True)  # DeepSpeed leaves scripts of its own beside it

    def _commit(self, step: int, took: dict[str, float]) -> None:
        from launcher.training.saving import commit_checkpoint

        digests = self._parts(step)
        commit_checkpoint(
            self._folder, self._attempt, step, self._spec, digests=digests, seconds=took, log=self._log
        )
        with contextlib.suppress(OSError):  # a copy for people: the next commit brings it again
            publish(self._folder, self._folder.curve(self._attempt))

    def _parts(self, step: int) -> dict[str, tuple[int, str]]:
        """What all ranks uploaded, once all have said so."""
        prefix, deadline = prefix_of(self._attempt, step), time.monotonic() + PATIENCE_S
        wanted = {f"{parts_of(prefix)}{rank}.json" for rank in range(self._world)}
        while absent := wanted - {item.key for item in self._store.list(parts_of(prefix))}:
            if time.monotonic() > deadline:
                ranks = ", ".join(sorted(key.rsplit("/", 1)[1].removesuffix(".json") for key in absent))
                raise Failed(f"no word from rank {ranks} after {PATIENCE_S:.0f} s")
            time.sleep(POLL_S)
        digests: dict[str, tuple[int, str]] = {}
        for key in sorted(wanted):
            for name, (size, sha) in json.loads(self._store.get(key)).items():
                if name in digests:
                    raise Failed(f"{name} was written by two ranks")
                digests[name] = size, sha
        return digests

    def _tidy(self) -> None:
        tidy(self._folder.path)
        for stale in self._folder.path.glob("staged/*"):
            if stale.name.isdigit() and int(stale.name) < self._attempt:
                shutil.rmtree(stale, ignore_errors=True)

    def _moved(self, done: int, total: int) -> None:
        if time.monotonic() - self._told > PROGRESS_S:
            self._told = time.monotonic()
            self._tell({"progress": f", {done / 1e6:.0f} of {total / 1e6:.0f} MB"})


def _watch_stop(folder: RunFolder) -> None:
    """Somebody on another machine may ask the run to stop: make it the `stop` file that the trainer looks for."""
    while True:
        time.sleep(STOP_POLL_S)
        with contextlib.suppress(OSError):
            if stop_asked(folder):
                folder.stop.touch()


def _carry(carriage: Carriage, order: dict[str, Any]) -> None:
    """At low priority while training goes on meanwhile, as are the threads that this one starts; where the ranks wait, at theirs."""
    if not order["patience_s"]:
        with contextlib.suppress(OSError):  # not a thread's own, where this is not Linux
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LEISURE)
    carriage.carry(order)


def main(argv: list[str]) -> int:
    """Take orders until they end; then end at once, whatever is under way."""
    folder = RunFolder.at(argv[0])
    lock, orders = threading.Lock(), list[dict[str, Any]]()
    ready = threading.Semaphore(0)

    def tell(answer: dict[str, Any]) -> None:
        with lock, contextlib.suppress(BrokenPipeError):
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()

    def listen() -> None:
        for line in sys.stdin:
            orders.append(json.loads(line))
            ready.release()
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    ready.acquire()
    first = orders.pop(0)
    carriage = Carriage(folder, first, tell)
    if first["rank"] == 0:
        threading.Thread(target=_watch_stop, args=(folder,), daemon=True).start()
    while True:
        ready.acquire()
        # a thread of its own each time: a priority that was lowered is not raised again
        with ThreadPoolExecutor(1) as thread:
            thread.submit(_carry, carriage, orders.pop(0)).result()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
