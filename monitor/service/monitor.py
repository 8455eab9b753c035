"""The monitor as one object: store, writer, judges and tokens put together, and what it says of its runs.

What a run's state is comes from two places: the judge, which knows the loss, and the clock, which knows that a run is
silent. Both are put together here, for the page, the API and /metrics alike. `monitor.service.api` is its HTTP face.
"""

import contextlib
import functools
import itertools
import math
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from monitor.judge import Settings
from monitor.judging.apart import Apart
from monitor.judging.loop import Judging
from monitor.judging.run import band_columns
from monitor.prometheus import alerts
from monitor.service.attention import EVERY, Attention, Said, shown
from monitor.service.exporter import Exporter, Figures, Totals
from monitor.service.figures import detail_of, plain
from monitor.service.goodput import goodput_of
from monitor.service.laws import Laws
from monitor.service.states import CALM, shown_state, states_of
from monitor.service.tokens import Tokens
from monitor.service.views import Parts, Views, thinned
from monitor.store.columns import Damaged
from monitor.store.facts import RunFacts
from monitor.store.ingest import Ingest, Refused
from monitor.store.merging import Merger
from monitor.store.reading import LAST, find
from monitor.store.store import Store

SHOWN_AFTER_END_S = 900.0
MERGE_S = 20.0
"""Small chunks are looked for this often."""
LOOK_S = 3.0
"""What the clock says of each run is compared this often, while a page is open."""
FORGOTTEN_S = 86400.0
"""A run that said nothing for a day leaves /metrics; it was paged for long enough."""
NOTHING: dict[str, Any] = {}


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
        self._looked_s, self._looking = -math.inf, threading.Lock()
        self._held: dict[int, tuple[str, ...]] = {}
        """What held of a run when it was looked at, where it was more than the judge's word."""
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
            if self.keep_s > 0 and now - max(f.ended_received or 0.0, f.last_received) > self.keep_s
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

    def look(self, now: float) -> None:
        """Raise the version of every run of which the clock says something else than before: nothing arrives when a run falls
        silent. Of ten thousand runs nearly all are told at a glance."""
        if abs(now - self._looked_s) < LOOK_S or not self._looking.acquire(blocking=False):
            return
        try:
            self._looked_s = now
            held: dict[int, tuple[str, ...]] = {}
            judged = self.judging.last
            for facts in list(self.ingest.runs.values()):
                if facts.ended_received is None and not facts.imported:
                    states = self.states(facts, judged.get(facts.run_id, NOTHING), now)
                    if len(states) > 1:
                        held[facts.run_id] = states
            before, self._held = self._held, held
            self._changed([id for id in {*before, *held} if before.get(id) != held.get(id)])
        finally:
            self._looking.release()

    # what is said of a run

    def run(self, name: str) -> RunFacts | None:
        """What is known of a run by that name."""
        return self.ingest.runs.get(name)

    def states(self, facts: RunFacts, last: dict[str, Any], now: float) -> tuple[str, ...]:
        """All that holds of a run now, the judge's word first. `last`: the judge's newest verdict."""
        return states_of(facts, last, now, started=self.started, stalled_after_s=self.stalled_after_s)

    def summaries(self, runs: Iterable[RunFacts], now: float) -> Iterator[dict[str, Any]]:
        """The runs in the list. Alerts are the open ones."""
        said = self.attention.said()
        return (self._summary(facts, now, said) for facts in runs)

    def _summary(self, facts: RunFacts, now: float, said: Said) -> dict[str, Any]:
        last = self.judging.last.get(facts.run_id, {})
        states = self.states(facts, last, now)
        return {
            "run": facts.run,
            "team": facts.team,
            "state": shown_state(states),
            "states": states,
            "phase": facts.phase,
            "step": facts.step,
            "tokens": plain(facts.tokens),
            "total_tokens": plain(facts.total_tokens),
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
            "target_loss": plain(facts.target_loss),
            "advice": self._advice(facts, last, said),
            "muted": shown(said.muted(facts.run, now)),
            "trouble": last.get("trouble"),
        }

    def advice(self, facts: RunFacts) -> dict[str, Any] | None:
        """The judge's advice with the time and the money that are left."""
        return self._advice(facts, self.judging.last.get(facts.run_id, {}), self.attention.said())

    def _advice(self, facts: RunFacts, last: dict[str, Any], said: Said) -> dict[str, Any] | None:
        found = last.get("advice")
        if not found or facts.step is None:  # before the first step there is nothing to advise
            return None
        hours = found.get("hours_left") if facts.phase != "ended" else None
        tokens, total = plain(facts.tokens), plain(facts.total_tokens)
        # the usual one: the newest step may have been slow
        rate = last.get("tokens_per_s") or plain(facts.tokens_per_s)
        if tokens is not None and total is not None and rate and rate > 0 and facts.phase != "ended":
            hours = max(0.0, total - tokens) / rate / 3600
        price = plain(facts.price_per_hour)
        seen = said.seen_of(facts.run, str(found.get("action")), self.clock())
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
            **next(self.summaries([facts], now)),
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
        with self.views.alone(facts):
            return thinned(find(self.store, facts, pending, first=first, last=last, attempt=attempt), most)

    # /metrics

    def figures(self) -> Iterator[Figures]:
        """The active runs as they are exported."""
        now = self.clock()
        mutes, started, judged = self.attention.mutes(now), self.started, self.judging.last
        # nobody is forgotten before the monitor has listened for so long itself
        forgotten = now - FORGOTTEN_S if started < now - FORGOTTEN_S else -math.inf
        for facts in list(self.ingest.runs.values()):
            ended = facts.ended_received
            if facts.imported or facts.last_received < forgotten:
                continue
            if ended is not None and now - ended > SHOWN_AFTER_END_S:
                continue
            last = judged.get(facts.run_id, NOTHING)
            states = states_of(facts, last, now, started=started, stalled_after_s=self.stalled_after_s)
            step_time, team = facts.last_step_received, facts.team
            mute = mutes.get(facts.run) if mutes else None
            yield Figures(
                CALM.issuperset(states), facts.created_received, facts.run, facts.owner,
                team if team and team in self.teams else "", states,
                step_time if step_time is None or step_time > started else started,
                () if mute is None else mute.alerts or (EVERY,),
                functools.partial(detail_of, facts, last),
            )  # fmt: skip

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


def _spelled(value: float | None) -> float | str | None:
    if value is None or value - value == 0:
        return value
    return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"


def folder_of(store: str) -> Path:
    """The store's folder as a path, with ~ expanded."""
    return Path(os.path.expanduser(store))
