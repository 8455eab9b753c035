"""The data order is a pure function of (seed, sequence index): what a ladder's comparisons stand on."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data.prepare import BLOCK_TOKENS, BYTES, HOLDOUT_EVERY, write_corpus
from launcher.data.tokens import fetched, open_tokens, permuted, tokens_for
from launcher.errors import WrongInput


def made_of(data: bytes, folder: Path) -> Path:
    write_corpus([[data]], folder, BYTES, "made up")
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = np.random.default_rng(0).integers(0, 256, BLOCK_TOKENS * HOLDOUT_EVERY + 500, dtype=np.uint8)
    return made_of(text.tobytes(), tmp_path_factory.mktemp("corpus") / "bytes")


@given(size=st.integers(1, 5000), key=st.integers(0, 2**63))
@settings(max_examples=60, deadline=None)
def test_the_order_visits_every_sequence_once(size: int, key: int) -> None:
    places = permuted(np.arange(size, dtype=np.uint64), size, key)
    assert sorted(places.tolist()) == list(range(size))


def test_two_seeds_give_two_orders() -> None:
    index = np.arange(1000, dtype=np.uint64)
    same = permuted(index, 1000, 1) == permuted(index, 1000, 2)
    assert same.mean() < 0.02


@given(batches=st.lists(st.integers(1, 40), min_size=1, max_size=20), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_how_sequences_are_batched_never_changes_which_comes_when(
    corpus: Path, batches: list[int], seed: int
) -> None:
    tokens = open_tokens(corpus)
    whole = tokens.batch(0, sum(batches), 64, seed)
    first, parts = 0, []
    for count in batches:
        parts.append(tokens.batch(first, count, 64, seed))
        first += count
    assert np.array_equal(np.concatenate(parts), whole)


def test_a_second_pass_reads_the_same_sequences_in_another_order(corpus: Path) -> None:
    tokens = open_tokens(corpus)
    n = tokens.sequences(512)
    one, two = tokens.batch(0, n, 512, 7), tokens.batch(n, n, 512, 7)
    assert not np.array_equal(one, two)
    assert sorted(map(bytes, one.astype(np.uint8))) == sorted(map(bytes, two.astype(np.uint8)))


def test_targets_are_the_next_tokens(corpus: Path) -> None:
    tokens = open_tokens(corpus)
    row = tokens.batch(3, 1, 32, 0)[0].astype(np.uint8)
    assert row.tobytes() in tokens.train.tobytes()


def test_held_out_text_is_never_trained_on(tmp_path: Path) -> None:
    blocks = [bytes([n % 251]) * BLOCK_TOKENS for n in range(2 * HOLDOUT_EVERY)]
    tokens = open_tokens(made_of(b"".join(blocks), tmp_path / "c"))
    assert tokens.holdout.size == 2 * BLOCK_TOKENS
    assert tokens.train.size == 2 * (HOLDOUT_EVERY - 1) * BLOCK_TOKENS
    assert set(np.unique(tokens.holdout)) == {63, 127}
    assert not {63, 127} & set(np.unique(tokens.train))


@pytest.mark.parametrize("damage", ["cut", "no meta", "meta is no JSON"])
def test_a_damaged_corpus_is_refused_by_name(corpus: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    for name in ("train.bin", "holdout.bin", "meta.json"):
        (folder / name).write_bytes((corpus / name).read_bytes())
    if damage == "cut":
        (folder / "train.bin").write_bytes((corpus / "train.bin").read_bytes()[:-1])
    elif damage == "no meta":
        (folder / "meta.json").unlink()
    else:
        (folder / "meta.json").write_text("{")
    with pytest.raises(WrongInput, match=str(folder)):
        open_tokens(folder)


def test_stdlib_is_prepared_once_and_says_what_it_is(tmp_path: Path) -> None:
    one = tokens_for("stdlib", tmp_path)
    two = tokens_for("stdlib", tmp_path)
    meta = json.loads((tmp_path / "stdlib-bytes" / "meta.json").read_text())
    assert one.digest == two.digest == meta["digest"]
    assert one.train.size > 5_000_000
    assert one.holdout.size > 100_000


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"path": "nowhere"}, "data.path: .*nowhere: no prepared corpus here"),
        ({"tokenizer": "t.json"}, "data.tokenizer: t.json is not what"),
        ({}, None),
    ],
)
def test_submit_looks_into_the_data_first_wherever_it_is_run_from(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict, says: str | None
) -> None:
    from launcher.data.feed import refuse_unfit
    from launcher.runspec.model import RunSpec

    monkeypatch.setenv("LOSSCAST_WORKING_DIR", str(corpus.parent))
    spec = RunSpec.from_dict(
        {
            "name": "r",
            "workload": {"layers": 1, "width": 8, "heads": 1, "context": 16, "vocab": 256},
            "data": {"path": corpus.name, **change},
            "train": {"tokens": 1e3, "batch_tokens": 32, "lr": 1e-3},
        }
    )
    if says is None:
        refuse_unfit(spec, tmp_path)
    else:
        with pytest.raises(WrongInput, match=says):
            refuse_unfit(spec, tmp_path)


def test_what_a_process_that_was_killed_had_brought_of_a_corpus_goes(corpus: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    shutil.copytree(corpus, there)
    meta = json.loads((there / "meta.json").read_text())
    names = ("train.bin", "holdout.bin")
    meta["files"] = {
        name: {
            "bytes": (there / name).stat().st_size,
            "sha256": hashlib.sha256((there / name).read_bytes()).hexdigest(),
        }
        for name in names
    }
    (there / "meta.json").write_text(json.dumps(meta))
    cache = tmp_path / "cache"
    brought = fetched(str(there), cache)
    for name in (f".{brought.name}.killed", ".corpus-another.killed"):
        (cache / name).mkdir()
        (cache / name / "train.bin").write_bytes(b"half")
    shutil.rmtree(brought)
    assert fetched(str(there), cache) == brought and open_tokens(brought).digest == meta["digest"]
    assert sorted(p.name for p in cache.iterdir()) == sorted(
        [brought.name, f".{brought.name}.lock", ".corpus-another.killed"]
    ), "another corpus may be on its way at this moment"
