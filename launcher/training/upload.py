"""Saving without stopping: every rank writes its shards to this machine, a process beside it carries them to the store.

    step thread    write to local disk (or memory, where LOSSCAST_WORK is on /dev/shm), and go on
    carrier        one process a rank, niced, no torch: upload and hash, say what was uploaded (parts/<rank>.json);
                   rank 0's waits for every rank's part, then commits

The carrier is a process and no thread, since hashing and the SDK would take turns with the training loop for one
interpreter. At most one snapshot a rank is under way: a save that is due while one is still travelling is skipped, by all
ranks, said and counted. Carriers end with their trainer; what they had not committed does not exist. Files that were
uploaded stay where a resume looks for them, so that a restart on the same machine fetches nothing.

A run in a folder writes where its checkpoints are and commits at once: there is nothing to carry.

    python -m launcher.training.upload ADDRESS      orders on stdin, answers on stdout, one JSON object a line
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infra.objects import Missing, Store
from launcher.errors import Failed, WrongInput
from launcher.spec.model import RunSpec
from launcher.storage.checkpoints import parts_of, prefix_of
from launcher.storage.remote import publish, stop_asked, store_of
from launcher.storage.runfolder import RunFolder
from launcher.storage.runlog import Superseded

PATIENCE_S = 900.0
"""How long the last save of a run keeps trying, and rank 0 waits for the parts of other ranks."""
POLL_S = 0.5
STOP_POLL_S = 5.0
PROGRESS_S = 15.0
KEPT_HERE = 2
"""Checkpoints of which this machine keeps what its ranks wrote."""


class Saver:
    """A rank's side of saving. Every method but `committed` is called by all ranks together."""

    def __init__(
        self,
        folder: RunFolder,
        attempt: int,
        spec: RunSpec,
        rank: int,
        world: int,
        say: Callable[[str], None] = lambda message: print(
            f"losscast: {message}", file=sys.stderr, flush=True
        ),
    ) -> None:
        self._folder, self._attempt, self._spec, self._rank, self._world = folder, attempt, spec, rank, world
        self._say, self._done, self.skipped = say, list[int](), 0
        """skipped: saves that were due while another was under way."""
        self._said: int | None = None
        self._carrier = None if folder.url is None else Carrier(folder, attempt, spec, rank, world)

    def save(self, engine: Any, step: int, *, wait: bool) -> bool:
        """Save this step; with `wait`, return only when it is committed. False: skipped.

        Raises runlog.Superseded when the run is somebody else's, Failed when `wait` was asked and can't be had.
        """
        from launcher.training.saving import commit_checkpoint, write_checkpoint

        if self._carrier is None:
            write_checkpoint(engine, self._folder, self._attempt, step)
            if self._rank == 0:
                commit_checkpoint(self._folder, self._attempt, step, self._spec)
                self._done.append(step)
            return True
        carrier = self._carrier
        if wait:
            carrier.idle(PATIENCE_S * 2)
        elif _any(carrier.busy):
            self.skipped += 1
            if self._rank == 0 and self._said != carrier.step:  # once for each that is late
                self._said = carrier.step
                self._say(
                    f"step {step}: no checkpoint, that of step {carrier.step} is still on its way after "
                    f"{carrier.seconds:.0f} s{carrier.how_far()}. {self.skipped} skipped so far: save less often, or closer by."
                )
            return False
        carrier.raise_if_superseded()
        place = staging(self._folder, self._attempt, self._rank, step)
        write_checkpoint(engine, self._folder, self._attempt, step, place=place)
        carrier.carry(step, place, patience_s=PATIENCE_S if wait else 0.0)
        if wait:
            carrier.idle(PATIENCE_S * 2)
            _raise_together(carrier.outcome(step) if self._rank == 0 else None)
        return True

    def committed(self) -> list[int]:
        """Steps committed since the last call, on rank 0. Says what failed. Never waits."""
        if self._carrier is not None and self._rank == 0:
            for step, why in self._carrier.news():
                if why is None:
                    self._done.append(step)
                else:
                    self._say(f"step {step}: the checkpoint was not committed, training goes on: {why}")
        done, self._done = self._done, []
        return done

    def close(self) -> None:
        """End the carrier; what is still on its way is dropped."""
        if self._carrier is not None:
            self._carrier.close()


