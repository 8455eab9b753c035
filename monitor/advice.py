"""What to do about a run: the final loss it is heading for, the chance it misses its target, and a recommendation.

    final = p50_end + s_end * (k(t) * clip(u, -3, 3)) + e * (1 + k(t)) / 2
    e     = what the gap exceeds three of its standard deviations by, nats per token
    u     = (loss - p50) / s        the present gap, in standard deviations s of the prediction's band at this step
    k(t)  = t ** 0.7                how much of it is still there at the end; t the share of the run that is done

The end is normal with standard deviation s_end * sqrt(1 - k^2), wider by what the present gap is not known to, and by
e * (1 - k) / sqrt(12): no healthy run says how much of an excess stays, so anything between k of it and all of it. Of a gap
that is known no better than by noise n the share s^2 / (s^2 + n^2) counts as the run's own, and all that is more than three
deviations of both: that is no noise. k was
measured on validation curves of some 860 runs in groups of one recipe, each against the median of the others of its
group, for the mean of the two newest samples: 0.3, 0.56 and 0.73 at 25, 50 and 75% (bench/judge.py shows how well it
holds). It stops being true where the band is not the spread between runs of this kind.

Losses are nats per token, steps optimizer updates. A probability with its evidence and the money at stake, never a
bare verdict; acting on it is somebody else's choice. Works on plain values and knows nothing of the judge.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from monitor.verdict import Action, Advice, Alert

Z90 = 1.6449
KEEPS = 0.7
"""Exponent of the share of a present gap that lasts to the end."""
NEARS = 8.0
"""Exponent of the share of the run by which its end becomes the curve's, and nats count as nats: it is about to be seen."""
STOP = 0.98
"""P(miss) from which stopping is recommended, once a third of the run is done."""


def final_loss(
    prediction: Mapping[str, Any] | None, outlook: Mapping[str, float]
) -> tuple[float, float] | None:
    """Mean and standard deviation of the final loss, nats per token. None without a prediction, or where the run is
    longer than what was predicted: the loss at the end of a shorter schedule is not that of a longer one on its way."""
    final = (prediction or {}).get("final_loss")
    if not final or outlook.get("longer", 1.0) > 1.0:
        return None
    end, s_end = float(final["p50"]), max((final["p95"] - final["p05"]) / (2 * Z90), 1e-6)
    if outlook["gap_samples"] < 1 or not outlook["share"] > 0:
        return end, s_end
    done = min(1.0, outlook["share"])
    keeps, near = done**KEEPS, done**NEARS
    end += near * (outlook.get("curve_end", end) - end)
    gap, s_now, noise = outlook["gap"], outlook["band_sd"], outlook["gap_sd"]
    # what of the observed gap is the run's own rather than the noise of the samples it was seen through
    both = math.hypot(s_now, noise)
    doubt = gap * (noise / both) ** 2
    doubted = max(-3.0 * noise**2 / both, min(3.0 * noise**2 / both, doubt))
    own = gap - doubted
    by_noise = doubted / doubt if doubt else 1.0
    within = max(-3.0 * s_now, min(3.0 * s_now, own))
    beyond = own - within
    mean = (
        end + keeps * (s_end / s_now + near * (1.0 - s_end / s_now)) * within + beyond * (1.0 + keeps) / 2.0
    )
    stays = abs(beyond) * (1.0 - keeps) / math.sqrt(12.0)
    known_to = noise * math.sqrt(1.0 - by_noise * (noise / both) ** 2)
    unknown = keeps * s_end / s_now * known_to
    return mean, math.sqrt(
        s_end**2 * (1.0 - 0.997 * keeps * keeps)
        + unknown**2
        + stays**2
        + (keeps * outlook.get("gap_either", 0.0)) ** 2
    )


def probability_of_missing(mean: float, sd: float, target_loss: float) -> float:
    """P(final loss > target) for a normal end."""
    return 0.5 * math.erfc((target_loss - mean) / (sd * math.sqrt(2.0)))


