"""A gap that bends away from what the gaps of healthy runs do: Student's test of slow ramps, one look a window.

    g     gap in each window so far, nats per token
    A     scale matrix of such gaps in healthy runs: g is Student's t of df degrees of freedom, location 0, scale A
    e, m  what each window says that those before did not: L^-1 g, and L^-1 of the ramp max(0, t - t0), A = L L'
    z     m'e / |m|, the most powerful linear test of that ramp (Neyman and Pearson)
    T     z sqrt((df + w - 1) / (df + |e|^2 - z^2)),  Student's t of df + w - 1 after w windows

t is the share of the run. T is that whatever common factor the gaps of this run have: how much it wanders beside the
ramp is in the denominator, so a restless run has to drift further. Healthy runs have single windows that leap (a
validation that is off, a bump that passes), so no e counts for more than `CLIP` of its deviations and the windows after
are told of no more than that; and a call takes two looks, the newest past the height and the one before half-way.
The ramp's onset t0 is not known and every window is a look: heights are those of simulated healthy runs
(`tests/monitor/test_judge_bend.py`), past which one in 1,000 goes up. Stops being true where A is not theirs up to a factor.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

PARTS = 20
"""Windows are twentieths of the run, from the third on: runs wander in the first tenth."""
FIRST = 2
ONSETS = tuple(k / 10 for k in range(1, 9))
"""Shares of the run from which a drift may rise."""
CLIP = 3.0
"""Deviations of a window's news that count."""
BEFORE = 0.5
"""Share of the height that the look before the newest must have reached."""
LEAST = 4
"""Windows before there is a look."""


class Window(NamedTuple):
    """One window of a run."""

    place: int
    """Which of the reference's windows it is."""
    share: float
    """Share of the run at its middle."""
    gap: float
    extra: float
    """Variance that this run's gap has besides what healthy ones have."""


class Look(NamedTuple):
    """How far the gap has bent, in normal deviates, and the onset that says so."""

    up: float = 0.0
    since_up: float = 0.0
    down: float = 0.0
    since_down: float = 0.0


class Bend:
    """The windows so far, and what each says that those before did not. Constant memory: at most PARTS windows."""

    def __init__(self, scale: Callable[[Window, Window], float], df: float) -> None:
        self._scale, self._df = scale, df
        self.windows: list[Window] = []
        self.newest = self.before = Look()
        self._rows: list[list[float]] = []
        self._news: list[float] = []
        self._size = 0.0
        self._ramps: list[list[float]] = [[] for _ in ONSETS]
        self._dot = [0.0] * len(ONSETS)
        self._square = [0.0] * len(ONSETS)

    def add(self, window: Window) -> None:
        """Take in the next window, and look."""
        row: list[float] = []
        for held, other in zip(self.windows, self._rows, strict=True):
            row.append((self._scale(window, held) - _dot(row, other)) / other[-1])
        own = self._scale(window, window) + window.extra
        row.append(math.sqrt(max(own - _dot(row, row), 1e-9 * own)))
        w, df = len(self.windows), self._df
        e = (window.gap - _dot(row, self._news)) / row[-1]
        if df + w >= LEAST - 1:
            most = CLIP * math.sqrt((df + self._size) / (df + w))
            e = max(-most, min(most, e))
        for k, onset in enumerate(ONSETS):
            m = (max(0.0, window.share - onset) - _dot(row, self._ramps[k])) / row[-1]
            self._ramps[k].append(m)
            self._dot[k] += m * e
            self._square[k] += m * m
        self.windows.append(window)
        self._rows.append(row)
        self._news.append(e)
        self._size += e * e
        self.before, self.newest = self.newest, self._look()

    def _look(self) -> Look:
        w = len(self.windows)
        if w < LEAST:
            return Look()
        up, since_up, down, since_down = Look()
        df = self._df + w - 1.0
        for k, onset in enumerate(ONSETS):
            if self._square[k] <= 0.0:
                break
            z = self._dot[k] / math.sqrt(self._square[k])
            rest = self._df + max(1e-9 * self._size, self._size - z * z)
            z = normal(z * math.sqrt(df / rest), df) if rest > 0.0 else 0.0
            if z > up:
                up, since_up = z, onset
            if -z > down:
                down, since_down = -z, onset
        return Look(up, since_up, down, since_down)

    def called(self, height: float) -> int:
        """1 where it has bent up, -1 where down, 0 where neither."""
        for sign, newest, before in (
            (1, self.newest.up, self.before.up),
            (-1, self.newest.down, self.before.down),
        ):
            if newest > height and before > BEFORE * height:
                return sign
        return 0

    def until(self, place: int) -> "Bend":
        """The same without the windows from this one on."""
        kept = Bend(self._scale, self._df)
        for window in self.windows:
            if window.place < place:
                kept.add(window)
        return kept

    def state(self) -> list[list[float]]:
        return [list(window) if window.extra else list(window[:3]) for window in self.windows]

    def load(self, state: Any) -> None:
        for place, share, gap, *extra in state:
            self.add(Window(int(place), float(share), float(gap), float(extra[0]) if extra else 0.0))


def normal(t: float, df: float) -> float:
    """The normal deviate with the tail of this one of Student's t. Wallace 1959, Annals of Mathematical Statistics 30."""
    return math.copysign((8.0 * df + 1.0) / (8.0 * df + 3.0) * math.sqrt(df * math.log1p(t * t / df)), t)


class Shape(NamedTuple):
    """How gaps of healthy runs of one recipe hang together: t^fade times a stationary process of log t, and noise.

    A gap keeps its size in equal parts of log steps as a loss does; `smooth` (Matern 3/2) or rough (Ornstein-Uhlenbeck).
    """

    smooth: bool = True
    fade: float = -0.5
    rate: float = 1.0
    noise: float = 0.03
    """Share of a window's variance that no other window knows of."""

    def at(self, a: float, b: float) -> float:
        """The covariance of the windows at shares a and b, in units of that at the end."""
        size = (a * b) ** self.fade
        if a == b:
            return size
        apart = self.rate * abs(math.log(a / b))
        return size * (1.0 - self.noise) * math.exp(-apart) * (1.0 + apart if self.smooth else 1.0)


def cholesky(table: Sequence[Sequence[float]]) -> list[list[float]]:
    """The lower factor of a symmetric matrix; what is no part of it by rounding counts as next to nothing."""
    rows: list[list[float]] = []
    for i, line in enumerate(table):
        row: list[float] = []
        for j in range(i):
            row.append((line[j] - _dot(row, rows[j])) / rows[j][-1])
        row.append(math.sqrt(max(line[i] - _dot(row, row), 1e-12 * line[i])))
        rows.append(row)
    return rows


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    """Of as many as the shorter has."""
    return sum(x * y for x, y in zip(a, b, strict=False))
