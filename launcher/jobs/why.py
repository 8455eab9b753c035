"""Why a run is not where its owner wants it: what a pending one lacks, what broke a failed one, who held a vanished one.

The first half is pure: a picture of the cluster and what the run needs in, words out. The second reads the run's own
storage. An answer is a headline, lines of evidence, and what to do next.
"""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from launcher.jobs.cluster import Node, Picture
from launcher.jobs.standing import Facts, damage
from launcher.runspec.model import RunSpec
from launcher.storage.output import job_log
from launcher.storage.runfolder import RunFolder, read_json
from launcher.storage.runlog import Entry

TAIL_LINES = 20
TAIL_BYTES = 64_000
TRAINS_S = 10.0
"""A step as young as this: ranks still train."""


@dataclass(frozen=True)
class Reason:
    """The answer."""

    headline: str
    evidence: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    """The same for a program: keys depend on the phase."""


def bundles_of(spec: RunSpec) -> list[dict[str, float]]:
    """What every rank asks for."""
    each = {"CPU": 1.0, **({"GPU": 1.0} if spec.cluster.gpus_per_node else {})}
    return [each] * spec.ranks


def unplaced(
    bundles: Sequence[Mapping[str, float]], room: Sequence[Mapping[str, float]]
) -> list[Mapping[str, float]]:
    """The bundles that find no place when each must lie on one machine: the largest first, wherever it fits.

    room   free resources, one mapping a machine
    """
    left = [dict(r) for r in room]
    over = []
    for bundle in sorted(bundles, key=lambda b: -sum(b.values())):
        for node in left:
            if all(node.get(k, 0.0) >= need for k, need in bundle.items()):
                for key, need in bundle.items():
                    node[key] -= need
                break
        else:
            over.append(bundle)
    return over


