"""A run's samples as people look at them: the newest attempt's word for every step, thinned without hiding a spike.

An attempt holds the steps after its `resume_step`, up to where the next attempt took over. Asked for one attempt by
number, all that it sent is given, superseded or not.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monitor.store.columns import BAND, COLUMNS, Columns, Damaged, Floats, Pieces, missing, unpack
from monitor.store.facts import AttemptFacts, RunFacts
from monitor.store.query import Reader
from monitor.store.tables import ChunkRow

FIELDS = (
    "step", "loss", "tokens", "time", "lr", "val_loss", "grad_norm", "tokens_per_s", "mfu", "spread",
    "expected", "lower", "upper", "gap_sigma",
)  # fmt: skip
"""Of a sample in the API, besides `attempt`."""
LAST = 2**53


def spans(attempts: list[AttemptFacts]) -> list[tuple[int, int, int]]:
    """(attempt, first step, last step) that each attempt has the word for, oldest first; those with none left out."""
    out, limit = [], LAST
    for found in reversed(attempts):
        if found.resume_step is None:
            continue
        after = found.resume_step if found.resume_step > 0 else -1
        if after + 1 <= limit:
            out.append((found.attempt, after + 1, limit))
        limit = min(limit, after)
    return out[::-1]


@dataclass(slots=True)
class Found:
    """What one attempt has to say: `index` are the positions in `pieces` of its samples in order of step, each step once."""

    attempt: int
    pieces: Pieces
    index: NDArray[np.intp]
    bands: list[Columns]

    def columns(self, kept: NDArray[np.intp] | slice = slice(None)) -> Columns:
        """The samples at the places `kept` of `index`, with what was expected of them."""
        return _with_bands(self.pieces.take(self.index[kept]), self.bands)

    def thinned(self, most: int) -> Columns:
        """The samples that `thin` keeps, with the column `mean`: the mean finite loss of the bucket each stands in. No others are
        put together."""
        names = [name for name in ("step", "loss", "val_loss") if name in self.pieces.names]
        whole = Columns(len(self.index), {name: self.pieces.column(name)[self.index] for name in names})
        kept = thin(whole, most)
        out = self.columns(kept)
        if len(kept) < whole.n:
            out.of["mean"] = _means(whole, most, kept)
        return out


def samples(
    store: Reader,
    facts: RunFacts,
    pending: Sequence[tuple[int, Columns]],
    *,
    first: int = 0,
    last: int = LAST,
    attempt: int | None = None,
) -> list[tuple[int, Columns]]:
    """(attempt, its samples with what was expected of them) in order of step, each step once. See `find`."""
    return [
        (found.attempt, found.columns())
        for found in find(store, facts, pending, first=first, last=last, attempt=attempt)
    ]


def find(
    store: Reader,
    facts: RunFacts,
    pending: Sequence[tuple[int, Columns]],
    *,
    first: int = 0,
    last: int = LAST,
    attempt: int | None = None,
) -> list[Found]:
    """Each attempt's samples of steps first..last, as of one moment, put together no further than need be.

    pending  attempt and bands that are not in the store yet

    Raises Damaged.
    """
    with store.at_once():
        return _find(store, facts, pending, first, last, attempt)


def _find(
    store: Reader,
    facts: RunFacts,
    pending: Sequence[tuple[int, Columns]],
    first: int,
    last: int,
    attempt: int | None,
) -> list[Found]:
    wanted = spans(facts.attempts) if attempt is None else [(attempt, 0, LAST)]
    known = store.run(facts.run)  # as of the last commit; what the writer holds may be ahead of it
    if known is None and facts.samples and not pending:
        raise Damaged(
            f"{store.path}: the row of run {facts.run!r} can't be found; see `losscast monitor repair`"
        )
    out = []
    for number, low, high in wanted:
        low, high = max(low, first), min(high, last)
        if low > high:
            continue
        chunks = list(store.chunks(facts.run_id, number, first=low, last=high))
        of = None if known is None else known.attempt_facts(number)
        _without_a_hole(store, facts, number, chunks, of)
        if not chunks:
            continue
        pieces = Pieces([unpack(c.body) for c in chunks])
        index = _in_order(pieces.column("step"), low, high)
        if not len(index):
            continue
        bands = [
            unpack(body, BAND)
            for body in store.bands(facts.run_id, number, chunks[0].first_ord, chunks[-1].ord)
        ]
        bands += [band for of, band in pending if of == number]
        out.append(Found(number, pieces, index, bands))
    return out


def _in_order(step: Floats, low: int, high: int) -> NDArray[np.intp]:
    """Positions of the steps low..high in rising order; of a step that was sent twice, the later one."""
    index = np.flatnonzero((step >= low) & (step <= high))
    step = step[index]
    if np.all(step[1:] > step[:-1]):
        return index
    order = np.argsort(step, kind="stable")
    step = step[order]
    return index[order][np.append(step[1:] != step[:-1], True)]


def _without_a_hole(
    store: Reader, facts: RunFacts, attempt: int, chunks: list[ChunkRow], known: AttemptFacts | None
) -> None:
    """Raise Damaged where samples that were committed can't be found.

    Each chunk says how many samples its attempt had before it. Chunks outside the steps in view are counted.

    known  the attempt as of a commit before the chunks were read, where they go on to its end
    """

    def missing_before(count: int, ord: int) -> Damaged:
        return Damaged(
            f"{store.path}: {count} samples of run {facts.run}, attempt {attempt}, are missing before chunk {ord}; "
            f"see `losscast monitor repair`"
        )

    seen = at = 0
    for chunk in chunks:
        if chunk.before != seen:
            seen += store.count_between(facts.run_id, attempt, at, chunk.ord)
            if chunk.before != seen:
                raise missing_before(chunk.before - seen, chunk.ord)
        seen, at = chunk.before + chunk.n, chunk.ord
    if known is not None and seen < known.samples:
        seen += store.count_between(facts.run_id, attempt, at, 2**62)
        if seen < known.samples:
            raise missing_before(known.samples - seen, at + 1)


def _with_bands(whole: Columns, bands: list[Columns]) -> Columns:
    if not any(band.n for band in bands):
        return whole
    pieces = Pieces(bands, BAND)
    seq, order = pieces.column("seq"), None
    if not np.all(seq[1:] >= seq[:-1]):
        order = np.argsort(seq, kind="stable")
        seq = seq[order]
    wanted = whole.get("seq")
    at = np.minimum(np.searchsorted(seq, wanted), len(seq) - 1)
    hit = seq[at] == wanted
    expected = pieces.take(at if order is None else order[at])
    of = dict(whole.of)
    for name in BAND[2:]:
        of[name] = np.where(hit, expected.get(name), np.nan)
    return Columns(whole.n, of, whole.extra)


def thin(columns: Columns, most: int) -> NDArray[np.intp]:
    """Positions of about `most` samples: of each bucket the lowest loss, the highest, and one that is not finite; a spike of a
    single step is never lost. The first and the last are always there, and of the rare ones with a validation loss about
    a quarter of `most` besides, by the same rule."""
    n = columns.n
    if most <= 0 or n <= most:
        return np.arange(n)
    kept = [np.array([0, n - 1]), _extremes(columns.get("loss"), buckets(columns, most))]
    val = columns.of.get("val_loss")
    if val is not None:
        there = np.flatnonzero(~missing(val))
        few = max(1, most // 4)
        if 3 * len(there) > few and len(there):
            picked = _extremes(
                val[there], np.unique(np.linspace(0, len(there), max(1, few // 3) + 1).astype(np.int64))
            )
            there = there[picked]
        kept.append(there)
    return np.unique(np.concatenate(kept))


def _extremes(values: Floats, edges: NDArray[np.int64]) -> NDArray[np.intp]:
    """Of each bucket: where the lowest finite value is, the highest, and the first that is not finite."""
    starts, sizes = edges[:-1], np.diff(edges)
    finite = np.isfinite(values)
    bucket = np.repeat(np.arange(len(starts)), sizes)
    low = np.minimum.reduceat(np.where(finite, values, np.inf), starts)
    high = np.maximum.reduceat(np.where(finite, values, -np.inf), starts)
    found = []
    for hit in (finite & (values == low[bucket]), finite & (values == high[bucket]), ~finite):
        at = np.flatnonzero(hit)
        found.append(at[np.unique(bucket[at], return_index=True)[1]])  # the first of each bucket
    return np.concatenate(found)


def buckets(columns: Columns, most: int) -> NDArray[np.int64]:
    """Bounds of the buckets: most of them of equally many samples, and finer ones towards the first step, as many in each
    of its powers of ten, so that a logarithmic axis has its points too."""
    n, count = columns.n, max(1, (most - 2) // 3)
    fine = count // 4
    edges = [np.linspace(0, n, count - fine + 1)]
    step = columns.of.get("step")
    if fine and step is not None and step[-1] > max(step[0], 1.0):
        edges.append(np.searchsorted(step, np.geomspace(max(step[0], 1.0), step[-1], fine)))
    return np.unique(np.concatenate(edges).astype(np.int64))


def _means(columns: Columns, most: int, kept: NDArray[np.intp]) -> Floats:
    loss, edges = columns.get("loss"), buckets(columns, most)
    finite = np.isfinite(loss)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.add.reduceat(np.where(finite, loss, 0.0), edges[:-1]) / np.add.reduceat(
            finite, edges[:-1], dtype=np.int64
        )
    return mean[np.minimum(np.searchsorted(edges, kept, side="right") - 1, len(mean) - 1)]


def rows(parts: list[tuple[int, Columns]], block: int = 5000) -> Iterator[list[dict[str, Any]]]:
    """Samples as the API gives them, `block` at a time. Missing values are null, non-finite ones spelled."""
    for attempt, columns in parts:
        for start in range(0, columns.n, block):
            yield _rows(attempt, columns.take(slice(start, start + block)))


def _rows(attempt: int, columns: Columns) -> list[dict[str, Any]]:
    none = [None] * columns.n
    cells_of = [
        none if (column := columns.of.get(name)) is None else _values(column, name in BAND) for name in FIELDS
    ]
    out = []
    for cells in zip(*cells_of, strict=True):
        row = dict[str, Any](zip(FIELDS, cells, strict=True))
        row["step"] = int(cells[0])
        row["attempt"] = attempt
        out.append(row)
    mean = columns.of.get("mean")
    if mean is not None:
        for row, value in zip(out, mean.tolist(), strict=True):
            row["mean"] = value if value - value == 0 else None
    if columns.extra:
        for row, seq in zip(out, columns.get("seq").tolist(), strict=True):
            more = columns.extra.get(int(seq))
            if more:
                row["extra"] = more
    return out


def _values(column: NDArray[np.float64], band: bool) -> list[Any]:
    values: list[Any] = column.tolist()
    odd = np.flatnonzero(~np.isfinite(column))
    if len(odd):
        absent = missing(column)
        for i in odd.tolist():
            v = values[i]
            values[i] = (
                None
                if absent[i] or (band and v != v)
                else "NaN"
                if v != v
                else "Infinity"
                if v > 0
                else "-Infinity"
            )
    return values


assert set(FIELDS[:-4]) | {"seq"} == set(COLUMNS)
