"""What a run leaves on its own disk while it trains, monitor or not, and what it finds there: its curve, and the wish to stop."""

import csv
import io
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

COLUMNS = ("run", "step", "tokens", "loss", "val_loss", "lr", "grad_norm", "params", "time")
"""Of curve.csv: what `losscast fit` and `losscast replay` read. loss in nats per token, time in seconds since the epoch."""


HELD_BYTES = 64 << 20
"""Of rows that a disk did not take yet; past this the oldest half goes."""


class Record:
    """Every step of one attempt as CSV, flushed about once a second: the run's own memory, monitor or not.

    Rows that a full disk does not take are held and written once it does: a record is not worth a run.
    """

    def __init__(self, path: Path, run: str, params: int | None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("wb", buffering=0)
        self._held = bytearray()
        self._failing = False
        self._run, self._params, self._flushed = run, params, time.monotonic()
        self._hold(COLUMNS)

    def add(
        self,
        step: int,
        tokens: int,
        loss: float,
        val: float | None,
        lr: float | None,
        norm: float | None,
    ) -> None:
        self._hold(
            (
                self._run,
                step,
                tokens,
                _short(loss),
                _short(val),
                _short(lr),
                _short(norm),
                self._params or "",
                f"{time.time():.3f}",
            )
        )
        if time.monotonic() - self._flushed > 1.0:
            self.flush()

    def _hold(self, row: Sequence[object]) -> None:
        line = io.StringIO()
        csv.writer(line).writerow(row)
        self._held += line.getvalue().encode()

    def flush(self) -> None:
        """Hand everything to the system now: it outlives this process. Never raises for the disk."""
        self._flushed = time.monotonic()
        try:
            while self._held:
                del self._held[: self._file.write(self._held)]  # all, or as much as there was room for
            self._failing = False
        except OSError as error:
            if not self._failing:
                print(
                    f"losscast: steps are recorded late, training goes on: {error}",
                    file=sys.stderr,
                    flush=True,
                )
            self._failing = True
            if len(self._held) > HELD_BYTES:
                half = self._held.find(b"\n", len(self._held) // 2) + 1
                first = self._held.find(b"\n") + 1  # it may be the rest of a line that is half written
                del self._held[first:half]

    def close(self) -> None:
        self.flush()
        self._file.close()


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.7g}"


class StopRequest:
    """Whether somebody asked the run to stop: the caller's own sign, or the run folder's `stop` file, looked for at
    most once a second, since the folder may be on a slow shared disk."""

    def __init__(self, path: Path, also: Callable[[], bool]) -> None:
        self._path, self._also, self._looked, self._seen = path, also, time.monotonic(), False

    def __call__(self) -> bool:
        now = time.monotonic()
        if not self._seen and now - self._looked > 1.0:
            self._seen, self._looked = self._path.exists(), now
        return self._seen or self._also()
