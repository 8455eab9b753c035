"""What processes print and say at their end, for a run whose truth lies on az://: carried there, and brought back.

Logs travel as pieces named by where they begin, `<log>/000000000000` and so on, since a blob is replaced whole and a log
only grows; a piece every few seconds at first, every minute later, and the rest when the process ends. A process that is
killed outright loses the seconds since its last piece there; its machine's own folder has them. A storage that is away
costs nothing but delay: what could not be carried goes with the next piece.

For a run in a folder all of this does nothing: the log is where it belongs already.
"""

import contextlib
import threading
from pathlib import Path

from launcher.storage.runfolder import RunFolder

FIRST_S, LONGEST_S = 3.0, 60.0
PIECE_BYTES = 4 << 20
END_S = 20.0
"""How long the end of a process may wait for its last piece."""


class Carrier:
    """Carries one growing log of a run, from a thread of its own, until closed."""

    def __init__(self, folder: RunFolder, path: Path) -> None:
        self._folder, self._path = folder, path
        self._key = path.relative_to(folder.path).as_posix()
        self._sent = path.stat().st_size if path.exists() else 0
        self._base: int | None = None if self._sent == 0 else 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if folder.url is not None:
            self._thread = threading.Thread(target=self._carry, name="losscast-carry", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Send what is left, as far as that can be done in a while."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(END_S)

    def _carry(self) -> None:
        wait_s, last = FIRST_S, False
        while True:
            with contextlib.suppress(Exception):  # a storage that is away: the next piece has it
                while self._piece():
                    pass
            if last:
                return
            last = self._stop.wait(wait_s)
            wait_s = min(LONGEST_S, wait_s * 1.5)

    def _piece(self) -> bool:
        """Send the next piece. False when there is none."""
        from launcher.storage.remote import store_of

        store = store_of(self._folder)
        if self._base is None:  # the job may have begun before, on a machine that is gone
            there = [i for i in store.list(self._key + "/") if i.key.rsplit("/", 1)[-1].isdigit()]
            self._base = max((int(i.key.rsplit("/", 1)[-1]) + i.size for i in there), default=0)
        with self._path.open("rb") as file:
            file.seek(self._sent)
            data = file.read(PIECE_BYTES)
        if data:
            store.put(f"{self._key}/{self._base + self._sent:012d}", data)
            self._sent += len(data)
        return len(data) == PIECE_BYTES


def publish(folder: RunFolder, path: Path) -> None:
    """Copy a small document of the run to where its truth is. Never raises."""
    if folder.url is not None:
        from launcher.storage.remote import publish as put

        with contextlib.suppress(Exception):
            put(folder, path)


def bring(folder: RunFolder, *, logs: bool) -> None:
    """Bring what processes of the run said at their end to this machine's folder, and with `logs` what they printed.

    A log that is longer here than there is being written here, and stays as it is. Raises OSError.
    """
    if folder.url is None:
        return
    from launcher.storage.remote import store_of

    store = store_of(folder)
    for item in (i for prefix in ("output/", "attempts/") for i in store.list(prefix)):
        name = item.key.rsplit("/", 1)[-1]
        path = folder.path / item.key
        if item.key.endswith(".json") and ("output/" in item.key or name == "failure.json"):
            if not path.exists() or path.stat().st_size != item.size:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(store.get(item.key))
        elif logs and name.isdigit() and ".log/" in item.key:
            log, begins = path.parent, int(name)
            here = log.stat().st_size if log.exists() else 0
            if begins <= here < begins + item.size:
                log.parent.mkdir(parents=True, exist_ok=True)
                with log.open("ab") as file:
                    file.write(store.get(item.key)[here - begins :])
