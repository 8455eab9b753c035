"""HTML whose text is escaped unless it was built here: the only way from a value to markup is `tag`."""

from html import escape
from typing import Any


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def text(value: Any) -> Html:
    """The value as markup: escaped, unless it is markup; nothing for None."""
    if isinstance(value, Html):
        return value
    return Html("" if value is None else escape(str(value)))


def join(*parts: Any) -> Html:
    """Parts after one another, each escaped unless it is markup."""
    return Html("".join(text(part) for part in parts))


def tag(name: str, *children: Any, **attributes: Any) -> Html:
    """An element. `cls` is its class; underscores in names are hyphens; an attribute of None is left out."""
    said = "".join(
        f' {"class" if key == "cls" else key.replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{said}>{join(*children)}</{name}>")


def table(head: list[tuple[str, bool]], rows: list[list[Any]]) -> Html:
    """A table that scrolls sideways where it must. `head`: each column's name, and whether of numbers."""
    kinds = ["num" if number else None for _, number in head]

    def line(kind: str, cells: list[Any]) -> Html:
        return tag("tr", *(tag(kind, cell, cls=cls) for cell, cls in zip(cells, kinds, strict=True)))

    columns = tag("thead", line("th", [name for name, _ in head]))
    return tag(
        "div", tag("table", columns, tag("tbody", *(line("td", row) for row in rows))), cls="scroll tables"
    )
