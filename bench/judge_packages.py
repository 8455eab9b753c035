"""Small packages from PyPI that watch a loss, as they come, beside ours on the same curves: `python bench/judge_packages.py`.

    pip install losslint trainpulse trainspotter

Those that are not installed are left out, and said so; none is a dependency of losscast. Defaults everywhere. losslint and
trainspotter read a whole log, so they are polled as their own `watch` does: a finding counts when it was not there at the
poll before the fault. An error of theirs counts as a page, a warning as a warning, information as nothing.

    healthy   one reading of each finished curve (online rules: every sample), runs that get a call
    faults    into the 0.5M-token run, a poll every 30 samples for 300 samples: found, median delay
    blow-up   the real one: calls by two log points after its minimum
"""

import argparse
import importlib.metadata
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from msgspec.structs import replace

sys.path.insert(0, str(Path(__file__).parent))

from judge import FAULTS, HEALTHY

from monitor.forecast.points import read_curves
from monitor.replay import read_samples, replay, samples_of
from monitor.verdict import Sample

Called = set[tuple[str, str, int]]
"""(severity, rule, step): page or warning."""
Reader = Callable[[Sequence[Sample]], Called]


def losslint() -> Reader:
    """Every check over the log as it is."""
    from losslint.checks import run_all_checks
    from losslint.parsing import RunLog

    names = {"error": "page", "warning": "warning"}

    def read(samples: Sequence[Sample]) -> Called:
        log = RunLog([s.step for s in samples], {"loss": [s.loss for s in samples]}, Path("run"))
        # a finding has no step of its own: the same check twice is the same finding unless its text changes
        return {
            (names[f.severity], f.check + str(f.details.get("count", "")), 0)
            for f in run_all_checks(log)
            if f.severity in names
        }

    return read


def trainpulse() -> Reader:
    """Its online monitor, fed every sample."""
    from trainpulse import Monitor

    names = {"critical": "page", "warning": "warning"}

    def read(samples: Sequence[Sample]) -> Called:
        monitor = Monitor()
        for s in samples:
            monitor.log("loss", s.step, s.loss)
        return {
            (names[a.severity.value], a.detector, a.step) for a in monitor.alerts if a.severity.value in names
        }

    return read


def trainspotter() -> Reader:
    """Every detector over the log as it is."""
    from trainspotter.detectors import run_all
    from trainspotter.model import Run

    names = {"error": "page", "warning": "warning"}

    def read(samples: Sequence[Sample]) -> Called:
        run = Run()
        for s in samples:
            run.add_point("train/loss", s.step, s.loss)
        return {(names[f.severity], f.detector, f.step_start) for f in run_all(run) if f.severity in names}

    return read


def losscast() -> Reader:
    """Ours, over the same samples."""

    def read(samples: Sequence[Sample]) -> Called:
        names = {"critical": "page", "warning": "warning"}
        return {
            (names[a["severity"]], a["alert"], a["step"])
            for a in replay(samples)["alerts"]
            if a["severity"] in names
        }

    return read


PACKAGES: dict[str, Callable[[], Reader]] = {
    "losscast": losscast,
    "losslint": losslint,
    "trainpulse": trainpulse,
    "trainspotter": trainspotter,
}


def installed() -> tuple[dict[str, Reader], list[str]]:
    """Readers by name and version, and the names of those that are not here."""
    found, absent = {}, []
    for name, make in PACKAGES.items():
        try:
            found[f"{name} {importlib.metadata.version(name)}"] = make()
        except (ImportError, importlib.metadata.PackageNotFoundError):
            absent.append(name)
    return found, absent


def healthy(read: Reader, data: Path, every: int) -> dict[str, Any]:
    """Runs of the healthy sets that get a call, and calls per million samples."""
    every_run: list[Sequence[Sample]] = []
    for name in HEALTHY:
        runs = list(read_samples(data / f"{name}.csv").values())
        every_run += runs[::every] if name == "speedrun_val" else runs
    curves = read_curves(data / "parameter_golf.csv", where={"kind": "train_loss"}).runs
    every_run += [list(samples_of(curve)) for curve in curves]
    count: Counter[str] = Counter()
    for samples in every_run:
        called = read(samples)
        count.update(f"runs with a {severity}" for severity in {severity for severity, _, _ in called})
        count["calls"] += len(called)
        count["samples"] += len(samples)
        count["runs"] += 1
    return {**count, "calls per million": 1e6 * count["calls"] / count["samples"]}


def faults(read: Reader, samples: Sequence[Sample], starts: Sequence[int]) -> dict[str, Any]:
    """Share of faults with a new call within 300 samples, and the median delay at the polls."""
    out = {}
    for name, fault in FAULTS.items():
        found = []
        for start in starts:
            known = read(samples[:start])
            bad = list(samples[:start])
            bad += [
                replace(s, loss=s.loss + fault(s.step - samples[start].step))
                for s in samples[start : start + 300]
            ]
            found.append(next((n for n in (1, *range(30, 301, 30)) if read(bad[: start + n]) - known), None))
        hit = [n for n in found if n is not None]
        out[name] = [len(hit) / len(found), median(hit) if hit else None]
    return out


def blow_up(read: Reader, data: Path) -> list[str]:
    """What is called of the real blow-up by two log points after its minimum."""
    runs = read_samples(data / "blowups_350m.csv")
    samples = next(s for name, s in runs.items() if name.startswith("blowup-4-alibi-fp32"))
    lowest = min(
        range(len(samples)), key=lambda i: samples[i].loss if math.isfinite(samples[i].loss) else 99.0
    )
    return sorted({severity for severity, _, _ in read(samples[: lowest + 3]) - read(samples[: lowest + 1])})


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--starts", type=int, default=6, help="faults of each kind")
    parser.add_argument("--every", type=int, default=10, help="one in so many of the short validation curves")
    args = parser.parse_args()
    root = os.environ.get("LOSSCAST_DATA")
    if not root:
        print("packages bench skipped: set LOSSCAST_DATA to the folder with curves/", file=sys.stderr)
        return 0
    data = Path(root) / "curves"
    readers, absent = installed()
    if absent:
        print(f"not installed and left out: {', '.join(absent)}; pip install {' '.join(absent)}")
    run = read_samples(data / "perstep_single.csv")["0"]
    starts = [len(run) // 10 + k * (len(run) * 4 // 5) // args.starts for k in range(args.starts)]
    for name, read in readers.items():
        print(f"\n## {name}")
        for what, part in (
            ("healthy", lambda read=read: healthy(read, data, args.every)),
            ("faults", lambda read=read: faults(read, run, starts)),
            ("blow-up", lambda read=read: blow_up(read, data)),
        ):
            print(f"  {what}: {json.dumps(part())}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
