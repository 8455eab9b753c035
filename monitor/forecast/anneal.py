"""The loss at any step of any learning-rate schedule: the multi-power law.

    L(t) = E + A_N (N / N0)**-a + A S(t)**-alpha - LD(t)
    LD(t) = B sum_k (eta_{k-1}**p - eta_k**p) (1 - (1 + C eta_k**-gamma (S(t) - S_k))**-beta)

eta   learning rate over the peak of the fitted runs of that size;  S its sum over steps so far, over the longest fitted run's
p     how what is gained hangs on the rate: 1 in the multi-power law as published, where halving a rate twice gains the second
      time half as much. Here it is fitted about 1: real runs gain somewhat less from the first halving
N     parameters; the size term is there when runs of several sizes were fitted (as in Tissue et al. 2024)
E     nats per token; LD the loss that lowering the rate gains, summed over its changes, warm-up included

Source: Luo et al. 2025, arXiv:2503.12811; Tissue et al. 2024, arXiv:2408.11029. Holds for one batch size and one
peak rate, or peaks near it; early in training (the first few percent) it is rough.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from monitor.errors import WrongInput
from monitor.forecast.table import FloatArray

NAMES = ("E", "A", "alpha", "B", "C", "beta", "gamma", "p", "A_N", "a")
DRIFT = 0.125
"""sd of the true curve about the fitted one beyond the fitted runs' sum of rates, as a share of the fall foretold there; as a law's."""
KINDS = ("cosine", "wsd", "linear", "constant")


@dataclass(frozen=True)
class LrPath:
    """A learning-rate schedule as straight pieces: rates `lr` (k,) at `steps` (k,), from (0, 0) on; sums in `area` (k,)."""

    steps: FloatArray
    lr: FloatArray
    area: FloatArray
    unit: float = 1.0
    """What sums of rates are counted in: the fitted runs' largest."""

    @classmethod
    def of(cls, steps: FloatArray, lr: FloatArray, unit: float = 1.0, pieces: int = 400) -> "LrPath":
        """Through the given rows, linear between, and linear from zero at step 0; a steep piece is cut finer."""
        if steps[0] > 0:
            steps, lr = np.concatenate([[0.0], steps]), np.concatenate([[0.0], lr])
        if steps.size > pieces:
            bends = np.abs(np.diff(np.diff(lr) / np.maximum(np.diff(steps), 1e-9)))
            keep = np.zeros(steps.size, bool)
            keep[np.linspace(0, steps.size - 1, pieces // 2).astype(int)] = True
            keep[1 + np.argsort(-bends)[: pieces // 2]] = True
            steps, lr = steps[keep], lr[keep]
        top = float(lr.max()) or 1.0
        cuts = np.maximum(1, np.ceil(np.abs(np.diff(lr)) / (0.04 * top))).astype(int)
        fine = [
            np.linspace(a, b, n, endpoint=False) for a, b, n in zip(steps[:-1], steps[1:], cuts, strict=True)
        ]
        nodes = np.concatenate([*fine, steps[-1:]])
        rates = np.interp(nodes, steps, lr)
        area = np.concatenate([[0.0], np.cumsum(np.diff(nodes) * 0.5 * (rates[1:] + rates[:-1]))])
        return cls(nodes, rates, area / unit, unit)

    def area_at(self, steps: FloatArray) -> FloatArray:
        """Sum of the rates up to the given steps (n,); the last rate goes on beyond the end."""
        k = np.clip(np.searchsorted(self.steps, steps, side="right") - 1, 0, self.steps.size - 1)
        past = (steps - self.steps[k]) / self.unit
        return self.area[k] + past * 0.5 * (self.lr[k] + np.interp(steps, self.steps, self.lr))


def loss_at(theta: FloatArray, path: LrPath, steps: FloatArray, size: float = 0.0) -> FloatArray:
    """Loss (n,) at steps (n,) for parameters in the order of NAMES; `size` is ln(N / N0). The path is in units of the fit."""
    e, a, alpha, b, c, beta, gamma, p, a_n, expo = theta
    area = np.maximum(path.area_at(steps), 1e-12)
    falls = -np.diff(path.lr**p)
    live = np.flatnonzero(falls != 0)
    loss = e + a * area**-alpha
    if a_n > 0:
        loss = loss + a_n * math.exp(-expo * size)
    if live.size:
        after = np.maximum(path.lr[live + 1], 1e-6)
        middle = 0.5 * (path.area[live] + path.area[live + 1])
        since = np.maximum(area[:, None] - middle[None, :], 0.0)
        loss = loss - b * ((1.0 - (1.0 + c * after**-gamma * since) ** -beta) @ falls[live])
    return loss


@dataclass(frozen=True)
class Schedule:
    """What the learning rate does: a kind with lengths, as fractions of the run, or the rows of a file."""

    kind: str
    warmup: float = 0.01
    decay: float = 0.2
    final: float = 0.0
    """Last rate over the peak."""
    rows: tuple[tuple[float, float], ...] = ()
    """(step, lr) of a file; lr as in the file."""
    source: str = ""

    @classmethod
    def parse(cls, text: str) -> "Schedule":
        """`cosine`, `wsd:warmup=0.02,decay=0.2,final=0.1`, ..., or the name of a CSV file with step,lr.

        Raises WrongInput for an unknown kind or length, and for a file that is no schedule.
        """
        kind, _, rest = text.partition(":")
        if kind in KINDS:
            values: dict[str, float] = {}
            for part in filter(None, rest.split(",")):
                name, _, value = part.partition("=")
                try:
                    values[name.strip()] = float(value)
                except ValueError:
                    raise WrongInput(
                        f"--schedule {text}: {part!r} is no NAME=FRACTION; say for example wsd:warmup=0.01,decay=0.2,final=0.1"
                    ) from None
            unknown = sorted(set(values) - {"warmup", "decay", "final"})
            if unknown:
                raise WrongInput(
                    f"--schedule {text}: there is no length {unknown[0]!r}; say warmup, decay (of wsd) and final, as in wsd:warmup=0.01,decay=0.2,final=0.1"
                )
            if (
                any(not 0 <= v <= 1 for v in values.values())
                or values.get("warmup", 0) + (values.get("decay", 0) if kind == "wsd" else 0) > 1
            ):
                raise WrongInput(
                    f"--schedule {text}: warmup and decay are fractions of the run and final one of the peak rate, each 0 to 1; got {rest}"
                )
            return cls(
                kind,
                warmup=values.get("warmup", cls.warmup),
                decay=values.get("decay", cls.decay),
                final=values.get("final", cls.final),
            )
        if not Path(text).suffix and not Path(text).exists():
            raise WrongInput(
                f"--schedule {text}: is neither a kind ({', '.join(KINDS)}) nor a file; a file has the columns step,lr"
            )
        return cls("file", rows=_rows(text), source=text)

    def rates(self, total: int) -> tuple[FloatArray, FloatArray]:
        """Steps (k,) and rates (k,) of a run of `total` steps; the rates over the peak, those of a file as they are."""
        if self.kind == "file":
            steps, lr = np.array(self.rows, float).T
            return steps, lr
        warm = max(self.warmup * total, 1e-9)
        if self.kind == "constant":
            knots, lr = np.array([0.0, warm, total]), np.array([0.0, 1.0, 1.0])
        elif self.kind == "linear":
            knots, lr = np.array([0.0, warm, total]), np.array([0.0, 1.0, self.final])
        elif self.kind == "wsd":
            knots, lr = (
                np.array([0.0, warm, (1 - self.decay) * total, total]),
                np.array([0.0, 1.0, 1.0, self.final]),
            )
        else:
            u = np.linspace(0, 1, 201)
            knots = np.concatenate([[0.0], warm + u * (total - warm)])
            lr = np.concatenate([[0.0], self.final + (1 - self.final) * 0.5 * (1 + np.cos(np.pi * u))])
        return knots, lr

    def to_dict(self) -> dict[str, Any]:
        """As prediction.json has it."""
        if self.kind == "file":
            return {
                "kind": "file",
                "rows": len(self.rows),
                "last_step": self.rows[-1][0],
                "peak_lr": max(r for _, r in self.rows),
            }
        out: dict[str, Any] = {"kind": self.kind, "warmup": self.warmup}
        if self.kind == "wsd":
            out["decay"] = self.decay
        if self.kind != "constant":
            out["final"] = self.final
        return out


def _rows(path: str) -> tuple[tuple[float, float], ...]:
    from monitor.forecast.table import need, read_table, refuse

    table = read_table(path)
    steps = table.numbers(
        need(table, ("step", "steps", "iteration"), "optimizer updates"), low=0.0, may_equal=True
    )
    lr = table.numbers(need(table, ("lr", "learning_rate"), "learning rate"), low=0.0, may_equal=True)
    order = np.argsort(steps, kind="stable")
    steps, lr = steps[order], lr[order]
    refuse(
        [
            f"{path}:{table.lines[int(order[i + 1])]}: step {steps[i + 1]:g} is there twice"
            for i in np.flatnonzero(np.diff(steps) == 0)
        ]
    )
    if not lr.max() > 0:
        raise WrongInput(f"{path}: every learning rate is 0")
    return tuple(zip(steps.tolist(), lr.tolist(), strict=True))


def own_shape(model: dict[str, Any], total: int) -> Schedule:
    """The fitted runs' own schedule, stretched to `total` steps."""
    rows = tuple((fraction * total, rate * (model["peak"] or 1.0)) for fraction, rate in model["shape"])
    return Schedule("file", rows=rows)


def predicted(
    model: dict[str, Any],
    schedule: Schedule,
    steps: FloatArray,
    total: int,
    params: float | None,
    over: Schedule | None = None,
) -> tuple[FloatArray, FloatArray]:
    """Loss (n,) and its sd (n,), nats per token, of a run under a schedule, from what `monitor.forecast.fit_anneal` learnt.

    With `over`, both are shares of the loss that the same run would end at under that schedule.
    """
    if over is not None:
        values, middle, _, beyond = _paths(model, schedule, steps, total, params)
        ends, end, _, _ = _paths(model, over, np.array([float(total)]), total, params)
        shares = values / np.maximum(ends, 1e-6)
        own = np.hypot(2 * model["rmse"], beyond) / middle
        return middle / max(float(end[0]), 1e-6), np.hypot(shares.std(axis=0), own)
    values, middle, far, beyond = _paths(model, schedule, steps, total, params)
    sd = np.sqrt(values.var(axis=0) + (2 * model["rmse"]) ** 2 + beyond**2 + (0.1 * far * middle) ** 2)
    return middle, sd


def _paths(
    model: dict[str, Any], schedule: Schedule, steps: FloatArray, total: int, params: float | None
) -> tuple[FloatArray, FloatArray, float, FloatArray]:
    """Losses (k, n) of every draw, those (n,) of the best, how far the size lies beyond the fitted ones, ln, and drift (n,)."""
    knots, lr = schedule.rates(total)
    peak = model["peak"] if schedule.kind == "file" and model["peak"] else float(lr.max())
    scaled = LrPath.of(knots, lr / peak, model["area"])
    size = math.log(params / model["params"]) if params and model["params"] else 0.0
    draws, best = (np.exp(_with_power(np.asarray(model[key], float))) for key in ("draws", "theta"))
    draws[:, 8] *= model["sizes"] > 1
    best[8] *= model["sizes"] > 1
    values = np.array([loss_at(theta, scaled, steps, size) for theta in draws])
    middle = loss_at(best, scaled, steps, size)
    start = model.get("start")
    if start is not None:  # the law is rough early on, where it may stand above what an untrained model loses
        values, middle = np.minimum(values, start), np.minimum(middle, start)
    far = abs(size) if model["sizes"] < 2 else max(0.0, abs(size) - model["size_span"])
    beyond = DRIFT * best[1] * (1 - np.maximum(scaled.area_at(steps), 1.0) ** -best[2])
    return values, np.maximum(middle, 1e-6), far, beyond


def _with_power(theta: FloatArray) -> FloatArray:
    """ln parameters (..., 10) of a model, whose law.json may be from before there was a `p` (..., 9): it was 1."""
    return theta if theta.shape[-1] == len(NAMES) else np.insert(theta, NAMES.index("p"), 0.0, axis=-1)
