"""How fast a run trains, by the steps it tells of. Tokens are counts, times are seconds of a monotonic clock."""


class Pace:
    """Tokens a second from one told step to the next, however many steps lie between them."""

    def __init__(self, step: int, now: float) -> None:
        """Training goes on after `step`, at a time not before `now`."""
        self.step, self._since = step, now

    def leave_out(self, seconds: float) -> None:
        """So much time since the last told step was no training, but a validation."""
        self._since += seconds

    def tokens_per_s(self, step: int, batch_tokens: int, now: float) -> float:
        """The rate since the last told step, now that `step` is told."""
        steps = max(1, step - self.step)  # a script that went back has made this one at least
        rate = steps * batch_tokens / max(now - self._since, 1e-9)
        self.step, self._since = step, now
        return rate
