"""From finished runs, and their curves, to a law: clean, fit every form that applies, weigh them, say what is unknown.

`form="auto"` combines forms by how well each, fitted to the smaller runs, predicted the larger ones (log score
under each form's own uncertainty), and lets their disagreement widen the interval. `form="chinchilla"` is the
plain fit that papers report: summed Huber loss, delta 1e-3, on ln loss, no priors, nothing excluded.
"""

import time
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.stats import rankdata

from monitor.errors import WrongInput
from monitor.forecast import curve as curves_of
from monitor.forecast.fit_anneal import fit_curves
from monitor.forecast.fit_chinchilla import bootstrap_plain, fit_plain
from monitor.forecast.fit_clean import asked_in, asked_out, clean, ends, rates_at_end
from monitor.forecast.fit_members import Runs, draw, fit_mode
from monitor.forecast.fit_weights import (
    SIZES,
    choose,
    noise_near,
    sizes_near,
    spreads,
)
from monitor.forecast.law import PARAMETERS, Law, Member, log_loss
from monitor.forecast.points import Curves, Points
from monitor.forecast.table import FloatArray

FEW = 7
"""Runs up to which a plain fit takes its draws from weak priors and gives no standard errors."""
E_LOOSE, E_LOOSE_EASED = 0.7, 0.5
"""90% range of E over its middle from which on E counts as unknown; the priors of the eased forms alone leave 0.64."""
HELD = 0.1
"""What small runs are held back by at the largest run, ln loss, from which on the law is called a guess."""
RISING = 0.3
"""Rank correlation of loss with compute from which on the columns are doubted."""
DRIFT_PLAIN = 0.125
"""sd of the true line about a plain fit, as a share of the fall in ln loss that is foretold."""
FORMS = ("auto", "chinchilla", "frontier", "power", "curve")


def fit(
    points: Points | Curves,
    form: str = "auto",
    *,
    curves: Curves | None = None,
    include: Collection[str] = (),
    exclude: Collection[str] = (),
    conventions: dict[str, str] | None = None,
    seed: int = 0,
    effort: int = 150,
) -> Law:
    """The law of finished runs; with their `curves`, one that also knows the way there.

    points      finished runs, or curves alone, whose ends are then taken
    effort      turns of the walkers behind the draws; fewer are quicker and rougher
    include     runs to keep whatever the cleaning says;  exclude  runs to leave out

    Raises WrongInput when no run is left, or the form needs a column that is not there.
    """
    if form not in FORMS:
        raise WrongInput(f"--form {form}: there is no such form; choose from {', '.join(FORMS)}")
    steps_serve = isinstance(points, Curves) and all(c.tokens is None for c in points.runs)
    if isinstance(points, Curves):
        curves = points
        points = ends(curves, include)
    asked_in(points, include)
    points = asked_out(points, exclude)
    if form != "chinchilla":
        points = clean(points, include)
    if len(points) == 0:
        why = "; ".join(f"{e.run}: {e.reason}" for e in points.excluded[:4])
        hint = ". --include RUN keeps one" if any("unfinished" in e.reason for e in points.excluded) else ""
        raise WrongInput(f"{points.path or 'points'}: no finished run is left to fit ({why}){hint}")
    sized = bool(np.all(np.isfinite(points.params) & np.isfinite(points.tokens)))
    if form == "chinchilla" and not sized:
        raise WrongInput(
            f"{points.path}: --form chinchilla needs params and tokens of every run; give them, or fit --form frontier"
        )
    conventions = dict(conventions or {})
    if not np.isfinite(points.params).any():
        conventions.setdefault(
            "params", "not given: the runs count as of one size, and their tokens as their compute"
        )
    if steps_serve:
        conventions.setdefault(
            "tokens", "optimizer steps, as the curves have no tokens: give --batch-tokens to count tokens"
        )
    at_rate, short = rates_at_end(curves, points.run) if curves is not None else ("", "")
    if at_rate:
        conventions.setdefault("schedule", at_rate)
    shape = _shape(points, curves) if curves is not None else None
    if form == "curve" and (shape is None or shape["anneal"] is None):
        raise WrongInput(
            f"{points.path}: --form curve needs curves with a column lr, and 12 finite losses of a run at least"
        )
    if form == "chinchilla":
        return _plain(points, shape, conventions, seed)
    doubt = "; ".join(filter(None, [_backwards(points), short]))
    if sized and form == "auto":
        points = _of_one_size(points, include)
    law = _mixed(points, form, shape, conventions, seed, sized, effort, doubt)
    return _as_curve_law(law) if form == "curve" else law


