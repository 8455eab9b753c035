"""The small runs of a law: one base spec, rungs that change a few keys of it, all on the same data order.

    name: gpt-bytes
    tokens_per_param: 60          # optional: train.tokens of a rung that states none
    at_once: 2                    # runs in flight, wherever they wait; default as many as the cluster has room for
    base: {...}                   # a run.yaml without what the rungs say
    rungs:
      - {workload: {width: 8}}
      - {workload: {width: 12}}

A rung's name is the ladder's and what it changes, so a second `losscast ladder` finds the runs that are finished,
follows those that still run, and makes only the others (`launcher.jobs.climbing`).
"""

import copy
import difflib
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from launcher.errors import WrongInput
from launcher.runspec.accounting import parameter_count
from launcher.runspec.document import Complaint, Document, read_document
from launcher.runspec.keys import NAME, Positive, Rate
from launcher.runspec.model import RunSpec
from launcher.runspec.wording import shown, value_error, word


class Ladder(BaseModel):
    """A ladder file, checked but not yet expanded."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Annotated[str, Field(pattern=NAME)]
    tokens_per_param: Rate | None = None
    at_once: Positive | None = None
    base: dict[str, Any]
    rungs: Annotated[list[dict[str, Any]], Field(min_length=1)]


def merged(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with every key of `change`, sections merged key by key."""
    out = copy.deepcopy(dict(base))
    for key, value in change.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = merged(out[key], value) if both else copy.deepcopy(value)
    return out


def specs_of(ladder: Ladder, document: Document | None = None) -> list[RunSpec]:
    """Every rung as a run of its own, in the ladder's order.

    document   the file it was read from: problems then have their line. Raises WrongInput naming the rung that can't be.
    """
    specs: list[RunSpec] = []
    complaints: list[Complaint] = []
    for number, rung in enumerate(ladder.rungs):
        data = merged(ladder.base, rung)
        data.setdefault("name", f"{ladder.name}-{_tail(rung) or number}")
        try:
            specs.append(RunSpec.model_validate(_with_tokens(ladder, data)))
        except ValidationError as error:
            found = word(error, data)
            if document is None:
                lines = "\n".join(f"{c.path}: {c.message}" for c in found)
                raise WrongInput(f"rungs[{number}]: {lines}") from None
            complaints += [_placed(c, number, document) for c in found]
        except WrongInput as error:
            raise WrongInput(f"rungs[{number}]: {error}") from None
    if complaints and document is not None:
        raise document.refuse(
            list(dict.fromkeys(complaints))
        )  # one of the base is one, however many rungs there are
    names = [s.name for s in specs]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        if document is not None:
            said = "two rungs would be called {}. Give each a `name` of its own."
            raise document.refuse(
                [Complaint(("rungs", i), said.format(n)) for i, n in enumerate(names) if n in twice]
            )
        raise WrongInput(f"rungs: {', '.join(twice)}: two rungs of that name. Give each a `name`.")
    where = sorted({s.cluster.to for s in specs})
    if len(where) > 1:
        raise WrongInput(
            f"rungs: they go to {' and '.join(where)}, and a ladder has one cluster. Set cluster.to in the base."
        )
    return specs


def _with_tokens(ladder: Ladder, data: dict[str, Any]) -> dict[str, Any]:
    """The rung with its tokens, where the ladder gives them by the parameter and it states none itself."""
    train = data.get("train")
    if not ladder.tokens_per_param or not isinstance(train, dict) or "tokens" in train:
        return data
    probe = RunSpec.model_validate(merged(data, {"train": {"tokens": train.get("batch_tokens")}}))
    params = parameter_count(probe)
    if params is None:
        raise WrongInput(
            "tokens_per_param needs a workload whose parameters are known; give train.tokens instead"
        )
    batch = probe.train.batch_tokens
    steps = max(1, round(ladder.tokens_per_param * params / batch))
    return merged(data, {"train": {"tokens": steps * batch}})


def _placed(complaint: Complaint, number: int, document: Document) -> Complaint:
    """A complaint about a rung where its key was written: in the rung itself, or in the base."""
    for start in (("rungs", number), ("base",)):
        loc = (*start, *complaint.loc)
        if loc in document.keys or loc in document.values:
            return replace(complaint, loc=loc)
    return replace(complaint, loc=("base", *complaint.loc))


def _tail(change: Mapping[str, Any]) -> str:
    """A rung's changes as the end of a name: {workload: {width: 8}} is w8."""
    parts = []
    for key, value in change.items():
        if isinstance(value, Mapping):
            parts.append(_tail(value))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            parts.append(f"{key[0]}{value:g}".replace(".", "-").replace("+", ""))
    return "-".join(p for p in parts if p)


def read_ladder(data: Any, source: str, document: Document | None = None) -> Ladder:
    """The ladder in plain data. Raises WrongInput with every problem, at its line where the document is given."""
    if isinstance(data, dict) and "rungs" not in data and "train" in data:
        raise WrongInput(f"{source}: this is a run, not a ladder. Give it to `losscast submit`.")
    try:
        return Ladder.model_validate(data)
    except ValidationError as error:
        complaints = [
            Complaint(e["loc"], _said(e), at_key=e["type"] == "extra_forbidden") for e in error.errors()
        ]
        if document is not None:
            raise document.refuse([*document.complaints, *complaints]) from None
        raise WrongInput("\n".join(f"{source}: {c.path}: {c.message}" for c in complaints)) from None


def _said(error: Any) -> str:
    """One of pydantic's errors about a ladder's own keys, in our words."""
    keys, key = ", ".join(Ladder.model_fields), str(error["loc"][-1]) if error["loc"] else ""
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, Ladder.model_fields, 1)
        return f"unknown key. {f'Did you mean {near[0]}?' if near else f'A ladder has {keys}.'}"
    if error["type"] == "missing":
        return f"is missing. A ladder has {keys}."
    change = "a mapping of what the rung changes, such as `{workload: {width: 16}}`"
    if error["type"] == "list_type":
        return f"need a list of rungs, each {change}; got {shown(error['input'])}."
    if error["type"] == "too_short":
        return f"is empty, and a ladder has at least one rung: {change}."
    if error["type"] in ("dict_type", "model_type"):
        needs = "what all rungs share, such as workload:, data: and train:" if key == "base" else change
        return f"need {needs if error['loc'] else 'keys such as name:, base: and rungs:'}; got {shown(error['input'])}."
    return value_error(error["type"], error["input"], error.get("ctx", {}), key, error["msg"])


def read_file(path: str) -> tuple[Ladder, list[RunSpec]]:
    """A ladder file and its runs. Raises WrongInput with every problem, each as file:line:col."""
    document = read_document(path)
    if document.complaints:
        raise document.refuse(document.complaints)
    ladder = read_ladder(document.data, path, document)
    return ladder, specs_of(ladder, document)
