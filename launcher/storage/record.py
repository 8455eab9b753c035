"""What a run leaves on its own disk while it trains, monitor or not, and what it finds there: its curve, and the wish to stop."""

import csv
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

COLUMNS = ("run", "step", "tokens", "loss", "val_loss", "lr", "grad_norm", "params", "time")
"""Of curve.csv: what `losscast fit` and `losscast replay` read. loss in nats per token, time in seconds since the epoch."""


class Record:
    """Every step of one attempt as CSV, flushed about once a second: the run's own memory, monitor or not."""

    def __init__(self, path: Path, run: str, params: int | None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] = path.open("w", newline="")
        self._rows = csv.writer(self._file)
        self._rows.writerow(COLUMNS)
        self._run, self._params, self._flushed = run, params, time.monotonic()

    def add(
        self,
        step: int,
        tokens: int,
        loss: float,
        val: float | None,
        lr: float | None,
        norm: float | None,
    ) -> None:
        self._rows.writerow(
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

    def flush(self) -> None:
        """Hand everything to the system now: it outlives this process."""
        self._file.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
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