def _ran_off(point: FloatArray, loss: FloatArray) -> str:
    """Words on a plain fit whose parts are not what they are called: an exponent that is a step or a constant, or no E to speak of."""
    e, alpha, beta = (float(point[i]) for i in (0, 3, 4))
    if not all(0.02 < v < 2 for v in (alpha, beta)):
        return (
            f"the plain fit ran off to alpha = {alpha:.2g}, beta = {beta:.2g}: look for a wrong or diverged run, which "
            "--form auto leaves out"
        )
    return "" if e > 1e-3 * float(loss.min()) else f"the fit leaves no irreducible loss (E = {e:.2g})"


def _as_curve_law(law: Law) -> Law:
    """The same law, reporting the curve law's parameters as its own."""
    assert law.curve is not None
    anneal = law.curve["anneal"]
    count = len(anneal["names"]) - (0 if anneal["sizes"] > 1 else 2)
    names, theta, draws = (
        anneal["names"][:count],
        np.exp(anneal["theta"][:count]),
        np.exp(np.array(anneal["draws"])[:, :count]),
    )
    why = (
        []
        if anneal["shapes"] > 1
        else ["the runs share one shape of schedule, so what another does rests on priors"]
    )
    if float(draws[:, 0].std()) > 0.1 * float(theta[0]):
        why.append("the irreducible loss E is known to no better than a tenth")
    return replace(
        law,
        identifiable=not why,
        why="; ".join(why),
        parameters=dict(zip(names, map(float, theta), strict=True)),
        standard_errors=dict(zip(names, map(float, draws.std(axis=0)), strict=True)),
        fit={
            **law.fit,
            "best_form": "curve",
            "rmse": anneal["rmse"],
            "seconds": anneal["seconds"],
            "objective": anneal["objective"],
        },
    )


def _shape(points: Points, curves: Curves) -> dict | None:
    """What the curves teach: the shape the fitted runs share, and the law that knows the learning rate."""
    by_name = {run: i for i, run in enumerate(points.run)}
    found = []
    for c in curves.runs:
        i = by_name.get(c.run)
        if i is not None:
            s = curves_of.smooth(c, float(points.loss[i]), float(points.flops[i]), float(points.tokens[i]))
            if s is not None:
                found.append(s)
    gone = {e.run for e in points.excluded if "asked for" in e.reason}
    anneal = fit_curves([c for c in curves.runs if c.run not in gone])
    borrowed = curves_of.learn(found)
    return None if borrowed is None and anneal is None else {"borrowed": borrowed, "anneal": anneal}


def _plain(points: Points, shape: dict | None, conventions: dict[str, str], seed: int) -> Law:
    start = time.perf_counter()
    z, value = fit_plain(points.params, points.tokens, points.loss)
    seconds = time.perf_counter() - start
    if len(points) > FEW:
        natural = _naturals(bootstrap_plain(points.params, points.tokens, points.loss, z, 500, seed))
        natural = natural[np.all(np.isfinite(natural), axis=1)]
    else:  # a bootstrap of so few says they are certain; weak priors say what they leave open
        natural = draw(fit_mode("chinchilla", Runs.of(points)), seed=seed)[0]
    point = _naturals(z[None])[0]
    residual = log_loss("chinchilla", point[None], points.params, points.tokens, points.flops)[0] - np.log(
        points.loss
    )
    errors = {
        k: v if len(points) > FEW else None
        for k, v in zip(PARAMETERS["chinchilla"], _errors(natural), strict=True)
    }
    why = _unknown(len(points), _spans(points), natural[:, 0], E_LOOSE, _ran_off(point, points.loss))
    dof = max(1, len(points) - 5)
    return Law(
        "chinchilla",
        (Member("chinchilla", 1.0, tuple(map(float, point)), natural[:256]),),
        max(0.002, float(np.sqrt((residual**2).sum() / dof))),
        DRIFT_PLAIN,
        _runs(points),
        not why,
        why,
        dict(zip(PARAMETERS["chinchilla"], map(float, point), strict=True)),
        errors,
        {
            "best_form": "chinchilla",
            "objective": value,
            "rmse": _rmse(residual, points.loss),
            "seconds": seconds,
            "delta": 1e-3,
        },
        _listed(points),
        conventions,
        shape,
    )


