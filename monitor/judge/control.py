"""A control variate: another run on the same data order, whose batch noise is ours.

    y = (x - c) + (1 - beta) u,    u = c less its own level,    beta = cov(e, u) / var(u)

x our loss, c the control's at the same step, e ours less its own level; beta is learnt online from clipped values and
is near 1 for a run of the same recipe. y keeps what is ours alone: batch noise cancels, shared bad data cancels. A
control that leaves its own line, or whose noise turns out not to be ours, is not used. Nats per token.

Samples are matched by step, or by the window of tokens between two of ours where both carry tokens, so that a control
with another batch size is compared over the same data: of one with larger batches, each is held against the mean of as
many of ours.
"""

from monitor.judge.cusum import Cusum
from monitor.judge.track import Track

USEFUL = 0.8
"""The control is used while its spread of y is below this share of our own spread."""
LEAST_PAIRS = 200
"""Pairs before that is known well enough."""
KEEP = 40
"""Control samples that may wait for ours."""
MOST = 16
"""Our samples that one of the control's larger batches may cover."""


class Control:
    """Pairs the two runs' samples and learns the weight. Constant memory."""

    def __init__(self, memory: int) -> None:
        self.own = Track(memory)
        """The control's own past: it is judged too."""
        self.own_cusum = Cusum()
        self.rest = Track(max(50, memory // 2), follow=True)
        """y: ours less what is shared."""
        self.cusum = Cusum()
        self.level = Track(memory, follow=True)
        self.mine = Track(memory, follow=True)
        self.waiting: list[tuple[float, float, float]] = []  # step, tokens (-1 unknown), loss
        self.last = [-1.0, -1.0]  # step, tokens of our last sample
        self.cross = self.square = 0.0
        self.pairs = 0
        self.batch = [0.0, 0.0]
        """Tokens a step of the control's, and a sample of ours; 0 where they are not known."""
        self.came = [-1.0, -1.0]
        """Step and tokens of the control's last sample."""
        self.missed = 0
        """Samples of ours since the last pair."""
        self.window: list[float] = []
        """Our newest losses, kept only beside a control of larger batches."""
        self.newest: tuple[float, float] | None = None
        """y of the sample in hand and its score; None where the control has nothing for it or is off its own line."""

    def offer(self, step: float, tokens: float | None, loss: float) -> None:
        """A sample of the control; it waits for ours of the same step or tokens."""
        self.batch[0] = _batch(self.came, step, tokens)
        self.came = [step, -1.0 if tokens is None else tokens]
        if len(self.waiting) >= KEEP:
            del self.waiting[0]
        self.waiting.append((step, -1.0 if tokens is None else tokens, round(loss, 9)))

    def matched(self, step: float, tokens: float | None, loss: float) -> tuple[float, float] | None:
        """(our loss, the control's) over the same data up to here: means where one of them has the smaller batches.
        None where the control has nothing since our last sample."""
        self.batch[1] = _batch(
            [step - 1.0, self.last[1]], step, tokens
        )  # of a sample, however many steps it stands for
        covers = round(self.batch[0] / self.batch[1]) if min(self.batch) > 0 else 1
        self.window.append(round(loss, 9))
        del self.window[: -max(1, min(MOST, covers))]
        mine = -1.0 if tokens is None else tokens
        total, count, keep = 0.0, 0, []
        before_step, before_tokens = self.last
        for entry in self.waiting:
            by_tokens = mine >= 0 and entry[1] >= 0
            key, low, high = (entry[1], before_tokens, mine) if by_tokens else (entry[0], before_step, step)
            if key > high:
                keep.append(entry)
            elif key > low:
                total += entry[2]
                count += 1
        self.waiting = keep
        self.last = [step, mine]
        self.missed = 0 if count else self.missed + 1
        return (sum(self.window) / len(self.window), total / count) if count else None

    def between(self) -> bool:
        """Between two of the control's larger batches, or in a short gap of its log: its next sample is still to come."""
        return 0 < self.missed <= MOST

    def residual(self, x: float, c: float) -> float:
        """y for this pair, and the weight learnt a little further."""
        u = c - self.level.base if self.level.count >= 3 else 0.0
        e = x - self.mine.base if self.mine.count >= 3 else 0.0
        if self.pairs > 30:
            top = 4.0 * self.level.calm_sd
            u_c = top if u > top else (-top if u < -top else u)
            top = 4.0 * self.mine.calm_sd
            e_c = top if e > top else (-top if e < -top else e)
            gain = 0.005 if self.pairs > 200 else 1.0 / self.pairs
            self.cross += gain * (e_c * u_c - self.cross)
            self.square += gain * (u_c * u_c - self.square)
        self.pairs += 1
        beta = min(1.5, max(0.0, self.cross / self.square)) if self.pairs > 60 and self.square > 0 else 1.0
        return (x - c) + (1.0 - beta) * u

    def learn(self, x: float, c: float) -> None:
        """Move the two levels that the weight is learnt from."""
        self.level.learn(c, True)
        self.mine.learn(x, True)

    def shares_noise(self, own_sd: float, pairs: int) -> bool:
        """Whether, as of so many pairs, its noise is ours: what is left is less than a lone sample's spread."""
        return self.rest.count > pairs and self.rest.calm_sd < USEFUL * own_sd

    def beta(self) -> float:
        """How much of the control's noise is ours."""
        return self.cross / self.square if self.square > 0 else 0.0

    def state(self) -> dict[str, object]:
        return {
            "tracks": [t.state() for t in (self.own, self.rest, self.level, self.mine)],
            "cusums": [c.state() for c in (self.own_cusum, self.cusum)],
            "waiting": [list(entry) for entry in self.waiting],
            "numbers": [*self.last, self.cross, self.square, self.pairs],
            "sizes": [*self.batch, *self.came, self.missed],
            "window": self.window[:],
        }

    def load(self, state: dict) -> None:  # type: ignore[type-arg]
        for track, held in zip((self.own, self.rest, self.level, self.mine), state["tracks"], strict=True):
            track.load(held)
        for cusum, held in zip((self.own_cusum, self.cusum), state["cusums"], strict=True):
            cusum.load(held)
        self.waiting = [(float(a), float(b), float(c)) for a, b, c in state["waiting"]]
        a, b, self.cross, self.square, pairs = state["numbers"]
        self.last, self.pairs = [a, b], int(pairs)
        sizes = [float(v) for v in state.get("sizes", (0.0, 0.0, -1.0, -1.0, 0.0))]
        self.batch, self.came, self.missed = sizes[:2], sizes[2:4], int(sizes[4])
        self.window = [float(v) for v in state.get("window", ())]


def _batch(before: list[float], step: float, tokens: float | None) -> float:
    """Tokens a step since the sample before; 0 where they are not known."""
    known = tokens is not None and before[1] >= 0 and step > before[0] and tokens > before[1]
    return (tokens - before[1]) / (step - before[0]) if known and tokens is not None else 0.0
