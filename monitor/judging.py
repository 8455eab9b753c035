"""The judges at work: one `Watch` a run, fed what was committed, in the order of its ordinals.

A judge sees exactly what is in the store and nothing else, so a run that is judged again from a persisted state comes
to the same verdicts: after a restart the state is loaded and whatever has a later ordinal is fed to it. State, alerts and
bands of a run go to disk together, with the ordinal up to which they hold.

One thread. It is handed what the writer has just committed; when it falls behind, only ordinals are handed over, and
it reads the samples back from the store. Runs take turns, so that one that sends what it spooled for hours keeps no other's
page waiting; and while it is behind and more comes in, it leaves half of the time to those who take it in.
"""

import contextlib
import json
import math
import queue
import sqlite3
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from typing import Any, cast

from monitor.columns import BAND, MISSING, Columns, Damaged, pack, unpack
from monitor.facts import RunFacts
from monitor.ingest import Item, Refused, Taken
from monitor.judge import Settings
from monitor.replay import Watch
from monitor.schema import spell, unspell
from monitor.store import ChunkRow, EventRow, Judged, Store
from monitor.verdict import Sample, Verdict

PERSIST_S = 15.0
"""A run whose verdict does not change is written this often."""
PERSIST_SAMPLES = 20_000
ADVISE_S = 1.0
HANDED_SAMPLES = 200_000
"""Samples that may wait in memory; beyond, the judge reads them from the store."""
TURN_SAMPLES = 1000
"""Samples of one run that are judged before the next run has its turn."""
BEHIND_SAMPLES = 1000
"""Samples that wait, from which on the judge leaves as much time to the writer as it takes, PAUSE_S and more at once."""
PAUSE_S = 0.005
WRITE_EVERY_S = 0.05
STOP_S = 5.0
"""What is not judged so long after it was told to end is judged by the next process."""
IDLE_S = 600.0
"""A judge that heard nothing for so long is put away."""
DURATIONS = 256
RETRY_S = 5.0
"""A run whose judge could not go on (a read that failed) is tried again so long after, though nothing new comes."""

Row = tuple[int, int, float, float | None, float | None, float | None, float | None, float | None, float | None,
            float | None, float | None]  # fmt: skip


@dataclass(slots=True)
class Run:
    """One run's judge and what it has said since it was last written."""

    run_id: int
    watch: Watch
    cursor: int = 0
    last: dict[str, Any] = field(default_factory=dict)
    context: dict[str, Any] = field(default_factory=dict)
    """What the judge was told beside samples: target_loss, total_tokens, total_steps, prediction_ord, control."""
    attempt: int = -1
    state: str = ""
    heard_s: float = 0.0
    written_s: float = 0.0
    advised_s: float = 0.0
    urgent: bool = False
    bands: "dict[tuple[int, int], array[float]]" = field(default_factory=dict)
    """By (attempt, ordinal): seq, step, expected, lower, upper, gap_sigma, one after the other."""
    opened: list[tuple[Any, ...]] = field(default_factory=list)
    closed: list[tuple[Any, ...]] = field(default_factory=list)
    verdicts: list[tuple[int, int, int, float, str]] = field(default_factory=list)
    pending: int = 0
    dirty: bool = False
    durations: list[float] = field(default_factory=list)
    timed: tuple[int, float] | None = None
    control: "ControlFeed | None" = None
    outside: list[int] = field(default_factory=lambda: [0, 0])
    """Samples above the band, and below it."""


