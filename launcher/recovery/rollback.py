"""Going back by itself when a run diverges: opt-in (`policy.on_divergence: rollback`), at most twice, then it asks.

The monitor judges, this only acts: while it advises to roll back and says since when the loss is wrong, the attempt is
ended, every checkpoint from that step on is made void in the run's log, the run goes on from the newest one before it,
and the batches from the onset to the sample it was called at are left out of the data order for good. Only where a
committed checkpoint lies before the onset: a rollback to the seed would be a new run, and a person's decision.

Steps count optimizer updates.
"""

import getpass
import json
import os
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from launcher.errors import WrongInput
from launcher.runspec.model import Entrypoint, RunSpec
from launcher.storage.runfolder import RunFolder

MOST = 2
"""Rollbacks of one run that nobody asked for."""
POLL_S = float(os.environ.get("LOSSCAST_ADVICE_POLL_S", "5"))
TIMEOUT_S = 5.0
CALLS = frozenset({"LossDiverged", "LossNonFinite"})
"""Alerts that a rollback answers."""
ACTIONS = frozenset({"roll_back", "lower_lr"})
"""Advice under which it acts. With a learning rate that was too high, going back is half of what is advised."""


class RollBack(Exception):
    """The attempt is to end here, and the run to go on from before `onset`."""

    def __init__(self, onset: int, called: int, why: str) -> None:
        super().__init__(why)
        self.onset, self.called, self.why = onset, called, why


@dataclass
class Rollbacks:
    """What was left out of the data order so far: [step, count], oldest first. Kept in the run's log."""

    skips: list[list[int]]
    unasked: int = 0
    """Those that no person asked for."""

    @classmethod
    def read(cls, folder: RunFolder, spec: RunSpec) -> "Rollbacks":
        """From the log, whose rollback entries say what was left out."""
        from launcher.training.saving import run_log

        found = [e for e in run_log(folder).entries() if e.kind == "rollback"]
        skips = [[int(v) for v in e.fields["skip"]] for e in found]
        return cls(skips, sum(not e.fields.get("asked") for e in found))

    def add(self, folder: RunFolder, attempt: int, ask: RollBack) -> None:
        """Make checkpoints from the onset on void, and leave the batches out: one entry of the log, so both or neither. May be
        called again after an error, which leaves open whether the entry is there."""
        from launcher.training.saving import run_log

        log, skip = run_log(folder), [ask.onset, ask.called - ask.onset + 1]
        fields = {"step": ask.onset - 1, "skip": skip, "why": ask.why}
        newest = next(reversed(log.entries()), None)
        if newest is None or (newest.kind, newest.attempt, newest.fields) != (
            "rollback",
            attempt,
            {"run": folder.name, **fields},
        ):
            log.append("rollback", attempt, **fields)
        self.skips.append(skip)
        self.unasked += 1

    def told(self) -> str:
        return f"{self.unasked} of at most {MOST} rollbacks"


def go_back(
    folder: RunFolder, spec: RunSpec, step: int, skip: tuple[int, int] | None
) -> tuple[int, Callable[[], None]]:
    """A rollback that a person asks for: the step it ends at, and what makes it so. Nothing is changed before that is called.

    step  the run goes on from its newest checkpoint of this step or before; newer ones become void
    skip  first and last step whose batches are left out from now on

    Raises WrongInput.
    """
    from launcher.training.saving import run_log

    log = run_log(folder)
    steps = [int(e.fields["step"]) for e in log.commits()]
    target = max((s for s in steps if s <= step), default=None)
    if target is None:
        have = f"the oldest is of step {min(steps)}" if steps else "it has none"
        raise WrongInput(
            f"--back-to {step}: {folder.name} has no committed checkpoint of that step or before; {have}."
        )
    if skip is not None and isinstance(spec.workload, Entrypoint):
        raise WrongInput(f"--skip: {folder.name} picks its own batches, so losscast can leave none out.")
    if skip is not None and not target < skip[0] <= skip[1] <= spec.total_steps:
        raise WrongInput(
            f"--skip {skip[0]}:{skip[1]}: give first and last step, both after step {target} and up to {spec.total_steps}."
        )
    left_out = [target + 1, 0] if skip is None else [skip[0], skip[1] - skip[0] + 1]

    def write() -> None:
        newest = log.newest_attempt()
        assert newest is not None  # it made the checkpoints
        log.append(
            "rollback", newest.attempt, step=target, skip=left_out, why="asked for", asked=getpass.getuser()
        )

    return target, write


