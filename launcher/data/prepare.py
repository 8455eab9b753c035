"""Making a token file: documents in, a folder of tokens out, the same bytes for the same documents and tokenizer.

    FOLDER/train.bin, holdout.bin   one unsigned integer a token, little-endian, the smallest type that holds the vocabulary
    FOLDER/meta.json                what they are, their sizes and sha256; written last, so that it makes the folder whole
    FOLDER/tokenizer.json           a copy, where it is not bytes

Documents are laid one after another with the tokenizer's end-of-text token (for bytes: a zero byte) between them. The holdout
is every 64th block of 8,192 tokens of that stream (smaller blocks where the stream has less than 64 of them): the same text
for every context, seed and model. A text file is never held in memory as a whole, a row of JSONL or Parquet is.
"""

import contextlib
import gzip
import hashlib
import json
import os
import shutil
import sysconfig
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from launcher.errors import Failed, WrongInput

BLOCK_TOKENS = 8192
HOLDOUT_EVERY = 64
CHUNK_BYTES = 1 << 20
DOCUMENTS_AT_ONCE = 256
FORMATS = {".txt": "text", ".md": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
"""File name endings that say how to read a file; .gz may follow those of text and jsonl."""
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")
"""Tokens that end a document in well-known tokenizers, looked for in this order."""


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """Text to tokens."""

    name: str
    """`bytes`, or the sha256 of its file."""
    vocab: int
    separator: int
    """The token between two documents."""
    encode: Callable[[list[str]], list[NDArray]] | None
    """Several documents at once; None for bytes."""
    file: Path | None = None

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint8 if self.vocab <= 1 << 8 else "<u2" if self.vocab <= 1 << 16 else "<u4")


BYTES = Tokenizer("bytes", 256, 0, None)


def open_tokenizer(name: str, end_of_text: str | None = None) -> Tokenizer:
    """`bytes`, or the tokenizer of a Hugging Face tokenizer.json. Raises WrongInput where it can't be used."""
    if name == "bytes":
        return BYTES
    try:
        from tokenizers import Tokenizer as HuggingFace
    except ImportError as error:
        raise Failed(
            "reading a tokenizer.json takes a package: pip install 'losscast[tokenizers]'"
        ) from error
    path = Path(name).expanduser()
    try:
        data = path.read_bytes()
        made: Any = HuggingFace.from_str(data.decode())
    except OSError as error:
        raise WrongInput(
            f"{path}: {error.strerror}. --tokenizer is `bytes` or the path of a tokenizer.json."
        ) from error
    except Exception as error:  # the package raises a bare Exception
        raise WrongInput(f"{path}: not a tokenizer.json ({error})") from error
    names = [end_of_text] if end_of_text else list(END_OF_TEXT)
    ends = [token for n in names if (token := made.token_to_id(n)) is not None]
    if not ends:
        asked = (
            f"no token is {end_of_text!r}" if end_of_text else "knows none of the usual end-of-text tokens"
        )
        raise WrongInput(f"{path}: {asked}. Name the one that ends a document with --end-of-text.")
    made.no_truncation()
    made.no_padding()
    vocab = int(made.get_vocab_size(with_added_tokens=True))

    def encode(texts: list[str]) -> list[NDArray]:
        return [np.asarray(e.ids, dtype=np.int64) for e in made.encode_batch(texts, add_special_tokens=False)]

    return Tokenizer("sha256:" + hashlib.sha256(data).hexdigest(), vocab, ends[0], encode, path)