def _mixed(
    points: Points,
    form: str,
    shape: dict | None,
    conventions: dict[str, str],
    seed: int,
    sized: bool,
    effort: int,
    doubt: str,
) -> Law:
    runs = Runs.of(points)
    sizes = sizes_near(runs) if sized and form == "auto" else SIZES
    start = time.perf_counter()
    names, trials, weights = choose(runs, form, sized)
    fits = [fit_mode(name, runs) for name in names]
    seconds = time.perf_counter() - start
    drawn = [draw(f, seed=seed, effort=effort) for f in fits]
    members = tuple(
        Member(f.form.name, float(w), tuple(map(float, f.point())), d[0])
        for f, w, d in zip(fits, weights, drawn, strict=True)
    )
    best = names.index("frontier") if "frontier" in names else int(np.argmax(weights))
    names_of = PARAMETERS[names[best]]
    point = fits[best].point()
    residual = fits[best].log_loss(runs) - runs.ln_loss
    scale = float(np.exp(np.sum(weights * [np.median(np.log(d[1])) for d in drawn])))
    noise = noise_near(
        runs, np.sum([w * f.log_loss(runs) for w, f in zip(weights, fits, strict=True)], axis=0), scale
    )
    wider, drift = spreads(trials, weights, len(runs), sizes)
    why = _unknown(
        len(points),
        _spans(points),
        _floors(names, drawn, weights),
        E_LOOSE_EASED if "eased" in names else E_LOOSE,
        ""
        if sizes >= SIZES
        else f"the runs near the frontier are of {'one size' if sizes == 1 else 'two sizes'}",
        *_held_back(names, drawn, weights),
        doubt,
    )
    return Law(
        form,
        members,
        noise,
        drift,
        _runs(points),
        not why,
        why,
        dict(zip(names_of, map(float, point), strict=True)),
        dict(zip(names_of, _errors(drawn[best][0]), strict=True)),
        {"best_form": names[best], "objective": float(-fits[best].form.density(fits[best].z[None])[0]),
         "rmse": _rmse(residual, points.loss), "seconds": seconds,
         "inside_errors": {name: [float(v) for v in t.errors] for name, t in zip(names, trials, strict=True)}},
        _listed(points),
        conventions,
        shape,
        wider,
    )  # fmt: skip


def _floors(names: list[str], drawn: list[tuple[FloatArray, FloatArray]], weights: FloatArray) -> FloatArray:
    """Draws of E, from each form that has one as many as its weight allows; ones where none has."""
    parts = [
        d[0][np.linspace(0, len(d[0]) - 1, max(1, round(w * len(d[0])))).astype(int), 0]
        for name, d, w in zip(names, drawn, weights, strict=True)
        if name != "bent"
    ]
    return np.concatenate(parts) if parts else np.ones(1)


def _of_one_size(points: Points, include: Collection[str]) -> Points:
    """Where all runs near the frontier are of one size, only those of that size: a few bad ones of another tell a wrong tale of size."""
    runs = Runs.of(points)
    if sizes_near(runs) > 1:
        return points
    excess = runs.excess()
    own = runs.ln_params[int(np.argmin(excess))]
    kept = np.array([run in include for run in points.run]) | (np.abs(runs.ln_params - own) < 0.1)
    return points.keep(
        kept,
        {
            int(
                i
            ): f"{np.expm1(excess[i]):.0%} worse than a run of other size and no more compute; too few like it to learn from"
            for i in np.flatnonzero(~kept)
        },
    )


