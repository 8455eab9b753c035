"""`losscast data prepare` and `losscast data show`: token files, made once and read by every run."""

import argparse
import json
import sys
import time
from pathlib import Path


def register(commands: argparse._SubParsersAction) -> None:
    """Add the commands, once."""
    if "data" in commands.choices:
        return
    top = commands.add_parser(
        "data",
        help="make token files from text, JSONL or Parquet",
        description="Make the token files that runs read, and look at them.",
    )
    inner = top.add_subparsers(dest="data_command", metavar="COMMAND", required=True)
    make = inner.add_parser(
        "prepare",
        help="make a corpus from files of text",
        description="Turn text into a folder of tokens that a run.yaml names in data.path. Files are read in the order of "
        "their paths; a text file is one document, and so is a line of JSONL or a row of Parquet. Every 64th block of 8,192 "
        "tokens is held out. The same files give the same bytes, whoever prepares them.",
    )
    make.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="a file or folder: .txt .md .jsonl .parquet, .gz too; stdlib",
    )
    make.add_argument(
        "-o", "--out", required=True, metavar="OUT", help="new folder, or az://account/container/prefix"
    )
    make.add_argument(
        "--tokenizer", default="bytes", metavar="T", help="bytes (default), or a Hugging Face tokenizer.json"
    )
    make.add_argument(
        "--end-of-text",
        metavar="TOKEN",
        help="token put between documents, where it can't be told from the tokenizer",
    )
    make.add_argument(
        "--field",
        default="text",
        help="field of JSONL or column of Parquet that holds the text (default: text)",
    )
    make.add_argument(
        "--format", choices=("text", "jsonl", "parquet"), help="of every source, whatever its name ends in"
    )
    make.add_argument("--json", action="store_true", help="print meta.json")
    make.set_defaults(func=prepare)
    look = inner.add_parser(
        "show", help="what a corpus holds", description="What a prepared corpus holds, and how it begins."
    )
    look.add_argument("path", metavar="PATH", help="as in data.path: a folder, az://..., or stdlib")
    look.add_argument("--json", action="store_true", help="print it as JSON")
    look.set_defaults(func=show)


def prepare(args: argparse.Namespace) -> int:
    """Make a corpus and say what it is."""
    from launcher.data.prepare import prepare_corpus
    from monitor.errors import writing

    began = shown = time.monotonic()

    def tick(documents: int, tokens: int) -> None:
        nonlocal shown
        if sys.stderr.isatty() and time.monotonic() - shown > 0.2:
            shown = time.monotonic()
            rate = tokens / (shown - began)
            print(
                f"\r{documents:,} documents, {tokens:,} tokens, {rate:,.0f} tokens/s ",
                end="",
                file=sys.stderr,
            )

    with writing(Path(args.out).expanduser(), "Give -o a new folder where folders can be made."):
        meta = prepare_corpus(
            args.sources, args.out, args.tokenizer, end_of_text=args.end_of_text, field=args.field, form=args.format, tick=tick
        )  # fmt: skip
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)
    if args.json:
        print(json.dumps(meta, indent=1))
        return 0
    print(_told(args.out, meta))
    vocab = "" if meta["tokenizer"] == "bytes" else f", workload.vocab: {meta['vocab']}"
    print(f"in run.yaml: data: {{path: {args.out}, tokenizer: {args.tokenizer}}}{vocab}", file=sys.stderr)
    return 0


def show(args: argparse.Namespace) -> int:
    """Say what a corpus is."""
    from launcher.data.tokens import cache_folder, tokens_for

    tokens = tokens_for(args.path, cache_folder())
    meta = {
        "tokenizer": tokens.tokenizer,
        "vocab": tokens.vocab,
        "train_tokens": tokens.train.size,
        "holdout_tokens": tokens.holdout.size,
        "digest": tokens.digest,
        "folder": str(Path(getattr(tokens.train, "filename", args.path)).parent),
    }
    if args.json:
        print(json.dumps(meta))
        return 0
    print(_told(args.path, meta))
    if tokens.tokenizer == "bytes":
        print(f"begins   {bytes(tokens.train[:72].tolist())!r}")
    return 0


def _told(where: str, meta: dict) -> str:
    documents = f"{meta['documents']:,} documents, " if "documents" in meta else ""
    return (
        f"{where}: {documents}{meta['train_tokens']:,} training tokens and {meta['holdout_tokens']:,} held out\n"
        f"tokens   {meta['tokenizer']}, vocabulary {meta['vocab']:,}\ndigest   {meta['digest']}"
    )
