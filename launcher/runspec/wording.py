"""What is wrong with a spec, in words: pydantic's errors as what, why and what instead.

Pure: an error and the data it is about go in, complaints with paths come out. Places in the file are added by
`launcher.runspec.document`.
"""

import difflib
import math
import re
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from launcher.runspec.document import Complaint, Loc
from launcher.runspec.problem import Impossible
from launcher.runspec.sections import Sections
from launcher.runspec.words import EXAMPLES, FIRST, MEANT, NOTES, SWITCHED_ON
from launcher.runspec.workload import Entrypoint, Gpt

NUMBER = r"[-+]?[0-9.]+([eE][-+]?\d+)?"


def word(error: ValidationError, data: Any) -> list[Complaint]:
    """Every problem of a failed validation, one complaint a key; a key that is only misspelt is not missing as well."""
    complaints: list[Complaint] = []
    missing: list[tuple[str, Complaint]] = []
    meant: set[str] = set()
    for item in error.errors(include_url=False):
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, Impossible):
            for problem in cause.problems:
                # a layout's sizes that nobody wrote are 1, and nothing to mend; what is missing elsewhere is
                ones = {
                    key for key in problem.keys if key.startswith("parallel.") and not _written(key, data)
                }
                keys = [key for key in problem.keys if key not in ones] or problem.keys
                complaints += [Complaint.of(key, problem.message) for key in keys]
            continue
        loc = _clean(item["loc"], data)
        complaint = _one(item, loc, data)
        if item["type"] == "missing":
            missing.append((".".join(map(str, loc)), complaint))
            continue
        if item["type"] == "extra_forbidden" and (right := _right_key(loc, data)) is not None:
            meant.add(right)
        complaints.append(complaint)
    complaints += [complaint for path, complaint in missing if path not in meant]
    return list(dict.fromkeys(complaints))


def _written(key: str, data: Any) -> bool:
    """True for a key that stands in the file; others have their default."""
    for part in key.split("."):
        if not isinstance(data, dict) or part not in data:
            return False
        data = data[part]
    return True


def _meant(loc: Loc) -> str | None:
    """The word of `MEANT` that a key is, however it joins its words."""
    key = _plain(str(loc[-1]))
    found = key if key in MEANT else next((k for k in MEANT if _joined(k) == _joined(key)), None)
    return found if found is not None and ".".join(map(str, loc)) != MEANT[found] else None


def _joined(key: str) -> str:
    return key.replace("_", "")


def _right_key(loc: Loc, data: Any) -> str | None:
    """The path that an unknown key most likely stands for."""
    key, section = str(loc[-1]), loc[:-1]
    if (found := _meant(loc)) is not None:
        return MEANT[found]
    model = model_at(section, data)
    close = difflib.get_close_matches(_plain(key), list(model.model_fields) if model else [], 1, 0.6)
    return ".".join([*map(str, section), close[0]]) if close else None


