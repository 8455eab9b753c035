"""The small runs of a law: one base spec, rungs that change a few keys of it, all on the same data order.

    name: gpt-bytes
    tokens_per_param: 60          # optional: train.tokens of a rung that states none
    at_once: 2                    # runs in flight
    base: {...}                   # a run.yaml without what the rungs say
    rungs:
      - {workload: {width: 8}}
      - {workload: {width: 12}}

A rung's name is the ladder's and what it changes, so a second `losscast ladder` finds the runs that are finished
and makes only the others. One rung that fails does not lose the rest.
"""

import copy
import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from launcher.accounting import parameter_count
from launcher.errors import WrongInput
from launcher.runfolder import RunFolder, last_step, read_json
from launcher.spec import NAME, RunSpec
from launcher.submit import ENDED, Submission, end_job, status, submit


class Ladder(BaseModel):
    """A ladder file, checked but not yet expanded."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=NAME)]
    tokens_per_param: Annotated[float, Field(gt=0)] | None = None
    at_once: Annotated[int, Field(ge=1)] = 1
    base: dict[str, Any]
    rungs: Annotated[list[dict[str, Any]], Field(min_length=1), BeforeValidator(lambda v: v)]


@dataclass(frozen=True)
class Rung:
    """One small run and where it stands: waiting, running, finished, failed."""

    spec: RunSpec
    folder: RunFolder
    state: str = "waiting"

    @property
    def step(self) -> int:
        attempts = self.folder.attempts()
        return last_step(self.folder, attempts[-1]) if attempts else 0


def merged(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with every key of `change`, sections merged key by key."""
    out = copy.deepcopy(dict(base))
    for key, value in change.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = merged(out[key], value) if both else copy.deepcopy(value)
    return out


def specs_of(ladder: Ladder) -> list[RunSpec]:
    """Every rung as a run of its own, in the ladder's order. Raises WrongInput naming the rung that can't be."""
    specs = []
    for number, rung in enumerate(ladder.rungs):
        data = merged(ladder.base, rung)
        data.setdefault("name", f"{ladder.name}-{_tail(rung) or number}")
        try:
            if ladder.tokens_per_param and "tokens" not in data.get("train", {}):
                probe = RunSpec.from_dict(merged(data, {"train": {"tokens": data["train"]["batch_tokens"]}}))
                params = parameter_count(probe)
                if params is None:
                    raise WrongInput(
                        "tokens_per_param needs a workload whose parameters are known; give train.tokens instead"
                    )
                batch = probe.train.batch_tokens
                steps = max(1, round(ladder.tokens_per_param * params / batch))
                data = merged(data, {"train": {"tokens": steps * batch}})
            specs.append(RunSpec.from_dict(data))
        except WrongInput as error:
            raise WrongInput(f"rungs[{number}]: {error}") from None
    names = [s.name for s in specs]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise WrongInput(f"rungs: {', '.join(twice)}: two rungs of that name. Give each a `name`.")
    return specs


def _tail(change: Mapping[str, Any]) -> str:
    """A rung's changes as the end of a name: {workload: {width: 8}} is w8."""
    parts = []
    for key, value in change.items():
        if isinstance(value, Mapping):
            parts.append(_tail(value))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            parts.append(f"{key[0]}{value:g}".replace(".", "-").replace("+", ""))
    return "-".join(p for p in parts if p)


def read_ladder(data: Any, source: str) -> Ladder:
    """The ladder in plain data. Raises WrongInput with every problem."""
    try:
        return Ladder.model_validate(data)
    except ValidationError as error:
        lines = [f"{source}: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise WrongInput("\n".join(lines)) from None


def finished(folder: RunFolder, spec: RunSpec) -> bool:
    """True when the folder holds the finished run of this very spec."""
    result = read_json(folder.result)
    return result is not None and result.get("digest") == spec.digest


def run_ladder(
    specs: list[RunSpec],
    dashboard: str,
    ray_env: Mapping[str, str],
    *,
    at_once: int = 1,
    env: Mapping[str, str] | None = None,
    tick: Callable[[list[Rung]], None] = lambda rungs: None,
    interval_s: float = 0.5,
) -> list[Rung]:
    """Make the runs that are not finished yet, the longest first, `at_once` at a time. Returns all rungs as they ended.

    An interruption ends the jobs it started; what they committed is found again by the next call.
    """
    import time

    rungs = {s.name: Rung(s, RunFolder.of(s.checkpoints.url, s.name)) for s in specs}
    for name, rung in rungs.items():
        if finished(rung.folder, rung.spec):
            rungs[name] = Rung(rung.spec, rung.folder, "finished")
    queue = sorted((r for r in rungs.values() if r.state == "waiting"), key=lambda r: -r.spec.total_steps)
    flying: dict[str, Submission] = {}
    try:
        while queue or flying:
            while queue and len(flying) < at_once:
                rung = queue.pop(0)
                flying[rung.spec.name] = submit(rung.spec, dashboard, ray_env, env=env)
                rungs[rung.spec.name] = Rung(rung.spec, rung.folder, "running")
            for name in list(flying):
                if status(flying[name], ray_env) in ENDED:
                    rung = rungs[name]
                    how = "finished" if finished(rung.folder, rung.spec) else "failed"
                    rungs[name] = Rung(rung.spec, rung.folder, how)
                    del flying[name]
            tick(list(rungs.values()))
            if flying:
                time.sleep(interval_s)
    finally:
        for submission in flying.values():
            end_job(submission, ray_env)
    return list(rungs.values())


POINT = ("run", "params", "tokens", "loss", "flops")


def result_of(rung: Rung) -> dict[str, Any]:
    """A finished rung as one row of points: run, params, tokens, loss in nats per token, flops."""
    result = read_json(rung.folder.result) or {}
    return {key: result.get(key) for key in POINT}


def write_points(rungs: list[Rung], points: Path, curves: Path) -> int:
    """Write the finished rungs as a law's points and curves (CSV). Returns how many there are."""
    done = [r for r in rungs if r.state == "finished"]
    with points.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(POINT)
        for rung in done:
            rows.writerow(list(result_of(rung).values()))
    with curves.open("w", newline="") as file:
        rows = csv.writer(file)
        for number, rung in enumerate(done):
            heading, *steps = rung.folder.whole_curve()
            rows.writerows([heading, *steps] if number == 0 else steps)
    return len(done)
