"""The newest committed checkpoint of a run at az://, brought to this machine before anybody needs it.

    python -m launcher.storage.ahead ADDRESS [--keep N]      exit status 3: too large, and need not be tried again

A restart reads the newest checkpoint on the driver's machine and on every host that loads it; bringing one of some hundred MB takes
as long as all the rest of it. Each host has what its own ranks wrote; what others wrote, and on a head without ranks everything, is fetched here
while training goes on: by a process of its own, niced, one at a time on a machine, after each commit that it can keep up with.

What it brings is trusted no more than anything else that lies here: a resume compares every byte with what was committed, and
fetches anew what differs (`launcher.storage.checkpoints.bring`). A file gets its name when it is whole and nobody else has
made one of that name, so that a resume that brings the same file meanwhile is never written over.

Bounds: checkpoints up to LOSSCAST_AHEAD_GB (8 by default, 0 for none), and where the disk keeps room for another like it. The
price is traffic: each host reads at each commit what the other hosts wrote.
"""

import argparse
import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from infra.objects import Missing, Store
from launcher.errors import Failed, one_line
from launcher.storage.checkpoints import declared
from launcher.storage.remote import store_of, tidy
from launcher.storage.runfolder import RunFolder
from launcher.storage.runlog import RunLog

NICE = 15
LIMIT = "LOSSCAST_AHEAD_GB"
TOO_LARGE = 3
SCRATCH = ".new-ahead-"
"""No store lists such a name, and no loader looks for it."""


def limit_bytes() -> float:
    """The largest checkpoint that is brought ahead. Raises ValueError for what is no number."""
    return float(os.environ.get(LIMIT) or 8.0) * 1e9


@dataclass(frozen=True, slots=True)
class Brought:
    """What became of it."""

    size: int = 0
    """Bytes that were fetched."""
    why: str | None = None
    """Why not all of it is here."""
    for_good: bool = False
    """No later one will fit either."""


def bring_ahead(store: Store, log: RunLog, into: Path, limit: float) -> Brought:
    """Bring what is missing of the newest committed checkpoint.

    into   as for `checkpoints.bring`: files get the keys that they have in the store
    limit  bytes of a whole checkpoint
    """
    newest = next(iter(log.commits()), None)
    if newest is None:
        return Brought(why="nothing is committed")
    said, wrong = declared(store, newest, log.run)
    if said is None:
        return Brought(why=wrong[0])
    whole, place = sum(about["bytes"] for about in said.files.values()), into / said.key
    if whole > limit:
        return Brought(why=f"{whole / 1e9:.1f} GB are more than {LIMIT}={limit / 1e9:g}", for_good=True)
    place.mkdir(parents=True, exist_ok=True)
    for stale in into.glob(f"attempts/*/checkpoints/step-*/**/{SCRATCH}*"):
        stale.unlink(missing_ok=True)  # of one that was killed: only one works at a time
    names = [name for name in said.files if not (place / name).exists()]
    missing = sum(said.files[name]["bytes"] for name in names)
    if shutil.disk_usage(place).free < missing + whole:
        return Brought(why=f"{place} has no room for it and another like it")
    scratch = {name: (place / name).with_name(f"{SCRATCH}{i}") for i, name in enumerate(names)}
    size = 0
    try:
        came = store.download({said.key + name: path for name, path in scratch.items()})
        for name, path in scratch.items():
            if came[said.key + name][1] == said.files[name]["sha256"]:
                with contextlib.suppress(FileExistsError):
                    os.link(path, place / name)
                    size += said.files[name]["bytes"]
    except Missing as error:  # retention was faster
        return Brought(size, f"{error} is missing")
    finally:
        for path in scratch.values():
            path.unlink(missing_ok=True)
    return Brought(size)


class Ahead:
    """Has it done on this machine, by one process at a time. Never raises, never waits."""

    def __init__(self, address: str, say: Callable[[str], None], *, keep: int | None = None) -> None:
        """keep: also let go of what this machine has of older checkpoints, but for so many. For one where no rank trains."""
        self._say = say
        self._process: subprocess.Popen[bytes] | None = None
        self._command = [sys.executable, "-m", "launcher.storage.ahead", address]
        self._command += ["--keep", str(keep)] if keep is not None else []
        self._off = not address.startswith("az://") or os.environ.get(LIMIT) == "0"

    def look(self) -> None:
        """Something was committed: bring it, unless another is still on its way."""
        if self._process is not None:
            if (status := self._process.poll()) is None:
                return
            self._off = self._off or status == TOO_LARGE
        if self._off:
            return
        root = Path(__file__).resolve().parents[2]
        try:
            self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, cwd=root)
        except OSError as error:
            self._say(f"checkpoints are not brought ahead: {error}")
            self._off = True

    def stop(self) -> None:
        """End it now: somebody needs the machine, or the very files."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            if process.stdin is not None:
                process.stdin.close()


def main(argv: list[str]) -> int:
    """Once, for the run at an address; ends with whoever started it, whose end of stdin it holds."""
    parser = argparse.ArgumentParser(prog="python -m launcher.storage.ahead")
    parser.add_argument("address")
    parser.add_argument("--keep", type=int)
    args = parser.parse_args(argv)
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
    os.nice(NICE)
    folder = RunFolder.at(args.address)
    folder.path.mkdir(parents=True, exist_ok=True)
    with (folder.path / "ahead.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return 0  # another of this machine is at it
        try:
            store = store_of(folder)
            found = bring_ahead(store, RunLog(store, folder.name), folder.path, limit_bytes())
        except (OSError, Failed) as error:  # a resume says what is wrong with the storage
            found = Brought(why=one_line(error))
        except ValueError as error:
            found = Brought(why=f"{LIMIT}: {error}", for_good=True)
        if args.keep is not None:
            tidy(folder.path, args.keep)
    if found.for_good:
        print(f"losscast: checkpoints are not brought ahead of a restart: {found.why}", flush=True)
    return TOO_LARGE if found.for_good else 0


if __name__ == "__main__":
    # the end of this process may not wait for the thread that listens
    os._exit(main(sys.argv[1:]))
