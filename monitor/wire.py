"""Reading wire v1: a request body in, checked events out, in the order they were sent.

A body is first tried as plain samples with finite numbers, by msgspec in one call, which is nearly all of the traffic.
Where that fails each line is tried as a sample with spelled numbers; one that is anything else (another event, a field
unknown to v1, Python's bare NaN) is read as a dict. A request is taken whole or not at all: the first line that can't be
used raises `BadLine` with its number, the reason and what is expected.
"""

import hashlib
import json
import math
import sys
import zlib
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from monitor.schema import EVENTS, MAX_COUNT, MAX_TEXT_BYTES, SPELLED, is_run_id, spell, unspell

Count = Annotated[int, msgspec.Meta(ge=0, lt=MAX_COUNT)]
if TYPE_CHECKING:
    Number = float  # what they are once `parse` has given them out
else:
    Number = float | str

FLOATS = ("time", "loss", "tokens", "val_loss", "lr", "grad_norm", "tokens_per_s", "mfu", "spread")
MAX_EXTRA_BYTES = 4096
"""What one sample may carry in fields that v1 does not know."""
MAX_EVENT_BYTES = 4 << 20
"""Length of one event's line; a prediction with its whole curve is some 200 KB."""
MAX_NESTING = 32
MAX_MEMBERS = 1024
"""Gzip streams put behind one another in a body. Each costs a pass over what is left of a piece, however little it holds."""
PIECE_BYTES = 64 << 10
MOST = int(sys.float_info.max)
"""Largest number that a float can be."""


class BadLine(ValueError):
    """A line, counted from 1, or with 0 the whole body, that can't be taken. `reason` is one of a fixed set, for the
    counter's label."""

    def __init__(self, line: int, message: str, reason: str = "invalid"):
        super().__init__(f"line {line}: {message}" if line else message)
        self.line = line
        self.reason = reason


class TooLarge(ValueError):
    """The body, or what it decompresses to, is over the limit."""


class SampleLine(msgspec.Struct, tag_field="event", tag="sample", forbid_unknown_fields=True, gc=False):
    """A sample, its numbers floats."""

    run: str
    attempt: Count
    seq: Count
    step: Count
    loss: float
    time: float | None = None
    tokens: float | None = None
    val_loss: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    tokens_per_s: float | None = None
    mfu: float | None = None
    spread: float | None = None


class SpelledLine(SampleLine, tag_field="event", tag="sample", forbid_unknown_fields=True, gc=False):
    """A sample as it travels: numbers are floats or one of the three spellings until `_check_floats` has run."""

    loss: Number
    time: Number | None = None
    tokens: Number | None = None
    val_loss: Number | None = None
    lr: Number | None = None
    grad_norm: Number | None = None
    tokens_per_s: Number | None = None
    mfu: Number | None = None
    spread: Number | None = None


