"""What a launch may fail with. A message says what, where, why and what to do instead."""


class WrongInput(ValueError):
    """The input can't be used as it is: a spec, a flag, a value."""

    exit_status = 2


class Failed(RuntimeError):
    """The input was fine and the work could not be done."""

    exit_status = 1


class Held(RuntimeError):
    """Somebody else holds the run. The message says who, and since when."""

    exit_status = 75
