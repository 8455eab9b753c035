"""The live judge over a recorded run: the same code that the service runs, fed from a file.

`Watch` is what both use: the judge with its advice. `replay` gives the contract of `losscast replay --json`:
samples, alerts (`step` where called, `since_step` the onset, an escalation is a new entry), final loss, advice.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from msgspec import structs

from monitor.advice import advise
from monitor.forecast.points import Curve, Curves, read_curves
from monitor.judge import Judge, Settings
from monitor.judge.control import LEAST_PAIRS
from monitor.judge.drop import KNOWN
from monitor.judge.line import Line
from monitor.judge.old_runs import OldRuns
from monitor.verdict import Advice, Alert, Sample


class Watch(Judge):
    """A judge that also advises: what the service keeps, one per active run."""

    price_per_hour: float | None = None
    """What an hour of this run costs, in any currency; set it where it is known."""

    def advice(self) -> Advice:
        """What to do now, with its evidence."""
        return advise(
            self.outlook(),
            self.open_alerts(),
            self.prediction,
            self.target_loss,
            self.causes(),
            self.price_per_hour,
            self.checkpoints,
        )


def samples_of(curve: Curve) -> Iterator[Sample]:
    """The curve's rows as the samples a run would have sent, in step order."""
    tokens, lr, norm, val = curve.tokens, curve.lr, curve.grad_norm, curve.val_loss

    def at(column: Any, i: int) -> float | None:
        return None if column is None or column[i] != column[i] else float(column[i])

    attempts = [1] * len(curve) if curve.attempt is None else curve.attempt.tolist()
    for i, (step, loss) in enumerate(zip(curve.step.tolist(), curve.loss.tolist(), strict=True)):
        yield Sample(
            step,
            loss,
            tokens=at(tokens, i),
            lr=at(lr, i),
            grad_norm=at(norm, i),
            val_loss=at(val, i),
            attempt=attempts[i],
        )


def read_samples(
    path: str | Path, columns: Mapping[str, str] | None = None, where: Mapping[str, str] | None = None
) -> dict[str, list[Sample]]:
    """Every run's samples in a curves file, by run. Raises WrongInput with file:line:col."""
    return samples_by_run(read_curves(path, columns, where, attempts=True))


def samples_by_run(curves: Curves) -> dict[str, list[Sample]]:
    """The samples of each run of a file that was read."""
    return {run.run: list(samples_of(run)) for run in curves.runs}


def merged(runs: Iterable[Sequence[Sample]]) -> list[Sample]:
    """Several control runs as one: the mean loss at the steps they all have, which halves a lone control's own noise."""
    held = [{s.step: s for s in run if math.isfinite(s.loss)} for run in runs]
    if not held:
        return []
    shared = sorted(set(held[0]).intersection(*held[1:]))
    return [
        structs.replace(held[0][step], loss=sum(run[step].loss for run in held) / len(held))
        for step in shared
    ]