class Judging:
    """Start it with `start`, hand it what was committed with `hand`, end it with `stop`, before the writer ends."""

    def __init__(
        self,
        store: Store,
        write: Callable[[list[Judged]], Future[Taken]],
        runs: dict[str, RunFacts],
        *,
        settings: Settings | None = None,
        clock: Callable[[], float] = time.time,
        changed: Callable[[int], None] = lambda run_id: None,
    ):
        """
        write    commits what the judges say (`Ingest.submit_judged`)
        runs     the runs by name, kept up to date by the writer
        changed  called with a run's id when there is a new verdict of it
        """
        self.store = store
        self.settings = settings or Settings()
        self.runs = runs
        self.last: dict[int, dict[str, Any]] = {}
        """The newest verdict of each run: replaced, never changed in place."""
        self.steps_s: dict[int, list[float]] = {}
        """Seconds a step of each run's latest steps, by the sender's clock."""
        self.failing: str | None = None
        self._write, self._clock, self._changed = write, clock, changed
        self._judges: dict[int, Run] = {}
        self._queue: queue.SimpleQueue[list[Item] | None] = queue.SimpleQueue()
        self._waiting = 0
        self._gate = threading.Lock()
        self._todo: dict[int, deque[Item | None]] = {}
        """What waits of each run, in order; None stands for whatever the store has after its cursor."""
        self._handed_s = self._scanned_s = 0.0
        self._ending_s: float | None = None
        self._unsaid: set[int] = set()
        self._again: dict[int, float] = {}
        """Runs whose judge failed, and when to try them again."""
        self._predictions: dict[str, dict[str, Any]] = {}
        self._thread = threading.Thread(target=self._work, name="losscast-judge", daemon=True)
        cursors = store.lasts()
        for facts in list(runs.values()):
            cursor, last = cursors.get(facts.run_id, (0, {}))
            if last:
                self.last[facts.run_id] = last
            if facts.last_ord > cursor:
                self._todo[facts.run_id] = deque([None])

    def start(self) -> None:
        """Judge what the last process left unjudged, then what comes."""
        self._thread.start()

    def stop(self) -> None:
        """Judge what waits, for STOP_S at most, write everything, end."""
        self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def hand(self, items: list[Item]) -> None:
        """What was committed, in order. Called by the writer; never waits."""
        count = sum(len(item.lines) for item in items if item.lines)
        with self._gate:
            if self._waiting + count > HANDED_SAMPLES:
                for item in items:
                    item.lines = None
                count = 0
            self._waiting += count
        self._handed_s = time.monotonic()
        self._queue.put(items)

    # the judge's thread

    def _work(self) -> None:
        owed_s = 0.0
        while self._ending_s is None or (self._todo and time.monotonic() < self._ending_s):
            self._collect()
            if self._todo:
                began = time.monotonic()
                self._turn(next(iter(self._todo)))
                owed_s += time.monotonic() - began
                if owed_s >= PAUSE_S:
                    if self._waiting > BEHIND_SAMPLES and time.monotonic() - self._handed_s < 0.05:
                        time.sleep(min(owed_s, 0.05))
                    owed_s = 0.0
            now = time.monotonic()
            for run_id, due_s in list(self._again.items()):
                if now >= due_s:
                    del self._again[run_id]
                    self._todo.setdefault(run_id, deque()).appendleft(None)
            if not self._todo or now - self._scanned_s > WRITE_EVERY_S:
                self._scanned_s = now
                for run_id in list(self._unsaid):
                    run = self._judges.get(run_id)
                    if run is None:
                        self._unsaid.discard(run_id)
                    elif now - run.advised_s >= ADVISE_S:
                        self._tell(run)
                self._persist()
        self._persist(every=True)

    def _collect(self) -> None:
        """Sort what was handed over by run. Waits for something when there is nothing to do."""
        wait = not self._todo
        with contextlib.suppress(queue.Empty):
            while True:
                items = self._queue.get(wait, 0.5)
                wait = False
                if items is None:
                    self._ending_s = time.monotonic() + STOP_S
                    return
                for item in items:
                    self._todo.setdefault(item.run_id, deque()).append(item)

    def _turn(self, run_id: int) -> None:
        """Judge some of what waits of a run, then put the run behind the others."""
        waiting, judged = self._todo.pop(run_id), 0
        while waiting and judged < TURN_SAMPLES:
            item = waiting[0]
            if item is None:
                more, count = self._guarded(run_id, None)
                judged += count
                if more:
                    break
            else:
                count = len(item.lines) if item.lines else 0
                self._guarded(run_id, item)
                judged += count
                with self._gate:
                    self._waiting -= count
            waiting.popleft()
        if waiting:
            self._todo[run_id] = waiting
        judge = self._judges.get(run_id)
        if judge is not None:
            self._tell(judge)

    def _guarded(self, run_id: int, item: Item | None) -> tuple[bool, int]:
        """Judge one item: whether more of it is left, and how many samples were read back for it.

        What one run does to its judge must not silence the others.
        """
        try:
            answer = self._judge(run_id, item)
            self._again.pop(run_id, None)
            return answer
        except Exception as error:
            self._judges.pop(run_id, None)
            self._again[run_id] = time.monotonic() + RETRY_S
            self.failing = f"run id {run_id}: {error!r}"
            self.last[run_id] = {**self.last.get(run_id, {}), "trouble": self.failing[:300]}
            return False, 0

    def _judge(self, run_id: int, item: Item | None) -> tuple[bool, int]:
        run = self._judges.get(run_id)
        if item is None:
            if run is None:
                run = self._judges[run_id] = self._load(run_id)
            return self._catch_up(run, None, TURN_SAMPLES)
        if run is None:
            run = self._judges[run_id] = self._load(run_id)
            self._catch_up(run, item.ord)
        if item.ord <= run.cursor:
            return False, 0
        if item.event is not None:
            self._event(run, item.event)
        elif item.lines is not None:
            rows: list[Row] = [
                (
                    s.seq,
                    s.step,
                    s.loss,
                    s.tokens,
                    s.time,
                    s.val_loss,
                    s.lr,
                    s.grad_norm,
                    s.tokens_per_s,
                    s.spread,
                    None,
                )
                for s in item.lines
            ]
            self._samples(run, item.attempt, item.ord, item.received, rows)
        else:
            self._catch_up(run, item.ord)
        run.cursor = max(run.cursor, item.ord)
        return False, 0

    def _watch(self, state: Any, prediction: dict[str, Any] | None, context: dict[str, Any]) -> Watch:
        given = (context.get("target_loss"), context.get("total_tokens"), context.get("total_steps"))
        return cast(Watch, Watch.from_state(self.settings, state, prediction, *given))

    def _load(self, run_id: int) -> Run:
        try:
            found = self.store.judged(run_id)
            if found is not None:
                return self._restored(run_id, *found)
        except (Damaged, ValueError, KeyError, TypeError) as error:
            self.failing = f"run id {run_id} is judged again from its first sample: {error}"
        return Run(run_id, Watch(self.settings), written_s=time.monotonic())

    def _restored(self, run_id: int, cursor: int, blob: bytes) -> Run:
        kept = json.loads(blob)
        context = kept["context"]
        prediction = self._prediction(run_id, context.get("prediction_ord"))
        watch = self._watch(kept["watch"], prediction, context)
        last = {name: value for name, value in self.last.get(run_id, {}).items() if name != "trouble"}
        run = Run(run_id, watch, cursor, last, context, kept["attempt"], kept["state"])
        run.durations = kept.get("durations", [])
        run.outside = kept.get("outside", [0, 0])
        if context.get("control"):
            run.control = ControlFeed(self.store, self.runs, context["control"], kept.get("control_at"))
        run.written_s = time.monotonic()
        return run

    def _prediction(self, run_id: int, ord: int | None) -> dict[str, Any] | None:
        """The prediction that a run_started event brought; runs with the same one share it."""
        if ord is None:
            return None
        for event in self.store.events(run_id, after=ord - 1, last=ord):
            return self._shared(event.fields.get("prediction"))
        return None

    def _shared(self, prediction: Any) -> dict[str, Any] | None:
        if not isinstance(prediction, dict):
            return None
        digest = prediction.get("digest")
        if not isinstance(digest, str) or len(self._predictions) > 1000:
            return prediction
        held = self._predictions.setdefault(digest, prediction)
        return held if held == prediction else prediction

    def _catch_up(self, run: Run, until: int | None, most: float = math.inf) -> tuple[bool, int]:
        """Feed what is in the store after the cursor, up to and with `until`.

        Whether more is there, and how many samples were fed: about `most`, then it is somebody else's turn.
        """
        last, fed = 2**62 if until is None else until, 0
        while True:
            chunks = list(self.store.chunks(run.run_id, after=run.cursor, limit=16))
            horizon = chunks[-1].ord if len(chunks) == 16 else last
            events = self.store.events(run.run_id, after=run.cursor, last=min(horizon, last))
            parts: list[ChunkRow | EventRow] = sorted([*chunks, *events], key=lambda part: part.ord)
            for part in parts:
                if part.ord > last:
                    return False, fed
                if fed >= most:
                    return True, fed
                if isinstance(part, EventRow):
                    self._event(run, part)
                else:
                    fed += part.n
                    self._samples(
                        run, part.attempt, part.ord, part.received, list(rows_of(unpack(part.body)))
                    )
                run.cursor = part.ord
                if run.pending >= PERSIST_SAMPLES:
                    self._tell(run)
                    self._persist_run(run)
            if len(chunks) < 16:
                return False, fed

    # one item

    def _event(self, run: Run, row: EventRow) -> None:
        body = row.fields
        if row.kind == "run_started":
            self._started(run, row, body)
        elif row.kind == "announce" and isinstance(body.get("step"), int):
            run.watch.announce(body["step"], str(body.get("what", ""))[:80])
        run.dirty = True

    def _started(self, run: Run, row: EventRow, body: dict[str, Any]) -> None:
        context = dict(run.context)
        for name in ("target_loss", "total_tokens", "total_steps"):
            value = body.get(name)
            if isinstance(value, (int, float, str)) and not isinstance(value, bool):
                with contextlib.suppress(ValueError):
                    number = unspell(value)
                    if number is not None and math.isfinite(number):
                        context[name] = number
        prediction = self._shared(body.get("prediction"))
        if prediction is not None:
            context["prediction_ord"] = row.ord
        else:
            prediction = run.watch.prediction
        control = body.get("control")
        if isinstance(control, str) and control != context.get("control"):
            context["control"] = control
            run.control = ControlFeed(self.store, self.runs, control, None)
        if context != run.context:
            state = run.watch.state_dict()
            try:
                run.watch = self._watch(state, prediction, context)
            except Exception as error:  # a prediction that can't be read: judge by the run's own past
                context.pop("prediction_ord", None)
                context["prediction_error"] = str(error)[:300]
                run.watch = self._watch(state, None, context)
            run.context = context
        resume = body.get("resume_step")
        if row.attempt > run.attempt >= 0 and isinstance(resume, int):
            run.watch.restarted(resume, row.attempt + 1)
        run.attempt = max(run.attempt, row.attempt)

    def _samples(self, run: Run, attempt: int, ord: int, received: float, rows: list[Row]) -> None:
        watch, feed = run.watch, run.control
        run.attempt = max(run.attempt, attempt)
        band = run.bands.setdefault((attempt, ord), array("d"))
        verdict = None
        for seq, step, loss, tokens, at, val_loss, lr, grad_norm, rate, spread, _ in rows:
            sample = Sample(
                step, loss, tokens, at, val_loss, lr, grad_norm, rate, attempt + 1, spread
            )  # the judge counts attempts from 1
            if feed is not None:
                for other in feed.until(step, tokens):
                    watch.observe_control(other)
            verdict = watch.observe(sample)
            if verdict.step == step:
                band.extend(
                    MISSING if v is None else v
                    for v in (seq, step, verdict.expected, verdict.lower, verdict.upper, verdict.gap_sigma)
                )
                if verdict.upper is not None and verdict.lower is not None:
                    run.outside[0] += loss > verdict.upper
                    run.outside[1] += loss < verdict.lower
            if verdict.opened or verdict.closed or verdict.state != run.state:
                self._changes(run, attempt, ord, received, verdict)
            if at is not None:
                timed, run.timed = run.timed, (step, at)
                if timed is not None and step > timed[0] and 0 < at - timed[1] < 86400:
                    run.durations.append((at - timed[1]) / (step - timed[0]))
        del run.durations[:-DURATIONS]
        run.pending += len(rows)
        run.dirty = True
        if verdict is not None:
            run.last = {**run.last, **_said(verdict), "outside": run.outside[:]}

    def _changes(self, run: Run, attempt: int, ord: int, received: float, verdict: Verdict) -> None:
        for a in verdict.closed:
            run.closed.append((a.resolved_step, received, a.alert))
        for a in verdict.opened:
            if a.alert == "LossSpike":
                run.last = {**run.last, "spike_time": received}
            if a.severity == "critical":
                run.last = {**run.last, "called": {**run.last.get("called", {}), a.alert: received}}
            value = spell(a.value)
            special = value if isinstance(value, str) else None
            number = None if special else value
            run.opened.append(
                (attempt, a.alert, a.severity, a.step, a.since_step, number, a.expected, special, received)
            )
            if a.resolved_step is not None:
                run.closed.append((a.resolved_step, received, a.alert))
        body = _said(verdict)
        body["opened"] = [a.alert for a in verdict.opened]
        body["closed"] = [a.alert for a in verdict.closed]
        run.verdicts.append((attempt, verdict.step, ord, received, json.dumps(body, separators=(",", ":"))))
        run.state = verdict.state
        run.urgent = True

    # what was said

    def _tell(self, run: Run) -> None:
        """Make the newest verdict, its open alerts and the advice known."""
        now = time.monotonic()
        run.heard_s = now
        if run.urgent or now - run.advised_s >= ADVISE_S:
            run.advised_s = now
            self._unsaid.discard(run.run_id)
            advice = None
            with contextlib.suppress(ArithmeticError, ValueError, KeyError, TypeError):
                found = run.watch.advice()
                advice = spell({name: getattr(found, name) for name in found.__dataclass_fields__})
            run.last = {**run.last, "advice": advice}
            if "prediction_error" in run.context:
                run.last["trouble"] = run.context["prediction_error"]
        else:
            self._unsaid.add(run.run_id)
        final = (run.watch.prediction or {}).get("final_loss")
        run.last = {
            **run.last,
            "open": [spell(asdict(a)) for a in run.watch.open_alerts()],
            "predicted_final": final if isinstance(final, dict) else None,
            "predicted": run.watch.line is not None,
        }
        self.last[run.run_id] = run.last
        self.steps_s[run.run_id] = run.durations[:]
        self._changed(run.run_id)

    def _persist(self, every: bool = False) -> None:
        """Write what is due, many runs in one commit; what could not be written is kept and tried again."""
        now = time.monotonic()
        due = [
            run
            for run in list(self._judges.values())
            if run.dirty
            and (every or run.urgent or now - run.written_s >= PERSIST_S or run.pending >= PERSIST_SAMPLES)
        ]
        for start in range(0, len(due), 500):
            self._commit(due[start : start + 500])
        if len(self._judges) > 64:
            for run_id in [
                k for k, run in list(self._judges.items()) if not run.dirty and now - run.heard_s > IDLE_S
            ]:
                del self._judges[run_id]
                self.steps_s.pop(run_id, None)

    def _persist_run(self, run: Run) -> None:
        self._commit([run])

    def _commit(self, runs: list[Run]) -> None:
        try:
            self._write([_judged(run) for run in runs]).result()
        except (Refused, sqlite3.Error, OSError) as error:
            self.failing = str(error)
            now = time.monotonic()
            for run in runs:
                run.written_s, run.urgent = now - PERSIST_S + 2.0, False
            return
        self.failing = None
        now = time.monotonic()
        for run in runs:
            run.bands, run.opened, run.closed, run.verdicts, run.pending = {}, [], [], [], 0
            run.dirty = run.urgent = False
            run.written_s = now

    def forget(self, run_ids: list[int]) -> None:
        """These runs are no more."""
        for run_id in run_ids:
            self._judges.pop(run_id, None)
            self._again.pop(run_id, None)
            self.last.pop(run_id, None)
            self.steps_s.pop(run_id, None)

    def pending_bands(self, run_id: int) -> "dict[tuple[int, int], array[float]]":
        """What was expected of samples whose bands are not in the store yet. Any thread."""
        run = self._judges.get(run_id)
        return {} if run is None else {key: flat[:] for key, flat in dict(run.bands).items()}


