"""Fixtures that more than one folder of tests uses."""

from typing import Any

import pytest


@pytest.fixture
def crds() -> Any:
    """Errors of a custom resource by its published schema; skips where the schemas are not at hand."""
    from tests.k8s.schemas import custom_or_skip

    return custom_or_skip()


@pytest.fixture
def core() -> Any:
    """Errors of an object of a core kind; skips without kubernetes-validate."""
    from tests.k8s.schemas import builtin_or_skip

    return builtin_or_skip()
