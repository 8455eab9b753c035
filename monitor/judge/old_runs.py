"""What the finished runs of a recipe say of the next one: where it should be in each window, and how healthy runs differ.

    mean    mean loss of the K old runs in each window, over the steps they all have            nats per token
    A       scale matrix of a healthy run's gap to it:  (1 + 1/K) (d s^2 R + S) / (d + K - 1)
    S       summed squares and products of the old runs' own gaps
    R       what gaps of healthy runs are like (`bend.Shape`), the shape and the size s^2 that these runs make likeliest,
            worth d runs: an inverse Wishart prior (Dawid 1981, Biometrika 68). The gap is Student's t, d + K - 1 degrees
            of freedom, so that few old runs call late, not falsely

The run's mean over the same steps less `mean` is its gap: batch noise that is shared cancels, and noise that is not is in S.
Old runs that read one data order beside a run that reads another would make A too small. So the sums with alternating
signs are kept as well, in which no level and no drift is left: by them the run's own batch noise beyond theirs is known
and added. Stops being true where the run is not of the recipe, or is shorter or longer than they are.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from monitor.errors import WrongInput
from monitor.judge.bend import FIRST, LEAST, PARTS, Bend, Shape, cholesky
from monitor.verdict import Sample

FEWEST = 3
"""Old runs from which they say how runs differ."""
WORTH = 8.0
"""Old runs that the likeliest shape is worth: between 5 and 20 on validation curves of 70 recipes, by their likelihood."""
SHAPES = tuple(
    Shape(*of) for of in product((True, False), (-1.1, -0.5, 0.0), (0.5, 1.0, 2.0), (0.003, 0.03, 0.15))
)
Table = list[list[float]]


@dataclass(frozen=True, slots=True)
class OldRuns:
    """What is known of a recipe. Windows rise in step."""

    runs: int
    steps: frozenset[int]
    """Steps that they all have."""
    last_step: float
    first: tuple[float, ...]
    """First step of each window."""
    last: tuple[float, ...]
    """Last step of each window."""
    count: tuple[int, ...]
    """Samples of each window."""
    share: tuple[float, ...]
    """Share of the run at the middle of each window."""
    mean: tuple[float, ...]
    turns: tuple[float, ...]
    """Mean over the old runs of the window's sum with alternating signs."""
    noise: float
    """Variance that one sample's gap to the mean has by batches in such a run, nats per token squared."""
    scale: tuple[tuple[float, ...], ...]
    df: float

    def bend(self) -> Bend:
        """The test of a run beside these."""
        return Bend(lambda a, b: self.scale[a.place][b.place], self.df)

    def window(self, step: float) -> int:
        """The newest window that has begun at a step; -1 before the first."""
        return bisect_right(self.first, step) - 1

    def at(self, step: float) -> tuple[float, float] | None:
        """Expected loss and the standard deviation between runs, linear between windows; None outside them."""
        share = step / self.last_step
        i = bisect_right(self.share, share)
        if not 0 < i < len(self.share):
            return None
        part = (share - self.share[i - 1]) / (self.share[i] - self.share[i - 1])
        sd = [math.sqrt(self.scale[j][j]) for j in (i - 1, i)]
        return self.mean[i - 1] + part * (self.mean[i] - self.mean[i - 1]), sd[0] + part * (sd[1] - sd[0])


def old_runs(runs: Iterable[Sequence[Sample]]) -> OldRuns:
    """What these runs say of the next one. Raises WrongInput where they are too few, or have too little in common."""
    held = [{s.step: s.loss for s in run if math.isfinite(s.loss)} for run in runs]
    if len(held) < FEWEST:
        raise WrongInput(
            f"{len(held)} old runs don't say how far runs of the recipe lie apart; give {FEWEST} or more"
        )
    shared = sorted(set(held[0]).intersection(*held[1:]))
    end = float(max(1, shared[-1])) if shared else 1.0
    parts: list[list[int]] = [[] for _ in range(PARTS)]
    for step in shared:
        parts[min(PARTS - 1, int(PARTS * step / end))].append(step)
    parts = [steps for steps in parts[FIRST:] if steps]
    if len(parts) < LEAST + 1:
        raise WrongInput(
            f"{len(held)} old runs have {len(shared)} steps in common, in {len(parts)} of {PARTS - FIRST} parts of the "
            "run; give runs that were logged at the same steps"
        )
    k, w = len(held), range(len(parts))
    table = [[sum(run[s] for s in steps) / len(steps) for steps in parts] for run in held]
    turned = [[turns(run[s] for s in steps) for steps in parts] for run in held]
    mean, middle = (tuple(sum(row[i] for row in of) / k for i in w) for of in (table, turned))
    spread = [[sum((row[i] - mean[i]) * (row[j] - mean[j]) for row in table) for j in w] for i in w]
    share = tuple((steps[0] + steps[-1]) / 2.0 / end for steps in parts)
    prior = likeliest(share, spread, k - 1)
    df = WORTH + k - 1.0
    scale = tuple(tuple((1.0 + 1.0 / k) * (prior[i][j] + spread[i][j]) / df for j in w) for i in w)
    apart = sum((row[i] - middle[i]) ** 2 for row in turned for i in w) / (k - 1) / sum(map(len, parts))
    return OldRuns(
        k, frozenset(shared), end, tuple(float(steps[0]) for steps in parts), tuple(float(steps[-1]) for steps in parts),
        tuple(map(len, parts)), share, mean, middle, (1.0 + 1.0 / k) * apart, scale, df,
    )  # fmt: skip


def turns(losses: Iterable[float]) -> float:
    """Their sum with alternating signs."""
    return sum(-x if i % 2 else x for i, x in enumerate(losses))


def likeliest(share: Sequence[float], spread: Table, n: int) -> Table:
    """d s^2 R of the shape and size under which a spread of n degrees of freedom is likeliest."""
    w = range(len(share))
    m = WORTH + len(share) - 1.0
    best, found = math.inf, spread
    floor = 1e-12 * max(1e-12, max(spread[i][i] for i in w))
    for shape in SHAPES:
        like = [[shape.at(a, b) for b in share] for a in share]
        rows = cholesky(like)
        size = max(_trace(rows, spread) / n / len(share), floor)
        for part in (1.0, 0.4):  # a shape that misses some direction seems larger than it is
            by = WORTH * size * part
            both = cholesky([[by * like[i][j] + spread[i][j] for j in w] for i in w])
            alone = sum(2.0 * math.log(row[-1]) for row in rows) + len(share) * math.log(by)
            unlikely = (m + n) / 2.0 * sum(2.0 * math.log(row[-1]) for row in both) - m / 2.0 * alone
            if unlikely < best:
                best, found = unlikely, [[by * like[i][j] for j in w] for i in w]
    return found


def _trace(rows: Table, spread: Table) -> float:
    """Of R^-1 S, R by its lower factor: the sum of the squares that S has along it."""
    factor = cholesky(spread)
    total = 0.0
    for column in range(len(rows)):
        solved: list[float] = []
        for i, row in enumerate(rows):
            value = factor[i][column] if column <= i else 0.0
            solved.append((value - sum(a * b for a, b in zip(row, solved, strict=False))) / row[-1])
        total += sum(v * v for v in solved)
    return total
