"""How far the demo has got: one line, redrawn, with the time left."""

import shutil
import sys
import time
from dataclasses import dataclass, field


@dataclass
class Progress:
    """One line that says what is being done and how much time is left, never a scrolling wall."""

    estimate_s: dict[str, float]
    began: float = field(default_factory=time.monotonic)
    spent: dict[str, float] = field(default_factory=dict)
    _phase: str = ""
    _phase_began: float = 0.0
    _said: float = 0.0
    _wide: int = 0

    def phase(self, name: str) -> None:
        now = time.monotonic()
        if self._phase:
            self.spent[self._phase] = now - self._phase_began
        self._phase, self._phase_began, self._said = name, now, 0.0

    def left_s(self, done: float) -> float:
        """Seconds left, `done` being the finished part of this phase. Estimates are scaled by how this machine kept
        them so far, half a minute counting as kept, so that the first seconds don't decide."""
        names = list(self.estimate_s)
        if self._phase not in names:
            later, expected = [], 0.0
            past = names
        else:
            here = names.index(self._phase)
            past, later, expected = names[:here], names[here + 1 :], self.estimate_s[self._phase]
        known, spent = sum(self.estimate_s[n] for n in past), sum(self.spent.get(n, 0.0) for n in past)
        pace = (spent + 30.0) / (known + 30.0)
        elapsed = time.monotonic() - self._phase_began
        # a phase begins with processes that start: its first part says little of the rest
        this = elapsed * (1 - done) / done if done > 0.15 else max(0.2 * expected, pace * expected - elapsed)
        return this + pace * sum(self.estimate_s[n] for n in later)

    def show(self, words: str, done: float) -> None:
        """Redraw the line on a terminal; elsewhere say it every ten seconds."""
        now, left = time.monotonic(), self.left_s(done)
        line = f"  {words}  ({100 * done:.0f}%; {clock(now - self.began)} so far, about {clock(left)} left)"
        if sys.stderr.isatty():
            width = shutil.get_terminal_size().columns - 1
            print("\r" + line[:width].ljust(min(self._wide, width)), end="", file=sys.stderr, flush=True)
            self._wide = len(line)
        elif now - self._said >= 10:
            print(line, file=sys.stderr, flush=True)
            self._said = now

    def say(self, words: str) -> None:
        if sys.stderr.isatty() and self._wide:
            print(
                "\r" + " " * min(self._wide, shutil.get_terminal_size().columns - 1) + "\r",
                end="",
                file=sys.stderr,
            )
            self._wide = 0
        print(words, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
