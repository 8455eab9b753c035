"""The `losscast` command. Thin: arguments, one call, one print.

This is the one place that composes launcher and monitor. Commands live one a module, in `launcher.cli` and
`monitor.cli`, each with `register(subparsers)`; what a command needs is imported when it runs, so that
`--help` is instant.

Exit status: 0 fine, 1 failed, 2 wrong input, 3 the run is off its prediction, 75 somebody else holds the run.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

MODULES = (
    "demo",
    "validate",
    "plan",
    "schema",
    "data",
    "submit",
    "runs",
    "logs",
    "ending",
    "janitor",
    "export",
    "doctor",
    "ladder",
)


def parser() -> argparse.ArgumentParser:
    """Every command of losscast, without importing what they need."""
    from monitor.cli import MODULES as MONITOR_MODULES

    top = argparse.ArgumentParser(
        prog="losscast",
        description="Train on Ray and DeepSpeed, know the loss before you pay for it, and know within minutes "
        "when a run leaves its line.",
        epilog="exit status: 0 fine, 1 failed, 2 wrong input, 3 the run is off its prediction, "
        "75 somebody else holds the run",
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for package, names in (("launcher.cli", MODULES), ("monitor.cli", MONITOR_MODULES)):
        for name in names:
            importlib.import_module(f"{package}.{name}").register(commands)
    from monitor.cli import predict

    predict.read_run = _sizes
    return top


def _sizes(path: str) -> dict[str, Any]:
    """What `losscast predict LAW RUN` needs of a run.yaml, which the monitor does not know: params, tokens, batch_tokens."""
    from launcher.runspec.accounting import parameter_count, total_tokens
    from launcher.runspec.file import read_spec

    spec = read_spec(path)
    return {
        "params": parameter_count(spec),
        "tokens": total_tokens(spec),
        "batch_tokens": spec.train.batch_tokens,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    args = parser().parse_args(argv)
    try:
        return args.func(args)
    except KeyboardInterrupt:
        print("losscast: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away: not our failure
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f"{error.filename}: " if isinstance(error.filename, str) else ""
        print(f"losscast: {where}{error.strerror if where else error}", file=sys.stderr)
        return getattr(error, "exit_status", 1)
    except Exception as error:
        status = getattr(error, "exit_status", None)
        if status is None:
            raise
        print(f"losscast: {error}", file=sys.stderr)
        return status
