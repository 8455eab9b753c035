"""Scaling law: the loss a finished run should end at, from its size, its data and its compute.

    chinchilla   L(N, D) = E + A / N**alpha + B / D**beta      Hoffmann et al. 2022, arXiv:2203.15556, eq. 2
    frontier     L(C)    = E + a / C**b                        OpenAI 2023, arXiv:2303.08774, section 3.1
    valley       L(N, D) = (E + a / C**b) exp(v(ln(D / N)))    the frontier, and what leaving its best D / N costs
    bent         ln L(C) = l - b (ln C - x) + c (ln C - x)**2  a power law free to bend either way: what the data say without an E
    eased        frontier times exp(late / (C / top)**pace)    small runs held back by what large ones outgrow
    eased_valley valley times the same

N     parameters (count), embeddings as `conventions` says
D     training tokens seen (count)
C     training compute (FLOPs), 6 N D unless the runs said otherwise
L, E  nats per token; E is the irreducible part

The valley is v = 4 k (cosh(u / 2) - 1) exp(skew tanh(u)), u = ln(D / N) - ratio - turn (ln C - x) from its floor and
k = bend exp(fade (ln C - x)), so that, unlike in the Chinchilla form, how a law bends along the frontier does not hang
on how it bends across.

Small runs are often worse than the line they lead to: a warm-up of fixed length is most of a short run, a fixed batch
is too large for an early loss. `late` is what is left of that in ln loss at the largest run, of compute `top`; it dies
out as a power of compute: one break of the smoothly broken power laws of Caballero et al. 2023, arXiv:2210.14891.

A law is a mixture of members, one a form, each with draws of its parameters from their joint uncertainty and a
weight for how well it extrapolated inside the runs. Holds once the learning rate has decayed to its end; for the
loss partway through a schedule see `monitor.forecast.curve`.
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import ndtri

from monitor.errors import WrongInput, absent, unwritable
from monitor.forecast.table import FloatArray

VERSION = 1
LEAST = 0.02
"""Fall in ln loss a decade beyond the runs that drift is at least reckoned on."""
PARAMETERS: dict[str, tuple[str, ...]] = {
    "chinchilla": ("E", "A", "B", "alpha", "beta"),
    "frontier": ("E", "a", "b"),
    "valley": ("E", "a", "b", "ratio", "turn", "bend", "fade", "skew", "x"),
    "bent": ("l", "b", "c", "x"),
    "eased": ("E", "a", "b", "late", "pace", "top"),
    "eased_valley": (
        *("E", "a", "b", "ratio", "turn", "bend", "fade", "skew", "x"),
        *("late", "pace", "top"),
    ),
}
"""Names of a form's parameters, in the order of a draw."""


def log_loss(
    form: str, draws: FloatArray, params: FloatArray, tokens: FloatArray, flops: FloatArray
) -> FloatArray:
    """ln of the loss, (k, n), for draws (k, p) of a form's parameters at n runs. Arrays params, tokens, flops are (n,)."""
    if form == "chinchilla":
        e, a, b, alpha, beta = (draws[:, i : i + 1] for i in range(5))
        return np.log(e + a * params**-alpha + b * tokens**-beta)
    if form == "frontier":
        e, a, b = (draws[:, i : i + 1] for i in range(3))
        return np.log(e + a * flops**-b)
    if form == "valley":
        e, a, b, ratio, turn, bend, fade, skew, x = (draws[:, i : i + 1] for i in range(9))
        away = np.log(flops) - x
        u = np.clip(np.log(tokens / params) - ratio - turn * away, -8.0, 8.0)
        return np.log(e + a * flops**-b) + bend * np.exp(fade * away) * 4 * (np.cosh(0.5 * u) - 1) * np.exp(
            skew * np.tanh(u)
        )
    if form == "bent":
        level, b, c, x = (draws[:, i : i + 1] for i in range(4))
        away = np.log(flops) - x
        return level - b * away + c * away**2
    if form in ("eased", "eased_valley"):
        late, pace, top = (draws[:, i, None] for i in (-3, -2, -1))
        held = late * np.exp(np.minimum(-pace * (np.log(flops) - top), 6.0))
        plain = "frontier" if form == "eased" else "valley"
        return log_loss(plain, draws[:, :-3], params, tokens, flops) + np.minimum(held, 6.0)
    raise ValueError(f"no form {form!r}; there are {', '.join(PARAMETERS)}")


