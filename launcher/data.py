"""Token files, and the order in which they are read.

The order is a pure function of (seed, sequence index): batch size, world size and resumes change who reads a
sequence and when, never which sequence is the i-th. So every run of a ladder, a pacer beside a big run, and
a run resumed on fewer machines read the same text in the same order, and their noise can be compared.

A prepared folder holds `train.bin` and `holdout.bin` (one unsigned integer a token, little-endian) and
`meta.json`. The holdout is every 64th block of 8,192 tokens: the same text for every context and seed.
"""

import hashlib
import json
import os
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from launcher.errors import WrongInput

BLOCK_TOKENS = 8192
HOLDOUT_EVERY = 64

U64 = NDArray[np.uint64]


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
    try:
        meta = json.loads((folder / "meta.json").read_text())
        dtype = np.dtype(meta["dtype"])
        train = np.memmap(folder / "train.bin", dtype=dtype, mode="r")
        holdout = np.memmap(folder / "holdout.bin", dtype=dtype, mode="r")
    except (OSError, ValueError, KeyError) as error:
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


def standard_library() -> Iterator[bytes]:
    """Every source file of this Python's standard library, tests and installed packages left out, by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "lib2to3",
        "__pycache__",
        "turtledemo",
    }
    for path in sorted(root.rglob("*.py")):
        if not skip.intersection(path.relative_to(root).parts):
            yield path.read_bytes()


def prepare_bytes(documents: Iterable[bytes], folder: Path, source: str) -> Path:
    """Write `documents` as a byte-level corpus (vocabulary 256, a zero byte between documents) to `folder`.

    Whole or not there: written beside its place and renamed. Returns the folder.
    """
    stream = np.frombuffer(b"\0".join(documents), dtype=np.uint8)
    blocks = np.arange(stream.size) // BLOCK_TOKENS
    held = blocks % HOLDOUT_EVERY == HOLDOUT_EVERY - 1
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=folder.name + "."))
    stream[~held].tofile(scratch / "train.bin")
    stream[held].tofile(scratch / "holdout.bin")
    meta = {
        "tokenizer": "bytes",
        "vocab": 256,
        "dtype": "uint8",
        "train_tokens": int((~held).sum()),
        "holdout_tokens": int(held.sum()),
        "digest": "sha256:" + hashlib.sha256(stream.tobytes()).hexdigest(),
        "source": source,
    }
    (scratch / "meta.json").write_text(json.dumps(meta, indent=1))
    try:
        os.rename(scratch, folder)
    except OSError:  # somebody else prepared it meanwhile: theirs is the same text
        for part in scratch.iterdir():
            part.unlink()
        scratch.rmdir()
    return folder


def tokens_for(path: str, cache: Path) -> Tokens:
    """The corpus that a spec's `data.path` names: a prepared folder, or `stdlib`, prepared on first use."""
    if path == "stdlib":
        folder = cache / "stdlib-bytes"
        if not (folder / "meta.json").exists():
            prepare_bytes(standard_library(), folder, "Python standard library")
        return open_tokens(folder)
    if "://" in path:
        raise WrongInput(
            f"data.path: {path}: only a local folder, or stdlib, can be read so far. Copy the corpus to a disk."
        )
    return open_tokens(Path(path))


def cache_folder() -> Path:
    """Where prepared corpora lie on this machine: LOSSCAST_CACHE, or the user's cache folder."""
    base = os.environ.get("LOSSCAST_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "losscast"
    )
    return Path(base).expanduser()
