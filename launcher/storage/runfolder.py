"""Where everything of one run lies on disk, so that no other file spells a path.

RUN/spec.json                  the spec of the newest submission, every default written out
RUN/prediction.json            what was predicted before the run started, and its digest
RUN/log/<n>.json               attempts and committed checkpoints, one sequence (`launcher.storage.runlog`)
RUN/attempts/<k>/curve.csv     every step of attempt k, in the form that `fit` and `replay` read
RUN/attempts/<k>/spool/        samples that the monitor has not taken yet
RUN/attempts/<k>/checkpoints/  what DeepSpeed wrote; whole only when the log says so
RUN/output, attempts/<k>/output what jobs and ranks printed, and how they ended (`launcher.storage.output`)
RUN/result.json                the finished run: one row of a law's points
RUN/stop                       somebody asked the run to stop at the next step

A run whose `checkpoints.url` is az://... has its log, its checkpoints and copies of the JSON documents there, and on each
machine a folder like this one to work in (`launcher.storage.remote` moves things between the two).
"""

import contextlib
import csv
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import WrongInput


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run. Making the object touches nothing."""

    path: Path
    url: str | None = None
    """az://... of the run where its truth lies there; `path` is then this machine's own place to work in."""

    @classmethod
    def of(cls, url: str, name: str) -> "RunFolder":
        """The folder of run `name` under a spec's `checkpoints.url`. Raises WrongInput for what is no folder."""
        return cls.at(url.rstrip("/") + "/" + name)

    @classmethod
    def at(cls, address: str) -> "RunFolder":
        """The folder of the run at an address: a path, or az://account/container/prefix/name."""
        if address.startswith("az://"):
            parts = address.removeprefix("az://").strip("/").split("/")
            if len(parts) < 3 or any(part in ("", ".", "..") for part in parts):
                raise WrongInput(f"{address}: no run is there. Give az://account/container/prefix/name.")
            return cls(work_folder().joinpath(*parts), "az://" + "/".join(parts))
        if "://" in address:
            raise WrongInput(
                f"checkpoints.url: {address}: no storage is called {address.split('://')[0]}://. "
                "Give a folder, or az://account/container/prefix."
            )
        return cls(Path(address).expanduser().resolve())

    @property
    def address(self) -> str:
        """What `at` makes this folder of again, on any machine that sees the same storage."""
        return self.url or str(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def spec(self) -> Path:
        return self.path / "spec.json"

    @property
    def prediction(self) -> Path:
        return self.path / "prediction.json"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def stop(self) -> Path:
        return self.path / "stop"

    def attempt(self, number: int) -> Path:
        return self.path / "attempts" / str(number)

    def curve(self, number: int) -> Path:
        return self.attempt(number) / "curve.csv"

    def whole_curve(self) -> list[list[str]]:
        """Every step of the run, heading first, as one curve: where attempts overlap the newest is the truth."""
        heading: list[str] = []
        rows: list[list[str]] = []
        for number in self.attempts():
            if not self.curve(number).exists():
                continue
            with self.curve(number).open(newline="") as file:
                heading, *fresh = list(csv.reader(file)) or [[]]
            fresh = [r for r in fresh if len(r) == len(heading)]  # a killed process may have left half a line
            if fresh:
                at = heading.index("step")
                rows = [r for r in rows if int(r[at]) < int(fresh[0][at])] + fresh
        return [heading, *rows]

    def attempts(self) -> list[int]:
        """Numbers of the attempts that have left anything here, oldest first."""
        folder = self.path / "attempts"
        return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def work_folder() -> Path:
    """Where this machine works on runs whose truth lies elsewhere: LOSSCAST_WORK, or the user's state folder."""
    base = os.environ.get("LOSSCAST_WORK") or os.path.join(
        os.environ.get("XDG_STATE_HOME") or "~/.local/state", "losscast", "work"
    )
    return Path(base).expanduser().resolve()


def write_whole(path: Path, document: Any) -> None:
    """Write JSON so that a reader finds the old document or the new one, never half of one; on disk when it returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with scratch.open("w") as file:
            json.dump(document, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except OSError:
        with contextlib.suppress(OSError):
            scratch.unlink()  # it would only keep a full disk full
        raise


def read_json(path: Path) -> Any | None:
    """The document at `path`, None where there is none. Raises WrongInput for one that is damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise WrongInput(f"{path}: damaged ({error}). Remove it if the run can do without it.") from error


def last_step(folder: RunFolder, attempt: int) -> int:
    """The last step that the attempt recorded, 0 where it recorded none."""
    try:
        with folder.curve(attempt).open("rb") as file:
            file.seek(max(0, os.path.getsize(file.name) - 4096))
            for line in reversed(file.read().splitlines()):
                fields = line.split(b",")
                if len(fields) > 2 and fields[1].isdigit():
                    return int(fields[1])
    except OSError:
        pass
    return 0


def steps_after(folder: RunFolder, attempt: int, step: int) -> list[tuple[int, float]]:
    """Steps after `step` that the attempt recorded, oldest first, each with when (seconds since the epoch). Reads no more of
    the curve than it has to, from its end."""
    span = 1 << 16
    try:
        with folder.curve(attempt).open("rb") as file:
            size = os.path.getsize(file.name)
            while True:
                file.seek(max(0, size - span))
                *whole, _ = file.read().split(b"\n")
                rows = [row for line in whole if (row := _row(line)) is not None]
                if span >= size or (rows and rows[0][0] <= step):
                    return [row for row in rows if row[0] > step]
                span *= 8
    except OSError:
        return []


def _row(line: bytes) -> tuple[int, float] | None:
    """Step and time of a curve's line; None for its heading, and for what is not a whole line."""
    fields = line.strip().split(b",")
    try:
        return (int(fields[1]), float(fields[8])) if len(fields) == 9 else None
    except ValueError:
        return None
