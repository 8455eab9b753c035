"""The launcher's own metrics, for Prometheus' textfile collector: facts that runs leave in their storage, counted.

The launcher is no service: its processes come and go with runs. So nothing is counted in memory; every number is read
from what submissions, attempts and commits left behind, and a scrape after a crash says the same as one before it.
`losscast ls FOLDER --textfile /var/lib/node_exporter/losscast.prom`, from cron or a timer, keeps the file fresh.

    losscast_submissions_total{outcome}                      accepted, held (somebody had the run), failed (no cluster took it)
    losscast_time_to_first_step_seconds{run}                 newest submission to its first optimizer step
    losscast_restarts_total{run,cause}                       attempts that broke, by what the driver saw
    losscast_checkpoint_last_commit_timestamp_seconds{run}
    losscast_checkpoint_duration_seconds{run,stage}          of the newest committed one, by stage: write (every rank's shards to its
                                                             disk), upload (at az://), commit (read back, hashed, entered in the log)
    losscast_lease_held{run}                                 1 while somebody keeps the run alive
    losscast_spool_bytes{run}                                samples that the monitor has not taken yet
    losscast_gpu_seconds_total{run,state}                    useful, lost, idle (`launcher.recovery.goodput`): what is settled: of a
                                                             run that trains, up to its newest checkpoint

Per run only while it lives and for a quarter of an hour after it was last heard of, and for 300 runs at most.
"""

import csv
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from launcher.errors import Failed, WrongInput
from launcher.jobs.standing import LIVE, Facts
from launcher.storage.runfolder import read_json

OUTCOMES = ("accepted", "held", "failed")
CAUSES = ("killed", "raised", "hung", "host_lost", "preempted", "resized", "rollback", "other")
KEPT_S = 900.0
MOST_RUNS = 300
"""Of the newest, as far as MOST_SERIES go: a run has eight to twelve series and one a cause of its restarts."""
MOST_SERIES = 2000
STATES = ("useful", "lost", "idle")
STAGES = ("write", "upload", "commit")


class _Families(Collector):
    def __init__(self, families: list[CounterMetricFamily | GaugeMetricFamily]) -> None:
        self._families = families

    def collect(self) -> Iterable[CounterMetricFamily | GaugeMetricFamily]:
        return self._families


def exposition(runs: list[tuple[Facts, str]]) -> bytes:
    """The metrics of some runs, each with its phase, in Prometheus' text form."""
    submissions = CounterMetricFamily(
        "losscast_submissions", "Submissions, by what became of them.", labels=["outcome"]
    )
    first = GaugeMetricFamily(
        "losscast_time_to_first_step_seconds", "Newest submission to its first step.", labels=["run"]
    )
    restarts = CounterMetricFamily(
        "losscast_restarts", "Attempts that broke, by cause.", labels=["run", "cause"]
    )
    commit = GaugeMetricFamily(
        "losscast_checkpoint_last_commit_timestamp_seconds",
        "When a checkpoint was last committed.",
        labels=["run"],
    )
    stages = GaugeMetricFamily(
        "losscast_checkpoint_duration_seconds",
        "What the newest committed checkpoint took.",
        labels=["run", "stage"],
    )
    lease = GaugeMetricFamily("losscast_lease_held", "Somebody keeps the run alive.", labels=["run"])
    spool = GaugeMetricFamily("losscast_spool_bytes", "Samples waiting for the monitor.", labels=["run"])
    gpu = CounterMetricFamily(
        "losscast_gpu_seconds",
        "Time of GPUs (of ranks, on CPU) by what became of it.",
        labels=["run", "state"],
    )
    outcomes: Counter[str] = Counter()
    for facts, _ in runs:
        outcomes.update(outcomes_of(facts))
    for outcome in OUTCOMES:
        submissions.add_metric([outcome], outcomes[outcome])
    recent = [(f, w) for f, w in runs if w in LIVE or f.now - heard(f) < KEPT_S]
    left = MOST_SERIES - len(OUTCOMES)
    for facts, _ in sorted(recent, key=lambda r: -heard(r[0]))[:MOST_RUNS]:
        name = [facts.spec.name]
        seconds, causes, spent = time_to_first_step(facts), sorted(broken(facts).items()), gpu_seconds(facts)
        took = checkpoint_seconds(facts)
        left -= 4 + len(causes) + len(spent) + len(took)
        if left < 0:
            break
        if seconds is not None:
            first.add_metric(name, seconds)
        for cause, count in causes:
            restarts.add_metric([*name, cause], count)
        for state, spent_s in spent.items():
            gpu.add_metric([*name, state], spent_s)
        for stage, took_s in took.items():
            stages.add_metric([*name, stage], took_s)
        if facts.committed is not None:
            commit.add_metric(name, facts.committed.time)
        lease.add_metric(name, float(facts.holder.alive))
        spool.add_metric(name, waiting_bytes(facts))
    registry = CollectorRegistry()
    registry.register(_Families([submissions, first, restarts, commit, stages, lease, spool, gpu]))
    return generate_latest(registry)


