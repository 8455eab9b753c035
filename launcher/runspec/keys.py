"""What a key of run.yaml may hold, and the section that every part of it is: frozen, without unknown keys.

Counts are whole numbers and may be written 2.5e9.
"""

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

NAME = r"^[a-z0-9][a-z0-9-]{0,62}$"
AZ_URL = re.compile(r"az://[a-z0-9]{3,24}/[a-z0-9](?:[a-z0-9-]{1,61}[a-z0-9])(?:/[^\s]*)?")
"""az://account/container[/prefix]: Azure's own rules for account and container names."""


def whole(value: Any) -> Any:
    """2.5e9 is a float to YAML and a count to us; 2.5 stays what it is and is refused."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def no_flag(value: Any) -> Any:
    """A choice of numbers that `true`, which Python holds equal to 1, is none of."""
    return str(value).lower() if isinstance(value, bool) else value


def as_tuple(value: Any) -> Any:
    """YAML's lists are tuples here, since specs are frozen."""
    return tuple(value) if isinstance(value, list) else value


Count = Annotated[int, Field(le=2**53), BeforeValidator(whole)]
"""Exact as a float too, since it travels as JSON."""
Positive = Annotated[Count, Field(ge=1)]
Natural = Annotated[Count, Field(ge=0)]
Ranks = Annotated[Count, Field(ge=1, le=1_000_000)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Text = Annotated[str, StringConstraints(min_length=1)]


class Part(BaseModel):
    """A section of run.yaml: frozen, refuses unknown keys, converts nothing silently."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
