"""/metrics: bounded, the important first, and valid for Prometheus."""

import time

from prometheus_client.parser import text_string_to_metric_families

from monitor.service.exporter import (
    GAUGES,
    MAX_RUN_SERIES,
    MAX_SERIES,
    REASONS,
    Detail,
    Exporter,
    Figures,
    Totals,
)


def figures(run: str, owner: str = "t", created: float = 0.0, healthy: bool = True) -> Figures:
    return Figures(
        healthy, created, run, owner, states=("healthy",) if healthy else ("diverged", "off_line"), last_step_time=1e9,
        detail=full,
    )  # fmt: skip


def full() -> Detail:
    return Detail(
        action="continue", gauges=dict.fromkeys(GAUGES, 1.5), final={"0.05": 1.0, "0.5": 2.0, "0.95": 3.0},
        step_seconds={"0.5": 1.0, "0.99": 2.0}, checkpoint_time=1e9, restarts={f"c{i}": 1 for i in range(8)},
    )  # fmt: skip


def series(exporter: Exporter) -> list[str]:
    return [line for line in exporter.text().decode().splitlines() if not line.startswith("#")]


def test_ten_thousand_hostile_runs_stay_under_the_cap_and_cannot_silence_a_page() -> None:
    runs = [figures(f"hostile-{i}", "enemy", 5.0, healthy=False) for i in range(10_000)]
    runs.append(figures("mine", "me", 9.0, healthy=False))
    totals = Totals()
    exporter = Exporter(lambda: runs, totals, "1")
    found = series(exporter)
    assert 1500 < len(found) <= MAX_SERIES
    assert 'losscast_verdict{run="mine",state="diverged",team=""} 1.0' in found
    assert any(line.startswith('losscast_run_last_step_timestamp_seconds{run="mine"}') for line in found)
    assert totals.dropped_series > 10_000
    counted = next(
        float(line.split()[1])
        for line in series(exporter)
        if line.startswith("losscast_series_dropped_total")
    )
    assert counted == totals.dropped_series


def test_detail_of_the_newest_runs_goes_first() -> None:
    runs = [figures(f"r{i}", created=i) for i in range(200)]
    found = series(Exporter(lambda: runs, Totals(), "1"))
    assert len(found) <= MAX_SERIES
    for i in range(200):
        assert any(f'verdict{{run="r{i}",' in line for line in found)
    assert any('run_loss{run="r0"}' in line for line in found)
    assert not any('run_loss{run="r199"}' in line for line in found)


def test_one_run_has_at_most_thirty_series() -> None:
    totals = Totals()
    found = [
        line
        for line in series(Exporter(lambda: [figures("a", healthy=False)], totals, "1"))
        if 'run="a"' in line
    ]
    assert MAX_RUN_SERIES - 8 < len(found) <= MAX_RUN_SERIES
    assert totals.dropped_series == 0, "one run is no overflow, and pages nobody as one"


def test_of_what_belongs_together_a_run_shows_all_or_nothing() -> None:
    d = full()
    d.restarts, d.gpu_seconds = {}, {"useful": 1.0, "lost": 2.0, "idle": 3.0}
    f = figures("a")._replace(detail=lambda: d)
    for fewer in range(6):
        d.gauges = dict.fromkeys(list(GAUGES)[fewer:], 1.5)
        text = "\n".join(series(Exporter(lambda: [f], Totals(), "1")))
        assert text.count("losscast_gpu_seconds_total{") in (0, 3)
    assert text.count("losscast_gpu_seconds_total{") == 3


def test_the_text_is_what_prometheus_reads_and_counters_start_at_nought() -> None:
    totals = Totals()
    totals.committed(0.02)
    totals.reject("stale_attempt")
    totals.reject("no such word")
    text = Exporter(lambda: [Figures(True, 0.0, "a", "t")], totals, "1").text().decode()
    families = {f.name: f for f in text_string_to_metric_families(text)}
    assert {s.labels["reason"]: s.value for s in families["losscast_samples_rejected"].samples}[
        "stale_attempt"
    ] == 1
    assert len(families["losscast_samples_rejected"].samples) == len(REASONS)
    assert [s.value for s in families["losscast_samples_received"].samples] == [0.0]
    assert {s.labels["kind"] for s in families["losscast_samples_nonfinite"].samples} == {"nan", "inf"}
    buckets = [
        s for s in families["losscast_ingest_commit_duration_seconds"].samples if s.name.endswith("_bucket")
    ]
    assert buckets[-1].labels["le"] == "+Inf" and buckets[-1].value == 1


def test_rendering_at_the_cap_is_quick() -> None:
    runs = [figures(f"r{i}") for i in range(80)]
    exporter = Exporter(lambda: runs, Totals(), "1")
    exporter.text()
    began = time.process_time()
    for _ in range(3):
        exporter.text()
    assert (time.process_time() - began) / 3 < 0.25  # 0.03 s on a free core; CI machines are shared