def wanted(advice: Any, alerts: Any, *, resumed_at: int, seen: int) -> tuple[int, int, str] | None:
    """Onset, the step it was called at, and why, where the monitor's answers call for a rollback of this attempt.

    advice      of `/v1/runs/{run}/advice`;  alerts of `/v1/runs/{run}/verdicts`
    resumed_at  the step this attempt started from: what lies before it was dealt with
    seen        the newest step of this attempt: an answer about steps it has not made is about an older one
    """
    if not isinstance(advice, dict) or advice.get("action") not in ACTIONS or not isinstance(alerts, list):
        return None
    found = [
        a
        for a in alerts
        if isinstance(a, dict)
        and a.get("alert") in CALLS
        and a.get("resolved_step") is None
        and resumed_at < int(a.get("since_step", 0)) <= int(a.get("step", 0)) <= seen
    ]
    if not found:
        return None
    onset, called = min(int(a["since_step"]) for a in found), max(int(a["step"]) for a in found)
    evidence = advice.get("evidence") or [found[0]["alert"]]
    return onset, called, "; ".join(str(line) for line in evidence)[:300]


class Adviser:
    """Asks the monitor in a thread, so that a monitor that hangs delays nothing."""

    def __init__(self, spec: RunSpec, say: Callable[[str], None]) -> None:
        assert spec.monitor is not None
        self._base = spec.monitor.url.rstrip("/") + "/v1/runs/" + urllib.parse.quote(spec.name)
        self._token = os.environ.get(spec.monitor.token_env, "")
        self._say, self._answer, self._asked = say, (None, None, 0.0), False
        threading.Thread(target=self._run, name="losscast-advice", daemon=True).start()

    @classmethod
    def of(cls, spec: RunSpec, say: Callable[[str], None]) -> "Adviser | None":
        """None unless the spec asks for rollbacks and names a monitor."""
        acts = spec.policy.on_divergence == "rollback" and spec.monitor is not None
        return cls(spec, say) if acts else None

    def _run(self) -> None:
        while True:
            began = time.monotonic()
            try:
                advice = self._get("/advice").get("advice")
                alerts = self._get("/verdicts").get("alerts") if advice else None
                self._answer = (advice, alerts, began)
            except (OSError, ValueError, AttributeError):
                self._answer = (None, None, began)  # no news is no advice
            time.sleep(POLL_S)

    def _get(self, path: str) -> Any:
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        request = urllib.request.Request(self._base + path, headers=headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            return json.loads(answer.read(8 << 20))

    def ask(
        self, began: float, resumed_at: int, seen: int, committed: Callable[[], int], rollbacks: Rollbacks
    ) -> RollBack | None:
        """What to do now. Says once when it would act and may not.

        began      when this attempt began (monotonic): older answers are about another one
        committed  step of the oldest committed checkpoint that counts
        """
        advice, alerts, at = self._answer
        if at <= began:
            return None
        found = wanted(advice, alerts, resumed_at=resumed_at, seen=seen)
        if found is None:
            return None
        onset, called, why = found
        refusal = ""
        if rollbacks.unasked >= MOST:
            refusal = f"it went back {MOST} times already"
        elif not 0 < committed() < onset:
            refusal = f"no committed checkpoint lies before step {onset}"
        if not refusal:
            return RollBack(onset, called, why)
        if not self._asked:
            self._say(f"the monitor advises to roll back ({why}), and {refusal}: a person has to decide")
            self._asked = True
        return None
