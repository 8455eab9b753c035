"""The monitor as one object: store, writer, judges and tokens put together, and what it says of its runs.

What a run's state is comes from two places: the judge, which knows the loss, and the clock, which knows that a run is
silent. Both are put together here, for the page, the API and /metrics alike. `monitor.service.api` is its HTTP face.
"""

import contextlib
import functools
import itertools
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from monitor.judge import Settings
from monitor.judging.apart import Apart
from monitor.judging.loop import Judging
from monitor.judging.run import band_columns
from monitor.prometheus import alerts
from monitor.service.attention import EVERY, Attention, shown
from monitor.service.exporter import Exporter, Figures, Totals
from monitor.service.laws import Laws
from monitor.service.tokens import Tokens
from monitor.service.views import Parts, Views, thinned
from monitor.store.columns import Damaged
from monitor.store.facts import RunFacts
from monitor.store.ingest import Ingest, Refused
from monitor.store.merging import Merger
from monitor.store.reading import LAST, find, spans
from monitor.store.store import Store

STATE_OF = {
    "LossNonFinite": "non_finite",
    "LossDiverged": "diverged",
    "LossOffLine": "off_line",
    "LossAbovePrediction": "above",
    "LossBelowPrediction": "below",
    "LossJumpAfterResume": "jump_after_resume",
    "LossPlateau": "plateau",
    "ValidationApart": "validation_apart",
    "RankApart": "rank_apart",
    "GradNormHigh": "grad_norm_high",
}
CALM = frozenset({"healthy", "warming_up", "spike"})
SHOWN_AFTER_END_S = 900.0
MERGE_S = 20.0
"""Small chunks are looked for this often."""
FORGOTTEN_S = 86400.0
"""A run that said nothing for a day leaves /metrics; it was paged for long enough."""


