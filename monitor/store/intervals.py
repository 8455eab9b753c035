"""A set of whole numbers as sorted, disjoint, closed intervals: which sequence numbers of an attempt were taken."""

from bisect import bisect_right
from collections.abc import Iterable


class Intervals:
    """Constant memory while numbers arrive in order; two more integers for each gap."""

    __slots__ = ("ends", "starts")

    def __init__(self, pairs: Iterable[tuple[int, int]] = ()):
        self.starts: list[int] = []
        self.ends: list[int] = []
        for first, last in pairs:
            self.add(first, last)

    def __contains__(self, number: int) -> bool:
        at = bisect_right(self.starts, number) - 1
        return at >= 0 and number <= self.ends[at]

    def __len__(self) -> int:
        """How many numbers are in the set."""
        return sum(self.ends) - sum(self.starts) + len(self.starts)

    @property
    def next(self) -> int:
        """One past the largest number; 0 when empty."""
        return self.ends[-1] + 1 if self.ends else 0

    def add(self, first: int, last: int) -> None:
        """Put first..last in; what is already there stays."""
        starts, ends = self.starts, self.ends
        if not ends or first > ends[-1] + 1:
            starts.append(first)
            ends.append(last)
            return
        if first == ends[-1] + 1:
            ends[-1] = last
            return
        low = bisect_right(ends, first - 2)  # first interval that touches or follows `first`
        high = bisect_right(starts, last + 1)  # one past the last that touches `last`
        if low < high:
            first, last = min(first, starts[low]), max(last, ends[high - 1])
        starts[low:high] = [first]
        ends[low:high] = [last]

    def pairs(self) -> list[tuple[int, int]]:
        """(first, last) of each interval, in order."""
        return list(zip(self.starts, self.ends, strict=True))
