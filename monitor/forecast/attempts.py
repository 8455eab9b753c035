"""Which attempt each row of a curve belongs to: a resumed run logs some steps twice, and the newest attempt is the truth.

A file may say it in a column `attempt`. Where it does not, rows whose steps go back to ones that were seen with another
loss are a new attempt. Rows that repeat others exactly, late rows that fill a gap, and rows in no order at all are none:
a file may hold its rows twice, or shuffled.
"""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from monitor.forecast.table import FloatArray

MOST_BACK = 0.02
"""Share of a run's rows at which the steps may go back for these to be resumes; more than that, and than three, is no
order."""


def attempts_seen(step: FloatArray, loss: FloatArray) -> NDArray[np.int64]:
    """Attempt of each row, from 1, by the rows' order in the file. Arrays are (n,)."""
    attempt = np.ones(step.size, dtype=np.int64)
    if np.all(np.diff(step) >= 0):
        return attempt
    rows = zip(step.tolist(), ["nan" if x != x else x for x in loss.tolist()], strict=True)
    first: dict[tuple[float, float | str], int] = {}
    same = np.array([first.setdefault(row, i) for i, row in enumerate(rows)])
    kept = np.flatnonzero(same == np.arange(step.size))
    back = np.flatnonzero(np.diff(step[kept]) < 0) + 1
    if back.size > max(3.0, MOST_BACK * kept.size):
        return attempt
    seen: set[float] = set()
    current = 1
    for begin, end in pairwise([0, *back.tolist(), kept.size]):
        part = kept[begin:end]
        if not seen.isdisjoint(step[part].tolist()):
            current += 1
        seen.update(step[part].tolist())
        attempt[part] = current
    return attempt[same]


def superseded(attempt: NDArray[np.int64], step: FloatArray) -> NDArray[np.bool_]:
    """Rows at whose step a newer attempt has begun, or that it has left behind. Arrays are (n,)."""
    gone = np.zeros(step.size, dtype=bool)
    for newest in np.unique(attempt)[1:]:
        gone |= (attempt < newest) & (step >= step[attempt == newest].min())
    return gone
