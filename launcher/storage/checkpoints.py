"""Which checkpoints are whole, and which one a run goes on from.

    attempts/<k>/checkpoints/step-<s>/...            the shards of every rank, as the engine wrote them
    attempts/<k>/checkpoints/step-<s>.parts/<r>.json what rank r wrote, with size and sha256 (`launcher.training.upload`)
    attempts/<k>/checkpoints/step-<s>.manifest.json  every file with size and sha256, topology, versions
    log/<n>.json, kind commit                        the manifest's own sha256: from here on the checkpoint exists

A file counts only through this chain: log entry, manifest, content. Everything is read and compared before anything
is unpickled; a file that no manifest names is a reason to refuse too, since a loader that globs would find it.

Steps count optimizer updates, sizes bytes.
"""

import errno
import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from infra.objects import Exists, Missing, Progress, Store, quiet
from launcher.errors import Failed
from launcher.storage import beside
from launcher.storage.runlog import Entry, RunLog
from launcher.storage.store import FolderStore

VERSION = 1
THREADS = 8
MOST_BOOKED = 8
"""Damaged checkpoints of one resume that get an entry of the log each."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A committed checkpoint whose every byte is the one that was committed."""

    run: str
    attempt: int
    step: int
    key: str
    """Prefix of its files."""
    files: dict[str, dict[str, Any]]
    """Name under the prefix to {"bytes", "sha256"}."""
    topology: dict[str, int]
    versions: dict[str, str]
    spec_digest: str | None
    entry: int
    """Number of its log entry."""


def topology_of(dp: int, pp: int, tp: int, zero: int) -> dict[str, int]:
    """What a manifest says of the layout that wrote it. Counts of ranks, and the ZeRO stage."""
    return {"dp": dp, "pp": pp, "tp": tp, "zero": zero, "world": dp * pp * tp}


def why_not(checkpoint: Checkpoint, topology: Mapping[str, int]) -> str | None:
    """Why these shards can't be loaded as they are by a run laid out like that; None when they can.

    DeepSpeed's own message for a wrong world comes from the middle of unpickling, if at all.
    """
    differ = [k for k in ("dp", "pp", "tp", "zero") if checkpoint.topology.get(k) != topology.get(k)]
    if not differ:
        return None
    then, now = (", ".join(f"{k} {t.get(k)}" for k in differ) for t in (checkpoint.topology, topology))
    return f"step {checkpoint.step} was written with {then} and this run has {now}: convert it to a universal checkpoint"


def prefix_of(attempt: int, step: int) -> str:
    """Where an attempt's checkpoint of a step goes."""
    return f"attempts/{attempt}/checkpoints/step-{step}/"


def manifest_key(attempt: int, step: int) -> str:
    return prefix_of(attempt, step).rstrip("/") + ".manifest.json"


def parts_of(prefix: str) -> str:
    """Where ranks that upload say what they uploaded of the checkpoint under `prefix`."""
    return prefix.rstrip("/") + ".parts/"