class Carrier:
    """The process that uploads a rank's shards, and what it has said."""

    def __init__(self, folder: RunFolder, attempt: int, spec: RunSpec, rank: int, world: int) -> None:
        self.step: int | None = None
        self.busy = False
        self._began, self._progress = 0.0, ""
        self._outcomes: dict[int, str | None] = {}
        self._news: list[tuple[int, str | None]] = []
        self._superseded: str | None = None
        self._changed = threading.Condition()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "launcher.training.upload", folder.address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).resolve().parents[2],
        )
        self._order({"attempt": attempt, "spec": spec.to_dict(), "rank": rank, "world": world})
        threading.Thread(target=self._listen, name="losscast-carrier", daemon=True).start()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def how_far(self) -> str:
        return self._progress

    def carry(self, step: int, place: Path, patience_s: float) -> None:
        """Have the files under `place` uploaded as this rank's part of the step."""
        with self._changed:
            self.step, self.busy, self._began, self._progress = step, True, time.monotonic(), ""
        self._order({"step": step, "place": str(place), "patience_s": patience_s})

    def idle(self, timeout_s: float) -> None:
        """Return when nothing is under way. Raises Failed when that takes too long."""
        with self._changed:
            if not self._changed.wait_for(lambda: not self.busy, timeout_s):
                raise Failed(
                    f"the checkpoint of step {self.step} is still on its way after {timeout_s:.0f} s"
                )
        self.raise_if_superseded()

    def outcome(self, step: int) -> str | None:
        """None: committed. Else why not."""
        return self._outcomes.get(step, "it was never carried")

    def news(self) -> list[tuple[int, str | None]]:
        """Outcomes since the last call."""
        self.raise_if_superseded()
        with self._changed:
            news, self._news = self._news, []
        return news

    def raise_if_superseded(self) -> None:
        if self._superseded is not None:
            raise Superseded(self._superseded)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _order(self, order: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:  # it died: `_listen` says so
            pass

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                answer = json.loads(line)
            except ValueError:
                print(line.decode(errors="replace"), file=sys.stderr, end="")
                continue
            with self._changed:
                if "progress" in answer:
                    self._progress = answer["progress"]
                    continue
                self._end(answer["step"], answer.get("failed"))
                self._superseded = answer.get("superseded", self._superseded)
        with self._changed:
            if self.busy and self.step is not None:
                self._end(self.step, f"the uploading process ended ({self._process.wait()})")

    def _end(self, step: int, why: str | None) -> None:
        self._outcomes[step] = why
        self._news.append((step, why))
        self.busy = False
        self._changed.notify_all()


def staging(folder: RunFolder, attempt: int, rank: int, step: int) -> Path:
    """Where a rank writes its shards of a step before they are carried away."""
    return folder.path / "staged" / str(attempt) / f"rank-{rank}" / f"step-{step}"


def _any(flag: bool) -> bool:
    """True when the flag is set on any rank."""
    import torch
    import torch.distributed as dist

    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    tensor = torch.tensor([1.0 if flag else 0.0], device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return bool(tensor.item() > 0)


def _raise_together(why: str | None) -> None:
    """Raise Failed on every rank when rank 0 says why."""
    import torch.distributed as dist

    told = [why]
    dist.broadcast_object_list(told, src=0)
    if told[0] is not None:
        raise Failed(f"the checkpoint was not committed: {told[0]}")


class Carriage:
    """What the carrier does with its orders. Runs in a process of its own."""

    def __init__(
        self, folder: RunFolder, first: dict[str, Any], tell: Callable[[dict[str, Any]], None]
    ) -> None:
        self._folder, self._tell = folder, tell
        self._attempt, self._rank, self._world = first["attempt"], first["rank"], first["world"]
        self._spec = RunSpec.from_dict(first["spec"])
        self._told = 0.0

    @property
    def _store(self) -> Store:
        return store_of(self._folder)

    def carry(self, order: dict[str, Any]) -> None:
        """One order, to its answer."""
        step, deadline = order["step"], time.monotonic() + order["patience_s"]
        uploaded = False
        while True:
            try:
                if not uploaded:
                    self._upload(step, Path(order["place"]))
                    uploaded = True
                if self._rank == 0:
                    self._commit(step)
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

    def _commit(self, step: int) -> None:
        from launcher.training.saving import commit_checkpoint

        digests = self._parts(step)
        commit_checkpoint(self._folder, self._attempt, step, self._spec, digests=digests)
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
        """Of what ranks of this machine wrote, keep the newest few."""
        found: list[tuple[int, Path]] = []
        for path in self._folder.path.glob("attempts/*/checkpoints/step-*"):
            digits = path.name.removeprefix("step-")
            if path.is_dir() and digits.isdigit():
                found.append((int(digits), path))
        for _, path in sorted(found, reverse=True)[KEPT_HERE:]:
            shutil.rmtree(path, ignore_errors=True)
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


def main(argv: list[str]) -> int:
    """Take orders until they end; then end at once, whatever is under way."""
    os.nice(10)
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
        carriage.carry(orders.pop(0))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
