"""The two places a run may live, for tests that must hold in both: a folder, and Azure Blob (a real Azurite)."""

import secrets
from pathlib import Path
from typing import Any

import pytest

from infra.objects import Store
from launcher.storage.store import FolderStore

BOTH = ["folder", pytest.param("blob", marks=pytest.mark.e2e)]


class Place:
    """Where the stores of one test are: every name is one place, every call a client of its own."""

    def __init__(self, kind: str, folder: Path, azurite: Any) -> None:
        self.kind, self._folder, self._azurite, self._id = kind, folder, azurite, secrets.token_hex(6)
        self.term_s = 0.5 if kind == "folder" else 4.0
        """A lease's term that the place's clock can tell: Blob's has whole seconds."""

    def store(self, name: str = "run-a", **more: Any) -> Store:
        if self.kind == "folder":
            return FolderStore(self._folder / name)
        return self._azurite.store("runs", f"{self._id}/{name}", **more)


def make_place(request: pytest.FixtureRequest, folder: Path) -> Place:
    """For a fixture parametrised over BOTH."""
    azurite = request.getfixturevalue("azurite") if request.param == "blob" else None
    return Place(request.param, folder, azurite)