class Monitor:
    """Open it on a folder, `start` it, `stop` it."""

    def __init__(
        self,
        folder: Path,
        *,
        settings: Settings | None = None,
        teams: frozenset[str] = frozenset(),
        clock: Callable[[], float] = time.time,
        version: str = "0",
        keep_days: float = 0.0,
        apart: bool = False,
        url: str = "",
        stalled_after_s: float = alerts.STALE_LEAST_S,
    ):
        """
        apart      judge in a process of its own
        url        where people reach the page, for the links in alerts
        stalled_after_s  no run is called stalled or silent before it has made no step for so long
        keep_days  a run is removed so long after it ended or was last heard of; 0 keeps all
        teams      those that alerts are routed by; another team's name is kept, and is no label
        """
        self.store = Store(folder)
        self.tokens = Tokens(folder)
        self.attention = Attention(folder)
        self.laws = Laws(folder)
        self.totals = Totals()
        self.clock, self.teams, self.keep_s = clock, teams, keep_days * 86400.0
        self.started = clock()
        self.stalled_after_s = stalled_after_s
        self.versions: dict[int, int] = {}
        """Of each run, a number that rises when its verdict changes."""
        self.stopping = threading.Event()
        self._count = itertools.count(1)
        self.ingest = Ingest(self.store, committed=self._committed, observe=self._observe, clock=clock)
        self.judging: Judging | Apart = (Apart if apart else Judging)(
            self.store, self.ingest.submit_judged, settings=settings, clock=clock, changed=self._changed
        )
        self.views = Views(self.store)
        self.merger = Merger(self.store, self.ingest.merge)
        self.exporter = Exporter(self.figures, self.totals, version, self._gauges, url)

    def start(self) -> None:
        """Take requests, and judge what was left unjudged."""
        self.ingest.start()
        self.judging.start()
        threading.Thread(target=self._merge, name="losscast-merge", daemon=True).start()
        if self.keep_s > 0:
            threading.Thread(target=self._tidy, name="losscast-tidy", daemon=True).start()

    def stop(self) -> None:
        """Write everything down and let go of the store."""
        self.stopping.set()
        self.judging.stop()
        self.ingest.stop()
        self.store.close()

    def _merge(self) -> None:
        while not self.stopping.wait(MERGE_S):
            for facts in list(self.ingest.runs.values()):
                more = True
                while more and not self.stopping.is_set():
                    more = False
                    with contextlib.suppress(Damaged, sqlite3.Error, OSError, TimeoutError):
                        more = self.merger.run(facts)  # what is damaged is said by whoever asks for it

    def _tidy(self) -> None:
        while True:
            with contextlib.suppress(Refused, OSError, TimeoutError):
                self.remove_old()
            if self.stopping.wait(3600.0):
                return

    def remove_old(self) -> int:
        """Remove the runs that are past their time. How many there were."""
        now = self.clock()
        old = [
            f
            for f in list(self.ingest.runs.values())
            if self.keep_s > 0 and now - (f.ended_received or f.last_received) > self.keep_s
        ]
        for start in range(0, len(old), 20):  # a little at a time: who sends must not wait long
            some = old[start : start + 20]
            self.ingest.remove([f.run for f in some]).result(60)
            gone = [f.run_id for f in some if self.ingest.runs.get(f.run) is not f]
            self.judging.forget(gone)
            self.merger.forget(gone)
            for run_id in gone:
                self.versions.pop(run_id, None)
            self.attention.forget({f.run for f in some if f.run_id in gone}, now)
        return len(old)

    def _committed(self, ord: int) -> None:
        self.judging.notice(ord)

    def _observe(self, seconds: float, count: int) -> None:
        self.totals.committed(seconds)

    def _changed(self, run_ids: list[int]) -> None:
        for run_id in run_ids:
            self.versions[run_id] = next(self._count)

    # what is said of a run

    def run(self, name: str) -> RunFacts | None:
        """What is known of a run by that name."""
        return self.ingest.runs.get(name)

    def states(self, facts: RunFacts, last: dict[str, Any], now: float) -> tuple[str, ...]:
        """All that holds of a run now, the judge's word first."""
        out = [str(last.get("state") or "warming_up")]
        for alert in last.get("open", ()):
            state = STATE_OF.get(alert["alert"])
            if state:
                out.append(state)
            if alert["alert"] == "LossAbovePrediction" and alert["severity"] == "critical":
                out.append("will_miss")

        for name, at in last.get("called", {}).items():
            if now - at < alerts.HOLD_S and name in STATE_OF:
                out.append(STATE_OF[name])

        def recent(at: float | None) -> bool:
            return at is not None and now - at < alerts.RECENT_S

        if recent(last.get("spike_time")):
            out.append("spike")
        if recent(facts.checkpoint_failed_received):
            out.append("checkpoint_bad")
        if recent(facts.lease_lost_received):
            out.append("lease_lost")
        if facts.phase != "ended":
            out.extend(self._clocked(facts, now))
        return tuple(dict.fromkeys(out))

    def _clocked(self, facts: RunFacts, now: float) -> Iterator[str]:
        """What the clock alone says of a run that should be training."""
        if facts.restarts_since_step >= alerts.RESTART_LIMIT:
            yield "restart_loop"
        if abs(facts.skew_s) > alerts.SKEW_S:
            yield "clock_skew"
        if facts.last_step_received is None:
            return
        took = self.step_seconds(facts)
        stale = (
            max(self.stalled_after_s, alerts.STALE_FACTOR * took["0.99"]) if took else alerts.STALE_UNKNOWN_S
        )
        if now - max(facts.last_step_received, self.started) > stale:
            yield "stalled" if now - max(facts.last_received, self.started) <= stale else "silent"
        if facts.checkpoint_received is not None and facts.checkpoint_interval_s is not None:
            due = max(alerts.CHECKPOINT_LEAST_S, alerts.CHECKPOINT_FACTOR * facts.checkpoint_interval_s)
            if now - max(facts.checkpoint_received, self.started) > due:
                yield "checkpoint_overdue"

    def step_seconds(self, facts: RunFacts) -> dict[str, float] | None:
        """Median and 99th percentile of the latest steps' seconds, by the sender's clock."""
        found = self.judging.last.get(facts.run_id, {}).get("step_s")
        return None if not found else {"0.5": found[0], "0.99": found[1]}

    def summary(self, facts: RunFacts, now: float) -> dict[str, Any]:
        """A run in the list. Alerts are the open ones."""
        last = self.judging.last.get(facts.run_id, {})
        states = self.states(facts, last, now)
        state = states[0]
        if state in CALM:
            state = next((s for s in states if s in ("stalled", "silent")), state)
            state = "stalled" if state == "silent" else state
        return {
            "run": facts.run,
            "team": facts.team,
            "state": state,
            "states": states,
            "phase": facts.phase,
            "step": facts.step,
            "tokens": _plain(facts.tokens),
            "total_tokens": _plain(facts.total_tokens),
            "loss": _spelled(facts.last_loss),
            "last_finite_loss": facts.loss,
            "expected": last.get("expected"),
            "lower": last.get("lower"),
            "upper": last.get("upper"),
            "gap_sigma": last.get("gap_sigma"),
            "source": last.get("source"),
            "causes": last.get("causes", []),
            "predicted_final": last.get("predicted_final"),
            "since_step": last.get("since_step"),
            "started_time": facts.started_time,
            "last_time": facts.last_step_received or facts.last_received,
            "ended_time": facts.ended_time,
            "end_reason": facts.end_reason,
            "attempt": facts.attempt,
            "samples": facts.samples,
            "alerts": last.get("open", []),
            "target_loss": _plain(facts.target_loss),
            "advice": self.advice(facts, last),
            "muted": shown(self.attention.muted(facts.run, now)),
            "trouble": last.get("trouble"),
        }

    def advice(self, facts: RunFacts, last: dict[str, Any] | None = None) -> dict[str, Any] | None:
        """The judge's advice with the time and the money that are left."""
        if last is None:
            last = self.judging.last.get(facts.run_id, {})
        found = last.get("advice")
        if not found or facts.step is None:  # before the first step there is nothing to advise
            return None
        hours = found.get("hours_left") if facts.phase != "ended" else None
        tokens, total, rate = _plain(facts.tokens), _plain(facts.total_tokens), _plain(facts.tokens_per_s)
        if tokens is not None and total is not None and rate and rate > 0 and facts.phase != "ended":
            hours = max(0.0, total - tokens) / rate / 3600
        price = _plain(facts.price_per_hour)
        seen = self.attention.seen(facts.run, str(found.get("action")), self.clock())
        return {
            **found,
            "seen": None if seen is None else {"by": seen.by, "at": seen.at, "until": seen.until},
            "hours_left": hours,
            "money_left": None if hours is None or price is None else hours * price,
        }

    def mute(
        self, facts: RunFacts, for_s: float, alerts: tuple[str, ...], by: str, why: str
    ) -> dict[str, Any] | None:
        """Silence the run's alerts for a while. Raises WrongInput."""
        made = self.attention.mute(facts.run, for_s, self.clock(), alerts=alerts, by=by, why=why)
        self._changed([facts.run_id])
        return shown(made)

    def unmute(self, facts: RunFacts) -> None:
        """Let them sound again."""
        self.attention.unmute(facts.run, self.clock())
        self._changed([facts.run_id])

    def see(self, facts: RunFacts, action: str, for_s: float | None, by: str) -> None:
        """Somebody has seen this advice."""
        self.attention.see(facts.run, action, self.clock(), for_s=for_s, by=by)
        self._changed([facts.run_id])

    def unsee(self, facts: RunFacts) -> None:
        """Nobody has."""
        self.attention.unsee(facts.run, self.clock())
        self._changed([facts.run_id])

    def law_views(self) -> list[dict[str, Any]]:
        """The laws put beside the store, with the predictions that runs registered."""
        predictions = []
        for facts in list(self.ingest.runs.values()):
            if facts.prediction_ord is not None:
                for event in self.store.events(
                    facts.run_id, after=facts.prediction_ord - 1, last=facts.prediction_ord
                ):
                    found = event.fields.get("prediction")
                    if isinstance(found, dict):
                        predictions.append({**found, "run": facts.run})
            if len(predictions) >= 200:
                break
        return self.laws.views(predictions)

    def detail(self, facts: RunFacts, now: float) -> dict[str, Any]:
        """All of one run but its samples. Raises Damaged."""
        events = self.store.events(facts.run_id)
        prediction = next((e.fields.get("prediction") for e in events if e.ord == facts.prediction_ord), None)
        predictions = []
        shown = []
        for e in events[-500:]:
            body = e.fields
            made = body.pop("prediction", None)
            if isinstance(made, dict):
                predictions.append(
                    {"digest": made.get("digest"), "made_at": made.get("made_at"), "time": e.received}
                )
            if e.kind != "heartbeat":
                shown.append({"event": e.kind, "attempt": e.attempt, "received": e.received, **body})
        return {
            **self.summary(facts, now),
            "alerts": self.store.alerts(facts.run_id),
            "prediction": prediction,
            "predictions": predictions,
            "attempts": [
                {
                    "attempt": a.attempt,
                    "resume_step": a.resume_step or 0,
                    "started_time": a.started_time,
                    "samples": a.samples,
                }
                for a in facts.attempts
            ],
            "events": shown[-200:],
            "control": facts.control,
            "goodput": goodput_of(facts),
        }

    def samples(
        self, facts: RunFacts, first: int = 0, last: int = LAST, attempt: int | None = None, most: int = 0
    ) -> tuple[int, bool, Parts]:
        """(samples there are, whether some are left out, the others by attempt); see `monitor.store.reading`.

        most  about so many of them; 0 for all

        Raises Damaged.
        """
        pending = [(of, band_columns(flat)) for of, flat in self.judging.pending_bands(facts.run_id) if flat]
        if most > 0 and first <= 0 and last >= LAST and attempt is None:
            return self.views.whole(facts, pending, most)
        return thinned(find(self.store, facts, pending, first=first, last=last, attempt=attempt), most)

    # /metrics

    def figures(self) -> Iterator[Figures]:
        """The active runs as they are exported."""
        now = self.clock()
        mutes = self.attention.mutes(now)
        for facts in list(self.ingest.runs.values()):
            if facts.imported or (
                facts.ended_received is not None and now - facts.ended_received > SHOWN_AFTER_END_S
            ):
                continue
            if now - max(facts.last_received, min(self.started, now)) > FORGOTTEN_S:
                continue
            last = self.judging.last.get(facts.run_id, {})
            states = self.states(facts, last, now)
            step_time = facts.last_step_received
            mute = mutes.get(facts.run)
            yield Figures(
                facts.run, facts.owner, facts.created_received, healthy=CALM.issuperset(states),
                team=facts.team if facts.team in self.teams and facts.team else "", states=states,
                last_step_time=None if step_time is None else max(step_time, self.started),
                muted=() if mute is None else mute.alerts or (EVERY,),
                fill=functools.partial(self._fill, facts, last),
            )  # fmt: skip

    def _fill(self, facts: RunFacts, last: dict[str, Any], f: Figures) -> None:
        advice = last.get("advice") or {}
        outside = last.get("outside", (0, 0))
        f.phase = facts.phase
        f.law = "predicted" if last.get("predicted") else "own_past" if facts.samples else "none"
        f.action = advice.get("action")
        f.gauges = {
            "run_loss": facts.loss, "run_step": facts.step, "run_predicted_loss": last.get("expected"),
            "run_band_lower": last.get("lower"), "run_band_upper": last.get("upper"),
            "run_loss_gap_sigma": last.get("gap_sigma"), "run_loss_gap_nats": last.get("gap_nats"),
            "run_attempt": facts.attempt, "run_tokens": _plain(facts.tokens),
            "run_tokens_per_second": _plain(facts.tokens_per_s), "run_mfu_ratio": _plain(facts.mfu),
            "run_goodput_ratio": _goodput(facts),
        }  # fmt: skip
        f.final = _quantiles(advice.get("final_loss") or last.get("predicted_final"))
        f.step_seconds = self.step_seconds(facts)
        f.samples, f.nan, f.inf = facts.samples, facts.nan_samples, facts.inf_samples
        f.above, f.below = outside[0], outside[1]
        f.restarts, f.gpu_seconds = facts.restarts, facts.gpu_seconds
        f.checkpoint_time, f.checkpoint_failures = facts.checkpoint_received, facts.checkpoint_failures

    def _gauges(self) -> Iterator[tuple[str, str, float]]:
        yield "store_size_bytes", "The store's files", self.store.size_bytes()
        yield "store_free_bytes", "Room left where the store lies", self.store.free_bytes()
        yield "runs", "Runs known", len(self.ingest.runs)
        yield "store_failing", "1 while the last commit failed", float(self.ingest.failing is not None)
        yield (
            "judge_failing",
            "1 while a judge could not be fed or written",
            float(self.judging.failing is not None),
        )
        yield (
            "judge_lag_seconds",
            "For how long the oldest sample that is not judged has been on disk",
            self.judging.lag_s(),
        )


