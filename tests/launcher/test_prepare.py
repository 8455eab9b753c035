"""`losscast data prepare`: the same documents give the same bytes, and nothing is lost, added or half written."""

import gzip
import json
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.cli import main
from launcher.data.prepare import BLOCK_TOKENS, BYTES, HOLDOUT_EVERY, prepare_corpus, write_corpus
from launcher.data.tokens import open_tokens, tokens_for
from launcher.errors import Failed, WrongInput
from tests.azurite import Azurite


def stream(folder: Path) -> bytes:
    """The tokens of a byte corpus in the order they were written."""
    tokens, size = open_tokens(folder), json.loads((folder / "meta.json").read_text())["block_tokens"]
    train, held, out = tokens.train.tobytes(), tokens.holdout.tobytes(), []
    for block in range(-(-(len(train) + len(held)) // size)):
        if block % HOLDOUT_EVERY == HOLDOUT_EVERY - 1:
            out.append(held[:size])
            held = held[size:]
        else:
            out.append(train[:size])
            train = train[size:]
    return b"".join(out)


@given(
    st.lists(st.lists(st.binary(max_size=3 * BLOCK_TOKENS), min_size=1, max_size=3), min_size=1, max_size=6)
)
@settings(max_examples=25, deadline=None)
def test_documents_come_back_as_they_were_with_a_zero_byte_between(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[bytes]]
) -> None:
    folder = tmp_path_factory.mktemp("made") / "c"
    whole = b"\0".join(b"".join(pieces) for pieces in documents)
    if not whole:
        with pytest.raises(WrongInput, match="no text"):
            write_corpus(documents, folder, BYTES, "made up")
        assert not folder.exists()
        return
    meta = write_corpus(documents, folder, BYTES, "made up")
    assert stream(folder) == whole
    assert meta["train_tokens"] + meta["holdout_tokens"] == len(whole)
    assert meta["holdout_tokens"] > 0 or len(whole) < HOLDOUT_EVERY
    assert meta["documents"] == len(documents)


TEXTS = ["one day", "zwei Tage, süß", "three\nlines\n", "4" * 20_000]


def sources(folder: Path) -> dict[str, Path]:
    """The same documents in every format."""
    folder.mkdir()
    (folder / "text").mkdir()
    for i, text in enumerate(TEXTS):
        (folder / "text" / f"{i}.txt").write_text(text)
    lines = "".join(json.dumps({"id": i, "body": t}) + "\n" for i, t in enumerate(TEXTS))
    (folder / "all.jsonl").write_text(lines)
    (folder / "all.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    found = {"text": folder / "text", "jsonl": folder / "all.jsonl", "gz": folder / "all.jsonl.gz"}
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        return found
    parquet.write_table(
        pa.table({"id": [0, 1, 2, 3], "body": TEXTS}), folder / "all.parquet", row_group_size=2
    )
    return {**found, "parquet": folder / "all.parquet"}


def test_the_format_of_the_source_changes_nothing(tmp_path: Path) -> None:
    digests = {
        name: prepare_corpus([str(path)], str(tmp_path / name), field="body")["digest"]
        for name, path in sources(tmp_path / "in").items()
    }
    assert len(set(digests.values())) == 1, digests
    assert stream(tmp_path / "text") == b"\0".join(t.encode() for t in TEXTS)


def test_a_corpus_is_read_back_through_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = sources(tmp_path / "in")["text"]
    out = tmp_path / "corpus"
    assert main(["data", "prepare", str(text), "-o", str(out), "--json"]) == 0
    meta = json.loads(capsys.readouterr().out)
    assert meta["documents"] == 4 and meta["tokenizer"] == "bytes"
    assert main(["data", "show", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["digest"] == meta["digest"]
    assert main(["data", "prepare", str(text), "-o", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": ', "a.jsonl:2:10: not a line of JSON"),
        ("a.jsonl", '{"body": "x"}\n', "no text under 'text'; its fields are body"),
        ("a.jsonl", '{"text": 3}\n', "a.jsonl:1: 'text' holds 3, which is no text"),
        ("a.jsonl", "[1]\n", "it is no object"),
        ("a.bin", "x", "can't tell its format"),
        ("a.txt", "", "no text in it"),
        ("a.parquet", "not one", "not a Parquet file"),
        ("a.txt.gz", "not zipped", "a.txt.gz"),
    ],
)
def test_a_source_that_is_wrong_is_named_and_leaves_nothing(
    tmp_path: Path, name: str, content: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_text(content)
    assert main(["data", "prepare", str(tmp_path / name), "-o", str(tmp_path / "out")]) == 2
    assert says in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == [name]


def tokenizer_file(folder: Path, end: str = "<|endoftext|>") -> Path:
    """A small byte-level BPE tokenizer, trained here."""
    package = pytest.importorskip("tokenizers", reason="needs tokenizers: pip install 'losscast[tokenizers]'")
    made = package.Tokenizer(package.models.BPE())
    made.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = package.decoders.ByteLevel()
    alphabet = package.pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXTS * 4,
        package.trainers.BpeTrainer(
            vocab_size=300, special_tokens=[end], initial_alphabet=alphabet, show_progress=False
        ),
    )
    path = folder / "tokenizer.json"
    made.save(str(path))
    return path


def test_a_tokenizer_file_makes_a_corpus_that_decodes_to_its_documents(tmp_path: Path) -> None:
    path = tokenizer_file(tmp_path)
    package = pytest.importorskip("tokenizers")
    text = sources(tmp_path / "in")["jsonl"]
    meta = prepare_corpus([str(text)], str(tmp_path / "out"), str(path), field="body")
    tokens = open_tokens(tmp_path / "out")
    reader = package.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    ids = np.concatenate([tokens.train, tokens.holdout])
    assert ids.dtype.itemsize == 2 and meta["vocab"] == reader.get_vocab_size() <= 300
    documents = reader.decode(ids.tolist(), skip_special_tokens=False).split("<|endoftext|>")
    assert documents == TEXTS
    with pytest.raises(WrongInput, match="no token is '<nope>'"):
        prepare_corpus([str(text)], str(tmp_path / "o2"), str(path), end_of_text="<nope>", field="body")


def test_a_spec_with_another_tokenizer_than_the_corpus_is_refused(tmp_path: Path) -> None:
    from launcher.data.feed import feed_for
    from launcher.runspec.model import RunSpec

    (tmp_path / "a.txt").write_text("hello " * 5000)
    prepare_corpus([str(tmp_path / "a.txt")], str(tmp_path / "c"))
    base = {
        "name": "r",
        "workload": {"layers": 1, "width": 8, "heads": 1, "context": 16, "vocab": 512},
        "train": {"tokens": 1024, "batch_tokens": 64, "lr": 1e-3},
    }
    good = RunSpec.from_dict({**base, "data": {"path": str(tmp_path / "c")}})
    assert feed_for(good, tmp_path).train(0, 2)[1].shape == (2, 16)
    wrong = RunSpec.from_dict({**base, "data": {"path": str(tmp_path / "c"), "tokenizer": "tokenizer.json"}})
    with pytest.raises(WrongInput, match="prepared with"):
        feed_for(wrong, tmp_path)


class Shelf:
    """A store's folder that the az:// address stands for in these tests."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
        from launcher.storage import store as storage

        real = storage.open_store
        self.root = root
        monkeypatch.setattr(
            storage, "open_store", lambda url: real(str(root) if url.startswith("az://") else url)
        )


def test_a_corpus_in_a_store_is_brought_once_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf(monkeypatch, tmp_path / "store")
    url, cache = "az://account/container/corpus", tmp_path / "cache"
    with pytest.raises(WrongInput, match="no prepared corpus"):
        tokens_for(url, cache)
    text = sources(tmp_path / "in")["text"]
    meta = prepare_corpus([str(text)], url)
    with pytest.raises(WrongInput, match="holds a corpus already"):
        prepare_corpus([str(text)], url)
    found: list[str] = []
    together = [
        threading.Thread(target=lambda: found.append(tokens_for(url, cache).digest)) for _ in range(4)
    ]
    for thread in together:
        thread.start()
    for thread in together:
        thread.join()
    assert found == [meta["digest"]] * 4
    assert len([p for p in cache.iterdir() if p.is_dir()]) == 1
    (shelf.root / "train.bin").write_bytes(b"x" * meta["train_tokens"])
    assert tokens_for(url, cache).digest == meta["digest"], "it is here already"
    with pytest.raises(Failed, match="not what meta"):
        tokens_for(url, tmp_path / "another-cache")


def test_a_corpus_travels_through_azure_blob(
    azurite: Azurite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launcher.storage import store as storage

    monkeypatch.setattr(storage, "open_store", lambda url: azurite.store("runs", "corpora/small"))
    text = sources(tmp_path / "in")["text"]
    meta = prepare_corpus([str(text)], "az://account/runs/corpora/small")
    tokens = tokens_for("az://account/runs/corpora/small", tmp_path / "cache")
    assert tokens.digest == meta["digest"]
    assert stream(next(p for p in (tmp_path / "cache").iterdir() if p.is_dir())) == b"\0".join(
        t.encode() for t in TEXTS
    )
