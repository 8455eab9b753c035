"""A run's spec: sections that can run together. A `RunSpec` that exists can run.

To read a file, with file:line:col in its errors, see `launcher.runspec.file`.
"""

import hashlib
import json
from typing import Any, Self

from pydantic import ValidationError, model_validator

from launcher.errors import WrongInput
from launcher.runspec.checks import impossible
from launcher.runspec.cluster import Cluster, Kubernetes, Nodes, Toleration, Volume
from launcher.runspec.keys import AZ_URL, NAME, Count, Natural, Part, Positive, Rate, Text
from launcher.runspec.problem import Impossible
from launcher.runspec.sections import (
    Checkpoints,
    Data,
    Eval,
    Monitor,
    Optimizer,
    Parallel,
    Policy,
    Schedule,
    Sections,
    Train,
)
from launcher.runspec.wording import word
from launcher.runspec.workload import Entrypoint, Gpt, Workload

__all__ = [
    "AZ_URL", "NAME", "Checkpoints", "Cluster", "Count", "Data", "Entrypoint", "Eval", "Gpt", "Kubernetes", "Monitor", "Natural",
    "Nodes", "Optimizer", "Parallel", "Part", "Policy", "Positive", "Rate", "RunSpec", "Schedule", "Text", "Toleration", "Train",
    "Volume", "Workload",
]  # fmt: skip


class RunSpec(Sections):
    """One run, complete and possible."""

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        problems = impossible(self)
        if problems:
            raise Impossible(problems)
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, every default written out; `from_dict` gives an equal spec."""
        body = self.model_dump(mode="json")
        if self.policy.paces is None:
            del body["policy"]["paces"]  # so that specs written before there was the key keep their digest
        return body

    @classmethod
    def from_dict(cls, data: Any) -> "RunSpec":
        """The spec from plain data. Raises WrongInput naming every problem by its path."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            lines = [f"{p.path}: {p.message}" for p in word(error, data)]
            raise WrongInput("the run spec can't be used:\n" + "\n".join(lines)) from None

    @property
    def digest(self) -> str:
        """sha256 over the canonical JSON of `to_dict()`: two specs with one digest are one spec."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()
