"""Every example is a run that could be submitted as it stands."""

from pathlib import Path

import pytest

from launcher.runspec.doubts import refused
from launcher.runspec.file import read_spec
from launcher.runspec.model import Entrypoint

EXAMPLES = Path(__file__).parents[2] / "examples"
RUNS = [p for p in sorted(EXAMPLES.rglob("*.yaml")) if "ladder" not in p.name and "runs" not in p.parts]


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.relative_to(EXAMPLES).as_posix())
def test_an_example_can_be_submitted(path: Path) -> None:
    spec = read_spec(path)
    assert refused(spec) == []
    if isinstance(spec.workload, Entrypoint):
        module = spec.workload.entrypoint.partition(":")[0]
        file = path.parent / (module if spec.workload.is_script else f"{module}.py")
        assert file.is_file(), "what it names is beside it"
