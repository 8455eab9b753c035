"""Fixtures that more than one folder of tests uses."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.azurite import Azurite, needs_azurite


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


@pytest.fixture(scope="session")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    """A real Azurite with a container `runs`; skips where it is not installed."""
    needs_azurite()
    with Azurite(tmp_path_factory.mktemp("azurite")) as service:
        service.create("runs")
        yield service