def _backwards(points: Points) -> str:
    """Words on runs whose loss rises with their compute (rank correlation); empty where it falls, or for few runs."""
    ranks = [rankdata(values) - (len(points) + 1) / 2 for values in (points.flops, points.loss)]
    spread = float(np.prod([np.sum(r**2) for r in ranks])) ** 0.5
    if len(points) < 5 or float(np.ptp(np.log(points.flops))) < 1 or spread == 0:
        return ""
    rising = float(ranks[0] @ ranks[1]) / spread
    if not rising > RISING:
        return ""
    return f"the loss rises with compute (rank correlation {rising:+.1f}): are params, tokens and loss the right columns?"


def _held_back(
    names: list[str], drawn: list[tuple[FloatArray, FloatArray]], weights: FloatArray
) -> list[str]:
    """Words on runs whose loss falls faster than that of well-made ones, which the law takes for small runs held back."""
    late = [
        (w, float(np.median(d[0][:, PARAMETERS[name].index("late")])))
        for name, d, w in zip(names, drawn, weights, strict=True)
        if "late" in PARAMETERS[name]
    ]
    if not late or sum(w * v for w, v in late) / sum(w for w, _ in late) < HELD:
        return []
    return [
        "the loss falls faster than in runs of full length: the small ones look held back (a long warm-up, a batch too "
        "large for them), and how soon larger ones outgrow that is a guess"
    ]


def _spans(points: Points) -> float:
    return float(np.log10(points.flops.max() / points.flops.min()))


def _unknown(count: int, decades: float, e_draws: FloatArray, loose: float, *more: str) -> str:
    """What the runs can't tell, in words; empty when they can. `loose`: from which 90% range on E counts as unknown."""
    reasons = []
    if count < 5:
        reasons.append(f"{count} run{'s' if count > 1 else ''} can't fix a law's parameters")
    elif count < 10:
        reasons.append(f"{count} runs leave little to check a law of up to five parameters against")
    if decades < 1:
        reasons.append(f"the runs span {decades:.1f} decades of compute")
    low, middle, high = np.quantile(e_draws, [0.05, 0.5, 0.95])
    if not high - low < loose * middle:
        reasons.append(f"the irreducible loss E could be anything from {low:.2g} to {high:.2g}")
    return "; ".join([*reasons, *filter(None, more)])


def _naturals(z: FloatArray) -> FloatArray:
    with np.errstate(over="ignore"):
        return np.column_stack([np.exp(z[:, 0]), np.exp(z[:, 1]), np.exp(z[:, 2]), z[:, 3], z[:, 4]])


def _errors(draws: FloatArray) -> list[float | None]:
    """Standard deviation of each parameter's draws (k, p); None for one too wide for a number."""
    size = np.maximum(np.abs(draws).max(axis=0), 1e-300)
    with np.errstate(over="ignore"):
        spread = (draws / size).std(axis=0) * size
    return [float(v) if np.isfinite(v) else None for v in spread]


def _rmse(residual: FloatArray, loss: FloatArray) -> float:
    """Root mean square of fitted minus observed loss, nats per token, from residuals of ln loss."""
    return float(np.sqrt(np.mean((np.exp(residual) * loss - loss) ** 2)))


def _runs(points: Points) -> dict[str, list]:
    def plain(values: FloatArray) -> list[float | None]:
        return [float(v) if np.isfinite(v) else None for v in values]

    return {
        "run": list(points.run),
        "params": plain(points.params),
        "tokens": plain(points.tokens),
        "flops": plain(points.flops),
        "loss": plain(points.loss),
    }


def _listed(points: Points) -> tuple[dict[str, Any], ...]:
    return tuple(
        {"run": e.run, "reason": e.reason, "flops": e.flops, "loss": e.loss} for e in points.excluded
    )
