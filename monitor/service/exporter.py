"""/metrics: what the monitor holds of its runs, as Prometheus reads it.

At most MAX_SERIES series. When there are more, detail goes first, of the newest runs first, and what was left out is
counted. At most MAX_RUN_SERIES a run, the most wanted first; what one run has beyond is in its API, and is no overflow. The verdict and the last step of unhealthy runs come before everything else; among them
each token's runs take turns, so that one token's thousand broken runs can't hide another's only one.

Loss, expected, gap in nats per token; times in seconds since the epoch by the monitor's clock. Counters start at 0 when
a run registers. Labels are the run's id and words from fixed lists, never what a sender typed.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count, groupby
from operator import itemgetter
from typing import NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

MAX_SERIES = 2000
MAX_RUN_SERIES = 30
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
COMMIT_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
REASONS = ("invalid", "json", "run_id", "encoding", "too_large", "stale_attempt", "scope", "quota", "busy", "disk_full", "store",
           "stopping", "unauthorized")  # fmt: skip


@dataclass(slots=True)
class Detail:
    """What is exported of a run that is shown in full; None is left out."""

    phase: str = "running"
    law: str = "none"
    """none, predicted or own_past."""
    action: str | None = None
    gauges: dict[str, float | None] = field(default_factory=dict)
    """Further gauges by name (without prefix), in order of importance."""
    final: dict[str, float] | None = None
    step_seconds: dict[str, float] | None = None
    samples: int = 0
    nan: int = 0
    inf: int = 0
    above: int = 0
    below: int = 0
    restarts: dict[str, int] = field(default_factory=dict)
    gpu_seconds: dict[str, float] = field(default_factory=dict)
    checkpoint_time: float | None = None
    checkpoint_failures: int = 0


class Figures(NamedTuple):
    """What is asked of every active run, ten thousand of them at every scrape. In order of importance, and no two alike in the
    first three, so that a plain sort puts them into it."""

    healthy: bool
    created: float
    run: str
    owner: str
    team: str = ""
    states: tuple[str, ...] = ()
    """What holds of it now, from the judge's and the monitor's fixed words."""
    last_step_time: float | None = None
    muted: tuple[str, ...] = ()
    """Alerts that somebody muted, or `all`."""
    detail: "Callable[[], Detail]" = Detail
    """Asked only where there is room for it."""


GAUGES = {
    "run_loss": "Last finite loss, nats per token",
    "run_predicted_loss": "Loss expected at this step, nats per token",
    "run_band_lower": "Lower end of what is expected at this step, nats per token",
    "run_band_upper": "Upper end of what is expected at this step, nats per token",
    "run_loss_gap_nats": "Loss less what was expected, nats per token",
    "run_loss_gap_sigma": "The same in standard deviations of one step's noise",
    "run_step": "Newest optimizer step",
    "run_tokens": "Training tokens seen",
    "run_attempt": "The attempt that is listened to",
    "run_tokens_per_second": "Throughput as the run reports it",
    "run_mfu_ratio": "Model FLOPs utilisation, 0 to 1",
    "run_goodput_ratio": "Share of the GPU time, or where nobody counts that of the steps trained, that still counts, 0 to 1",
}
_HELP = {
    **GAUGES,
    "run_info": "1 for every run",
    "run_last_step_timestamp_seconds": "When the newest step arrived",
    "run_predicted_final_loss": "Loss the run is heading for, nats per token",
    "run_step_seconds": "Seconds a step, of the latest ones",
    "verdict": "1 for everything that holds of the run now",
    "run_muted": "1 for an alert of the run that somebody muted for a while, or all",
    "advice": "1 for what is advised now",
    "samples_received": "Samples taken, each counted once",
    "samples_nonfinite": "Samples whose loss was not a number",
    "band_violations": "Samples outside what was expected",
    "restarts": "Restarts by cause",
    "gpu_seconds": "GPU seconds as the launcher books them: of steps that still count, of steps lost, of neither",
    "checkpoint_last_commit_timestamp_seconds": "When the newest checkpoint was committed",
    "checkpoint_verify_failures": "Checkpoints that did not verify",
}
_COUNTERS = frozenset(
    {
        "samples_received",
        "samples_nonfinite",
        "band_violations",
        "restarts",
        "checkpoint_verify_failures",
        "gpu_seconds",
    }
)
_LABELS = {
    "run_info": ("run", "team", "phase", "law"), "verdict": ("run", "team", "state"), "advice": ("run", "action"), "run_muted": ("run", "alert"),
    "run_predicted_final_loss": ("run", "quantile"), "run_step_seconds": ("run", "quantile"),
    "samples_nonfinite": ("run", "kind"), "band_violations": ("run", "side"), "restarts": ("run", "cause"), "gpu_seconds": ("run", "state"),
}  # fmt: skip

Series = tuple[str, tuple[str, ...], float]


def vital(f: Figures) -> Iterator[Series]:
    """What is never left out of a run that is not healthy."""
    for alert in f.muted:
        yield "run_muted", (f.run, alert), 1.0
    for state in f.states:
        yield "verdict", (f.run, f.team, state), 1.0
    if f.last_step_time is not None:
        yield "run_last_step_timestamp_seconds", (f.run,), f.last_step_time


def detail(f: Figures) -> Iterator[Series]:
    """The rest, the most wanted first."""
    d = f.detail()
    yield "run_info", (f.run, f.team, d.phase, d.law), 1.0
    yield "samples_received", (f.run,), d.samples
    yield "samples_nonfinite", (f.run, "nan"), d.nan
    yield "samples_nonfinite", (f.run, "inf"), d.inf
    if d.action is not None:
        yield "advice", (f.run, d.action), 1.0
    for name, value in d.gauges.items():
        if value is not None:
            yield name, (f.run,), value
    for quantile, value in (d.final or {}).items():
        yield "run_predicted_final_loss", (f.run, quantile), value
    for quantile, value in (d.step_seconds or {}).items():
        yield "run_step_seconds", (f.run, quantile), value
    yield "band_violations", (f.run, "above"), d.above
    yield "band_violations", (f.run, "below"), d.below
    if d.checkpoint_time is not None:
        yield "checkpoint_last_commit_timestamp_seconds", (f.run,), d.checkpoint_time
        yield "checkpoint_verify_failures", (f.run,), d.checkpoint_failures
    elif d.checkpoint_failures:
        yield "checkpoint_verify_failures", (f.run,), d.checkpoint_failures
    for state, seconds in d.gpu_seconds.items():
        yield "gpu_seconds", (f.run, state), seconds
    for cause, times in d.restarts.items():
        yield "restarts", (f.run, cause), times


def choose(figures: Iterable[Figures], room: int) -> tuple[list[Series], int]:
    """At most `room` series, the most important first, and how many were left out for want of room."""
    runs = _in_turn(list(figures))
    chosen: list[Series] = []
    left_out = 0

    def take(series: Iterable[Series], most: int, *, whole: bool = False) -> int:
        """How many were taken. `whole`: of a name all of the run's or none: GPU seconds that were useful say nothing alone."""
        nonlocal left_out
        taken = 0
        for _, named in groupby(series, itemgetter(0)):
            group = list(named)
            if whole and taken + len(group) > most:
                continue
            for one in group[: most - taken]:
                if len(chosen) >= room:
                    left_out += 1
                    continue
                chosen.append(one)
                taken += 1
        return taken

    used = {}
    for f in runs:  # the unhealthy ones come first
        if len(chosen) < room:
            used[f.run] = take(vital(f), MAX_RUN_SERIES)
        else:
            used[f.run] = 0
            left_out += len(f.muted) + len(f.states) + (f.last_step_time is not None)
    for f in runs:
        if len(chosen) >= room:  # what it would have had, without asking for it
            left_out += MAX_RUN_SERIES - used[f.run]
            continue
        take(detail(f), MAX_RUN_SERIES - used[f.run], whole=True)
    return chosen, left_out


