"""run.yaml's JSON Schema (draft 2020-12), every key with what it means.

It says a little less than `validate` does: combinations of keys are not in it.
"""

import ast
import inspect
from typing import Any

from launcher.runspec import cluster, sections, workload
from launcher.runspec.model import RunSpec


def json_schema() -> dict[str, Any]:
    """The schema as plain data."""
    schema = RunSpec.model_json_schema(mode="validation")
    documents = _documents()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "losscast run.yaml"
    for name, section in [("Sections", schema), *schema.get("$defs", {}).items()]:
        for key, about in section.get("properties", {}).items():
            if (text := documents.get((name, key))) is not None:
                about["description"] = text
            about.pop("title", None)
        section.pop("title", None) if section is not schema else None
    nodes = schema["$defs"]["Cluster"]["properties"]["nodes"]
    reference = {k: nodes.pop(k) for k in ("$ref", "allOf") if k in nodes}
    nodes["anyOf"] = [{"type": "integer", "minimum": 1}, reference]
    nodes["default"] = 1
    schema["$defs"]["Train"]["properties"]["precision"].pop("default")  # it depends on the cluster
    return _standard(schema)


def _standard(node: Any) -> Any:
    """The schema with pydantic's own words for bounds, which it leaves on converted numbers, as JSON Schema's."""
    if isinstance(node, list):
        return [_standard(item) for item in node]
    if not isinstance(node, dict):
        return node
    bounds = {"ge": "minimum", "le": "maximum", "gt": "exclusiveMinimum", "lt": "exclusiveMaximum"}
    return {bounds.get(k, k) if isinstance(v, (int, float)) else k: _standard(v) for k, v in node.items()}


def _documents() -> dict[tuple[str, str], str]:
    """(section, key) to the text under the key, where the section's class is written."""
    found: dict[tuple[str, str], str] = {}
    written = [
        node for module in (workload, cluster, sections) for node in ast.parse(inspect.getsource(module)).body
    ]
    for node in written:
        if not isinstance(node, ast.ClassDef):
            continue
        key = None
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                key = item.target.id
            elif key and isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant):
                found[node.name, key] = " ".join(str(item.value.value).split())
                key = None
            else:
                key = None
    return found
