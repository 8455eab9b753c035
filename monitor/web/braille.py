"""Text of exact width, and a curve drawn in braille, two by four dots a cell.

The loss is in front of the predicted band's edges. Without colour the edges are single dots, so that the two
can be told apart; a loss that is not finite is a cross on the lowest row.
"""

import math
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from monitor.web.words import number, short

CODES = {"red": "31", "green": "32", "yellow": "33", "blue": "34", "dim": "2", "bold": "1"}

MOST_LOG = 709.0
"""exp of more is past the largest float."""

Cell = tuple[str, str]
"""A piece of text and its tone; "" is the terminal's own colour."""

Place = tuple[int, int]
"""A dot: across and down, from the upper left."""


def clean(value: Any) -> str:
    """The value's text with everything that does not print as a question mark."""
    return "".join(c if c.isprintable() else "?" for c in str("" if value is None else value))


def width_of(text: str) -> int:
    """Columns the text takes: wide characters two, combining ones none."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text
    )


def fit(text: str, width: int, right: bool = False) -> str:
    """The text in exactly `width` columns, cut with a dot where it is longer."""
    if width_of(text) > width:
        kept = ""
        for c in text:
            if width_of(kept + c) > width - 1:
                break
            kept += c
        text = kept + "." if width > 0 else ""
    room = " " * (width - width_of(text))
    return room + text if right else text + room


def paint(cells: Iterable[Cell], width: int, color: bool) -> str:
    """One line of at most `width` columns. The one way to the terminal: what does not print is replaced here."""
    line, left = "", width
    for said, tone in cells:
        text = clean(said)
        text = fit(text, left) if width_of(text) > left else text
        left -= width_of(text)
        line += f"\x1b[{CODES[tone]}m{text}\x1b[0m" if color and tone and text.strip() else text
    return line if color else line.rstrip()


def plot(
    curve: dict[str, Any] | None, samples: Sequence[dict[str, Any]], *, width: int, height: int, color: bool
) -> list[str]:
    """Loss against step on a log loss axis in `height` lines of `width` columns.

    curve    step, p05, p95 of a prediction, lists of one length, or None
    samples  step and loss each, in order of step; where thinned, perhaps the mean of what each stands for
    """
    points = [(float(s["step"]), number(s.get("mean", s.get("loss")))) for s in samples]
    curve = curve or {"step": [], "p05": [], "p95": []}
    steps = [x for x, _ in points] + [float(x) for x in curve["step"]]
    if not points or max(steps) <= 0:
        return ["", "  No sample yet."]
    start, end = min(steps), max(steps)
    span = (end - start) or 1.0
    edges = [
        [(float(x), number(v)) for x, v in zip(curve["step"], curve[q], strict=True)] for q in ("p05", "p95")
    ]
    settled = min(start + 0.04 * span, points[-1][0])
    seen = [v for x, v in [*points, *edges[0], *edges[1]] if v is not None and v > 0 and x >= settled] or [
        1.0
    ]
    low, high = math.log(min(seen)), math.log(max(seen))
    pad = max(0.04 * (high - low), 0.005)
    low, high = low - pad, high + pad
    columns, rows = max(10, width - 8), max(3, height - 1)

    def places(line: Iterable[tuple[float, float | None]]) -> list[Place | None]:
        found: list[Place | None] = []
        for x, v in line:
            up = (math.log(v) - low) / (high - low) if v is not None and v > 0 else -1.0
            across = round((x - start) / span * (columns * 2 - 1))
            found.append((across, round((1 - up) * (rows * 4 - 1))) if 0 <= up <= 1 else None)
        return found

    band = _dots([*_joined(places(edges[0])), *_joined(places(edges[1]))])
    traced = _dots(_joined(places(_middles(points, start, span, columns * 2))))
    lost = {
        int((x - start) / span * (columns - 1))
        for (x, _), sample in zip(points, samples, strict=True)
        if sample.get("loss") is not None and number(sample["loss"]) is None
    }
    lines = []
    for row in range(rows):
        labelled = row % 3 == 0 or row == rows - 1
        value = math.exp(min(low + (1 - row / max(1, rows - 1)) * (high - low), MOST_LOG))
        cells: list[Cell] = [(f"{value:6.3g} " if labelled else " " * 7, "dim")]
        for column in range(columns):
            dots, edge = traced.get((column, row), 0), band.get((column, row), 0)
            if row == rows - 1 and column in lost:
                cells.append(("x", "red"))
            elif dots:
                cells.append((chr(0x2800 | dots), "bold"))
            elif edge:
                cells.append((chr(0x2800 | edge) if color else "\N{MIDDLE DOT}", "blue"))
            else:
                cells.append((" ", ""))
        lines.append(paint(_merged(cells), width, color))
    first = f"step {start:,.0f}"
    lines.append(
        paint([(f"       {first}{short(end):>{max(1, columns - len(first))}}", "dim")], width, color)
    )
    return lines


def _middles(
    points: Sequence[tuple[float, float | None]], start: float, span: float, n: int
) -> list[tuple[float, float | None]]:
    """The median loss in each of `n` columns, so that noise does not fill the plot."""
    columns: dict[int, list[float]] = {}
    for x, v in points:
        if v is not None:
            columns.setdefault(int((x - start) / span * (n - 1)), []).append(v)
    return [
        (start + column / (n - 1) * span, sorted(values)[len(values) // 2])
        for column, values in sorted(columns.items())
    ]


def _joined(places: Iterable[Place | None]) -> list[Place]:
    """The places with the dots between neighbours; a gap of more than a few columns stays one."""
    line: list[Place] = []
    before: Place | None = None
    for place in places:
        if place is not None:
            if before is not None and abs(place[0] - before[0]) <= 8:
                n = max(abs(place[0] - before[0]), abs(place[1] - before[1]))
                line += [
                    (
                        round(before[0] + (place[0] - before[0]) * k / n),
                        round(before[1] + (place[1] - before[1]) * k / n),
                    )
                    for k in range(1, n)
                ]
            line.append(place)
        before = place
    return line


def _dots(places: Iterable[Place]) -> dict[Place, int]:
    """Braille bits by cell, column and row."""
    bits = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
    cells: dict[Place, int] = {}
    for across, down in places:
        cell = (across // 2, down // 4)
        cells[cell] = cells.get(cell, 0) | bits[down % 4][across % 2]
    return cells


def _merged(cells: Iterable[Cell]) -> list[Cell]:
    """Neighbours of one tone as one cell, so that a line carries few escapes."""
    merged: list[Cell] = []
    for text, tone in cells:
        if merged and merged[-1][1] == tone:
            merged[-1] = (merged[-1][0] + text, tone)
        else:
            merged.append((text, tone))
    return merged
