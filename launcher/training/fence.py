"""A monitor says that a newer attempt reports: is it one of this run?

The monitor knows runs by their names alone. Somebody who deleted a run's folder and began it anew, or who gave two runs in two
folders one name, has an attempt that the monitor takes for an old one; the run's own log says who may write it.
"""

import time
from collections.abc import Callable

from launcher.errors import one_line
from launcher.storage.runfolder import RunFolder

AGAIN_S = 60.0
"""Before a log that could not be read is looked at again."""


class Fence:
    """Asks the log once, and only where the monitor has refused this attempt."""

    def __init__(self, folder: RunFolder, attempt: int, say: Callable[[str], None]) -> None:
        self._folder, self._attempt, self._say = folder, attempt, say
        self._answer: bool | None = None
        self._again_s = float("-inf")

    def __call__(self, refused: bool) -> bool:
        """True where the run is another attempt's now, and this one has to stop. `refused`: the monitor's word."""
        if not refused or self._answer is not None or time.monotonic() < self._again_s:
            return bool(self._answer)
        from launcher.training.saving import run_log

        try:
            newest = run_log(self._folder).newest_attempt()
        except Exception as error:  # whatever the storage's library raises: training does not end for it
            self._again_s = time.monotonic() + AGAIN_S
            self._say(
                f"the monitor has heard of a newer attempt, and the run's log can't be read: {one_line(error)}"
            )
            return False
        self._answer = newest is not None and (newest.kind == "void" or newest.attempt != self._attempt)
        if not self._answer:
            self._say(
                f"the monitor takes no samples of this run: another run of the name {self._folder.name} has told it of a newer "
                f"attempt than {self._attempt}. Training goes on. Give one of them another name"
            )
        return self._answer