def replay(
    samples: Iterable[Sample],
    settings: Settings | None = None,
    prediction: Mapping[str, Any] | None = None,
    control: Iterable[Sample] | None = None,
    target_loss: float | None = None,
    old: OldRuns | None = None,
) -> dict[str, Any]:
    """Every alert and the advice of one run, as plain data (non-finite numbers as they are: use `schema.spell`).

    Samples are put into step order first, as a service does within the window it holds. Advice is given at each
    twentieth of the samples, whenever an alert changes, and at the end. `old` is what the recipe's finished runs say.
    """
    rows = sorted(samples, key=lambda s: (s.attempt, s.step))
    held = list(control) if control is not None else []
    by_tokens = bool(held) and all(s.tokens is not None for s in (*held, *rows))
    last = held[-1] if held else None
    watch = Watch(
        settings,
        prediction,
        target_loss,
        total_tokens=last.tokens if last and by_tokens else None,
        total_steps=last.step if last and not by_tokens else None,
        old_runs=old,
    )
    alerts: list[Alert] = []
    advice: list[Advice] = []
    waiting = used = 0
    every = max(1, len(rows) // 20)
    for count, sample in enumerate(rows, 1):
        while waiting < len(held) and _reached(sample, held[waiting], by_tokens):
            watch.observe_control(held[waiting])
            waiting += 1
        verdict = watch.observe(sample)
        used += verdict.source == "control"
        if verdict.closed:
            ended = {a.alert: a.resolved_step for a in verdict.closed}
            alerts = [
                replace(a, resolved_step=ended[a.alert])
                if a.resolved_step is None and a.alert in ended
                else a
                for a in alerts
            ]
        alerts.extend(verdict.opened)
        if verdict.opened or verdict.closed or count % every == 0 or count == len(rows):
            advice.append(watch.advice())
    newest = advice[-1] if advice else None
    beside = {} if control is None and old is None else {"control": _beside(watch, rows, used, by_tokens)}
    return {
        "samples": len(rows),
        "question": _units(rows, watch.line),
        **beside,
        "alerts": [
            {
                "alert": a.alert, "severity": a.severity, "step": a.step, "since_step": a.since_step,
                "resolved_step": a.resolved_step, "value": a.value, "expected": a.expected,
            }
            for a in alerts
        ],
        "final_loss": newest.final_loss if newest else None,
        "advice": [
            {
                "step": a.step, "action": a.action, "p_miss": a.p_miss, "evidence": list(a.evidence),
                "final_loss": a.final_loss, "roll_back_to": a.roll_back_to, "skip": a.skip,
            }
            for a in advice
        ],
    }  # fmt: skip


def _units(rows: Sequence[Sample], line: Line | None) -> str | None:
    """What to ask where the loss is throughout another unit's multiple of the line: nobody's run is that by chance."""
    if line is None:
        return None
    pairs = [(s.loss, line.at(s.step, s.tokens)) for s in rows if math.isfinite(s.loss) and s.loss > 0]
    known = [(x, e.p50) for x, e in pairs[len(pairs) // 10 :] if e is not None and e.p50 > 0]
    if len(known) < 10:
        return None

    def throughout(ratios: Iterable[float]) -> bool:
        held = sorted(ratios)
        low, middle, high = (held[int(q * (len(held) - 1))] for q in (0.05, 0.5, 0.95))
        return abs(middle - 1.0) < 0.03 and low > 0.94 and high < 1.06

    if throughout(x * math.log(2.0) / p for x, p in known):
        return (
            "is this loss in bits? It is 1.44 times the prediction throughout, which is in nats per token: "
            "multiply it by 0.6931, or name its column 'loss (bits)'"
        )
    if all(x > 1.5 * p for x, p in known) and throughout(math.log(x) / p for x, p in known):
        return "is this a perplexity? Its logarithm is the prediction throughout, which is in nats per token: give the logarithm"
    return None


def _beside(watch: Watch, rows: Sequence[Sample], used: int, by_tokens: bool) -> dict[str, Any]:
    """What became of a control, and of old runs: `steps` matched to one of ours, `used` of them, `why` where it was no use."""
    control, old = watch.control, watch.old_runs
    steps = 0 if control is None else control.pairs
    what = "tokens" if by_tokens else "steps"
    why = None
    if not used and not steps:
        why = f"it has no {what} in common with the run"
    elif not used and control is not None:
        if control.rest.count <= LEAST_PAIRS:
            why = f"it takes more than {LEAST_PAIRS} samples in common to know whether its noise is the run's"
            if watch.line is None and control.shares_noise(watch.raw.calm_sd, KNOWN):
                why += "; a sudden drop is held against it all the same"
        elif not control.shares_noise(watch.raw.calm_sd, LEAST_PAIRS):
            why = "its noise is not the run's: other batches, another model, or another log"
        else:
            why = "it was off its own line itself"
    told: dict[str, Any] = {"steps": steps, "used": used, "why": why}
    if old is not None:
        held = ((s.loss, old.at(float(s.step))) for s in reversed(rows) if math.isfinite(s.loss))
        apart = next(
            ((x - at[0]) / math.hypot(at[1], watch.raw.calm_sd, 1e-6) for x, at in held if at is not None),
            None,
        )
        told["old_runs"] = {"runs": old.runs, "steps": len(old.steps), "apart_sigmas": apart}
    return told


def _reached(ours: Sample, other: Sample, by_tokens: bool) -> bool:
    """Whether a control's sample is of data that our run has seen by now: by tokens where all samples carry them."""
    return other.tokens <= ours.tokens if by_tokens else other.step <= ours.step  # type: ignore[operator]


def off_prediction(answer: Mapping[str, Any]) -> bool:
    """True when an alert that means 'off its line' (warning or critical) is still open at the end."""
    return any(a["resolved_step"] is None and a["severity"] != "info" for a in answer["alerts"])
