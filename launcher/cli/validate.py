"""`losscast validate`: whether run.yaml can run, and what to change where it can't."""

import argparse
import json
import sys


def register(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    from launcher.cli import schema

    parser = commands.add_parser(
        "validate",
        help="check run.yaml, without touching a machine or a network",
        description="Check specs. Every problem is printed as file:line:col path: what, why, what instead; exit 2.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run.yaml")
    parser.add_argument("--strict", action="store_true", help="treat warnings as errors")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(func=validate)
    schema.register(commands)


def validate(args: argparse.Namespace) -> int:
    """Check each file; 2 when any can't run."""
    from launcher.errors import WrongInput
    from launcher.plan.plan import warnings
    from launcher.runspec.document import Complaint, located, read_document
    from launcher.runspec.file import spec_in

    answers, wrong = [], False
    for path in args.runs:
        answer: dict = {"file": path, "ok": True, "digest": None, "problems": [], "warnings": []}
        answers.append(answer)
        try:
            document = read_document(path)
            spec = spec_in(document)
            answer["digest"] = spec.digest
            doubts = [Complaint.of(k, p.message) for p in warnings(spec) for k in p.keys[:1]]
            answer["warnings"] = [located(document, c) for c in doubts]
            if not args.json:
                for doubt in doubts:
                    print(f"warning: {document.render(doubt)}", file=sys.stderr)
                print(f"{path}: ok ({spec.digest[:19]})")
            answer["ok"] = not (doubts and args.strict)
        except WrongInput as error:
            answer["ok"] = False
            answer["problems"] = getattr(error, "problems", None) or [{"message": str(error)}]
            if not args.json:
                print(f"losscast: {error}", file=sys.stderr)
        wrong |= not answer["ok"]
    if args.json:
        print(json.dumps({"ok": not wrong, "files": answers}, indent=2))
    return 2 if wrong else 0