@dataclass(slots=True)
class Samples:
    """Consecutive samples of one attempt, in the order sent."""

    run: str
    attempt: int
    lines: list[SampleLine]
    extra: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Fields v1 does not know, by seq."""


@dataclass(slots=True)
class Event:
    """Any other event. `digest` tells a repeated one from a new one where the sender gave no seq."""

    run: str
    attempt: int
    kind: str
    body: dict[str, Any]
    digest: bytes
    seq: int | None


@dataclass(slots=True)
class Request:
    """What one request holds: samples and events in order, and how many lines were passed over as unknown."""

    parts: list[Samples | Event]
    samples: int
    unknown: int


def inflate(body: bytes) -> bytes:
    """Gunzip, at most MAX_TEXT_BYTES. Raises TooLarge beyond, BadLine when it is no gzip or is cut short."""
    out, left, members = [], MAX_TEXT_BYTES, 0
    stream = zlib.decompressobj(wbits=31)
    try:
        for start in range(0, len(body), PIECE_BYTES):
            piece = body[start : start + PIECE_BYTES]
            while piece:
                if stream.eof:
                    stream = zlib.decompressobj(wbits=31)
                    members += 1
                    if members >= MAX_MEMBERS:
                        raise BadLine(
                            0, f"more than {MAX_MEMBERS} gzip streams in one body; send one", "encoding"
                        )
                out.append(stream.decompress(piece, left + 1))
                left -= len(out[-1])
                if left < 0:
                    raise TooLarge(
                        f"more than {MAX_TEXT_BYTES} bytes after decompression; send smaller batches"
                    )
                piece = stream.unused_data
        if body and not stream.eof:
            raise BadLine(0, "the gzip stream ends early", "encoding")
    except zlib.error as error:
        raise BadLine(0, f"not gzip: {error}", "encoding") from None
    return b"".join(out)


_plain = msgspec.json.Decoder(SampleLine)
_spelled = msgspec.json.Decoder(SpelledLine)
_run_of, _attempt_of, _key_of = attrgetter("run"), attrgetter("attempt"), attrgetter("run", "attempt")


def parse(body: bytes) -> Request:
    """The events of one decompressed body. Raises BadLine at the first line that can't be used."""
    try:
        lines = _plain.decode_lines(body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return _parse_lines(body)
    parts: list[Samples | Event] = []
    if lines and len(set(map(_run_of, lines))) == 1 and len(set(map(_attempt_of, lines))) == 1:
        _check_run(lines[0].run, 1)
        parts.append(Samples(lines[0].run, lines[0].attempt, lines))
        return Request(parts, len(lines), 0)
    number = 1
    for (run, attempt), found in groupby(lines, _key_of):
        _check_run(run, number)
        parts.append(Samples(run, attempt, list(found)))
        number += len(parts[-1].lines)  # type: ignore[union-attr]
    return Request(parts, len(lines), 0)


def _parse_lines(body: bytes) -> Request:
    """The same, line by line: other events, spelled numbers, unknown fields, and the line of what can't be used."""
    parts: list[Samples | Event] = []
    samples = unknown = 0
    current: Samples | None = None
    for number, raw in enumerate(body.split(b"\n"), 1):
        if not raw or raw.isspace():
            continue
        extra: dict[str, Any] = {}
        try:
            line: SampleLine = _spelled.decode(raw)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            found = _event(raw, number)
            if found is None:
                unknown += 1
                continue
            if isinstance(found, Event):
                parts.append(found)
                current = None
                continue
            line, extra = found
        _check_floats(line, number)
        if current is None or line.run != current.run or line.attempt != current.attempt:
            _check_run(line.run, number)
            current = Samples(line.run, line.attempt, [])
            parts.append(current)
        if extra:
            current.extra[line.seq] = extra
        current.lines.append(line)
        samples += 1
    return Request(parts, samples, unknown)


def _check_run(run: object, number: int) -> None:
    if not is_run_id(run):
        shown = repr(run)[:80]
        raise BadLine(number, f"run {shown} is no run id; it must match [a-z0-9][a-z0-9-]{{0,62}}", "run_id")


def _check_floats(line: SampleLine, number: int) -> None:
    """Turn the spellings into numbers, in place."""
    if type(line.loss) is float and type(line.time) is not str and type(line.tokens) is not str and (
        type(line.val_loss) is not str and type(line.lr) is not str and type(line.grad_norm) is not str
        and type(line.tokens_per_s) is not str and type(line.mfu) is not str and type(line.spread) is not str
    ):  # fmt: skip
        return
    for name in FLOATS:
        value = getattr(line, name)
        if type(value) is str:
            number_behind = SPELLED.get(value)
            if number_behind is None:
                shown = repr(value)[:40]
                raise BadLine(
                    number,
                    f"{name}: {shown} is no number; a non-finite one is spelled NaN, Infinity or -Infinity",
                )
            setattr(line, name, number_behind)


def _load(raw: bytes, number: int) -> dict[str, Any]:
    try:
        found = json.loads(raw)  # also takes bare NaN and Infinity: a NaN that arrives beats a NaN refused
    except (ValueError, RecursionError) as error:
        shown = raw[:60].decode("utf-8", "replace")
        what = getattr(error, "msg", None) or "not UTF-8 or nested too deep"
        raise BadLine(number, f"not a JSON object: {what}: {shown!r}", "json") from None
    if not isinstance(found, dict):
        raise BadLine(number, f"need a JSON object, one event a line; got {type(found).__name__}", "json")
    if b"\\u" in raw:
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except (UnicodeEncodeError, RecursionError):
            raise BadLine(number, "holds half of a surrogate pair, or is nested too deep", "json") from None
    if _depth(found) > MAX_NESTING:
        raise BadLine(number, f"nested deeper than {MAX_NESTING}", "json")
    return found


def _depth(value: Any) -> int:
    deepest, todo = 0, [(value, 1)]
    while todo:
        node, depth = todo.pop()
        deepest = max(deepest, depth)
        if depth > MAX_NESTING:
            return depth
        if isinstance(node, dict):
            todo.extend((child, depth + 1) for child in node.values() if isinstance(child, (dict, list)))
        elif isinstance(node, list):
            todo.extend((child, depth + 1) for child in node if isinstance(child, (dict, list)))
    return deepest


def _check_size(body: dict[str, Any], number: int) -> None:
    """Whatever is a number, also one within a prediction, is computed with as a float one day."""
    for name, value in body.items():
        todo = [value]
        while todo:
            node = todo.pop()
            if isinstance(node, dict):
                todo.extend(node.values())
            elif isinstance(node, list):
                todo.extend(node)
            elif isinstance(node, int) and not -MOST <= node <= MOST:
                raise BadLine(
                    number, f"{name[:40]}: holds a number beyond 1e308; need one that a float can be"
                )


def _count(body: dict[str, Any], name: str, number: int, default: int | None = None) -> int:
    value = body.get(name)
    if value is None and default is not None:
        return default
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MAX_COUNT:
        raise BadLine(number, f"{name}: need a whole number from 0 to below 2**53; got {repr(value)[:40]}")
    return value


def _number(body: dict[str, Any], name: str, number: int) -> float | None:
    try:
        return unspell(body.get(name))
    except (ValueError, OverflowError) as error:
        raise BadLine(number, f"{name}: {str(error)[:120]}") from None


def _event(raw: bytes, number: int) -> Event | tuple[SampleLine, dict[str, Any]] | None:
    """The event of a line that is no plain sample; None for one of a kind v1 does not know."""
    if len(raw) > MAX_EVENT_BYTES:
        raise BadLine(number, f"{len(raw)} bytes; an event may have {MAX_EVENT_BYTES}", "too_large")
    body = _load(raw, number)
    kind = body.pop("event", None)
    if not isinstance(kind, str):
        raise BadLine(number, f"event: need the event's name; got {repr(kind)[:40]}")
    if kind not in EVENTS:
        return None
    run = body.pop("run", None)
    _check_run(run, number)
    attempt = _count(body, "attempt", number)
    if kind == "sample":
        loss = _number(body, "loss", number)
        if loss is None:
            raise BadLine(number, "loss: missing; a non-finite one is spelled NaN, Infinity or -Infinity")
        line = SampleLine(run, attempt, _count(body, "seq", number), _count(body, "step", number), loss)
        for name in FLOATS:
            if name != "loss":
                setattr(line, name, _number(body, name, number))
        extra = {k: v for k, v in body.items() if k not in SampleLine.__struct_fields__}
        if extra and len(json.dumps(extra)) > MAX_EXTRA_BYTES:
            raise BadLine(number, f"fields unknown to v1 take more than {MAX_EXTRA_BYTES} bytes", "too_large")
        return line, extra
    time = _number(body, "time", number)
    if time is not None and not math.isfinite(time):
        raise BadLine(number, "time: need a finite number of seconds since the epoch")
    for name in ("step", "resume_step"):
        if body.get(name) is not None:
            body[name] = _count(body, name, number)
    for name in ("target_loss", "total_tokens", "price_per_hour"):
        if body.get(name) is not None:
            _number(body, name, number)
    prediction = body.get("prediction")
    if prediction is not None and not isinstance(prediction, dict):
        raise BadLine(
            number, f"prediction: need the whole prediction.json or null; got {type(prediction).__name__}"
        )
    seq = _count(body, "seq", number) if body.get("seq") is not None else None
    _check_size(body, number)
    body = spell(body)
    body.pop("attempt")
    digest = hashlib.blake2b(
        json.dumps([kind, body], sort_keys=True).encode("utf-8", "surrogatepass"), digest_size=12
    ).digest()
    return Event(run, attempt, kind, body, digest, seq)