def _said(v: Verdict) -> dict[str, Any]:
    """A verdict as plain data, without the alerts that changed."""
    out: dict[str, Any] = {
        "step": v.step, "state": v.state, "source": v.source, "observed": v.observed, "expected": v.expected,
        "lower": v.lower, "upper": v.upper, "gap_nats": v.gap_nats, "gap_sigma": v.gap_sigma,
        "since_step": v.since_step, "causes": [{"name": c.name, "evidence": c.evidence} for c in v.causes],
    }  # fmt: skip
    total = v.observed + (v.expected or 0.0) + (v.lower or 0.0) + (v.upper or 0.0) + (v.gap_sigma or 0.0)
    return out if total - total == 0 else spell(out)


def _judged(run: Run) -> Judged:
    state = {
        "watch": run.watch.state_dict(), "context": run.context, "attempt": run.attempt, "state": run.state,
        "durations": [round(d, 6) for d in run.durations], "outside": run.outside,
        "control_at": None if run.control is None else run.control.at,
    }  # fmt: skip
    return Judged(
        run.run_id, run.cursor, json.dumps(spell(state), separators=(",", ":")).encode(),
        json.dumps(run.last, separators=(",", ":")),
        [(attempt, ord, 0, pack(band_columns(flat), BAND)) for (attempt, ord), flat in run.bands.items() if flat],
        run.opened, run.closed, run.verdicts,
    )  # fmt: skip