@dataclass(frozen=True)
class Quantiles:
    """A loss with its uncertainty, nats per token."""

    p05: float
    p50: float
    p95: float

    def to_dict(self) -> dict[str, float]:
        """As `predict --json` has it."""
        return {"p05": self.p05, "p50": self.p50, "p95": self.p95}


def quantiles_of(log_draws: FloatArray, weights: FloatArray, extra_sd: float) -> Quantiles:
    """Quantiles of exp(draw + extra_sd * standard normal), draws (k,) of weights (k,); no random numbers."""
    nodes = ndtri((np.arange(15) + 0.5) / 15)
    nodes *= 1.0 / np.sqrt(np.mean(nodes**2))
    values = (log_draws[:, None] + extra_sd * nodes).ravel()
    mass = np.repeat(weights / weights.sum() / nodes.size, nodes.size)
    order = np.argsort(values)
    values, below = values[order], np.cumsum(mass[order]) - 0.5 * mass[order]
    return Quantiles(*(float(np.exp(np.interp(q, below, values))) for q in (0.05, 0.5, 0.95)))


@dataclass(frozen=True)
class Member:
    """One form fitted to the runs."""

    form: str
    weight: float
    point: tuple[float, ...]
    """The best single values, in the order of PARAMETERS."""
    draws: FloatArray
    """(k, p) draws from the joint uncertainty of the parameters."""