def heard(facts: Facts) -> float:
    """When anything was last heard of the run, in seconds since the epoch."""
    times = [facts.last_step_time or 0.0, float((facts.submission or {}).get("time", 0.0))]
    times += [e.time for e in facts.entries[-1:]] + [float((facts.end or {}).get("time", 0.0))]
    return max(times)


def outcomes_of(facts: Facts) -> Counter[str]:
    """Submissions of the run by outcome; an outcome that is not known is left out."""
    counted: Counter[str] = Counter()
    try:
        lines = (facts.folder.path / "submissions.jsonl").read_text().splitlines()
    except OSError:
        return counted
    for line in lines:
        try:
            outcome = json.loads(line)["outcome"]
        except (ValueError, KeyError, TypeError):
            continue  # half a line, of a process that was killed
        if outcome in OUTCOMES:
            counted[outcome] += 1
    return counted


def time_to_first_step(facts: Facts) -> float | None:
    """Seconds from the newest submission to the end of its first step; None before that, and for torchrun's runs."""
    if facts.submission is None:
        return None
    mine = [
        e.attempt
        for e in facts.entries
        if e.kind == "attempt" and e.fields.get("submission") == facts.submission.get("job")
    ]
    for attempt in mine:
        try:
            with facts.folder.curve(attempt).open(newline="") as file:
                row = next(csv.DictReader(file), None)
            if row is not None and row.get("time"):
                return max(0.0, float(row["time"]) - float(facts.submission["time"]))
        except (OSError, ValueError, KeyError):
            continue
    return None


def broken(facts: Facts) -> Counter[str]:
    """Attempts that broke, by the cause that the driver wrote down."""
    counted: Counter[str] = Counter()
    for attempt in facts.folder.attempts():
        try:
            seen = read_json(facts.folder.attempt(attempt) / "failure.json")
        except WrongInput:
            continue
        if seen is not None:
            cause = str(seen.get("cause"))
            counted[cause if cause in CAUSES else "other"] += 1
    return counted


def gpu_seconds(facts: Facts) -> dict[str, float]:
    """Seconds by state, from the ledger that the run's driver keeps; empty before it has settled anything."""
    try:
        kept = read_json(facts.folder.path / "goodput.json")
        return {} if kept is None else {state: max(0.0, float(kept[f"{state}_s"])) for state in STATES}
    except (WrongInput, KeyError, TypeError, ValueError):
        return {}


def checkpoint_seconds(facts: Facts) -> dict[str, float]:
    """What the newest committed checkpoint took, by stage, as its entry in the log tells; older entries tell nothing."""
    said = facts.committed.fields.get("seconds") if facts.committed is not None else None
    if not isinstance(said, dict):
        return {}
    return {k: float(v) for k in STAGES if isinstance(v := said.get(k), int | float) and v >= 0}


def waiting_bytes(facts: Facts) -> int:
    """Bytes in the run's spools on this machine."""
    total = 0
    for path in (facts.folder.path / "spool").rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:
            continue
    return total


def write_textfile(path: Path, text: bytes) -> None:
    """Replace the file at once, so that the collector never reads half of it. Raises Failed."""
    scratch = path.with_name(f".{path.name}.new")
    try:
        scratch.write_bytes(text)
        scratch.replace(path)
    except OSError as error:
        raise Failed(f"{path}: can't be written: {error.strerror}") from None
