"""Faults put in on purpose, to see that the monitor calls them: a fire drill for a training run.

    LOSSCAST_DRILL="lr*30@2400"   from step 2400 on, the learning rate is 30 times what the schedule says
    LOSSCAST_DRILL="nan@2400"     at step 2400 the loss, and with it every gradient, becomes NaN
    LOSSCAST_DRILL="crash@2400"   at step 2400 rank 0 raises an error, in every attempt that gets there
    LOSSCAST_DRILL="hang@2400"    at step 2400 of the first attempt rank 0 stops for good

Read from the environment by the workers, never part of a spec: a drill must not travel with a file that somebody
else submits. Nothing is announced to the monitor, since a real fault would not be.
"""

import re
import time
from dataclasses import dataclass

from launcher.errors import WrongInput

VARIABLE = "LOSSCAST_DRILL"
FORM = re.compile(r"(?:(nan|crash|hang)|lr\*(\d+(?:\.\d+)?))@(\d+)")


class DrillCrash(RuntimeError):
    """The error of a crash drill."""


@dataclass(frozen=True)
class Drill:
    """What goes wrong, and from which step on (optimizer updates, counted from 1)."""

    step: int | None = None
    lr_factor: float = 1.0
    nan: bool = False
    crash: bool = False
    hang: bool = False

    def lr(self, step: int, lr: float) -> float:
        """The learning rate that is really used at `step`."""
        return lr * self.lr_factor if self.step is not None and step >= self.step else lr

    def poisons(self, step: int) -> bool:
        """True at the one step whose loss becomes NaN."""
        return self.nan and step == self.step

    def strike(self, step: int, rank: int, attempt: int) -> None:
        """Called by every rank as a step begins. Raises DrillCrash, or never returns, where that is the drill."""
        if step != self.step or rank != 0:
            return
        if self.crash:
            raise DrillCrash(f"on purpose, at step {step}, attempt {attempt}")
        while self.hang and attempt == 1:
            time.sleep(1.0)


def read_drill(text: str | None) -> Drill:
    """The drill that a value of LOSSCAST_DRILL asks for; none for an empty one. Raises WrongInput."""
    if not text:
        return Drill()
    match = FORM.fullmatch(text.strip())
    if match is None:
        raise WrongInput(
            f"{VARIABLE}={text!r}: no drill of that form. Use lr*FACTOR@STEP, nan@STEP, crash@STEP or hang@STEP, as in lr*30@2400."
        )
    kind, factor, step = match.groups()
    return Drill(
        step=int(step),
        lr_factor=float(factor or 1),
        nan=kind == "nan",
        crash=kind == "crash",
        hang=kind == "hang",
    )
