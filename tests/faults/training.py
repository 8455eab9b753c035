"""A real training run on a real Ray cluster of this machine, and ways to break it. Not a test itself."""

import contextlib
import csv
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.errors import Failed
from launcher.jobs import local_ray
from launcher.jobs.submit import Submission, logs, status, submit
from launcher.runspec.file import read_spec
from launcher.runspec.model import RunSpec
from launcher.storage.runfolder import RunFolder

SPEC = """
name: {name}
workload: {{kind: gpt, layers: 2, width: 12, heads: 1, context: 32}}
data: {{path: stdlib, holdout_tokens: 8192}}
train: {{tokens: {tokens}, batch_tokens: 256, lr: 0.03, lr_base_width: 16, schedule: {{kind: linear, warmup_tokens: 1024}}, seed: 3}}
parallel: {{dp: {dp}, zero: {zero}}}
checkpoints: {{url: {runs}, every_steps: {every}, keep: {keep}}}
{more}
"""
PATIENCE_S = 180.0
"""For whatever must happen at all: the machine may be busy."""


def spec_of(
    folder: Path,
    name: str,
    *,
    steps: int,
    every: int = 20,
    keep: int = 3,
    dp: int = 2,
    zero: int = 1,
    more: str = "",
) -> RunSpec:
    path = folder / f"{name}.yaml"
    text = SPEC.format(
        name=name,
        tokens=steps * 256,
        dp=dp,
        zero=zero,
        runs=folder / "runs",
        every=every,
        keep=keep,
        more=more,
    )
    path.write_text(text)
    return read_spec(path)


def until(what: Callable[[], Any], why: str, patience_s: float = PATIENCE_S) -> Any:
    """Wait for a truthy answer, and return it."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        found = what()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {patience_s:.0f} s: {why}")


def command_line(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def parent(pid: int) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


@dataclass
class Run:
    """A run that was submitted."""

    spec: RunSpec
    job: Submission
    head: local_ray.Head
    killed: list[int] = field(default_factory=list)

    @property
    def folder(self) -> RunFolder:
        return RunFolder.at(self.job.folder)

    def log(self) -> str:
        return logs(self.job, self.head.environment())

    def state(self) -> str:
        return status(self.job, self.head.environment())

    def ended(self) -> str:
        """Wait for the end, for as long as the run makes steps; the state it ended in."""
        recorded, since = -1, time.monotonic()
        while (state := self.state()) not in ("SUCCEEDED", "FAILED", "STOPPED"):
            now = sum(
                self.folder.curve(k).stat().st_size
                for k in self.folder.attempts()
                if self.folder.curve(k).exists()
            )
            if now != recorded:
                recorded, since = now, time.monotonic()
            assert time.monotonic() - since < PATIENCE_S, f"neither ended nor goes on:\n{self.log()[-3000:]}"
            time.sleep(0.2)
        return state

    def goes_on(self, attempt: int) -> None:
        """Wait for a step of that attempt."""

        def step() -> bool:
            if self.steps(attempt):
                return True
            assert self.state() in ("PENDING", "RUNNING"), (
                f"it ended without attempt {attempt}:\n{self.log()[-3000:]}"
            )
            time.sleep(0.2)
            return False

        until(step, f"a step of attempt {attempt}")

    def steps(self, attempt: int) -> list[dict[str, str]]:
        """What the attempt has recorded."""
        try:
            with self.folder.curve(attempt).open(newline="") as file:
                return [row for row in csv.DictReader(file) if row.get("time")]
        except OSError:
            return []

    def reached(self, step: int, attempt: int) -> None:
        """Wait until the attempt has recorded a step as far as that."""
        until(
            lambda: (rows := self.steps(attempt)) and int(rows[-1]["step"]) >= step,
            f"step {step} of attempt {attempt}; it is {self.state()}",
        )

    def losses(self) -> dict[int, float]:
        """Loss by step of the whole run, every attempt considered."""
        heading, *rows = self.folder.whole_curve()
        step, loss = heading.index("step"), heading.index("loss")
        return {int(r[step]): float(r[loss]) for r in rows}

    def warm(self) -> list[int]:
        """The warm processes of this cluster's ranks, by id."""
        family = local_ray.descendants(self.head.pid)
        return [p for p in family if "launcher.training.warm" in command_line(p)]

    def training(self) -> list[int]:
        """The processes that train: children of warm ones."""
        warm = self.warm()
        return [p for p in warm if parent(p) in warm and local_ray.still_runs(p)]

    def actors(self) -> list[int]:
        """The actors whose ranks train; one that only stands by is not among them."""
        return sorted({parent(parent(p)) for p in self.training()})

    def standby(self) -> list[int]:
        """Warm processes of actors that stand by."""
        busy = set(self.training()) | {parent(p) for p in self.training()}
        return sorted(set(self.warm()) - busy)

    def kill(self, pid: int, number: int = signal.SIGKILL) -> None:
        self.killed.append(pid)
        os.kill(pid, number)


@contextlib.contextmanager
def cluster(home: Path, cpus: int = 2, env: dict[str, str] | None = None) -> Iterator[local_ray.Head]:
    head = local_ray.start(home, cpus=cpus, extra_env=env)
    try:
        yield head
    finally:
        local_ray.stop(head)


def start(spec: RunSpec, head: local_ray.Head, env: dict[str, str] | None = None) -> Run:
    cache = {"LOSSCAST_CACHE": os.environ.get("LOSSCAST_CACHE", "")}

    def job() -> Submission | None:
        try:
            return submit(spec, head.dashboard, head.environment(), env={**cache, **(env or {})})
        except Failed as error:  # the Jobs API answers before its agent does, on a busy machine
            if "No available agent" not in str(error):
                raise
            time.sleep(1.0)
            return None

    return Run(spec, until(job, "a cluster that takes a job"), head)
