"""`losscast schema`: run.yaml's JSON Schema, for editors and for other tools."""

import argparse
import json


def register(commands: argparse._SubParsersAction) -> None:
    """Add the command, once."""
    if "schema" in commands.choices:
        return
    parser = commands.add_parser(
        "schema",
        help="run.yaml's JSON Schema, for your editor",
        description="Print the JSON Schema of run.yaml. In an editor with a YAML language server, put "
        "`# yaml-language-server: $schema=run.schema.json` at the top of the spec.",
    )
    parser.set_defaults(func=schema)


def schema(args: argparse.Namespace) -> int:
    """Print the schema."""
    from launcher.runspec.jsonschema import json_schema

    print(json.dumps(json_schema(), indent=2))
    return 0