def advise(
    outlook: Mapping[str, float],
    alerts: Sequence[Alert],
    prediction: Mapping[str, Any] | None = None,
    target_loss: float | None = None,
    causes: Sequence[Any] = (),
    price_per_hour: float | None = None,
    checkpoints: Sequence[int] = (),
) -> Advice:
    """The advice at this step.

    outlook         plain numbers from `Judge.outlook()`
    price_per_hour  what an hour of this run costs, any currency; None leaves the money out
    checkpoints     steps of the checkpoints that are there to go back to
    """
    step = int(outlook["step"])
    open_now = {alert.alert: alert for alert in alerts}
    hours = outlook.get("hours_left")
    money = hours * price_per_hour if hours is not None and price_per_hour is not None else None
    guess = final_loss(prediction, outlook)
    quantiles = p_miss = None
    heading: list[str] = []
    if not math.isfinite(outlook.get("loss", 0.0)):
        # as it stands there is no end to speak of; a roll back begins from another state
        p_miss = 1.0 if target_loss is not None else None
        heading.append("the loss is no number: left as it is, the run has no final loss")
    elif guess is not None:
        mean, sd = guess
        quantiles = {"p05": mean - Z90 * sd, "p50": mean, "p95": mean + Z90 * sd}
        heading.append(
            f"heading for {mean:.4f} nats per token ({quantiles['p05']:.4f} to {quantiles['p95']:.4f}), "
            f"predicted {(prediction or {})['final_loss']['p50']:.4f}"
        )
        if target_loss is not None:
            p_miss = probability_of_missing(mean, sd, target_loss)
            heading.append(f"target {target_loss:.4f} is missed with probability {_chance(p_miss)}")
    foretold = guess is not None or target_loss is not None
    if "LossDiverged" in open_now and foretold and (p_miss is None or p_miss < 0.5):
        # it may go anywhere: nothing that is known makes such a run safe
        p_miss = None
        heading = [said for said in heading if not said.startswith("target ")]
        if outlook["gap_samples"] < 1:
            quantiles, heading = None, []
        heading.append(
            "off its line for good, nothing says where it ends as it goes"
            if quantiles is None
            else "off its line for good, nothing says that it keeps there"
        )
    worst = open_now.get("LossNonFinite") or open_now.get("LossDiverged")
    look: list[str] = []
    if worst is not None and worst.alert == "LossNonFinite" and outlook.get("validation_broken"):
        look.append(
            f"the validation loss is not finite since step {worst.since_step} and the training loss is: look at the "
            "evaluation, and evaluate the last checkpoint again; there is nothing to roll back yet"
        )
        worst = open_now.get("LossDiverged")
    action: Action = "continue"
    back, skip = None, None
    if worst is not None:
        action, back, skip, said = _back(outlook, worst, open_now.get("LossOffLine"), causes, checkpoints)
        look.append(said)
    elif "LossOffLine" in open_now:
        since = open_now["LossOffLine"].since_step
        without = "; the end is told as if it passed" if outlook["gap_sd"] > 0 else ""
        look.append(
            f"off its line since step {since}, not yet known for how long: wait, keep the last checkpoint{without}"
        )
    elif p_miss is not None and p_miss >= STOP:
        known = outlook["share"] >= 1 / 3 or "LossAbovePrediction" in open_now  # which has tested the gap too
        action = "stop" if known else "continue"
        then = (
            "stop, or settle for more"
            if known
            else "too early to stop for it, look again at a third of the run"
        )
        look.append(f"as it goes the target is out of reach{_far(outlook)}: {then}")
    elif target_loss is None and "LossAbovePrediction" in open_now:
        look.append(f"no target is set{_far(outlook)}: whether such an end is worth the rest is yours to say")
    cost = []
    if hours is not None and hours > 0:
        saved = "" if money is None else f" and {money:,.0f} at {price_per_hour:g} an hour"
        cost.append(f"{'stopping now saves' if action == 'stop' else 'finishing takes'} {hours:.1f} h{saved}")
    told = {"LossNonFinite", "LossDiverged", "LossOffLine"}
    rest = [f"{a.alert} since step {a.since_step}" for a in alerts if a.alert not in told]
    if worst is not None:
        rest += [f"{cause.name}: {cause.evidence}" for cause in causes]
    evidence = [*look, *heading, *cost, *rest]
    longer = outlook.get("longer", 1.0)
    if prediction is not None and longer > 1.0:
        evidence.append(
            f"the run is {longer:.3g} times as long as its prediction's curve, which says nothing of such an end: "
            "predict the whole run (`losscast predict` with its tokens)"
        )
    elif target_loss is not None and guess is None:
        evidence.append(
            "no prediction: nothing says what it will end at, so not whether it misses its target"
        )
    if outlook.get("warming_up") and not alerts:
        evidence.insert(0, "too few samples to judge yet")
    if not evidence:
        evidence.append("no prediction and no alert: nothing speaks against going on")
    return Advice(step, action, p_miss, quantiles, tuple(evidence), hours, money, back, skip)


def _chance(p: float) -> str:
    """A probability in words that claim no more than a normal end can know."""
    return "above 0.99" if p > 0.99 else ("below 0.01" if p < 0.01 else f"{p:.2f}")


def _far(outlook: Mapping[str, float]) -> str:
    """How far it is above its line, where that is past what healthy runs differ by."""
    sigmas = outlook["gap"] / outlook["band_sd"]
    return f", {outlook['gap']:.3g} nats or {sigmas:.0f} sigmas above its line" if sigmas > 3.0 else ""


def _back(
    outlook: Mapping[str, float],
    worst: Alert,
    off: Alert | None,
    causes: Sequence[Any],
    checkpoints: Sequence[int],
) -> tuple[Action, int | None, tuple[int, int] | None, str]:
    """What to do about a divergence: the action, the checkpoint to go back to, the batches to skip, and the words."""
    what = "not finite" if worst.alert == "LossNonFinite" else "off its line for good"
    unseen = max(0, int(outlook.get("every", 1.0)) - 1)  # steps a sparse log does not show
    earlier = min((c for c in causes if c.step is not None), key=lambda c: c.step, default=None)
    onset, since = worst.since_step - unseen, f"step {worst.since_step}"
    if earlier is not None and earlier.step < onset:
        onset = earlier.step
        since += f" ({earlier.name.replace('_', ' ')} since step {onset})"
    elif unseen:
        since += f" (or from step {onset} on: the log shows one in {unseen + 1})"
    first_call = off.step if off is not None else worst.step
    skip = (onset, max(onset, first_call if worst.alert == "LossDiverged" else worst.step))
    back = max((at for at in checkpoints if at < onset), default=None)
    where = (
        f"go back to the checkpoint of step {back}"
        if back is not None
        else "no checkpoint from before it is known: go back to one"
    )
    if any(cause.name == "learning_rate" for cause in causes):  # the rate broke it, not the data
        return "lower_lr", back, None, f"{what} since {since}: {where} and lower the learning rate"
    return (
        "roll_back",
        back,
        skip,
        f"{what} since {since}: {where} and skip the data of steps {skip[0]} to {skip[1]}",
    )