class Writer:
    """Takes the stream piece by piece and deals its blocks out to training and holdout."""

    def __init__(self, folder: Path, dtype: np.dtype) -> None:
        self._dtype, self._at, self._block = dtype, 0, BLOCK_TOKENS
        self._first: list[NDArray] | None = []
        """The beginning, until it is known to be long enough for blocks of the usual size."""
        self._files: dict[str, IO[bytes]] = {
            n: (folder / f"{n}.bin").open("wb") for n in ("train", "holdout")
        }
        self._each = {n: hashlib.sha256() for n in self._files}
        self._whole = hashlib.sha256()
        self._written = dict.fromkeys(self._files, 0)
        self.tokens = 0
        """So far."""

    def add(self, tokens: NDArray) -> None:
        """The next tokens of the stream."""
        tokens = tokens.astype(self._dtype, copy=False)
        self._whole.update(tokens.tobytes())
        self.tokens += tokens.size
        if self._first is None:
            self._deal(tokens)
            return
        self._first.append(tokens)
        if self.tokens >= BLOCK_TOKENS * HOLDOUT_EVERY:
            self._begin()

    def _begin(self) -> None:
        first, self._first = self._first or [], None
        for tokens in first:
            self._deal(tokens)

    def _deal(self, tokens: NDArray) -> None:
        while tokens.size:
            block, inside = divmod(self._at, self._block)
            part, tokens = np.split(tokens, [min(tokens.size, self._block - inside)])
            name = "holdout" if block % HOLDOUT_EVERY == HOLDOUT_EVERY - 1 else "train"
            data = part.tobytes()
            self._files[name].write(data)
            self._each[name].update(data)
            self._written[name] += part.size
            self._at += part.size

    def close(self) -> dict[str, Any]:
        """What was written, for meta.json."""
        if self._first is not None:
            self._block = max(1, self.tokens // HOLDOUT_EVERY)
            self._begin()
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        return {
            "dtype": self._dtype.str.replace("|u1", "uint8"),
            "train_tokens": self._written["train"],
            "holdout_tokens": self._written["holdout"],
            "block_tokens": self._block,
            "digest": "sha256:" + self._whole.hexdigest(),
            "files": {
                f"{n}.bin": {
                    "bytes": self._written[n] * self._dtype.itemsize,
                    "sha256": self._each[n].hexdigest(),
                }
                for n in self._files
            },
        }


def write_corpus(
    documents: Iterable[Iterable[bytes | str]],
    folder: Path,
    tokenizer: Tokenizer,
    source: str,
    tick: Callable[[int, int], None] = lambda documents, tokens: None,
) -> dict[str, Any]:
    """Write documents, each in pieces, as a prepared folder; returns its meta.json. Whole or not there: written beside its
    place and renamed. Where somebody else made the folder meanwhile, theirs is kept.

    tick  told of documents and tokens so far
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        writer = Writer(scratch, tokenizer.dtype)
        count = 0
        for tokens, begins in _tokens(documents, tokenizer):
            if begins and count:
                writer.add(np.asarray([tokenizer.separator]))
            count += begins
            writer.add(tokens)
            tick(count, writer.tokens)
        written = writer.close()
        if written["train_tokens"] == 0:
            raise WrongInput(f"{source}: no text in it, and a corpus of nothing trains nothing.")
        meta = {
            "tokenizer": tokenizer.name,
            "vocab": tokenizer.vocab,
            "separator": tokenizer.separator,
            **written,
            "documents": count,
            "source": source,
        }
        if tokenizer.file is not None:
            shutil.copyfile(tokenizer.file, scratch / "tokenizer.json")
        (scratch / "meta.json").write_text(json.dumps(meta, indent=1))
        scratch.chmod(0o755)  # mkdtemp's is for its maker alone
        with contextlib.suppress(OSError):
            os.rename(scratch, folder)
        return meta
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _tokens(
    documents: Iterable[Iterable[bytes | str]], tokenizer: Tokenizer
) -> Iterator[tuple[NDArray, bool]]:
    """Pieces of the stream in order, and whether each begins a document."""
    if tokenizer.encode is None:
        for document in documents:
            first = True
            for piece in document:
                data = piece.encode() if isinstance(piece, str) else piece
                yield np.frombuffer(data, dtype=np.uint8), first
                first = False
        return
    waiting: list[tuple[str, bool]] = []
    size = 0
    for document in documents:
        first = True
        for piece in document:
            text = piece.decode(errors="replace") if isinstance(piece, bytes) else piece
            waiting.append((text, first))
            size, first = size + len(text), False
            if len(waiting) >= DOCUMENTS_AT_ONCE or size > 8 * CHUNK_BYTES:
                yield from _encoded(waiting, tokenizer)
                waiting, size = [], 0
    yield from _encoded(waiting, tokenizer)


def _encoded(pieces: list[tuple[str, bool]], tokenizer: Tokenizer) -> Iterator[tuple[NDArray, bool]]:
    assert tokenizer.encode is not None
    if pieces:
        yield from zip(tokenizer.encode([t for t, _ in pieces]), (first for _, first in pieces), strict=True)


# Where documents come from


def source_files(sources: list[str], form: str | None = None) -> list[tuple[Path, str]]:
    """Every file that the sources name, by path, and its format. Folders are searched. Raises WrongInput."""
    found: dict[Path, str] = {}
    for source in sources:
        path = Path(source).expanduser()
        if not path.exists():
            raise WrongInput(f"{source}: no such file or folder")
        inside = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        before = len(found)
        for file in inside:
            ending = (file.with_suffix("") if file.suffix == ".gz" else file).suffix.lower()
            known = form or FORMATS.get(ending)
            if known is None and not path.is_dir():
                raise WrongInput(
                    f"{file}: can't tell its format by its name. Say --format text, jsonl or parquet."
                )
            if known is not None:
                found[file] = known
        if len(found) == before:
            raise WrongInput(f"{source}: nothing to read in it. Known endings: {', '.join(FORMATS)}.")
    return sorted(found.items())


def documents_of(files: list[tuple[Path, str]], field: str, whole: bool) -> Iterator[Iterator[bytes | str]]:
    """The documents of every file, in order: a text file is one, a line of jsonl or a row of Parquet is one.

    whole  read text in pieces that end with a line, as a tokenizer needs it
    """
    readers = {"jsonl": _jsonl, "parquet": _parquet}
    for path, form in files:
        if form == "text":
            yield _named(path, _text(path, whole))
        else:
            for text in _named(path, readers[form](path, field)):
                yield iter([text])


def _named(path: Path, pieces: Iterator[Any]) -> Iterator[Any]:
    """The pieces; what can't be read is said with the file's name."""
    try:
        yield from pieces
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise WrongInput(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _text(path: Path, whole: bool) -> Iterator[bytes]:
    with _open(path) as file:
        while piece := file.read(CHUNK_BYTES):
            yield piece + (file.readline() if whole else b"")


def _jsonl(path: Path, field: str) -> Iterator[str]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                at = f"{path}:{number}:{getattr(error, 'colno', 1)}"
                raise WrongInput(
                    f"{at}: not a line of JSON: {getattr(error, 'msg', error)}. Each line is one object, such as "
                    f'{{"{field}": "..."}}; files of plain text: --format text.'
                ) from error
            text = row.get(field) if isinstance(row, dict) else None
            if isinstance(row, dict) and field in row and not isinstance(text, str):
                raise WrongInput(
                    f"{path}:{number}: {field!r} holds {json.dumps(text)[:40]}, which is no text. Mend the line, or name another "
                    "field with --field."
                )
            if not isinstance(text, str):
                has = (
                    f"its fields are {', '.join(map(str, row))}"
                    if isinstance(row, dict)
                    else "it is no object"
                )
                raise WrongInput(
                    f"{path}:{number}: no text under {field!r}; {has}. Name the field with --field."
                )
            yield text


def _parquet(path: Path, field: str) -> Iterator[str]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise Failed("reading Parquet takes a package: pip install 'losscast[parquet]'") from error
    try:
        file = parquet.ParquetFile(path)
    except (pa.ArrowInvalid, pa.ArrowException) as error:
        raise WrongInput(f"{path}: not a Parquet file ({error})") from error
    names = file.schema_arrow.names
    if field not in names:
        raise WrongInput(
            f"{path}: no column {field!r}; it has {', '.join(names)}. Name the column with --field."
        )
    row = 0
    for batch in file.iter_batches(columns=[field], batch_size=1024):
        for value in batch.column(0).to_pylist():
            row += 1
            if not isinstance(value, str):
                raise WrongInput(f"{path}: row {row} of {field!r} holds {type(value).__name__}, not text.")
            yield value


def standard_library() -> Iterator[Iterator[bytes]]:
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
            yield iter([path.read_bytes()])


def prepare_corpus(
    sources: list[str],
    out: str,
    tokenizer: str = "bytes",
    *,
    end_of_text: str | None = None,
    field: str = "text",
    form: str | None = None,
    tick: Callable[[int, int], None] = lambda documents, tokens: None,
) -> dict[str, Any]:
    """Make a corpus from files at `out`, a new folder or az://...; returns its meta.json. What `losscast data prepare` does."""
    from infra.objects import Exists, Store
    from launcher.storage.store import open_store

    tokens = open_tokenizer(tokenizer, end_of_text)
    store: Store | None = open_store(out) if "://" in out else None
    folder = Path(out).expanduser()
    if store is None and folder.exists():
        raise WrongInput(
            f"{out}: is there already, and runs may read it. Choose a new name, or remove it first."
        )
    if store is not None and store.list("meta.json"):
        raise WrongInput(f"{out}: holds a corpus already, and runs may read it. Choose a new name.")
    if sources == ["stdlib"]:
        documents: Iterable[Iterable[bytes | str]] = standard_library()
        source = "Python standard library"
    else:
        files = source_files(sources, form)
        documents = documents_of(files, field, whole=tokens.encode is not None)
        source = ", ".join(sources)
    if store is None:
        return write_corpus(documents, folder, tokens, source, tick)
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "corpus"
        meta = write_corpus(documents, made, tokens, source, tick)
        store.upload({p.name: p for p in made.iterdir() if p.name != "meta.json"})
        try:  # last: it makes the corpus whole
            store.put_new("meta.json", (made / "meta.json").read_bytes())
        except Exists as error:
            raise WrongInput(
                f"{out}: somebody else prepared a corpus there meanwhile. Choose a new name."
            ) from error
    return meta
