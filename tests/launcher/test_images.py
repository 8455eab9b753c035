"""Images and captions: the decoder is asked for the text alone, in an order that is a function of the seed."""

from pathlib import Path

import numpy as np
import pytest

from launcher.data.images import IGNORED, SIDE, DigitFeed, Digits, caption, load_digits, patches_of
from launcher.errors import WrongInput
from launcher.runspec.model import RunSpec

BASE = {
    "name": "digits",
    "workload": {"layers": 1, "width": 8, "heads": 1, "context": 40, "patch": 2},
    "data": {"path": "digits"},
    "train": {"tokens": 4000, "batch_tokens": 400, "lr": 1e-3},
}


def made_up(n: int = 37) -> Digits:
    images = np.arange(n * SIDE * SIDE, dtype=np.float32).reshape(n, SIDE, SIDE)
    labels = np.arange(n) % 10
    return Digits(images, labels, images[:5] + 0.5, labels[:5])


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_patches_are_the_image(patch: int) -> None:
    image = made_up().train[3]
    across = SIDE // patch
    for i, values in enumerate(patches_of(image[None], patch)[0]):
        row, column = divmod(i, across)
        there = image[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
        assert values.tolist() == there.flatten().tolist()


def test_only_text_is_asked_for_and_each_position_for_the_byte_it_has_not_seen() -> None:
    (patches, tokens), targets = DigitFeed(made_up(), 2, 40, 0).train(0, 6)
    assert patches.shape == (6, 16, 4) and tokens.shape == (6, 24) and targets.shape == (6, 40)
    assert (targets[:, :16] == IGNORED).all() and (tokens[:, 0] == 0).all()
    assert np.array_equal(targets[:, 16:-1], tokens[:, 1:])
    assert b"." in bytes(targets[0, 16:].tolist())


def test_every_image_comes_once_a_pass_with_its_own_caption_however_it_is_batched() -> None:
    feed, digits = DigitFeed(made_up(), 2, 40, 5), made_up()
    (whole, _), targets = feed.train(0, 2 * 37)
    parts = [feed.train(i, 1) for i in range(2 * 37)]
    assert np.array_equal(np.concatenate([p[0][0] for p in parts]), whole)
    by_image = {patches_of(image[None], 2).tobytes(): i for i, image in enumerate(digits.train)}
    first, second = ([by_image[x[None].tobytes()] for x in part] for part in (whole[:37], whole[37:]))
    assert sorted(first) == sorted(second) == list(range(37)) and first != second
    for i, target in zip(first, targets, strict=False):
        assert np.array_equal(target[16:], caption(int(digits.train_labels[i]), i, 24))


def test_held_out_images_are_those_that_are_never_trained_on() -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn: pip install 'losscast[vision]'")
    digits = load_digits()
    assert len(digits.train) + len(digits.held) == 1797 and len(digits.held) == 112
    assert not {x.tobytes() for x in digits.held} & {x.tobytes() for x in digits.train}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"data": {"path": "stdlib"}}, "patch is for images"),
        ({"workload": {**BASE["workload"], "patch": None}}, "digits are images"),
        ({"workload": {**BASE["workload"], "context": 16}}, "leaves none for text"),
        ({"data": {"path": "digits", "tokenizer": "t.json"}}, "digits is read as bytes"),
    ],
)
def test_what_does_not_go_together_is_refused(change: dict, says: str) -> None:
    with pytest.raises(WrongInput, match=says):
        RunSpec.from_dict({**BASE, **change, "train": {"tokens": 4000, "batch_tokens": 160, "lr": 1e-3}})


def test_patches_are_counted_as_parameters() -> None:
    pytest.importorskip("torch", reason="needs torch")
    from launcher.runspec.accounting import parameter_count
    from launcher.training.engine import build_model

    spec = RunSpec.from_dict(BASE)
    assert sum(p.numel() for p in build_model(spec).parameters()) == parameter_count(spec)


def test_the_feed_of_a_spec_with_patches_is_images(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn: pip install 'losscast[vision]'")
    from launcher.data.feed import feed_for

    assert len(feed_for(RunSpec.from_dict(BASE), tmp_path).train(0, 3)[0]) == 2
