"""`losscast ls | status | why` and `losscast ray`: where runs stand, and why one is not where it should be."""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.cli.finding import RUN_HELP, on_kubernetes

STATUS = (
    "Say in which phase a run is, its step and newest checkpoint, who holds it, and Ray's word for its job. The run's own "
    "storage decides, so that this works when the cluster is gone."
)
WHY = (
    "Say why a run is where it is. Pending: which resource is missing, how much of it, and who holds it. Failed: the first "
    "error of the first rank that failed, with its log lines. Vanished: who held it. And what to do."
)
LS = (
    "List the runs of a folder of runs, a line each; without FOLDER those in ./runs, and those that this machine handed to "
    "Kubernetes. Exit 1 where one can't be read. With --textfile, write the launcher's metrics of the folder's instead."
)


def register(commands: Any) -> None:
    ls = commands.add_parser("ls", help="runs in a folder of runs, and where each stands", description=LS)
    ls.add_argument(
        "folder", metavar="FOLDER", nargs="?", help="a spec's checkpoints.url (default runs, and Kubernetes)"
    )
    ls.add_argument("--json", action="store_true", help="print them as JSON")
    ls.add_argument(
        "--textfile",
        metavar="FILE.prom",
        help="write the launcher's metrics of these runs for Prometheus' textfile collector, and print nothing",
    )
    ls.set_defaults(func=list_runs)
    for name, func, words, more in (
        ("status", status_of, "where one run stands", STATUS),
        ("why", why, "why a run is pending, failed, or gone", WHY),
    ):
        parser = commands.add_parser(name, help=words, description=more)
        parser.add_argument("run", metavar="RUN", help=RUN_HELP)
        parser.add_argument("--json", action="store_true", help="print it as JSON")
        parser.set_defaults(func=func)
    ray = commands.add_parser(
        "ray",
        help="the local Ray that `cluster: {to: local}` uses",
        description="Put the local Ray up, take it down, or print its dashboard's address. `submit` starts it by itself; jobs "
        "on it end with it. Exit 1 for a status where none runs.",
    )
    ray.add_argument("action", choices=("up", "down", "status"))
    ray.add_argument("--json", action="store_true", help="print {running, dashboard, address} as JSON")
    ray.set_defaults(func=local)


def list_runs(args: argparse.Namespace) -> int:
    """Every run below a folder, by name, and where none was named those on Kubernetes too. A cluster is asked only where a
    run's own storage is silent. One that can't be read is said, and the others go on."""
    from launcher.cli import kuberay
    from launcher.cli.finding import JobLists
    from launcher.errors import Failed, WrongInput
    from launcher.jobs.standing import answer, facts_of, line, phase
    from launcher.storage.remote import refresh, runs_below
    from launcher.storage.runfolder import RunFolder

    place = args.folder or "runs"
    pods, bad = ([], 0) if args.folder or args.textfile else kuberay.listed()
    if place.startswith("az://"):
        folders = runs_below(place)
    elif Path(place).is_dir():
        folders = [
            RunFolder(p.resolve()) for p in sorted(Path(place).iterdir()) if (p / "spec.json").exists()
        ]
    elif pods or bad:
        folders = []
    else:
        raise WrongInput(
            f"{place}: no such folder. Give the checkpoints.url of your specs: losscast ls FOLDER"
        )
    found, everything, jobs = [], [], JobLists()
    for folder in folders:
        try:
            refresh(folder)
            facts = facts_of(folder)
            word = phase(facts)
            if word in ("pending", "vanished"):
                word = phase(facts, jobs.state(facts.submission))
        except (WrongInput, Failed, OSError) as error:
            bad += 1
            print(f"{folder.name}: can't be read: {error}", file=sys.stderr)
            continue
        everything.append((facts, word))
        found.append(answer(facts, word))
    if args.textfile:
        from launcher.jobs.facts import exposition, write_textfile

        write_textfile(Path(args.textfile), exposition(everything))
    elif args.json:
        print(json.dumps({"runs": found + pods}))
    elif found or pods:
        print("\n".join([*(line(said, time.time()) for said in found), *map(kuberay.line, pods)]))
    elif not bad:
        print(f"no runs in {place}", file=sys.stderr)
    return 1 if bad else 0


def status_of(args: argparse.Namespace) -> int:
    """One run, Ray's word for its job included."""
    from launcher.cli import kuberay

    spec = on_kubernetes(args.run)
    if spec is not None:
        return kuberay.status(spec, args)
    from launcher.cli.finding import folder_of, standing_of
    from launcher.errors import Failed
    from launcher.jobs.cluster import Unknown
    from launcher.jobs.standing import answer, line

    facts, word, job = standing_of(folder_of(args.run))
    said = answer(facts, word)
    said["job_state"] = getattr(job, "status", None)
    if isinstance(job, Failed) and not isinstance(job, Unknown):
        print(f"warning: {job}", file=sys.stderr)
    if args.json:
        print(json.dumps(said))
        return 0
    print(line(said, facts.now))
    if said["holder"]:
        print(f"held by {said['holder']}")
    if said["job"] and (said["job_state"] or isinstance(job, Unknown)):
        print(f"job {said['job']}: {said['job_state'] or 'unknown to the cluster'}")
    if word not in ("running", "finished"):
        print(f"next: losscast why {args.run}", file=sys.stderr)
    return 0