def band_columns(flat: "array[float]") -> Columns:
    """Columns of BAND from its rows laid end to end."""
    import numpy as np

    whole = len(flat) // len(BAND) * len(BAND)  # a reader may come while a row is being added
    table = np.array(flat[:whole], dtype=np.float64).reshape(-1, len(BAND))
    return Columns(len(table), {name: table[:, i] for i, name in enumerate(BAND)})


def rows_of(columns: Columns) -> Iterator[Row]:
    """The samples of a chunk as the judge takes them, missing values as None."""
    from monitor.columns import missing

    def column(name: str) -> list[Any]:
        found = columns.of.get(name)
        if found is None:
            return [None] * columns.n
        values = found.tolist()
        absent = missing(found)
        if absent.any():
            return [None if gone else v for v, gone in zip(values, absent.tolist(), strict=True)]
        return values

    seqs, steps = columns.get("seq").astype("int64").tolist(), columns.get("step").astype("int64").tolist()
    rest = [
        column(n) for n in ("loss", "tokens", "time", "val_loss", "lr", "grad_norm", "tokens_per_s", "spread")
    ]
    none = [None] * columns.n
    yield from zip(seqs, steps, *rest, none, strict=True)


class ControlFeed:
    """The samples of another run on the same data order, handed out in step order as far as ours has come."""

    def __init__(self, store: Store, runs: dict[str, RunFacts], name: str, at: list[int] | None):
        self.at = list(at) if at else [0, -1]
        """Ordinal of the chunk in hand, and the last step handed out."""
        self._store, self._runs, self._name = store, runs, name
        self._held: list[Sample] = []
        self._next_ord = max(self.at[0] - 1, 0)

    def until(self, step: int, tokens: float | None) -> Iterator[Sample]:
        """Samples up to our step, or up to our tokens where both carry them."""
        while True:
            if not self._held and not self._more():
                return
            other = self._held[0]
            by_tokens = tokens is not None and other.tokens is not None
            if (other.tokens > tokens) if by_tokens else (other.step > step):  # type: ignore[operator]
                return
            del self._held[0]
            self.at[1] = other.step
            yield other

    def _more(self) -> bool:
        facts = self._runs.get(self._name)
        if facts is None or facts.last_ord <= self._next_ord:
            return False
        try:
            chunks = list(self._store.chunks(facts.run_id, after=self._next_ord, limit=1))
        except Damaged:
            return False
        if not chunks:
            self._next_ord = facts.last_ord
            return False
        chunk = chunks[0]
        self._next_ord = self.at[0] = chunk.ord
        rows = sorted(rows_of(unpack(chunk.body)), key=lambda row: row[1])
        self._held = [
            Sample(row[1], row[2], tokens=row[3], time=row[4]) for row in rows if row[1] > self.at[1]
        ]
        return bool(self._held) or self._more()
