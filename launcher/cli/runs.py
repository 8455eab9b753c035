"""`losscast ls | status | logs | stop` and `losscast ray`: look after runs that were submitted.

A run is named by its run.yaml, or by its folder.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any


def register(commands: Any) -> None:
    ls = commands.add_parser("ls", help="runs in a folder of runs, and where each stands")
    ls.add_argument(
        "folder", nargs="?", default="runs", help="a spec's checkpoints.url (default %(default)s)"
    )
    ls.add_argument("--json", action="store_true")
    ls.set_defaults(func=list_runs)
    for name, func, words in (
        ("status", status_of, "where one run stands"),
        ("logs", logs_of, "what a run's job has printed"),
        ("stop", stop_run, "commit a checkpoint and end at the next step"),
    ):
        parser = commands.add_parser(name, help=words)
        parser.add_argument("run", metavar="RUN", help="run.yaml, or the run's folder")
        if name == "status":
            parser.add_argument("--json", action="store_true")
        if name == "logs":
            parser.add_argument("--follow", "-f", action="store_true", help="go on until the job ends")
        if name == "stop":
            parser.add_argument(
                "--now", action="store_true", help="end the job at once, without a checkpoint"
            )
        parser.set_defaults(func=func)
    ray = commands.add_parser("ray", help="the local Ray that `cluster: {to: local}` uses")
    ray.add_argument("action", choices=("up", "down", "status"))
    ray.set_defaults(func=local)


def folder_of(run: str) -> Any:
    """The run's folder, from a run.yaml or a folder. Raises WrongInput where there is none."""
    from launcher.errors import WrongInput
    from launcher.runfolder import RunFolder
    from launcher.specfile import read_spec

    path = Path(run)
    if path.is_dir():
        folder = RunFolder(path.resolve())
    else:
        spec = read_spec(run)
        folder = RunFolder.of(spec.checkpoints.url, spec.name)
    if not folder.spec.exists():
        raise WrongInput(f"{folder.path}: no run was submitted from here. `losscast submit {run}` does that.")
    return folder


def standing(folder: Any) -> dict[str, Any]:
    """What the run's own folder says of it; nothing is asked of a cluster."""
    from launcher.runfolder import last_step, read_json
    from launcher.spec import RunSpec

    spec = RunSpec.from_dict(read_json(folder.spec))
    attempts, result, prediction = folder.attempts(), read_json(folder.result), read_json(folder.prediction)
    finished = result is not None and result.get("digest") == spec.digest
    curve = folder.curve(attempts[-1]) if attempts else None
    return {
        "run": spec.name,
        "folder": str(folder.path),
        "finished": finished,
        "step": last_step(folder, attempts[-1]) if attempts else 0,
        "total_steps": spec.total_steps,
        "attempt": attempts[-1] if attempts else None,
        "last_step_time": curve.stat().st_mtime if curve is not None and curve.exists() else None,
        "loss": result["loss"] if finished and result else None,
        "predicted": prediction["final_loss"] if prediction else None,
    }


def _words(s: dict[str, Any]) -> str:
    state = "finished" if s["finished"] else f"step {s['step']} of {s['total_steps']}"
    ago = (
        ""
        if s["finished"] or s["last_step_time"] is None
        else f", last step {time.time() - s['last_step_time']:.0f} s ago"
    )
    loss = f", loss {s['loss']:.4f}" if s["loss"] is not None else ""
    q = s["predicted"]
    band = f", predicted {q['p50']:.4f} ({q['p05']:.4f} to {q['p95']:.4f})" if q else ""
    return f"{s['run']}: {state}{ago}{loss}{band}"


def list_runs(args: argparse.Namespace) -> int:
    """Every run below a folder, by name."""
    from launcher.errors import WrongInput
    from launcher.runfolder import RunFolder

    root = Path(args.folder)
    if not root.is_dir():
        raise WrongInput(
            f"{args.folder}: no such folder. Give the checkpoints.url of your specs: losscast ls FOLDER"
        )
    found = [standing(RunFolder(p.resolve())) for p in sorted(root.iterdir()) if (p / "spec.json").exists()]
    if args.json:
        print(json.dumps({"runs": found}))
    else:
        print(
            "\n".join(map(_words, found)) if found else f"no runs in {root}",
            file=sys.stdout if found else sys.stderr,
        )
    return 0


def status_of(args: argparse.Namespace) -> int:
    from launcher.errors import Failed
    from launcher.submit import read_submission, status

    folder = folder_of(args.run)
    found = standing(folder)
    job = read_submission(folder)
    found["job"] = None if job is None else job.job
    try:
        found["job_state"] = None if job is None else status(job, _reach(job))
    except Failed as error:
        found["job_state"] = None
        print(f"warning: {error}", file=sys.stderr)
    if args.json:
        print(json.dumps(found))
    else:
        print(_words(found) + (f"; job {found['job']} {found['job_state'] or 'unknown'}" if job else ""))
    return 0


def _reach(job: Any) -> dict[str, str]:
    """RAY_* settings for the cluster of a job: the local one's token, or the user's own environment."""
    import os

    from launcher import local_ray
    from launcher.cli.submit import local_home

    head = local_ray.running(local_home())
    if head is not None and head.dashboard == job.dashboard:
        return head.environment()
    return {k: v for k, v in os.environ.items() if k.startswith("RAY_AUTH_")} or {"RAY_AUTH_MODE": "disabled"}


def _job_of(run: str) -> Any:
    from launcher.errors import WrongInput
    from launcher.submit import read_submission

    job = read_submission(folder_of(run))
    if job is None:
        raise WrongInput(
            f"{run}: trained without Ray, so no job has printed anything. Its curve lies in attempts/<n>/curve.csv."
        )
    return job


def logs_of(args: argparse.Namespace) -> int:
    from launcher.submit import logs

    job = _job_of(args.run)
    if args.follow:
        return follow(job, _reach(job))
    print(logs(job, _reach(job)), end="")
    return 0


def follow(job: Any, ray_env: dict[str, str]) -> int:
    """Print what the job prints until it ends. 0 when it succeeded."""
    from launcher.submit import ENDED, logs, status

    printed = 0
    while True:
        state = status(job, ray_env)
        text = logs(job, ray_env)
        print(text[printed:], end="", flush=True)
        printed = len(text)
        if state in ENDED:
            print(f"{job.job}: {state}", file=sys.stderr)
            return 0 if state == "SUCCEEDED" else 1
        time.sleep(1.0)


def stop_run(args: argparse.Namespace) -> int:
    from launcher.submit import ask_to_stop, end_job

    if args.now:
        job = _job_of(args.run)
        end_job(job, _reach(job))
    else:
        ask_to_stop(folder_of(args.run))
        print("asked; the run commits a checkpoint and ends at its next step", file=sys.stderr)
    return 0


def local(args: argparse.Namespace) -> int:
    """Put the local Ray up, take it down, or say where it is."""
    import os

    from launcher import local_ray
    from launcher.cli.submit import local_home

    head = local_ray.running(local_home())
    if args.action == "up" and head is None:
        head = local_ray.start(local_home(), cpus=max(2, os.cpu_count() or 2))
    if args.action == "down":
        if head is not None:
            local_ray.stop(head)
        print("down", file=sys.stderr)
        return 0
    print(head.dashboard if head else "not running", file=sys.stdout if head else sys.stderr)
    return 0 if head else 1
