"""Reading YAML 1.2 with positions: every error says file:line:col, path, what, why and what instead.

PyYAML scans; scalars are resolved here by YAML 1.2's core schema, so `2.5e9` is a number, and `off`, `yes` and
`1:30` are text. Refused by line: duplicate keys, aliases and anchors (they can hide a bomb), tags, keys that are
not text, more than 32 levels, a file over 1 MiB.

Lines and columns count from 1, columns in characters.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.errors import WrongInput

MAX_BYTES = 1 << 20
MAX_DEPTH = 32

Loc = tuple[str | int, ...]

_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


@dataclass(frozen=True, slots=True)
class Complaint:
    """One thing wrong at one place."""

    loc: Loc
    message: str
    at_key: bool = False
    """Point at the key rather than at its value."""
    mark: tuple[int, int] | None = None
    """Line and column, where the place is not that of `loc`."""

    @property
    def path(self) -> str:
        return dotted(self.loc)

    @classmethod
    def of(cls, key: str, message: str) -> "Complaint":
        """About a dotted path, such as parallel.zero."""
        return cls(tuple(int(part) if part.isdigit() else part for part in key.split(".")), message)


@dataclass(slots=True)
class Document:
    """A YAML document as plain data, with the place of every key and value."""

    name: str
    lines: list[str]
    data: Any = None
    keys: dict[Loc, tuple[int, int]] = field(default_factory=dict)
    values: dict[Loc, tuple[int, int]] = field(default_factory=dict)
    complaints: list[Complaint] = field(default_factory=list)
    given: dict[str, str] = field(default_factory=dict)
    """Dotted path to the option that gave it on the command line, in place of the file."""

    def place(self, complaint: Complaint) -> tuple[int, int]:
        """Line and column of a complaint: of its path, or of the nearest ancestor that was written."""
        if complaint.mark is not None:
            return complaint.mark
        loc = complaint.loc
        while loc:
            if complaint.at_key and loc in self.keys:
                return self.keys[loc]
            if loc in self.values:
                return self.values[loc] if loc == complaint.loc else self.keys.get(loc, self.values[loc])
            loc = loc[:-1]
        return self.values.get((), (1, 1))

    def render(self, complaint: Complaint) -> str:
        """`file:line:col path: message`, the line itself, and a caret; for what the command line gave, that option."""
        if complaint.path in self.given:
            return f"{self.given[complaint.path]}: {complaint.path}: {complaint.message}"
        line, column = self.place(complaint)
        path = f" {complaint.path or repr('')}:" if complaint.loc else ""
        text = self.lines[line - 1] if line <= len(self.lines) else ""
        number = f"{line:>5} | "
        shown = text.replace("\t", " ")
        start = 0 if column <= 80 else column - 60
        excerpt = (
            ("…" if start else "") + shown[start : start + 100] + ("…" if len(shown) > start + 100 else "")
        )
        caret = " " * (column - 1 - start + bool(start)) + "^"
        return f"{self.name}:{line}:{column}{path} {complaint.message}\n{number}{excerpt}\n      | {caret}"

    def refuse(self, complaints: list[Complaint]) -> WrongInput:
        """The error that says all of them, in the order of the file."""
        ordered = sorted(complaints, key=self.place)
        count = f"{len(ordered)} problems" if len(ordered) > 1 else "1 problem"
        error = WrongInput("\n".join([f"{self.name}: {count}", *(self.render(c) for c in ordered)]))
        error.problems = [located(self, c) for c in ordered]  # type: ignore[attr-defined]
        return error


def dotted(loc: Loc) -> str:
    """workload.layers; betas[1]."""
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else (f".{part}" if text else str(part))
    return text


def read_document(path: str | Path) -> Document:
    """The file as plain data with places. Raises WrongInput when it can't be read or is not YAML."""
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise WrongInput(f"{path}: {size} bytes is no run spec; at most {MAX_BYTES} are read")
        raw = path.read_bytes()
    except FileNotFoundError:
        raise WrongInput(f"{path}: there is no such file. {there(path.parent)}") from None
    except IsADirectoryError:
        raise WrongInput(f"{path}: is a folder, and a spec is a file. {instead_of(path)}") from None
    except OSError as error:
        raise WrongInput(f"{path}: can't be read: {error.strerror}") from None
    try:
        return parse(raw.decode("utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        column = error.start - (raw[: error.start].rfind(b"\n") + 1) + 1
        raise WrongInput(
            f"{path}:{line}:{column} byte 0x{raw[error.start]:02x} is not UTF-8. Save the file as UTF-8."
        ) from None


def there(folder: Path) -> str:
    """What to give in place of a file that is not there."""
    if folder.is_dir():
        return f"{instead_of(folder)} That folder is {folder.resolve()}."
    return f"There is no folder {folder} either, seen from {Path.cwd()}."


def instead_of(folder: Path) -> str:
    """What to give in place of a folder: the spec in it, or what a run's own folder is good for."""
    if (folder / "spec.json").is_file():
        return f"It is a run's own: `losscast status {folder}` tells of the run, `losscast resume {folder}` goes on with it."
    try:
        inside = sorted(p for p in folder.iterdir() if p.suffix in (".yaml", ".yml") and p.is_file())
    except OSError:
        inside = []
    inside.sort(key=lambda p: p.stem != "run")  # the one that is named like a spec first
    if not inside:
        return "There is no .yaml in it. Give a run.yaml."
    others = f" (of {len(inside)} .yaml in it)" if len(inside) > 1 else ""
    return f"Give {inside[0]}{others}."


def parse(text: str, name: str) -> Document:
    """YAML text as plain data with places; duplicate keys and the like are in `complaints`."""
    import yaml

    document = Document(name, text.splitlines() or [""])
    try:
        _Builder(document, yaml.parse(text, Loader=yaml.SafeLoader)).build()
    except yaml.MarkedYAMLError as error:
        at = _blamed(error, document)
        raise document.refuse([Complaint((), _yaml_error(error, document, at), mark=at)]) from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        at = (before.count("\n") + 1, error.position - (before.rfind("\n") + 1) + 1)
        raise document.refuse([Complaint((), "a control character; YAML allows none", mark=at)]) from None
    return document


def _blamed(error: Any, document: Document) -> tuple[int, int]:
    """Line and column to mend, which is not always where the scanner gave up."""
    mark, said = error.problem_mark or error.context_mark, error.problem or ""
    if "could not find expected ':'" in said and error.context_mark is not None:
        mark = error.context_mark  # where the key began, not where its colon was missed
    if "expected '<document start>'" in said:
        directive = next((n for n, line in enumerate(document.lines) if line.startswith("%")), None)
        if directive is not None:
            return directive + 1, 1
    return (mark.line + 1, mark.column + 1) if mark else (1, 1)


def _yaml_error(error: Any, document: Document, at: tuple[int, int]) -> str:
    line = document.lines[at[0] - 1] if at[0] <= len(document.lines) else ""
    said = " ".join(str(p) for p in (error.context, error.problem) if p)
    if "\t" in line[: at[1]]:
        return f"not YAML: a tab can't indent. Use spaces. ({said})"
    if "could not find expected ':'" in said:
        if (stuck := re.match(r"\s*([\w-]+):(\S.*)", line)) is not None:
            return f"not YAML: a space is missing after the colon. Write {stuck[1]}: {stuck[2]}."
        return "not YAML: a key without a colon. Write key: value."
    if "expected '<document start>'" in said:
        if line.startswith("%"):
            return "not YAML: a line that starts with % is a directive. Remove it, or put the text in quotes."
        return "not YAML: more text after `...`, which ends a document. Remove the line with `...`."
    if "mapping values are not allowed" in said:
        if re.fullmatch(
            r"\s*[\w-]+", line[: at[1] - 1]
        ):  # the first key of its line: the line before is to blame
            before = document.lines[at[0] - 2] if at[0] > 1 else ""
            if re.match(r"\s*[\w-]+:\S", before):
                return f"not YAML: line {at[0] - 1} needs a space after its colon."
            return f"not YAML: indented further than line {at[0] - 1}, which has a value already."
        return "not YAML: a second `: ` on this line. Put text that holds one in quotes."
    if "scanning a quoted scalar" in said and error.context_mark is not None:
        return f"not YAML: the quote on line {error.context_mark.line + 1} is not closed."
    if "cannot start any token" in said:
        return f"not YAML: text that starts with {line[at[1] - 1 : at[1]]} must be in quotes."
    if "while parsing a flow" in said and error.context_mark is not None:
        opened = "{" if "mapping" in said else "["
        if error.context_mark.line + 1 < at[0]:
            return f"not YAML: the {opened} on line {error.context_mark.line + 1} is not closed."
        return (
            "not YAML: text with `:`, `?`, `,`, braces or brackets inside a {...} or [...] must be in quotes."
        )
    if re.match(r"\s*[\w-]+:\S", line):
        return f"not YAML: a space is missing after the colon? ({said})"
    return f"not YAML: {said}."


class _Builder:
    """Plain data from YAML events, without recursion deeper than MAX_DEPTH."""

    def __init__(self, document: Document, events: Any) -> None:
        self.document, self.events = document, events

    def build(self) -> None:
        import yaml

        documents = 0
        for event in self.events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    self._complain(
                        (),
                        event,
                        "a second document; a run is one. Remove everything from `---` on.",
                    )
                    return
            elif isinstance(event, (yaml.NodeEvent)):
                self.document.data = self._node(event, (), 0)

    def _complain(self, loc: Loc, event: Any, message: str) -> None:
        self.document.complaints.append(Complaint(loc, message, mark=_mark(event)))

    def _node(self, event: Any, loc: Loc, depth: int) -> Any:
        import yaml

        self.document.values[loc] = _mark(event)
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            sign = "*" if isinstance(event, yaml.AliasEvent) else "&"
            self._complain(
                loc,
                event,
                f"{sign}{event.anchor}: anchors and aliases are not read. Write it out.",
            )
            if isinstance(event, yaml.AliasEvent):
                return None
        if depth > MAX_DEPTH:
            raise self.document.refuse(
                [
                    *self.document.complaints,
                    Complaint((), f"more than {MAX_DEPTH} levels deep", mark=_mark(event)),
                ]
            )
        tag = event.tag
        if tag is not None and tag != "!":
            self._complain(
                loc,
                event,
                f"the tag {tag.replace('tag:yaml.org,2002:', '!!')} is not read. Remove it.",
            )
        if isinstance(event, yaml.ScalarEvent):
            return event.value if event.style is not None or tag is not None else _scalar(event.value)
        if isinstance(event, yaml.SequenceStartEvent):
            items: list[Any] = []
            while not isinstance(child := next(self.events), yaml.SequenceEndEvent):
                items.append(self._node(child, (*loc, len(items)), depth + 1))
            return items
        return self._mapping(loc, depth)

    def _mapping(self, loc: Loc, depth: int) -> dict[str, Any]:
        import yaml

        mapping: dict[str, Any] = {}
        while not isinstance(key_event := next(self.events), yaml.MappingEndEvent):
            if not isinstance(key_event, yaml.ScalarEvent):
                self._complain(loc, key_event, "a key must be text. Write name: value.")
                self._node(key_event, (*loc, "?"), depth + 1)
                self._node(next(self.events), (*loc, "?"), depth + 1)
                continue
            key = key_event.value
            here = (*loc, key)
            if key in mapping:
                line = self.document.keys[here][0]
                message = f"is given twice, first on line {line}. Keep one."
                self._complain(here, key_event, message)
                self._node(next(self.events), (*loc, "?"), depth + 1)
                continue
            self.document.keys[here] = _mark(key_event)
            mapping[key] = self._node(next(self.events), here, depth + 1)
        return mapping


def _mark(event: Any) -> tuple[int, int]:
    return event.start_mark.line + 1, event.start_mark.column + 1


def _scalar(text: str) -> Any:
    """A plain scalar by YAML 1.2's core schema (chapter 10.3.2)."""
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return text[0] in "tT"
    if _INT.fullmatch(text):
        return int(text) if len(text) < 400 else text
    if _FLOAT.fullmatch(text):
        return float(text)
    if re.fullmatch(r"0o[0-7]+", text):
        return int(text, 8)
    if re.fullmatch(r"0x[0-9a-fA-F]+", text):
        return int(text, 16)
    if re.fullmatch(r"[-+]?\.(inf|Inf|INF)", text):
        return float("-inf" if text[0] == "-" else "inf")
    return float("nan") if text in (".nan", ".NaN", ".NAN") else text


def located(document: Document, complaint: Complaint) -> dict[str, Any]:
    """A complaint as plain data: file, line, column, path, message."""
    line, column = document.place(complaint)
    return {
        "file": document.name, "line": line, "column": column, "path": complaint.path, "message": complaint.message,
    }  # fmt: skip


def read_data(path: str | Path) -> Any:
    """Any YAML file as plain data. Raises WrongInput for what is no YAML, and for duplicate keys and the like."""
    document = read_document(path)
    if document.complaints:
        raise document.refuse(document.complaints)
    return document.data
