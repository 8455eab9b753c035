"""Strict validation of manifests, as fixtures: custom resources by their published schemas, core kinds by kubernetes-validate.

The schemas are not part of this repository: LOSSCAST_CRDS names their folder, and beside it lies the validator that
applies defaults, refuses unknown fields and evaluates CEL rules. Without them the tests skip and say so.
"""

import copy
import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Check = Callable[[dict[str, Any]], list[str]]
CORE_VERSION = "1.32"
"""Of Kubernetes: the oldest that AKS supports when this was written."""


@functools.cache
def _tool() -> Any:
    folder = os.environ.get("LOSSCAST_CRDS")
    if not folder:
        return "LOSSCAST_CRDS is not set: no schemas of KubeRay, Kueue and the Prometheus operator to validate against"
    path = Path(folder).resolve().parent / "tools" / "validate_manifests.py"
    if not path.exists():
        return f"{path}: no validator beside the schemas"
    for name in ("jsonschema", "celpy"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
    spec = importlib.util.spec_from_file_location("validate_manifests", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def _schemas() -> dict[Any, Any]:
    return _tool().schemas()


def custom(found: dict[str, Any]) -> list[str]:
    """What is wrong with a custom resource. Raises KeyError for a kind without a schema."""
    import jsonschema

    tool = _tool()
    schema, raw = _schemas()[(found["apiVersion"], found["kind"])]
    whole = tool.with_defaults(copy.deepcopy(found), raw)
    errors = [
        f"{'.'.join(map(str, e.absolute_path))}: {e.message[:300]}"
        for e in jsonschema.Draft7Validator(schema).iter_errors(whole)
    ]
    return errors + list(tool.rules(whole, raw))


def builtin(found: dict[str, Any]) -> list[str]:
    """What is wrong with an object of a core kind."""
    import kubernetes_validate

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            kubernetes_validate.validate(found, CORE_VERSION, strict=True)
        except kubernetes_validate.ValidationError as error:
            return [f"{'.'.join(map(str, error.path))}: {error.message[:300]}"]
    return []


def custom_or_skip() -> Check:
    tool = _tool()
    if isinstance(tool, str):
        pytest.skip(tool)
    return custom


def builtin_or_skip() -> Check:
    pytest.importorskip("kubernetes_validate")
    return builtin