def _plain(key: str) -> str:
    """A key as ours are written: batchTokens and batch-tokens are batch_tokens."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower().replace("-", "_")


def _clean(loc: tuple[Any, ...], data: Any) -> Loc:
    """pydantic's location as it was written: without the union's branch, and with `nodes: 2` as one key."""
    if len(loc) > 1 and loc[0] == "workload" and loc[1] in ("gpt", "entrypoint"):
        written = data.get("workload") if isinstance(data, dict) else None
        if not (len(loc) == 2 and isinstance(written, dict) and loc[1] in written):
            loc = (loc[0], *loc[2:])
    if loc[:2] == ("cluster", "nodes") and not isinstance(data["cluster"]["nodes"], dict):
        loc = loc[:2]
    return loc


def model_at(loc: Loc, data: Any) -> type[BaseModel] | None:
    """The section of run.yaml at a path, as its type; None when there is none."""
    model: Any = Sections
    for part in loc:
        if not (isinstance(model, type) and issubclass(model, BaseModel)) or part not in model.model_fields:
            return None
        if part == "workload":
            written = data.get("workload") if isinstance(data, dict) else None
            model = Entrypoint if isinstance(written, dict) and "entrypoint" in written else Gpt
        else:
            model = _model_in(model.model_fields[str(part)].annotation)
    return model if isinstance(model, type) and issubclass(model, BaseModel) else None


def _model_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) is None:
        return None
    return next(
        (found for a in get_args(annotation) if (found := _model_in(a)) is not None),
        None,
    )


def _one(item: Any, loc: Loc, data: Any) -> Complaint:
    kind, value, ctx = item["type"], item.get("input"), item.get("ctx", {})
    path = ".".join(str(p) for p in loc)
    if kind == "extra_forbidden":
        return Complaint(loc, _unknown(loc, data), at_key=True)
    if kind == "missing" and isinstance(loc[-1], int):  # a pair that is not one
        return Complaint(loc[:-1], f"need a list of two numbers; got {shown(value)}.")
    if kind == "missing":
        example = EXAMPLES.get(path)
        return Complaint(
            loc,
            "is required." + (f" For example: `{loc[-1]}: {example}`." if example else ""),
        )
    if kind == "union_tag_invalid":
        return Complaint(
            (*loc, "kind"),
            f"there is no workload {shown(value.get('kind'))}. Use gpt, or entrypoint: module:function.",
        )
    if value is None:
        what = "has no value" + (f", such as `{EXAMPLES[path]}`" if path in EXAMPLES else "")
        return Complaint(loc, f"{what}. Write one, or remove the key.")
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        off = isinstance(value, bool) or str(value).lower() in ("none", "off", "no", "false")
        simple = path in FIRST and not off and re.fullmatch(r"[\w./:@-]{1,60}", str(value), re.A)
        instead = f" Write {loc[-1]}: {{{FIRST[path]}: {value}}}." if simple else ""
        if off and value is not True and path in ("data", "eval", "monitor", "kubernetes"):
            instead = f" To have none, remove {loc[-1]}."
        return Complaint(
            loc,
            f"needs keys of its own, such as {_some_keys(loc, data)}; got {shown(value)}.{instead}",
        )
    return Complaint(loc, value_error(kind, value, ctx, path, item["msg"]))


def value_error(kind: str, value: Any, ctx: Any, path: str, said: str) -> str:
    """What is wrong with one value, by pydantic's name for it."""
    example = EXAMPLES.get(path)
    such = f" Such as `{example}`." if example else ""
    if kind.startswith(("int", "float")) or kind == "less_than_equal":
        if kind == "less_than_equal":
            return f"need at most {ctx['le']}; got {shown(value)}."
        need = "a whole number" if kind.startswith("int") else "a number"
        return f"need {need}; got {shown(value)}.{_number_hint(value, path) or such}"
    if kind == "finite_number":
        return f"need a finite number; got {shown(value)}.{such}"
    if kind == "greater_than_equal":
        return f"need at least {ctx['ge']:g}; got {shown(value)}.{such}"
    if kind == "greater_than":
        return f"need more than {ctx['gt']:g}; got {shown(value)}.{such}"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'|(\d+)", ctx["expected"])
        names = [a or b for a, b in choices]
        close = difflib.get_close_matches(str(value).lower(), names, 1, 0.6)
        close = close or [n for n in names if str(value).lower().startswith(n)][:1]
        close = close or [n for n in names if str(value).strip().endswith(n)][:1]
        if value is True and path in SWITCHED_ON:
            close = [SWITCHED_ON[path]]
        meant = f" Did you mean {close[0]}?" if close else ""
        return f"need {', '.join(names[:-1])} or {names[-1]}; got {shown(value)}.{meant}"
    if kind == "bool_type":
        hint = f" Write {'true' if value else 'false'}." if value in (0, 1) else ""
        if isinstance(value, str) and value.lower() in (
            "yes",
            "on",
            "no",
            "off",
            "y",
            "n",
            "true",
            "false",
        ):
            hint = f" Write {'true' if value.lower() in ('yes', 'on', 'y', 'true') else 'false'}, without quotes."
        return f"need true or false; got {shown(value)}.{hint}"
    if kind == "string_type":
        quoted = f' Put it in quotes: "{shown(value)}".' if isinstance(value, (int, float)) else such
        return f"need text; got {shown(value)}.{quoted}"
    if kind == "string_too_short":
        return f"is empty.{such or ' Write one, or remove the key.'}"
    if kind == "string_pattern_mismatch":
        return _pattern(value, path, such)
    if kind in (
        "tuple_type",
        "too_short",
        "too_long",
        "missing_positional_only_argument",
    ):
        return f"need a list of two numbers; got {shown(value)}.{such}"
    return f"{said}; got {shown(value)}.{such}"


def _pattern(value: str, path: str, such: str) -> str:
    if path in ("name", "team"):
        better = re.sub(r"[^a-z0-9-]+", "-", value.lower()).strip("-")[:63]
        instead = f" Such as `{better}`." if better else such
        return (
            f"{shown(value)} can't name a run: lower-case letters, digits and hyphens, at most 63, "
            f"not starting with a hyphen.{instead}"
        )
    if path == "workload.entrypoint":
        if re.fullmatch(r"[\w.-]+:\w+", value) and "-" in value:
            return (
                f"{shown(value)}: a Python module's name has no hyphen. Rename the file to {_named(value)}."
            )
        return f"need module:function, or a script's path such as train.py; got {shown(value)}.{such}"
    if path == "cluster.to":
        if re.fullmatch(r"[\w.-]+:\d+", value):
            return f"need {EXAMPLES[path]}; got {shown(value)}. Write http://{value} for a Ray dashboard's address."
        close = difflib.get_close_matches(value.lower(), ["local", "kuberay"], 1, 0.6)
        return f"need {EXAMPLES[path]}; got {shown(value)}." + (f" Did you mean {close[0]}?" if close else "")
    if path == "monitor.url":
        return f"need an http:// or https:// address; got {shown(value)}.{such}"
    if path == "monitor.token_env":
        return (
            "need the NAME of an environment variable, never the token itself: letters, digits and underscores. "
            "Such as LOSSCAST_TOKEN."
        )
    if path == "kubernetes.namespace":
        return f"{shown(value)} can't name a namespace: lower-case letters, digits and hyphens, at most 63."
    return f"{shown(value)} does not fit.{such}"