def why(args: argparse.Namespace) -> int:
    """A headline, the evidence, what to do."""
    from launcher.cli import kuberay

    spec = on_kubernetes(args.run)
    if spec is not None:
        return kuberay.why(spec, args)
    from launcher.cli.finding import folder_of, reach, standing_of
    from launcher.errors import Failed
    from launcher.jobs.cluster import Cluster, Unknown
    from launcher.jobs.standing import LIVE, line
    from launcher.jobs.standing import answer as plainly
    from launcher.jobs.submit import ENDED
    from launcher.jobs.why import (
        Reason,
        bundles_of,
        checkpoint_bytes,
        failed,
        lacking,
        no_room,
        safe,
        stopped,
        tail,
        vanished,
    )
    from launcher.storage.carried import bring
    from launcher.storage.runlog import TERM_S

    folder = folder_of(args.run)
    bring(folder, logs=True)
    facts, word, job = standing_of(folder)
    state = getattr(job, "status", None)
    name = facts.spec.name
    if word in LIVE and state in ENDED:
        left = max(0.0, TERM_S - facts.holder.age_s)
        reason = Reason(
            f"Ray counts its job as {state}, and its lease lapses in {left:.0f} s",
            (
                f"held by {facts.holder.who()}",
                f"Ray: {job.message.strip().splitlines()[0] if job.message.strip() else state}",
            ),
            (f"losscast why {args.run}   again, then",),
        )
    elif word == "pending":
        submission = facts.submission or {}
        try:
            if isinstance(job, Unknown):
                reason = Reason(
                    f"its cluster knows nothing of job {submission.get('job')}: it may have been restarted since",
                    (f"Ray: {job}",),
                    (f"losscast resume {name}   hands it in again",),
                )
            elif state == "PENDING":
                reason = Reason(f"Ray has not started its job: {job.message}")
            else:
                picture = Cluster(submission["dashboard"], reach(submission["dashboard"])).picture()
                ours = getattr(job, "job_id", None)
                waits = next((w for w in picture.waiting if w.job_id == ours), None)
                reason = lacking(waits.bundles if waits else bundles_of(facts.spec), picture, ours)
        except (Failed, KeyError) as error:
            from launcher.storage.output import job_log

            said = tail(facts.folder, job_log(facts.folder, str(submission.get("job"))), 5)
            advice = (
                f"losscast why {name}   again, when it answers; `losscast resume {name}` if it is gone for good",
            )
            reason = Reason(f"its cluster can't be asked: {error}", tuple(f"| {t}" for t in said), advice)
    elif word == "failed":
        reason = failed(facts, vars(job) if state else None)
    elif word == "vanished":
        reason = vanished(facts, state)
    elif word == "stopped":
        reason = stopped(facts)
    elif word == "starting":
        log = facts.folder.attempt(facts.attempt or 0) / "output" / "rank-0.log"
        lines = tuple(f"| {t}" for t in tail(facts.folder, log, 5))
        reason = Reason("its ranks have their places, and no step is done yet", lines)
    else:
        advice = {"stopped": (f"losscast resume {name}",), "ended": (f"losscast resume {name}",)}.get(
            word, ()
        )
        reason = Reason(line(plainly(facts, word), facts.now).partition(": ")[2], (), advice)
    if word in LIVE or word == "vanished":
        full = no_room(folder, checkpoint_bytes(folder, facts.committed))
        if full is not None:
            reason = replace(reason, evidence=(full[0], *reason.evidence), advice=(full[1], *reason.advice))
    if facts.damaged and word == "failed":
        reason = replace(reason, evidence=(*reason.evidence, safe(facts)))
    if args.json:
        answer = {"run": name, "phase": word, "reason": reason.headline, "evidence": reason.evidence}
        print(json.dumps({**answer, "advice": reason.advice, **reason.facts}, default=str))
        return 0
    print(
        f"{name}: {word}: {reason.headline}"
        if reason.evidence or word in ("pending", "failed", "stopped")
        else f"{name}: {reason.headline}"
    )
    for text in reason.evidence:
        print(f"  {text}")
    for text in reason.advice:
        print(f"next: {text}", file=sys.stderr)
    return 0


def local(args: argparse.Namespace) -> int:
    """Put the local Ray up, take it down, or say where it is."""

    from launcher.cli.finding import local_home
    from launcher.jobs import local_ray

    head = local_ray.running(local_home())
    if args.action == "up" and head is None:
        head = local_ray.running_or_started(local_home())
    if args.action == "down":
        if head is not None:
            local_ray.stop(head)
            head = None
        print("down", file=sys.stderr)
    if args.json:
        here = {"dashboard": head and head.dashboard, "address": head and head.address}
        print(json.dumps({"running": head is not None, **here}))
        return 0 if head or args.action == "down" else 1
    if args.action == "down":
        return 0
    print(head.dashboard if head else "not running", file=sys.stdout if head else sys.stderr)
    return 0 if head else 1
