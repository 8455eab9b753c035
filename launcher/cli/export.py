"""`losscast export RUN -o FILE.safetensors`: the weights of a verified checkpoint, for whoever uses the model."""

import argparse
import json
import sys
from typing import Any

from launcher.cli.finding import RUN_HELP


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "export",
        help="write a verified checkpoint's weights as safetensors",
        description="Verify a committed checkpoint byte by byte, put its shards together, and write the weights as one safetensors "
        "file: no pickle for whoever loads it.",
    )
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument("--output", "-o", required=True, metavar="FILE", help="the file to write")
    parser.add_argument(
        "--step", type=int, metavar="N", help="of this step (default: the newest that verifies)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="default %(default)s"
    )
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    from launcher.cli.finding import folder_of
    from launcher.storage.export import export
    from monitor.errors import writing

    folder = folder_of(args.run)
    with writing(args.output):
        written = export(
            folder, args.output, step=args.step, dtype=args.dtype,
            say=lambda message: print(message, file=sys.stderr),
        )  # fmt: skip
    if args.json:
        print(json.dumps(written))
    else:
        print(
            f"{written['file']}: {written['parameters']:,} parameters of step {written['step']}, {written['dtype']}, "
            f"{written['bytes'] / 1e6:.1f} MB"
        )
    return 0
