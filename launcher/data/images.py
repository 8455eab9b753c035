"""Images with text about them: scikit-learn's handwritten digits, and a caption made from each one's label.

1,797 images of 8 x 8 pixels with values 0 to 16, no download. An image is cut into patches, row by row; its caption is
bytes. Each sequence is the patches and then the caption, as long as the context leaves room for, said again and again
where it is shorter, so that every text position counts and every layout averages over the same number of them. Every 16th
image is held out. The order of training is that of text: a permutation named by the seed, anew each pass.

    inputs    patches (count, P, A) in 0..1, and text tokens (count, T) that begin with a zero byte
    targets   (count, P + T): nothing for the patches, then the caption

The zero byte stands where the text begins, so that text token i is asked for byte i; P + T is the context.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from launcher.data.tokens import permuted
from launcher.errors import Failed

SIDE = 8
HELD_OUT_EVERY = 16
IGNORED = -100
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FORMS = ("a handwritten {}. ", "the digit {}. ", "someone wrote {}. ", "this is a {}. ")


@dataclass(frozen=True)
class Digits:
    """All images and labels, apart for training and holdout."""

    train: NDArray[np.float32]
    train_labels: NDArray[np.int64]
    held: NDArray[np.float32]
    held_labels: NDArray[np.int64]


def load_digits() -> Digits:
    """The images that scikit-learn ships, (n, 8, 8) in 0..1. Raises Failed where it is not installed."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise Failed("data.path: digits are scikit-learn's: pip install 'losscast[vision]'") from error
    found = datasets.load_digits()
    images, labels = found.images.astype(np.float32) / 16, found.target.astype(np.int64)  # type: ignore[union-attr]
    held = np.arange(len(images)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    return Digits(images[~held], labels[~held], images[held], labels[held])


def patches_of(images: NDArray[np.float32], patch: int) -> NDArray[np.float32]:
    """(n, 8, 8) images to (n, P, patch * patch) patches, row by row."""
    n, across = len(images), SIDE // patch
    cut = images.reshape(n, across, patch, across, patch).transpose(0, 1, 3, 2, 4)
    return np.ascontiguousarray(cut.reshape(n, across * across, patch * patch))


def caption(label: int, index: int, length: int) -> NDArray[np.int64]:
    """What is said of an image: `length` bytes. The wording goes by the image's index, the word by its label."""
    text = FORMS[index % len(FORMS)].format(WORDS[label]).encode()
    return np.resize(np.frombuffer(text, dtype=np.uint8), length).astype(np.int64)


class DigitFeed:
    """Sequences of patches and text. See `launcher.data.feed.Feed`."""

    vocab = 256

    def __init__(self, digits: Digits, patch: int, context: int, seed: int) -> None:
        self._digits, self._patch, self._seed = digits, patch, seed
        self._patches = (SIDE // patch) ** 2
        self._text = context - self._patches
        self.holdout = len(digits.held)

    def train(self, first: int, count: int) -> tuple[tuple[NDArray, ...], NDArray[np.int64]]:
        size = len(self._digits.train)
        index = np.arange(first, first + count, dtype=np.uint64)
        places = np.empty(count, dtype=np.int64)
        for lap in np.unique(index // np.uint64(size)):
            here = index // np.uint64(size) == lap
            key = self._seed * 1_000_003 + int(lap)
            places[here] = permuted(index[here] % np.uint64(size), size, key).astype(np.int64)
        return self._made(self._digits.train, self._digits.train_labels, places)

    def held_out(self, first: int, count: int) -> tuple[tuple[NDArray, ...], NDArray[np.int64]]:
        places = np.arange(first, min(first + count, self.holdout))
        return self._made(self._digits.held, self._digits.held_labels, places)

    def _made(
        self, images: NDArray[np.float32], labels: NDArray[np.int64], places: NDArray[np.int64]
    ) -> tuple[tuple[NDArray, ...], NDArray[np.int64]]:
        texts = np.stack([caption(int(labels[i]), int(i), self._text) for i in places])
        begin = np.zeros((len(places), 1), dtype=np.int64)
        inputs = np.concatenate((begin, texts[:, :-1]), axis=1)
        none = np.full((len(places), self._patches), IGNORED, dtype=np.int64)
        return (patches_of(images[places], self._patch), inputs), np.concatenate((none, texts), axis=1)