def summed(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for key, amount in part.items():
            total[key] = total.get(key, 0.0) + amount
    return total


def amounts(resources: Mapping[str, float]) -> str:
    """{'CPU': 2.0, 'GPU': 1.0} as `2 CPU and 1 GPU`."""
    return " and ".join(f"{n:g} {key}" for key, n in resources.items() if n) or "nothing"


def lacking(bundles: Sequence[Mapping[str, float]], picture: Picture, ours: str | None) -> Reason:
    """Which resource a run waits for.

    bundles   one a rank: Ray's resource names and amounts
    ours      the run's own job_id, left out of who holds what
    """
    if ours is not None and picture.placed.get(ours) and not any(w.job_id == ours for w in picture.waiting):
        held = {"missing": {}, "ever_fits": True, "held": dict(picture.placed[ours])}
        words = (
            f"its ranks have their places ({amounts(picture.placed[ours])}), and are loading what they need"
        )
        return Reason(words, (), (), held)
    need = summed(bundles)
    nodes, kinds = picture.nodes, {json.dumps(b, sort_keys=True): b for b in bundles}
    total = {key: sum(n.total.get(key, 0.0) for n in nodes) for key in need}
    free = {key: sum(n.free(key) for n in nodes) for key in need}
    lines = [f"needs {len(bundles)} x ({amounts(b)}), all at once" for b in kinds.values()][:4]
    lines += [_node_line(n, need) for n in nodes[:16]] or ["the cluster has no node that is alive"]
    never = unplaced(bundles, [n.total for n in nodes])
    now = unplaced(bundles, [{k: n.free(k) for k in need} for n in nodes])
    holders = _holders(picture, ours, need)
    if holders:
        lines += [f"held: {text}" for text in holders[:8]]
    if picture.autoscaler:
        lines.append(f"autoscaler: {picture.autoscaler}")
    short = {k: need[k] - total[k] for k in need if need[k] > total[k]}
    busy = {k: need[k] - free[k] for k in need if need[k] > free[k]}
    facts: dict[str, Any] = {
        "needs": need,
        "total": total,
        "free": free,
        "held_by": holders,
        "autoscaler": picture.autoscaler,
    }
    if never:
        places = len(bundles) - len(never)
        missing = short or summed(never)
        spread = "" if short else ", though not together on one machine as every rank needs it"
        headline = f"{amounts(missing)} missing: the whole cluster has {amounts(total)}{spread}, place for {places} of {len(bundles)} ranks"
        waits = "Wait for its new nodes, or a" if picture.autoscaler else "A"
        advice = (
            f"{waits}dd nodes, or ask for {max(1, places)} rank{'s' if places > 1 else ''} or fewer (parallel).",
        )
        return Reason(headline, tuple(lines), advice, {**facts, "missing": missing, "ever_fits": False})
    if now:
        missing = busy or summed(now)
        headline = f"{amounts(missing)} busy: the cluster has {amounts(total)}, of which {amounts(free)} free"
        return Reason(
            headline,
            tuple(lines),
            ("It starts by itself when what is held is given back.",),
            {**facts, "missing": missing, "ever_fits": True},
        )
    return Reason(
        "every resource is there: Ray is placing it now",
        tuple(lines),
        (),
        {**facts, "missing": {}, "ever_fits": True},
    )


def _node_line(node: Node, need: Mapping[str, float]) -> str:
    parts = ", ".join(f"{node.free(k):g} of {node.total.get(k, 0.0):g} {k} free" for k in need)
    return f"node {node.name}: {parts}"


def _holders(picture: Picture, ours: str | None, need: Mapping[str, float]) -> list[str]:
    """Who holds what the run needs: by run where it is one of ours, else by Ray's job."""
    jobs = {j.job_id: j for j in picture.jobs}
    held = []
    for job_id, resources in picture.placed.items():
        wanted = {k: v for k, v in resources.items() if k in need and v}
        if job_id == ours or not wanted:
            continue
        job = jobs.get(job_id)
        name = (
            f"run {job.run} (job {job.submission})"
            if job and job.run
            else f"Ray job {job.submission if job else job_id}"
        )
        held.append((sum(wanted.values()), f"{amounts(wanted)} by {name}"))
    return [text for _, text in sorted(held, key=lambda h: -h[0])]


# what the run's own storage says


def tail(folder: RunFolder, path: Any, lines: int = TAIL_LINES) -> list[str]:
    """The last lines of a log of the run; none where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    return text.splitlines()[-lines:]


def attempts_of(facts: Facts) -> list[int]:
    """Attempts of the newest submission that left anything, oldest first."""
    job = (facts.submission or {}).get("job")
    taken = [
        e.attempt
        for e in facts.entries
        if e.kind == "attempt" and (job is None or e.fields.get("submission") == job)
    ]
    return [a for a in taken if facts.folder.attempt(a).is_dir()]


def first_failure(folder: RunFolder, attempt: int) -> dict[str, Any] | None:
    """What broke an attempt: rank, message, time, trace, cause. None where nothing is written down.

    A rank that died takes its neighbours' collectives with it, and they complain of it: the driver's word for a death
    goes first, then the exception that was earliest.
    """
    seen = read_json(folder.attempt(attempt) / "failure.json")
    errors = [
        e for p in (folder.attempt(attempt) / "output").glob("rank-*.error.json") if (e := read_json(p))
    ]
    errors.sort(key=lambda e: e.get("time", 0.0))
    if seen is not None and (seen.get("cause") != "raised" or not errors):
        return {"attempt": attempt, **seen}
    if not errors:
        return None
    first = errors[0]
    message = f"{first.get('type')}: {first.get('message')}"
    return {"cause": "raised", "step": (seen or {}).get("step"), **first, "message": message}


def failed(facts: Facts, job: Mapping[str, Any] | None) -> Reason:
    """The first error of the first rank that failed, with its log lines.

    job   what Ray says of the job: status and message; None where it was not asked or is away
    """
    tried = attempts_of(facts)
    broke = [f for a in tried if (f := first_failure(facts.folder, a))]
    name = facts.spec.name
    # one whose newest attempt did not fail had gone on from whatever failed before, and ended by something else
    failures = story(broke) if facts.end is not None or (broke and broke[-1]["attempt"] == tried[-1]) else []
    if (facts.end or {}).get("type") == CLUSTER_LOST:
        return Reason(str((facts.end or {}).get("message")), (kept(facts),), (f"losscast resume {name}",))
    if failures:
        first, last = failures[0], failures[-1]
        where = (
            f" at step {first['step']}"
            if first.get("step")
            else " before its first step"
            if first.get("step") == 0
            else ""
        )
        if first.get("type") == "WrongInput":
            text = str(first.get("message")).removeprefix("WrongInput: ")
            return Reason(text, (), (f"mend it, then: losscast submit {name}",), {"first_failure": first})
        who = f"rank {first['rank']}" if first.get("rank") is not None else "the group"
        message = (str(first.get("message") or "").splitlines() or ["no message"])[0]
        headline = f"{who} of attempt {first['attempt']} {_verb(first)}{where}: {message}"
        log = facts.folder.attempt(first["attempt"]) / "output" / f"rank-{first.get('rank')}.log"
        lines = tail(facts.folder, log)
        evidence = [f"| {text}" for text in lines] or [f"| {t}" for t in first.get("trace", ())][-TAIL_LINES:]
        if len(failures) > 1:
            again = (str(last.get("message") or "").splitlines() or [""])[0]
            same = "the same each time" if again == message else f"last: {again}"
            evidence.append(f"tried {len(failures)} times; {same}")
        if len(broke) > len(failures):
            evidence.append(f"{len(broke) - len(failures)} failures before it had been gone on from")
        advice = (
            f"losscast logs {name} --attempt {first['attempt']} --rank {first.get('rank') or 0}",
            f"losscast resume {name}   once it is mended",
        )
        return Reason(headline, tuple(evidence), advice, {"first_failure": first, "attempts": len(tried)})
    said = tail(facts.folder, job_log(facts.folder, str((facts.submission or {}).get("job"))))
    own = [text for text in said if text.startswith("losscast: ")]
    words = str((job or {}).get("message") or "")
    first, _, rest = words.strip().partition("\n")
    if not said:  # it ended before our own code ran: Ray has the end of what it printed
        said = rest.strip().splitlines()[-TAIL_LINES:]
        first = first.partition(", last available logs")[0] + (f": {said[-1].strip()}" if said else "")
    if facts.end is None and facts.taken is not None:  # its last line is of something else
        own, first = [], f"its driver was ended without a word. {_signalled(first)}"
        again = f"losscast resume {name}"
        return Reason(first, (kept(facts), *(f"| {text}" for text in said)), (again,), {"ray": words})
    headline = own[-1].removeprefix("losscast: ") if own else first or "it left no word of why"
    evidence = [f"| {text}" for text in said]
    if own and first:
        evidence.append(f"Ray: {first}")
    if facts.end and facts.end.get("status") == 2:
        advice = (f"mend the spec, then: losscast submit {name}",)
    else:
        advice = (f"losscast logs {name}", f"losscast resume {name}   once it is mended")
    return Reason(headline, tuple(evidence), advice, {"first_failure": None, "ray": words})


CLUSTER_LOST = "ClusterLost"
"""The type of a driver's end that its cluster was to blame for (`launcher.recovery.lifeline`)."""


def story(failures: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The failures, oldest first, that belong to the last one: since a step was gained. Those before it the run had gone on
    from, and they explain nothing."""
    told, best = list[dict[str, Any]](), -1
    for failure in failures:
        reached = int(failure.get("step") or 0)
        if reached > best:
            told, best = [], reached
        told.append(failure)
    return told


def kept(facts: Facts) -> str:
    """What of the run is safe, and what will be trained again."""
    return f"{safe(facts)}; the last step seen is {facts.step} of {facts.spec.total_steps}"


def safe(facts: Facts) -> str:
    """The checkpoint that a resume goes on from, as far as is known, and what is wrong with a newer one."""
    at = int(facts.committed.fields.get("step", 0)) if facts.committed else 0
    what = f"the checkpoint of step {at} is committed" if at else "no checkpoint is committed"
    if not facts.damaged:
        return what
    whole = what if at else "no other is committed"
    return f"{whole}; {damage(facts.unfit)}"


def no_room(folder: RunFolder, needs_bytes: int) -> tuple[str, str] | None:
    """What a disk without room for another checkpoint does to a run in a folder, and what to do; None where there is room.

    needs_bytes   of the newest checkpoint
    """
    if folder.url is not None:
        return None
    try:
        free = shutil.disk_usage(folder.path).free
    except OSError:
        return None
    if free > max(needs_bytes, 1 << 16):
        return None
    room = f"the disk of {folder.path} has {free / 1e6:.1f} MB free"
    if needs_bytes:
        room += f", and a checkpoint takes {needs_bytes / 1e6:.1f}"
    return (
        f"{room}: no checkpoint can be written, and losses and output come late or not at all",
        "make room there: the run saves by itself when its next checkpoint is due",
    )


def checkpoint_bytes(folder: RunFolder, entry: Entry | None) -> int:
    """Of a committed checkpoint in a folder, 0 where none is known."""
    if entry is None or folder.url is not None:
        return 0
    place = folder.path / str(entry.fields.get("manifest")).removesuffix(".manifest.json")
    try:
        return sum(p.stat().st_size for p in place.rglob("*"))
    except OSError:
        return 0


def _signalled(words: str) -> str:
    """Ray's words, and what an exit code of a killed process means."""
    words = words.partition(", last available logs")[0]
    if "exit code 137" in words or "SIGKILL" in words:
        return f"{words}: SIGKILL, as a machine that is out of memory sends it"
    return f"{words}: SIGTERM" if "exit code 143" in words else words


def _verb(failure: Mapping[str, Any]) -> str:
    return {"raised": "failed", "killed": "was killed", "hung": "hung", "host_lost": "lost its host"}.get(
        str(failure.get("cause")), f"failed ({failure.get('cause')})"
    )


def stopped(facts: Facts) -> Reason:
    """What a stop kept, and what it cost."""
    commit, name = facts.committed, facts.spec.name
    at = int(commit.fields.get("step", 0)) if commit else 0
    what = safe(facts)
    lost = max(0, facts.step - at)
    cost = f"; {lost} steps after it will be trained again" if lost else ""
    by = "ended at once by a person" if (facts.end or {}).get("by") else "asked to stop"
    return Reason(
        f"{by} at step {facts.step} of {facts.spec.total_steps}; {what}{cost}",
        (),
        (f"losscast resume {name}",),
    )


def vanished(facts: Facts, job_state: str | None) -> Reason:
    """Who held a run that nobody holds any more, and since when."""
    holder, name = facts.holder, facts.spec.name
    ray = job_state or "does not answer, or does not know the job"
    if facts.taken is None or holder.attempt is None:
        since = float((facts.submission or {}).get("time", facts.now))
        headline = f"handed in {ago(facts.now - since)} ago, never begun, and no cluster knows of it"
        lines = (f"Ray: {ray}",)
        return Reason(
            headline,
            lines,
            (f"losscast submit {name}   hands it in again",),
            {"since": since, "holder": None},
        )
    since = facts.now - holder.age_s
    by = holder.attempt.fields
    headline = (
        f"nobody has renewed its lease for {ago(holder.age_s)}: attempt {holder.attempt.attempt} was held by "
        f"{by.get('user')}@{by.get('host')} (pid {by.get('pid')}, submission {by.get('submission')}), last heard of {clock(since)}"
    )
    lines = [kept(facts), f"Ray: {ray}"]
    advice = (
        f"losscast resume {name}   goes on from there",
        f"losscast end {name}   closes it, and tells the monitor so",
    )
    if job_state in ("PENDING", "RUNNING"):
        trains = facts.last_step_time is not None and facts.now - facts.last_step_time < TRAINS_S
        if trains:
            lines.append("its ranks still make steps: it is its driver alone that is silent")
        else:
            lines.append("the job's processes may hang, or their machine may have lost the storage")
        advice = (
            "wait: when the driver runs again and has its storage, it takes the run again by itself",
            f"losscast stop --now {name}   ends the job; `losscast resume {name}` then goes on from there",
        )
    lines += [f"| {t}" for t in tail(facts.folder, job_log(facts.folder, str(by.get("submission"))), 5)]
    facts_out = {
        "since": since,
        "holder": {k: by.get(k) for k in ("user", "host", "pid", "submission")},
        "attempt": holder.attempt.attempt,
    }
    return Reason(headline, tuple(lines), advice, facts_out)


def ago(seconds: float) -> str:
    """A span in the unit that suits it."""
    for unit, one in (("days", 172_800.0), ("h", 7200.0), ("min", 120.0)):
        if seconds >= one:
            return f"{seconds / (one / 2):.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def clock(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at))
