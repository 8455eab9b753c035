"""Token files, and the order in which they are read.

The order is a pure function of (seed, sequence index): batch size, world size and resumes change who reads a
sequence and when, never which sequence is the i-th. So every run of a ladder, a pacer beside a big run, and
a run resumed on fewer machines read the same text in the same order, and their noise can be compared.

`launcher.data.prepare` makes prepared folders and says what is in them. They are memory-mapped: what a run does not read costs it
nothing.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launcher.errors import Failed, WrongInput

U64 = NDArray[np.uint64]
WORKING_DIR = "LOSSCAST_WORKING_DIR"
"""Environment variable: the folder that a run was submitted from, where relative paths start; default the current one."""


def _mixed(x: U64, key: int) -> U64:
    """A 64-bit hash of every element (the finaliser of SplitMix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        x = x + np.uint64((key * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & 0xFFFF_FFFF_FFFF_FFFF)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def permuted(index: U64, size: int, key: int) -> U64:
    """Where each of `index` (values below `size`) goes under the permutation of range(size) that `key` names.

    A four-round Feistel network over the next even power of two, walked again where it lands outside: any
    element is found in constant time and memory, without shuffling a list of a trillion sequences.
    """
    half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    out = index.astype(np.uint64)
    todo = np.ones(out.shape, dtype=bool)
    while todo.any():
        x = out[todo]
        left, right = x >> half, x & mask
        for turn in range(4):
            left, right = right, left ^ (_mixed(right, key * 4 + turn) & mask)
        out[todo] = (left << half) | right
        todo &= out >= size
    return out


@dataclass(frozen=True)
class Tokens:
    """A prepared corpus: memory-mapped tokens and what they are."""

    train: NDArray[np.integer]
    holdout: NDArray[np.integer]
    vocab: int
    tokenizer: str
    digest: str

    def sequences(self, context: int) -> int:
        """How many training sequences of `context` tokens one pass over the corpus holds."""
        return (self.train.size - 1) // context

    def batch(self, first: int, count: int, context: int, seed: int) -> NDArray[np.int64]:
        """Training sequences `first` .. `first + count` of the order that `seed` names.

        Returns (count, context + 1) token ids: inputs are [:, :-1], targets [:, 1:]. Past the end of the corpus
        the next pass has an order of its own.
        """
        size = self.sequences(context)
        if size < 1:
            raise WrongInput(
                f"the corpus has {self.train.size} tokens, too few for one sequence of {context + 1}"
            )
        index = np.arange(first, first + count, dtype=np.uint64)
        rows = np.empty((count, context + 1), dtype=np.int64)
        for lap in np.unique(index // np.uint64(size)):
            here = index // np.uint64(size) == lap
            places = permuted(index[here] % np.uint64(size), size, seed * 1_000_003 + int(lap))
            for row, place in zip(np.flatnonzero(here), places, strict=True):
                at = int(place) * context
                rows[row] = self.train[at : at + context + 1]
        return rows

    def held_out(self, first: int, count: int, context: int) -> NDArray[np.int64]:
        """Validation sequences, in file order: (up to `count`, context + 1) token ids, fewer at the end."""
        size = (self.holdout.size - 1) // context
        rows = [
            self.holdout[i * context : i * context + context + 1]
            for i in range(first, min(first + count, size))
        ]
        return np.stack(rows).astype(np.int64) if rows else np.empty((0, context + 1), dtype=np.int64)


def open_tokens(folder: Path) -> Tokens:
    """The corpus in a prepared folder. Raises WrongInput where it is none."""
    if not (folder / "meta.json").is_file():
        found = next((p for p in sorted(folder.iterdir()) if p.is_file()), None) if folder.is_dir() else None
        lacks = "it has no meta.json" if folder.is_dir() else "there is no such folder"
        if folder.is_file():
            lacks = "it is a file"
        such = (
            f"{folder} -o tokens` makes one of such files as its {found.name}"
            if found
            else "TEXT -o FOLDER` makes one"
        )
        raise WrongInput(
            f"{folder}: no prepared corpus here: {lacks}. `losscast data prepare {such}; `stdlib` is the Python library's "
            "own source."
        )
    try:
        meta = json.loads((folder / "meta.json").read_text())
        dtype = np.dtype(meta["dtype"])
        train, holdout = _mapped(folder / "train.bin", dtype), _mapped(folder / "holdout.bin", dtype)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WrongInput(
            f"{folder}: no prepared corpus here ({error}). Prepare one with `losscast data prepare`, "
            f"or set data.path to stdlib for the Python library's own source."
        ) from error
    if (train.size, holdout.size) != (meta["train_tokens"], meta["holdout_tokens"]):
        raise WrongInput(
            f"{folder}: cut short: {train.size} and {holdout.size} tokens, meta.json says "
            f"{meta['train_tokens']} and {meta['holdout_tokens']}. Prepare it again."
        )
    return Tokens(train, holdout, meta["vocab"], meta["tokenizer"], meta["digest"])


def _mapped(path: Path, dtype: np.dtype) -> NDArray:
    """The file as an array; an empty one can't be mapped, and needs no file."""
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)


def tokens_for(path: str, cache: Path) -> Tokens:
    """The corpus that a spec's `data.path` names: a prepared folder, `stdlib` (prepared on first use), or az://..., brought
    to this machine's cache once. Any number of processes may ask at the same time."""
    if path == "stdlib":
        from launcher.data.prepare import BYTES, standard_library, write_corpus

        folder = cache / "stdlib-bytes"
        if not (folder / "meta.json").exists():
            write_corpus(standard_library(), folder, BYTES, "Python standard library")
        return open_tokens(folder)
    if "://" in path:
        return open_tokens(fetched(path, cache))
    return open_tokens(Path(os.environ.get(WORKING_DIR, "")) / Path(path).expanduser())


def described(url: str) -> tuple[bytes, dict[str, dict[str, Any]]]:
    """meta.json of the prepared corpus at az://..., and the files it names. Raises WrongInput where there is none."""
    from infra.objects import Missing
    from launcher.storage.store import open_store

    try:
        meta_json = open_store(url).get("meta.json")
        files: dict[str, dict[str, Any]] = json.loads(meta_json)["files"]
        names = set(files)
    except Missing as error:
        raise WrongInput(
            f"{url}: no prepared corpus here. Make one with `losscast data prepare SOURCE -o {url}`."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise WrongInput(f"{url}: its meta.json is not one of a prepared corpus ({error}).") from error
    if names != {"train.bin", "holdout.bin"}:
        raise WrongInput(f"{url}: its meta.json names {sorted(names)}, not train.bin and holdout.bin.")
    return meta_json, files


def fetched(url: str, cache: Path) -> Path:
    """The prepared corpus at `url` as a folder in the cache, every byte compared with its meta.json. One process brings it,
    the others wait. Raises WrongInput where there is no corpus, Failed where it is not what its meta.json says."""
    from infra.objects import Missing
    from launcher.storage.store import open_store

    meta_json, files = described(url)
    store = open_store(url)
    folder = cache / ("corpus-" + hashlib.sha256(meta_json).hexdigest()[:32])
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for stale in cache.glob(f".{folder.name}.*/"):  # of one that was killed: only one brings it at a time
            shutil.rmtree(stale, ignore_errors=True)
        if (folder / "meta.json").exists():
            return folder
        scratch = Path(tempfile.mkdtemp(dir=cache, prefix=f".{folder.name}."))
        try:
            try:
                got = store.download({name: scratch / name for name in files})
            except Missing as error:
                raise Failed(
                    f"{url}: {error} is not there, though meta.json names it. Prepare it again."
                ) from error
            for name, said in files.items():
                if got[name] != (said["bytes"], said["sha256"]):
                    raise Failed(
                        f"{url}/{name}: is not what meta.json says of it (sha256 {got[name][1][:12]}, "
                        f"said {said['sha256'][:12]}). Prepare it again."
                    )
            (scratch / "meta.json").write_bytes(meta_json)
            os.rename(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def cache_folder() -> Path:
    """Where prepared corpora lie on this machine: LOSSCAST_CACHE, or the user's cache folder."""
    base = os.environ.get("LOSSCAST_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "losscast"
    )
    return Path(base).expanduser()