@dataclass(frozen=True)
class Law:
    """What `fit` learnt, and all that `predict` needs. Written once; its digest is in every prediction made from it."""

    form: str
    """What was asked for: auto, or the one form."""
    members: tuple[Member, ...]
    noise_sd: float
    """Spread between runs of one setting, ln loss."""
    drift: float
    """Spread of the true line about the fitted one, as a share of the fall in ln loss from the best run on."""
    runs: dict[str, list[Any]]
    """run, params, tokens, flops, loss: what it was fitted to."""
    identifiable: bool
    why: str
    """What the runs can not tell, in words; empty when identifiable."""
    parameters: dict[str, float]
    standard_errors: dict[str, float | None]
    fit: dict[str, Any] = field(default_factory=dict)
    """objective, rmse, seconds, and how members were scored."""
    excluded: tuple[dict[str, Any], ...] = ()
    """run, reason, and flops and loss where it had them."""
    conventions: dict[str, str] = field(default_factory=dict)
    curve: dict[str, Any] | None = None
    """What `monitor.forecast.curve` learnt of the runs' curves, as plain data."""
    stretch: float = 1.0
    """What the draws' distance from their mean is multiplied by, from how extrapolation inside the runs went."""
    task: dict[str, Any] | None = None
    """What turns the loss or the compute into a task's metric, as plain data."""

    def flops_of(self, params: float | None, tokens: float | None) -> float:
        """Compute of a run by the runs' own convention: their median ratio to 6 N D."""
        if (
            tokens is not None
            and all(v is None for v in self.runs["params"])
            and self.runs["tokens"][0] is not None
        ):
            return tokens  # runs of one unknown size: their compute is their tokens
        if params is None or tokens is None:
            raise WrongInput("need params and tokens (or flops, for a law of compute alone) to predict from")
        ratio = 1.0
        if self.runs["flops"] and all(v is not None for v in self.runs["params"]):
            nd = 6.0 * np.asarray(self.runs["params"], float) * np.asarray(self.runs["tokens"], float)
            ratio = float(np.median(np.asarray(self.runs["flops"], float) / nd))
        return 6.0 * params * tokens * ratio

    def range(self) -> dict[str, list[float]]:
        """Smallest and largest params, tokens and flops of the runs."""
        out = {}
        for key in ("params", "tokens", "flops"):
            values = [v for v in self.runs[key] if v is not None]
            if values:
                out[key] = [min(values), max(values)]
        return out

    def covers(self, params: float | None, tokens: float | None, flops: float) -> bool:
        """Whether a run lies inside the range of the runs in all that is known of it."""
        asked = {"params": params, "tokens": tokens, "flops": flops}
        return all(lo <= asked[k] <= hi for k, (lo, hi) in self.range().items() if asked[k] is not None)  # type: ignore[operator]

    def decades_beyond(self, flops: float) -> float:
        """log10 of the compute over that of the largest run; 0 inside."""
        largest = self.range().get("flops", [flops, flops])[1]
        return max(0.0, math.log10(flops / largest))

    def stretch_at(self, params: float | None, tokens: float | None) -> float:
        """`stretch`, but 1 for a run at half or twice the tokens per parameter of fitted runs that are all about of one.

        A stretch below 1 is what the runs showed along their own line; of what lies off it the draws are all that is known.
        """
        known = [
            math.log(d / n)
            for n, d in zip(self.runs["params"], self.runs["tokens"], strict=True)
            if n is not None and d is not None
        ]
        if params is None or tokens is None or not known or self.stretch >= 1:
            return self.stretch
        ratio = math.log(tokens / params)
        off = max(min(known) - ratio, ratio - max(known), 0.0)
        if max(known) - min(known) > math.log(2):  # they tell what the ratio does
            return self.stretch
        return self.stretch + (1 - self.stretch) * min(off / math.log(2), 1.0)

    def log_draws(
        self, params: float | None, tokens: float | None, flops: float | None = None
    ) -> tuple[FloatArray, FloatArray, float]:
        """Draws (k,) of ln loss, their weights (k,), and the normal sd that is to be added to them."""
        if flops is None:
            flops = self.flops_of(params, tokens)
        at = [np.asarray([np.nan if v is None else float(v)]) for v in (params, tokens, flops)]
        values = [log_loss(m.form, m.draws, *at)[:, 0] for m in self.members]
        weights = [np.full(len(v), m.weight / len(v)) for m, v in zip(self.members, values, strict=True)]
        every, mass = np.concatenate(values), np.concatenate(weights)
        middle = float(mass @ every) / float(mass.sum())
        every = middle + self.stretch_at(params, tokens) * (every - middle)
        beyond = self.decades_beyond(flops)
        fall = max(math.log(min(self.runs["loss"])) - middle, LEAST * beyond) if beyond else 0.0
        return every, mass, math.hypot(self.noise_sd, self.drift * fall)

    def predict(
        self, params: float | None = None, tokens: float | None = None, flops: float | None = None
    ) -> Quantiles:
        """The loss a finished run of this size should end at: params and tokens, or flops alone for a frontier law."""
        for name, value in (("params", params), ("tokens", tokens), ("flops", flops)):
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise WrongInput(f"{name}: {value:g} must be a finite number above 0")
        if flops is None:
            flops = self.flops_of(params, tokens)
            if not (math.isfinite(flops) and flops > 0):
                raise WrongInput(
                    f"params {params:g} and tokens {tokens:g} make a compute of {flops:g}: no run is that size"
                )
        if (params is None or tokens is None) and (
            any(m.form in ("chinchilla", "valley", "eased_valley") for m in self.members)
        ):
            raise WrongInput(
                "this law tells size from data, so it needs params and tokens; fit --form frontier for a law of flops alone"
            )
        return quantiles_of(*self.log_draws(params, tokens, flops))

    def to_dict(self) -> dict[str, Any]:
        """law.json, its digest included."""
        body: dict[str, Any] = {
            "losscast_law": VERSION,
            "form": self.form,
            "parameters": self.parameters,
            "standard_errors": self.standard_errors,
            "identifiable": self.identifiable,
            "why": self.why,
            "members": [
                {
                    "form": m.form,
                    "weight": m.weight,
                    "point": dict(zip(PARAMETERS[m.form], m.point, strict=True)),
                    "draws": [[float(f"{v:.10g}") for v in row] for row in m.draws.tolist()],
                }
                for m in self.members
            ],
            "noise_sd": self.noise_sd,
            "drift": self.drift,
            "stretch": self.stretch,
            "runs": self.runs,
            "runs_digest": digest_of(self.runs),
            "range": self.range(),
            "excluded": list(self.excluded),
            "conventions": self.conventions,
            "fit": self.fit,
            "curve": self.curve,
            "task": self.task,
        }
        return {**body, "digest": digest_of(body)}

    @property
    def digest(self) -> str:
        """sha256 of law.json without its digest."""
        return str(self.to_dict()["digest"])

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "law.json") -> "Law":
        """The law in a read law.json. Raises WrongInput when it is none, is newer, or does not match its digest."""
        if not isinstance(data, Mapping) or "losscast_law" not in data:
            raise WrongInput(
                f"{source}: is no law.json (no 'losscast_law' in it); make one with `losscast fit POINTS -o law.json`"
            )
        if data["losscast_law"] != VERSION:
            raise WrongInput(
                f"{source}: is of version {data['losscast_law']}, this losscast reads {VERSION}; upgrade losscast, or fit again"
            )
        body = {k: v for k, v in data.items() if k != "digest"}
        if digest_of(body) != data.get("digest"):
            raise WrongInput(
                f"{source}: does not match its digest: it was changed after it was written; fit again"
            )
        try:
            members = tuple(_member(m) for m in body["members"])
            spreads = (float(body["noise_sd"]), float(body["drift"]), float(body.get("stretch", 1.0)))
            if (
                not members
                or not sum(m.weight for m in members) > 0
                or not all(0 <= s < math.inf for s in spreads)
            ):
                raise ValueError("members, noise_sd, drift or stretch")
            return cls(
                body["form"], members, spreads[0], spreads[1], _whole_runs(body["runs"]), body["identifiable"], body["why"],
                body["parameters"], body["standard_errors"], body["fit"], tuple(body["excluded"]), body["conventions"],
                body["curve"], spreads[2], body.get("task"),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise WrongInput(f"{source}: lacks or garbles {error}; fit again") from None

    @classmethod
    def read(cls, path: str | Path) -> "Law":
        """The law in a file."""
        return cls.from_dict(
            read_json(path, "a law.json (`losscast fit POINTS -o law.json` makes one)"), str(path)
        )

    def write(self, path: str | Path) -> None:
        """Write law.json, replacing one that is there in one step."""
        path = Path(path)
        write_json(path, self.to_dict())


def _member(data: Mapping[str, Any]) -> Member:
    """A member in a read law.json. Raises KeyError, TypeError or ValueError when it is none."""
    names, draws = PARAMETERS[data["form"]], np.asarray(data["draws"], float)
    point = tuple(float(data["point"][name]) for name in names)
    weight = float(data["weight"])
    if draws.ndim != 2 or draws.shape[0] == 0 or draws.shape[1] != len(names) or not 0 <= weight < math.inf:
        raise ValueError(f"the draws or the weight of the member {data['form']!r}")
    if not (np.isfinite(draws).all() and np.isfinite(point).all()):
        raise ValueError(f"a number of the member {data['form']!r}")
    return Member(data["form"], weight, point, draws)


def _whole_runs(runs: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The runs in a read law.json. Raises KeyError, TypeError or ValueError when columns lack, or lack values."""
    known = [[v for v in runs[key] if v is not None] for key in ("params", "tokens", "flops", "loss")]
    if not (
        len(runs["run"]) and known[2] and known[3] and all(float(v) > 0 for values in known for v in values)
    ):
        raise ValueError("runs")
    return runs


def canonical(body: Any) -> bytes:
    """The one way to spell a document, for its digest: keys sorted, no blanks, shortest floats, no NaN."""
    return json.dumps(
        body, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True
    ).encode()


def digest_of(body: Any) -> str:
    """`sha256:<hex>` of a document's canonical spelling."""
    return "sha256:" + hashlib.sha256(canonical(body)).hexdigest()


def read_json(path: str | Path, what: str) -> Any:
    """The JSON document in a file. Raises WrongInput when the file is missing or is not JSON."""
    try:
        return json.loads(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        raise WrongInput(f"{absent(Path(path))}. Need {what}") from None
    except OSError as error:
        raise WrongInput(f"{path}: can't be read: {error.strerror or error}; need {what}") from None
    except UnicodeDecodeError:
        raise WrongInput(f"{path}: is no text; need {what}") from None
    except RecursionError:
        raise WrongInput(f"{path}: is nested too deep; need {what}") from None
    except json.JSONDecodeError as error:
        raise WrongInput(
            f"{path}:{error.lineno}:{error.colno}: not JSON ({error.msg}); need {what}"
        ) from None


def write_json(path: Path, body: Any) -> None:
    """Write a document so that a reader sees the old one or the whole new one, never a part."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "w", encoding="utf-8") as out:
            json.dump(body, out, allow_nan=False)
            out.write("\n")
            out.flush()
            os.fsync(out.fileno())
        os.replace(part, path)
    except OSError as error:
        raise unwritable(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
