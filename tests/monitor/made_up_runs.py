"""Made-up runs for the page's and the report's tests: a power law with noise, a spike, a divergence, a NaN.

Nothing here is measured. Seeds are fixed, so that two calls agree.
"""

import math
import random
from typing import Any


def loss_at(step: int, total: int = 3000, floor: float = 2.0) -> float:
    """A plausible loss in nats per token after `step` of `total` steps with a decay over the last fifth."""
    decay = 0.12 * max(0.0, (step / total - 0.8) / 0.2)
    return floor + 3.6 / (1 + step / 14) ** 0.52 - decay


def curve(total: int = 3000, spread: float = 0.035) -> dict[str, list[float]]:
    """A prediction's curve, as prediction.json holds it."""
    steps = sorted({round(1.02**k) for k in range(1, 600) if 1.02**k <= total} | set(range(0, total + 1, 25)))
    p50 = [loss_at(step, total) for step in steps]
    return {
        "step": [float(s) for s in steps],
        "tokens": [512.0 * s for s in steps],
        "p05": [v * (1 - spread) for v in p50],
        "p50": p50,
        "p95": [v * (1 + spread * 1.1) for v in p50],
    }


def samples(
    total: int = 3000, *, seed: int = 0, drift: float = 0.012, until: int | None = None
) -> list[list[float]]:
    """One run's [step, loss], noise right-skewed as real residuals are."""
    rng = random.Random(seed)
    return [
        [step, loss_at(step, total) + drift + 0.05 * (rng.gammavariate(2.0, 0.7) - 1.4)]
        for step in range(1, (until or total) + 1)
    ]


def diverged(fault: int = 1500, total: int = 3000) -> list[list[float]]:
    rng = random.Random(3)
    start = samples(total, seed=3, until=fault)
    top = loss_at(fault, total)
    rise = [
        [s, top + 1.4 * (1 - math.exp(-(s - fault) / 40)) + 0.08 * rng.gauss(0, 1)]
        for s in range(fault + 1, fault + 400)
    ]
    return start + rise


def report_data(name: str = "") -> dict[str, Any]:
    """What `losscast demo` hands to the report; `name` goes into every text there is."""
    ladder = []
    for index, (params, loss) in enumerate(
        ((4.1e3, 3.28), (6.9e3, 3.02), (10.4e3, 2.83), (14.9e3, 2.69), (20.8e3, 2.57), (28.3e3, 2.48))
    ):
        ladder.append(
            {
                "run": f"ladder-{index + 1}{name}",
                "params": params,
                "tokens": 60 * params,
                "flops": 6 * params * 60 * params,
                "loss": loss,
            }
        )
    flops = [10 ** (9.6 + k * 0.05) for k in range(60)]
    mid = [2.48 * (f / 2.88e11) ** -0.0684 for f in flops]
    wide = [0.006 + 0.011 * abs(math.log10(f / 6e10)) for f in flops]
    predicted = {"p05": 2.118, "p50": 2.187, "p95": 2.251}
    nan_run = [*samples(seed=5, until=1500), *[[s, "NaN"] for s in range(1501, 1512)]]
    return {
        "title": f"The whole line, on one small machine{name}",
        "made_at": 1795400000.0,
        "seed": 0,
        "machine": {"processor": f"2 cores{name}", "memory": "8 GiB", "python": "3.11.2", "torch": "2.9.0"},
        "seconds": {"ladder": 118.0, "fit": 1.4, "target": 131.0, "drills": 44.0},
        "ladder": ladder,
        "law": {
            "form": f"L = E + A / N^alpha + B / D^beta{name}",
            "parameters": {"E": 0.31, "A": 8.114, "alpha": 0.1683, "B": 13.02, "beta": 0.1874},
            "identifiable": False,
            "line": {
                "flops": flops,
                "p05": [m * (1 - w) for m, w in zip(mid, wide, strict=True)],
                "p50": mid,
                "p95": [m * (1 + w) for m, w in zip(mid, wide, strict=True)],
            },
        },
        "target": {
            "run": f"target{name}",
            "params": 71.4e3,
            "tokens": 60 * 71.4e3,
            "flops": 6 * 71.4e3 * 60 * 71.4e3,
            "predicted": predicted,
            "actual": 2.153,
            "error_percent": 100 * (2.187 / 2.153 - 1),
            "inside": True,
            "prediction_digest": "8f3c" * 16,
            "prediction_made_at": 1795399800.0,
            "curve": curve(),
            "samples": samples(),
        },
        "drills": [
            {
                "name": f"Learning rate x 30{name}",
                "what": f"Half-way, the learning rate is multiplied by 30{name}.",
                "fault_step": 1500,
                "called_step": 1509,
                "alert": "LossDiverged",
                "severity": "critical",
                "samples": diverged(),
                "alerts": [
                    {
                        "alert": "LossOffLine",
                        "severity": "warning",
                        "step": 1504,
                        "since_step": 1501,
                        "value": 2.71,
                        "expected": 2.31,
                        "resolved_step": 1509,
                    },
                    {
                        "alert": "LossDiverged",
                        "severity": "critical",
                        "step": 1509,
                        "since_step": 1501,
                        "value": 3.02,
                        "expected": 2.31,
                        "resolved_step": None,
                    },
                ],
                "prometheus": {"fired": True, "alerts": [f"LossDiverged{name}"]},
            },
            {
                "name": f"Not a number{name}",
                "what": "Half-way, one loss is NaN, and so is every one after it.",
                "fault_step": 1501,
                "called_step": 1501,
                "alert": "LossNonFinite",
                "severity": "critical",
                "samples": nan_run,
                "alerts": [
                    {
                        "alert": "LossNonFinite",
                        "severity": "critical",
                        "step": 1501,
                        "since_step": 1501,
                        "value": "NaN",
                        "expected": 2.31,
                        "resolved_step": None,
                    }
                ],
                "prometheus": None,
            },
        ],
        "commands": [
            {"command": f"losscast watch --once{name}", "what": "The same runs in a terminal."},
            {
                "command": "losscast predict law.json --params 1e6 --tokens 6e7",
                "what": "Ask the law about a run that nobody has started.",
            },
            {
                "command": "losscast replay curve.csv --prediction prediction.json",
                "what": "Hold a recorded run of your own against a prediction.",
            },
        ],
    }
