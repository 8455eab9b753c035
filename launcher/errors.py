"""What a launch may fail with. A message says what, where, why and what to do instead, and `one_line` is how others' errors
become part of one."""

import sys


class WrongInput(ValueError):
    """The input can't be used as it is: a spec, a flag, a value."""

    exit_status = 2


class Failed(RuntimeError):
    """The input was fine and the work could not be done."""

    exit_status = 1


class Held(RuntimeError):
    """Somebody else holds the run. The message says who, and since when."""

    exit_status = 75


def one_line(said: object, most: int = 300, *, first: bool = False) -> str:
    """An error, or what something said, as one line of at most `most` characters; an error without words by its type's name.

    first   its first line that is not empty, for libraries that put a trace after it
    """
    lines = [" ".join(line.split()) for line in str(said).splitlines() if line.strip()]
    text = " ".join(lines[:1] if first else lines)
    if not text and isinstance(said, BaseException):
        return type(said).__name__
    return text if len(text) <= most else text[: most - 4] + " ..."


def say(message: str) -> None:
    """Tell a person, on stderr."""
    print(f"losscast: {message}", file=sys.stderr, flush=True)