def _in_turn(runs: list[Figures]) -> list[Figures]:
    """Unhealthy ones first, then the oldest; the owners take turns."""
    turn: defaultdict[str, count[int]] = defaultdict(count)
    ranked = sorted((f.healthy, next(turn[f.owner]), f) for f in sorted(runs))
    return [f for _, _, f in ranked]


class Totals:
    """Counts of the service itself. Safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.rejected = dict.fromkeys(REASONS, 0)
        self.unknown_events = 0
        self.duplicates = 0
        self.dropped_series = 0
        self._buckets = [0] * (len(COMMIT_BUCKETS_S) + 1)
        self._commits_s = 0.0

    def reject(self, reason: str) -> None:
        """One request was refused."""
        with self._lock:
            self.rejected[reason if reason in self.rejected else "invalid"] += 1

    def passed_over(self, unknown: int, duplicates: int) -> None:
        """Events of a kind v1 does not know, and repeated ones."""
        if unknown or duplicates:
            with self._lock:
                self.unknown_events += unknown
                self.duplicates += duplicates

    def committed(self, seconds: float) -> None:
        """One commit, and how long it took."""
        with self._lock:
            self._commits_s += seconds
            for i, edge in enumerate(COMMIT_BUCKETS_S):
                if seconds <= edge:
                    self._buckets[i] += 1
                    return
            self._buckets[-1] += 1

    def families(self) -> Iterator[Metric]:
        """As metrics."""
        with self._lock:
            rejected = CounterMetricFamily("losscast_samples_rejected", "Requests refused", labels=["reason"])
            for reason, count in self.rejected.items():
                rejected.add_metric([reason], count)
            yield rejected
            yield CounterMetricFamily(
                "losscast_events_unknown", "Events of an unknown kind", value=self.unknown_events
            )
            yield CounterMetricFamily(
                "losscast_samples_duplicate", "Events sent again", value=self.duplicates
            )
            yield CounterMetricFamily(
                "losscast_series_dropped", "Series left out of /metrics", value=self.dropped_series
            )
            total, buckets = 0, []
            for edge, count in zip((*COMMIT_BUCKETS_S, float("inf")), self._buckets, strict=True):
                total += count
                buckets.append(("+Inf" if edge == float("inf") else str(edge), total))
            yield HistogramMetricFamily(
                "losscast_ingest_commit_duration_seconds",
                "From the first request of a group to its samples on disk",
                buckets=buckets,
                sum_value=self._commits_s,
            )


class Exporter:
    """A prometheus_client collector over the runs.

    figures  the active runs, asked at every scrape
    gauges   further gauges of the service: name without prefix, help, value
    url      where people reach the page; "" where it is not known
    """

    def __init__(
        self,
        figures: Callable[[], Iterable[Figures]],
        totals: Totals,
        version: str,
        gauges: Callable[[], Iterable[tuple[str, str, float]]] = lambda: (),
        url: str = "",
    ):
        self.figures, self.totals, self.version, self.gauges = figures, totals, version, gauges
        self.url = url
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)  # type: ignore[arg-type]

    def describe(self) -> Iterable[Metric]:
        """Nothing: the names are known only with the runs."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """For prometheus_client."""
        own: list[Metric] = [GaugeMetricFamily("losscast_build_info", "1", labels=["version"])]
        own[0].add_sample("losscast_build_info", {"version": self.version}, 1)
        if self.url:
            own.append(GaugeMetricFamily("losscast_page_info", "Where the page is", labels=["url"]))
            own[1].add_sample("losscast_page_info", {"url": self.url}, 1)
        own += [
            GaugeMetricFamily(f"losscast_{name}", text, value=value) for name, text, value in self.gauges()
        ]
        room = MAX_SERIES - len(own) - len(REASONS) - 3 - len(COMMIT_BUCKETS_S) - 3
        chosen, left_out = choose(self.figures(), room)
        self.totals.dropped_series += left_out
        families: dict[str, Metric] = {}
        for name, labels, value in chosen:
            family = families.get(name)
            if family is None:
                kind = CounterMetricFamily if name in _COUNTERS else GaugeMetricFamily
                family = families[name] = kind(
                    f"losscast_{name}", _HELP[name], labels=_LABELS.get(name, ("run",))
                )
            family.add_metric(labels, value)  # type: ignore[attr-defined]
        yield from own
        yield from self.totals.families()
        yield from families.values()

    def text(self) -> bytes:
        """The answer to a scrape."""
        return generate_latest(self.registry)
