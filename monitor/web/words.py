"""Numbers and moments as people read them, for the report and the terminal. Plain text, not markup."""

import datetime
import math
from typing import Any

from monitor.schema import spell, unspell

MISSING = "\N{EN DASH}"
SMALL = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def number(value: Any) -> float | None:
    """A number that can be drawn: finite, or None."""
    try:
        found = unspell(value)
    except ValueError:
        return None
    return found if found is not None and math.isfinite(found) else None


def loss(value: Any) -> str:
    """A loss in nats per token, four digits after the point where it is small; NaN and Infinity are said."""
    try:
        found = unspell(value)
    except ValueError:
        return str(value)
    if found is None:
        return MISSING
    if not math.isfinite(found):
        return str(spell(found))
    return f"{found:.4f}" if abs(found) < 10 else f"{found:.3f}" if abs(found) < 100 else f"{found:.4g}"


def short(value: float | None) -> str:
    """A large count with its letter: 1.2k, 3.4M, 2.5B."""
    if value is None:
        return MISSING
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit * 0.9995:
            return f"{float(f'{value / unit:.3g}'):g}{letter}"
    return f"{value:.3g}"


def count(n: int, what: str) -> str:
    """ "no runs", "one run", "twelve" as 12."""
    return f"{SMALL[n] if n < len(SMALL) else n} {what}{'' if n == 1 else 's'}"


def when(value: Any) -> str:
    """Seconds since the epoch in UTC; text as it is."""
    if isinstance(value, (int, float)):
        moment = datetime.datetime.fromtimestamp(value, datetime.UTC)
        return moment.strftime("%Y-%m-%d %H:%M:%S UTC")
    return str(value)


def duration(seconds: float) -> str:
    """Seconds as the two largest of days, hours, minutes and seconds."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 or seconds == int(seconds) else f"{seconds:.1f} s"
    parts = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
    at = next(i for i, (unit, _) in enumerate(parts) if seconds >= unit)
    (unit, name), (small, small_name) = parts[at], parts[at + 1]
    rest = int(seconds % unit // small)
    return f"{int(seconds // unit)} {name}" + (f" {rest} {small_name}" if rest else "")
