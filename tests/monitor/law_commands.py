"""`losscast fit` and `losscast predict`, run in this process."""

import argparse

from monitor.cli import fit as fit_command
from monitor.cli import predict as predict_command


def run(*argv: str) -> int:
    """The exit status of one command; what it refuses is raised."""
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    fit_command.register(commands)
    predict_command.register(commands)
    args = parser.parse_args(argv)
    return args.func(args)