def goodput_of(facts: RunFacts) -> dict[str, Any]:
    """What became of the run's time: the share that counts, and where the launcher keeps books, GPU seconds and money."""
    return {
        "ratio": _goodput(facts),
        "gpu_seconds": facts.gpu_seconds or None,
        "dollars": facts.gpu_dollars or None,
        "steps_lost": facts.steps_lost,
    }


def _goodput(facts: RunFacts) -> float | None:
    """Share of the GPU time that still counts, by the launcher's books; without them, of the steps of all attempts."""
    spent = sum(facts.gpu_seconds.values())
    if spent > 0:
        return facts.gpu_seconds["useful"] / spent
    trained = sum(
        (a.last_step or 0) - (a.resume_step or 0) for a in facts.attempts if a.last_step is not None
    )
    if trained <= 0 or facts.step is None:
        return None
    kept = 0
    for attempt, first, last in spans(facts.attempts):
        found = facts.attempt_facts(attempt)
        if found is not None and found.last_step is not None:
            kept += max(0, min(last, found.last_step) - max(first, 1) + 1)
    return min(1.0, kept / trained)


def _quantiles(final: Any) -> dict[str, float] | None:
    if not isinstance(final, dict):
        return None
    names = (("0.5", "p50"), ("0.05", "p05"), ("0.95", "p95"))
    found = {q: final.get(name) for q, name in names}
    return {q: float(v) for q, v in found.items() if isinstance(v, (int, float)) and v == v} or None


def _plain(value: float | None) -> float | None:
    """A finite number or None."""
    return value if value is not None and value - value == 0 else None


def _spelled(value: float | None) -> float | str | None:
    if value is None or value - value == 0:
        return value
    return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"


def folder_of(store: str) -> Path:
    """The store's folder as a path, with ~ expanded."""
    return Path(os.path.expanduser(store))
