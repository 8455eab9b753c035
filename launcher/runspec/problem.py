"""A combination of keys that can't run or will disappoint, as plain data."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with some keys taken together, and what to set instead."""

    keys: tuple[str, ...]
    """Dotted paths, such as parallel.zero."""
    message: str


class Impossible(ValueError):
    """Raised inside validation; carries the problems to whoever words the error."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(f"{', '.join(p.keys)}: {p.message}" for p in problems))
        self.problems = problems