def versions() -> dict[str, str]:
    """Versions of what writes and reads checkpoints, as installed."""
    found = {"python": platform.python_version()}
    for name in ("losscast", "torch", "deepspeed", "ray"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit_checkpoint(
    store: Store,
    log: RunLog,
    *,
    attempt: int,
    step: int,
    topology: dict[str, int],
    spec_digest: str | None = None,
    expected: Iterable[str] = (),
    digests: Mapping[str, tuple[int, str]] | None = None,
    more: dict[str, Any] | None = None,
    seconds: Mapping[str, float] | None = None,
    leisurely: bool = False,
) -> Entry:
    """Make the files under `prefix_of(attempt, step)` a checkpoint. Call once, when every rank has written its own.

    expected  names that must be there
    digests   name to (bytes, sha256) where the rank that wrote a file hashed it on the way: it is not read again, only
              its size is compared
    more      kept in the manifest as it is
    seconds   how long the stages before this one took; the entry keeps them, and this one's as `commit`
    leisurely this machine trains meanwhile: files of a folder are hashed with what CPU is left over

    Raises Failed when there are no files or an expected one is missing, runlog.Superseded when the run is no longer this
    attempt's; then nothing is committed.
    """
    began, prefix = time.monotonic(), prefix_of(attempt, step)
    store.settle(prefix)
    items = store.list(prefix)
    names = [item.key.removeprefix(prefix) for item in items]
    absent = sorted(set(expected) - set(names))
    if absent or not names:
        raise Failed(
            f"{store.where(prefix)}: not committed: {', '.join(absent[:5]) or 'it is empty'} missing"
        )
    known = dict(digests or {})
    unread = [name for name in names if name not in known]
    keys = [prefix + name for name in unread]
    aside = store if leisurely and isinstance(store, FolderStore) else None
    found = _digests(store, keys) if aside is None else _leisurely(aside, keys)
    known |= dict(zip(unread, found, strict=True))
    sizes = {item.key.removeprefix(prefix): item.size for item in items}
    short = [
        f"{n} has {sizes[n]} bytes, its writer says {known[n][0]}" for n in names if known[n][0] != sizes[n]
    ]
    if short:
        raise Failed(f"{store.where(prefix)}: not committed: {'; '.join(short[:5])}")
    files = {n: known[n] for n in names}
    data = manifest(log.run, attempt, step, files, topology, spec_digest, more)
    key = manifest_key(attempt, step)
    digest = hashlib.sha256(data).hexdigest()
    try:
        store.put_new(key, data)
    except Exists:
        for entry in log.commits():
            if entry.fields["manifest"] == key:
                if entry.fields["manifest_sha256"] == digest:
                    return entry  # the same files, committed before
                raise Failed(
                    f"{store.where(prefix)}: committed before, with other content: write elsewhere"
                ) from None
        store.put(key, data)  # left by a try that did not get as far as its commit
    took = {**(seconds or {}), "commit": time.monotonic() - began}
    return log.commit(attempt, step, key, digest, seconds={k: round(v, 6) for k, v in took.items()})


def manifest(
    run: str,
    attempt: int,
    step: int,
    files: Mapping[str, tuple[int, str]],
    topology: dict[str, int],
    spec_digest: str | None = None,
    more: dict[str, Any] | None = None,
) -> bytes:
    """What a log entry names by its sha256: each file with bytes and sha256, and what wrote them."""
    body = {
        "losscast_checkpoint": VERSION,
        "run": run,
        "attempt": attempt,
        "step": step,
        "topology": topology,
        "versions": versions(),
        "spec_digest": spec_digest,
        "files": {name: {"bytes": size, "sha256": sha} for name, (size, sha) in files.items()},
        **({"more": more} if more else {}),
    }
    return json.dumps(body, indent=1, sort_keys=True).encode()


def check(store: Store, entry: Entry, run: str) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint behind a commit entry, or everything that is wrong with it. Reads every byte, unpickles none."""
    said, wrong = declared(store, entry, run)
    if said is None:
        return None, wrong
    found = _digests(store, [said.key + name for name in said.files])
    wrong = [
        _not_it(store.where(said.key + name), sha)
        for (name, about), (_, sha) in zip(said.files.items(), found, strict=True)
        if sha != about["sha256"]
    ]
    return (None, wrong) if wrong else (said, [])


def bring(
    store: Store, entry: Entry, run: str, into: Path, progress: Progress = quiet
) -> tuple[Checkpoint | None, list[str]]:
    """`check`, for a store whose files a loader can't open: they are brought to `into`, under the same keys, and it is
    what lies there that is compared with what was committed. What is there already and right is not fetched again, and
    what the manifest does not name is removed from there, since a loader that globs would find it."""
    said, wrong = declared(store, entry, run)
    if said is None:
        return None, wrong
    place = into / said.key
    place.mkdir(parents=True, exist_ok=True)
    here = FolderStore(place)
    for item in here.list(""):
        if item.key not in said.files:
            here.delete(item.key)
    sizes = {item.key: item.size for item in here.list("")}
    likely = [name for name, about in said.files.items() if sizes.get(name) == about["bytes"]]
    right = {
        name
        for name, (_, sha) in zip(likely, _digests(here, likely), strict=True)
        if sha == said.files[name]["sha256"]
    }
    wanted = {said.key + name: place / name for name in said.files if name not in right}
    try:
        brought = store.download(wanted, progress)
    except Missing as error:
        return None, [f"{error} is missing"]
    wrong = [
        _not_it(store.where(key), sha)
        for key, (_, sha) in brought.items()
        if sha != said.files[key.removeprefix(said.key)]["sha256"]
    ]
    return (None, wrong) if wrong else (said, [])


def declared(store: Store, entry: Entry, run: str) -> tuple[Checkpoint | None, list[str]]:
    """What a commit entry says, when its manifest is the committed one and every file is there in its size; else
    what is wrong. No content is read yet."""
    key, said = str(entry.fields.get("manifest")), entry.fields.get("manifest_sha256")
    where = store.where(key)
    try:
        data = store.get(key)
    except (Missing, ValueError):
        return None, [f"{where} is missing"]
    if hashlib.sha256(data).hexdigest() != said:
        return None, [f"{where} is not the manifest that was committed"]
    body = json.loads(data)
    attempt, step, prefix = entry.attempt, entry.fields.get("step"), key.removesuffix(".manifest.json") + "/"
    if (body["run"], body["attempt"], body["step"]) != (run, attempt, step):
        return None, [f"{where} is of run {body['run']}, attempt {body['attempt']}, step {body['step']}"]
    files: dict[str, dict[str, Any]] = body["files"]
    there = {item.key.removeprefix(prefix): item.size for item in store.list(prefix)}
    wrong = [f"{store.where(prefix + name)} is missing" for name in files if name not in there]
    wrong += [f"{store.where(prefix + name)} was never committed" for name in there if name not in files]
    for name, about in files.items():
        if name in there and there[name] != about["bytes"]:
            wrong.append(f"{store.where(prefix + name)} has {there[name]} bytes instead of {about['bytes']}")
    if wrong:  # no need to read gigabytes
        return None, wrong
    return Checkpoint(
        run,
        attempt,
        body["step"],
        prefix,
        files,
        body["topology"],
        body["versions"],
        body["spec_digest"],
        entry.n,
    ), []


def _not_it(where: str, sha: str) -> str:
    return f"{where} is not what was committed (sha256 {sha[:12] or 'unreadable'}...)"


def newest_verified(
    store: Store,
    log: RunLog,
    say: Callable[[str], None] = lambda message: None,
    into: Path | None = None,
    progress: Progress = quiet,
    unfit: Callable[[Entry, str], None] = lambda entry, why: None,
) -> Checkpoint | None:
    """The newest committed checkpoint that verifies; None when there is none. Says what was skipped, and why.

    unfit  told of each one that was skipped, and what is wrong with it
    into  bring its files there, for a loader to open (`bring`); without it they are read where they are
    """
    for entry in log.commits():
        if into is None:
            found, wrong = check(store, entry, log.run)
        else:
            found, wrong = bring(store, entry, log.run, into, progress)
        if found is not None:
            return found
        why = wrong[0] + (f", and {len(wrong) - 1} more" if len(wrong) > 1 else "")
        say(f"checkpoint of step {entry.fields.get('step')}, attempt {entry.attempt}, is skipped: {why}")
        unfit(entry, why)
    return None


def book(log: RunLog, attempt: int, damaged: Sequence[tuple[Entry, str]], whole: Checkpoint | None) -> None:
    """Write what a resume has found into the log, as far as that is news, so that whoever looks at the run knows of it.

    damaged  commit entries that did not verify, newest first, and why;  whole  the one that did

    Of many, as where nothing verifies and old ones were let go long ago, the last one written stands for all before it.
    Raises runlog.Superseded.
    """
    known = log.damaged()
    for number, (entry, why) in enumerate(damaged[:MOST_BOOKED], 1):
        manifest, more = str(entry.fields["manifest"]), {}
        if number == MOST_BOOKED and len(damaged) > number:
            more = {"older_than": entry.n}
        if known.get(manifest) != why:
            log.append("damaged", attempt, step=entry.fields["step"], manifest=manifest, why=why, **more)
    if whole is not None and (manifest := manifest_key(whole.attempt, whole.step)) in known:
        log.append("mended", attempt, step=whole.step, manifest=manifest)


def _leisurely(store: FolderStore, keys: list[str]) -> list[tuple[int, str]]:
    """`_digests`, by a process that steps aside for training; where that can't be had, here."""
    try:
        return [found or (-1, "") for found in beside.digests([str(store.path(key)) for key in keys])]
    except OSError:
        return _digests(store, keys)


def _digests(store: Store, keys: list[str]) -> list[tuple[int, str]]:
    """(size, sha256) of each key, (-1, "") for one that is gone or on a bad sector.

    Any other I/O error is raised: a store that is away for a while is no reason to go back to an older checkpoint.
    """

    def one(key: str) -> tuple[int, str]:
        try:
            return store.digest(key)
        except Missing:
            return -1, ""
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return -1, ""

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(one, keys))
