"""What a workload reads, sequence by sequence: inputs and targets, for training in an order that never ends and held out
in file order. The i-th training sequence is a function of (seed, i) alone, whatever reads it.
"""

import hashlib
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from launcher.data.tokens import Tokens, described, tokens_for
from launcher.errors import WrongInput
from launcher.runspec.model import Data, Gpt, RunSpec

Arrays = tuple[tuple[NDArray, ...], NDArray[np.int64]]
"""Inputs, each (count, ...), and targets (count, context)."""


class Feed(Protocol):
    """Sequences of one corpus for one run."""

    holdout: int
    """Held-out sequences there are."""

    def train(self, first: int, count: int) -> Arrays:
        """Training sequences `first` .. `first + count`."""
        ...

    def held_out(self, first: int, count: int) -> Arrays:
        """Held-out sequences, fewer than `count` at the end."""
        ...


class TextFeed:
    """Tokens, and the next token as the target of each."""

    def __init__(self, tokens: Tokens, context: int, seed: int) -> None:
        self._tokens, self._context, self._seed = tokens, context, seed
        self.vocab = tokens.vocab
        self.holdout = max(0, (tokens.holdout.size - 1) // context)

    def train(self, first: int, count: int) -> Arrays:
        return self._split(self._tokens.batch(first, count, self._context, self._seed))

    def held_out(self, first: int, count: int) -> Arrays:
        return self._split(self._tokens.held_out(first, count, self._context))

    @staticmethod
    def _split(rows: NDArray[np.int64]) -> Arrays:
        return (np.ascontiguousarray(rows[:, :-1]),), np.ascontiguousarray(rows[:, 1:])


def feed_for(spec: RunSpec, cache: Path) -> Feed:
    """What the spec's `data` names, opened. Raises WrongInput where it is missing or does not fit the workload."""
    workload = spec.workload
    if isinstance(workload, Gpt) and workload.patch is not None:
        from launcher.data.images import DigitFeed, load_digits

        return DigitFeed(load_digits(), workload.patch, workload.context, spec.train.seed)
    feed = text_feed(spec, cache)
    vocab = workload.vocab if isinstance(workload, Gpt) else None
    if vocab is not None and feed.vocab > vocab:
        raise WrongInput(
            f"workload.vocab: {vocab} is less than the corpus's {feed.vocab}. Set it to that or more."
        )
    if feed.holdout < 1:
        raise WrongInput(
            f"data.path: of {spec.data.path if spec.data else ''} too few tokens are held out for one sequence of "
            f"{spec.context} and its next token. Use more text, or a shorter context."
        )
    return feed


def refuse_unfit(spec: RunSpec, cache: Path) -> None:
    """Raise WrongInput where a gpt submitted from this folder would find its data missing, cut short or not what its spec
    says. Nothing is made or brought: of az://... meta.json is read, and folders are looked into for runs on this machine."""
    path = spec.data.path if spec.data is not None else "stdlib"
    if not isinstance(spec.workload, Gpt) or path in ("stdlib", "digits"):
        return  # what a workload of the user's own reads, it knows itself
    try:
        if path.startswith("az://"):
            described(path)
        elif spec.cluster.to == "local":
            feed_for(spec, cache)
    except WrongInput as error:
        named = str(error).startswith(("data.", "workload."))
        raise WrongInput(str(error) if named else f"data.path: {error}") from error


def text_feed(spec: RunSpec, cache: Path) -> TextFeed:
    """Sequences of the spec's context from its prepared corpus. Raises WrongInput where there are none."""
    if spec.data is None:
        raise WrongInput("data: there is none to read. Set data.path to a prepared folder, or to stdlib.")
    tokens = tokens_for(spec.data.path, cache)
    _same_tokenizer(spec.data, tokens)
    if tokens.sequences(spec.context) < 1:
        raise WrongInput(
            f"data.path: {spec.data.path} has {tokens.train.size} training tokens, too few for one sequence of "
            f"{spec.context} and its next token. Use more text, or a shorter context."
        )
    return TextFeed(tokens, spec.context, spec.train.seed)


def _same_tokenizer(data: Data, tokens: Tokens) -> None:
    """Raise WrongInput where the spec says another tokenizer than the corpus was made with: its law would not fit."""
    said = data.tokenizer
    if said != "bytes":
        try:
            said = "sha256:" + hashlib.sha256(Path(said).expanduser().read_bytes()).hexdigest()
        except OSError:  # the file need not be on every machine; that it is not bytes must hold
            said = tokens.tokenizer if tokens.tokenizer != "bytes" else data.tokenizer
    if said != tokens.tokenizer:
        raise WrongInput(
            f"data.tokenizer: {data.tokenizer} is not what {data.path} was prepared with ({tokens.tokenizer[:19]}). "
            "Set it to that one, or prepare the corpus again."
        )
