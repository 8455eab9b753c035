"""Fixtures that more than one folder of tests uses."""

import gc
from collections.abc import Iterator
from typing import Any

import pytest

from tests.azurite import Azurite, needs_azurite

TRAINING = frozenset(
    {
        "tests/e2e/test_demo.py",
        "tests/e2e/test_kuberay_pods.py",
        "tests/e2e/test_operations.py",
        "tests/e2e/test_own_training.py",
        "tests/e2e/test_submitting_kinds.py",
        "tests/e2e/test_training.py",
        "tests/e2e/test_training_on_blob.py",
        "tests/faults/test_hosts.py",
        "tests/faults/test_rollback.py",
        "tests/faults/test_training.py",
        "tests/faults/test_world.py",
        "tests/launcher/test_ladder_kuberay.py",
    }
)
"""Files whose tests keep several processes busy at once, most of them ranks under a Ray: two of these beside each other stretch every
time-out there is, Ray's own first of all."""


def pytest_collection_finish() -> None:
    """What was imported is no garbage: on a busy machine to go over all of it takes seconds, in the middle of some test that looks
    at the clock."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: Any, log: Any) -> Any:
    """With `--dist loadfile`: a file at a time in each process, and the files that train all in one process."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class OneTrainsAtATime(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "training" if file in TRAINING else file

    return OneTrainsAtATime(config, log)


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
