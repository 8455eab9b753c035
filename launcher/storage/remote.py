"""A run whose truth lies on Azure Blob: what is brought to this machine, and what is put back.

The log and the checkpoints are used where they are (`store_of`). The small documents that people and other machines
read are copied: the spec and the prediction at submit, curves with each commit, the result at the end. For a run in
a folder all of this does nothing, since there the folder is the truth.

A checkpoint is brought whole to each machine that loads it, once, and compared there with what was committed.
"""

import contextlib
import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

from infra.objects import Missing, Store
from launcher.errors import Failed
from launcher.storage import checkpoints
from launcher.storage.runfolder import RunFolder, write_whole
from launcher.storage.runlog import RunLog
from launcher.storage.store import FolderStore, open_store

DOCUMENTS = ("spec.json", "prediction.json", "submission.json", "result.json")
KEPT_HERE = 2
"""Checkpoints of a run at az:// that a machine keeps what it has of."""
STOP = "stop"
UNIVERSAL = "universal"
"""Kind of the log entry, and folder, of a checkpoint in the form that any number of ranks reads."""


def store_of(folder: RunFolder) -> Store:
    """Where the run's log and checkpoints are."""
    return FolderStore(folder.path) if folder.url is None else _opened(folder.url)


@lru_cache(maxsize=64)
def _opened(url: str) -> Store:
    return open_store(url)


def publish(folder: RunFolder, *paths: Path) -> None:
    """Copy documents of the work folder to where the run's truth is; one that is not there is passed over."""
    if folder.url is not None:
        store = store_of(folder)
        for path in paths:
            if path.exists():
                store.put(path.relative_to(folder.path).as_posix(), path.read_bytes())


def refresh(folder: RunFolder) -> None:
    """Bring the run's documents and curves to this machine's work folder."""
    if folder.url is None:
        return
    store = store_of(folder)
    for name in DOCUMENTS:
        with contextlib.suppress(Missing):
            document = json.loads(store.get(name))
            write_whole(folder.path / name, document)
    curves = [i for i in store.list("attempts/") if i.key.endswith("/curve.csv") and i.key.count("/") == 2]
    for item in curves:
        path = folder.path / item.key
        if (
            not path.exists() or path.stat().st_size < item.size
        ):  # the one being written here is ahead of its copy
            store.download({item.key: path})


def runs_below(url: str) -> list[RunFolder]:
    """Every run under a spec's `checkpoints.url`, by name: whatever has a log."""
    keys = (item.key.split("/") for item in open_store(url).list(""))
    names = sorted({parts[0] for parts in keys if len(parts) == 3 and parts[1] == "log"})
    return [RunFolder.of(url, name) for name in names]


def ask_to_stop(folder: RunFolder) -> None:
    """Ask the run, wherever it is, to commit a checkpoint and end at its next step."""
    if folder.url is None:
        folder.stop.touch()
    else:
        store_of(folder).put(STOP, b"asked")


def forget_stop(folder: RunFolder) -> None:
    """A new attempt begins: whoever asked meant the one before."""
    folder.stop.unlink(missing_ok=True)
    if stop_asked(folder):
        store_of(folder).put(STOP, b"seen")  # overwritten, since a trainer need not be allowed to delete


def stop_asked(folder: RunFolder) -> bool:
    """True when somebody on another machine asked the run to stop. For a run in a folder its `stop` file says so."""
    if folder.url is None:
        return False
    try:
        return store_of(folder).get(STOP) == b"asked"
    except Missing:
        return False


def at_hand(
    folder: RunFolder, path: Path, attempt: int, say: Callable[[str], None] = lambda message: None
) -> Path:
    """The verified checkpoint at `path` of some machine's work folder, on this machine. Any number of ranks may ask at
    once: the first brings it, or compares what is here, and the others wait for it. Raises Failed when it is not whole."""
    kind = path.parts[-2] if len(path.parts) > 3 else ""
    if folder.url is None or kind not in ("checkpoints", UNIVERSAL) or not path.name.startswith("step-"):
        return path
    key = "/".join(path.parts[-4:]) + "/"
    here = folder.path / key.rstrip("/")
    mark = here.with_name(here.name + ".brought")
    with _alone(here.with_name(here.name + ".lock")):
        with contextlib.suppress(OSError, ValueError):
            if json.loads(mark.read_text()) == {"by_attempt": attempt}:
                return here
        store, log = store_of(folder), RunLog(store_of(folder), folder.name)
        manifest = key.rstrip("/") + ".manifest.json"
        known = log.commits() if kind == "checkpoints" else [e for e in log.entries() if e.kind == UNIVERSAL]
        for entry in known:
            if entry.fields.get("manifest") == manifest:
                found, wrong = checkpoints.bring(store, entry, folder.name, folder.path)
                if found is None:
                    raise Failed(f"{store.where(key)}: can't be loaded: {wrong[0]}")
                write_whole(mark, {"by_attempt": attempt})
                return here
    raise Failed(f"{store_of(folder).where(key)}: was never committed")


def within_reach(folder: RunFolder, path: Path, attempt: int) -> None:
    """Put a checkpoint that was converted for this attempt, on this machine, where every host of the run can bring it from
    (`at_hand`). By the chain that holds for any other: an entry of the log, a manifest, the content; it is no commit, and
    no resume takes it. For a run in a folder nothing needs to move. Raises runlog.Superseded."""
    if folder.url is None:
        return
    store, key = store_of(folder), "/".join(path.parts[-4:])
    files = {p.relative_to(path).as_posix(): p for p in sorted(path.rglob("*")) if p.is_file()}
    sent = store.upload({f"{key}/{name}": file for name, file in files.items()})
    step = int(path.name.removeprefix("step-"))
    data = checkpoints.manifest(
        folder.name, attempt, step, {name: sent[f"{key}/{name}"] for name in files}, topology={}
    )
    store.put(f"{key}.manifest.json", data)
    RunLog(store, folder.name).append(
        UNIVERSAL,
        attempt,
        step=step,
        manifest=f"{key}.manifest.json",
        manifest_sha256=hashlib.sha256(data).hexdigest(),
    )


def tidy(folder: Path, keep: int = KEPT_HERE) -> None:
    """Of the checkpoints that this machine's work folder has of a run, keep the newest few."""
    found: list[tuple[int, Path]] = []
    for path in folder.glob("attempts/*/checkpoints/step-*"):
        digits = path.name.removeprefix("step-")
        if path.is_dir() and digits.isdigit():
            found.append((int(digits), path))
    for _, path in sorted(found, reverse=True)[keep:]:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process of this machine at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