def _unknown(loc: Loc, data: Any) -> str:
    key, section = str(loc[-1]), loc[:-1]
    model = model_at(section, data)
    names = list(model.model_fields) if model else []
    where = f" in {'.'.join(map(str, section))}" if section else ""
    if not key:
        return f"an empty key{where}. Write name: value, or remove it."
    if key == "<<":
        return "merge keys are not read. Write the keys out."
    if section == ("train", "optimizer") and key in ("kind", "type", "name"):
        return f"is not a key{where}: the optimizer is AdamW. Leave it out. Its keys: {', '.join(names)}."
    if "." in key and model_at((*section, *key.split(".")[:-1]), data) is not None:
        *outer, last = key.split(".")
        return f"is not a key{where}: sections nest. Write {last} below {'.'.join([*map(str, section), *outer])}."
    if (found := _meant(loc)) is not None:
        return f"is not a key{where}. losscast's is {MEANT[found]}{NOTES.get(found, '')}."
    close = difflib.get_close_matches(_plain(key), names, 1, 0.6)
    if close:
        return f"is not a key{where}. Did you mean {close[0]}?"
    elsewhere = _sections_with(_plain(key))
    if elsewhere:
        named = "It" if _plain(key) == key else _plain(key)
        return f"is not a key{where}. {named} belongs in {' or '.join(elsewhere)}."
    return f"is not a key{where}. Its keys: {', '.join(names)}."


def _sections_with(key: str) -> list[str]:
    found = []
    for name, info in Sections.model_fields.items():
        model = _model_in(info.annotation)
        if model and key in model.model_fields:
            found.append(name)
        for inner, inner_info in model.model_fields.items() if model else ():
            nested = _model_in(inner_info.annotation)
            if nested and key in nested.model_fields:
                found.append(f"{name}.{inner}")
    return found


def _some_keys(loc: Loc, data: Any) -> str:
    example = EXAMPLES.get(".".join(str(p) for p in loc))
    if example:
        return f"`{example}`"
    model = model_at(loc, data)
    return ", ".join(list(model.model_fields)[:4]) if model else "name: value"


def _named(entrypoint: str) -> str:
    return entrypoint.split(":")[0].replace("-", "_").replace(".", "/") + ".py"


def _number_hint(value: Any, path: str) -> str:
    """What to write in place of something that is no number, or not a whole one."""
    if not isinstance(value, str):
        return _fraction_hint(value, path) if isinstance(value, float) and math.isfinite(value) else ""
    plain = re.sub(r"[_, ]|^\$", "", value.strip())
    if plain != value and re.fullmatch(NUMBER, plain):
        return (
            f" Write {plain}: YAML 1.2 numbers hold no separators."
            if "$" not in value
            else f" Write {plain}."
        )
    if re.fullmatch(NUMBER, value):
        return " Remove the quotes."
    suffixed = re.fullmatch(r"([0-9.]+)\s*([kKmMgGbBtT])", value)
    if suffixed:
        power = {"k": 3, "m": 6, "g": 9, "b": 9, "t": 12}[suffixed[2].lower()]
        return f" Write {suffixed[1]}e{power}."
    product = re.fullmatch(r"(\d+)\s*[*x]\s*(\d+)", value)
    if product:
        return f" Write {int(product[1]) * int(product[2])}: nothing is computed here."
    share = re.fullmatch(r"([0-9]+\.?[0-9]*)\s*%", value)
    if share:
        return (
            f" Write {float(share[1]) / 100:g}."
            if "tokens" not in path
            else " A count, not a share of the run."
        )
    return ""


def _fraction_hint(value: float, path: str) -> str:
    if path.endswith("tokens"):
        if 0 < value < 1:
            return " A count of tokens, not a share of the run."
        return (
            f" For {value:g} billion write {value:g}e9."
            if 0 < value < 1000
            else f" The nearest is {round(value)}."
        )
    return f" The nearest is {round(value)}." if value >= 1 else ""


def shown(value: Any) -> str:
    """A value as it was written, short."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    if isinstance(value, (dict, list, tuple)):
        return "a mapping" if isinstance(value, dict) else f"a list of {len(value)}"
    return "nothing" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
