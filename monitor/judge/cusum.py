"""Two one-sided CUSUMs of clipped residuals: a patient one for small shifts, a quick one for large ones.

    a <- max(0, a + w (clip(z, -2, 1.4) - 0.45))      a shift of one sigma in some twenty samples
    b <- max(0, b + w (clip(z, -3, 4.0) - 1.5))      a shift of three sigmas and more in two or three

z is a residual in robust standard deviations, w its weight (1 where neighbours are independent). Source: Page 1954,
Biometrika 41. The clips are near the log-likelihood ratio of the skewed, heavy-tailed residuals of real runs: no
single sample can alarm, however far out. Their heights are calibrated by simulation (`bench/judge.py`), never by a
normal table.
"""

A_REFERENCE, A_UP, A_DOWN = 0.45, 1.4, 2.0
B_REFERENCE, B_UP, B_DOWN = 1.5, 4.0, 3.0


class Cusum:
    """The pair, and the step at which the suspicion began."""

    __slots__ = ("a", "b", "b_since", "since")
    SAVED = ("a", "b", "since", "b_since")

    def __init__(self) -> None:
        self.a = self.b = 0.0
        self.since = self.b_since = 0.0

    def add(self, z: float, weight: float, step: float) -> None:
        """Take in one residual."""
        up = (A_UP if z > A_UP else (-A_DOWN if z < -A_DOWN else z)) - A_REFERENCE
        if self.a <= 0.0:
            self.since = step
        a = self.a + weight * up
        self.a = a if a > 0.0 else 0.0
        up = (B_UP if z > B_UP else (-B_DOWN if z < -B_DOWN else z)) - B_REFERENCE
        if self.b <= 0.0:
            self.b_since = step
        b = self.b + weight * up
        self.b = b if b > 0.0 else 0.0

    def quiet(self) -> bool:
        """No suspicion at all."""
        return self.a <= 0.0 and self.b <= 0.0

    def over(self, warn: float, warn_quick: float) -> bool:
        return self.a > warn or self.b > warn_quick

    def hold(self, warn: float, warn_quick: float) -> None:
        """Keep the pair where a recovery shows within some thirty samples, however long the alarm has lasted."""
        self.a = min(self.a, 1.25 * warn)
        self.b = min(self.b, 1.25 * warn_quick)

    def clear(self) -> None:
        self.a = self.b = 0.0

    def state(self) -> list[float]:
        return [float(getattr(self, name)) for name in self.SAVED]

    def load(self, state: list[float]) -> None:
        for name, value in zip(self.SAVED, state, strict=False):
            setattr(self, name, float(value))
