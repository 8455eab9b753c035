"""The laws that the page shows: law.json files put beside the store, drawn with the predictions that runs registered from them.

`losscast monitor law add law.json --store DIR` puts one there; the file's name is its digest. Pictures are made when they
are asked for, and kept while neither the law nor the predictions change.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monitor.errors import Failed, WrongInput

FOLDER = "laws"
MOST = 20
NAME = re.compile(r"[0-9a-f]{16,64}\.json")


def add(folder: Path, source: Path) -> str:
    """Put a law beside the store. Its file's name. Raises WrongInput for one that can't be read."""
    from monitor.forecast.law import Law

    law = Law.read(source)
    name = re.sub(r"[^0-9a-f]", "", law.digest.removeprefix("sha256:"))[:64] + ".json"
    place = folder / FOLDER
    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not (place / name).exists() and len(list(place.glob("*.json"))) >= MOST:
            raise WrongInput(f"{place}: holds {MOST} laws already; remove some")
        partial = place / f".{name}.partial"
        partial.write_bytes(source.read_bytes())
        os.replace(partial, place / name)
    except OSError as error:
        raise Failed(f"{place}: {error.strerror or error}") from error
    return name


class Laws:
    """Those of one store. Safe to share between threads."""

    def __init__(self, folder: Path):
        self._place = folder / FOLDER
        self._drawn: dict[str, tuple[object, dict[str, Any]]] = {}

    def views(self, predictions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Each law as data to draw, the newest first; one that can't be read says why."""
        files = sorted(
            (p for p in self._place.glob("*.json") if NAME.fullmatch(p.name)),
            key=lambda p: p.stat().st_mtime_ns, reverse=True,
        )[:MOST]  # fmt: skip
        digests = tuple(sorted(str(p.get("digest")) for p in predictions))
        out = []
        for path in files:
            key = (path.stat().st_mtime_ns, digests)
            held = self._drawn.get(path.name)
            if held is None or held[0] != key:
                held = self._drawn[path.name] = (key, _view(path, predictions))
            out.append(held[1])
        return out


def _view(path: Path, predictions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    from monitor.forecast.law import Law
    from monitor.forecast.law_view import law_view

    try:
        return law_view(Law.read(path), predictions)
    except (WrongInput, ValueError, KeyError, TypeError, ArithmeticError) as error:
        return {"digest": path.stem, "error": str(error)[:300]}
