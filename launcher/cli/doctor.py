"""`losscast doctor [RUN]`: whether this machine and the places a run needs are fit, and what to do where they are not."""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from launcher.cli.finding import RUN_HELP

SIGN = {"pass": "ok  ", "warn": "warn", "fail": "FAIL", "skip": "skip"}


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="is everything fit to train: versions, Ray, GPUs, storage, monitor",
        description="Check this machine, and with RUN the cluster, storage, data and monitor that it names. Answers within "
        "ten seconds; exit 1 where anything fails. Changes nothing but one scratch key in the run's storage.",
    )
    parser.add_argument(
        "run", metavar="RUN", nargs="?", help="the run whose places are to be looked at: " + RUN_HELP
    )
    parser.add_argument(
        "--prometheus",
        metavar="URL",
        help="default LOSSCAST_PROMETHEUS, or http://127.0.0.1:9090 where one answers",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.set_defaults(func=doctor)


def doctor(args: argparse.Namespace) -> int:
    """Run every check, print every finding. 1 when any failed."""
    from launcher.doctor.checks import examine

    began = time.monotonic()
    found = examine(checks(args.run, args.prometheus))
    states = [f.state for f in found]
    if args.json:
        print(json.dumps({"ok": "fail" not in states, "findings": [f.to_dict() for f in found]}, indent=2))
    else:
        wide = max(len(f.check) for f in found)
        for f in found:
            print(
                f"{SIGN[f.state]}  {f.check:<{wide}}  {f.said}"
                + (f"\n{'':{wide + 6}}  fix: {f.fix}" if f.fix else "")
            )
        print(
            f"{states.count('pass')} fine, {states.count('warn')} doubtful, {states.count('fail')} failed, "
            f"{states.count('skip')} skipped, in {time.monotonic() - began:.1f} s",
            file=sys.stderr,
        )
    sys.stdout.flush()
    return 1 if "fail" in states else 0


def checks(run: str | None, prometheus_url: str | None) -> dict[str, Any]:
    """Every check, ready to be called. Raises WrongInput for a spec that is none."""
    from launcher.cli.finding import local_home, settings, spec_of
    from launcher.data.tokens import cache_folder
    from launcher.doctor import checks as doctor
    from launcher.doctor import data as doctor_data
    from launcher.doctor import gpu as doctor_gpu
    from launcher.doctor import net as doctor_net
    from launcher.jobs import local_ray

    spec = spec_of(run) if run is not None else None
    here = Path.cwd()
    places: dict[str, tuple[Path, float]] = {
        "working files": (Path("/tmp"), 1e9),
        "corpora": (cache_folder(), 1e8),
    }
    listed: dict[str, Any] = {
        "versions": doctor.versions,
        "compiler": doctor.compiler,
        "memory": doctor.memory,
        "shared memory": doctor.shared_memory,
        "gpus": lambda: doctor_gpu.gpus(spec),
        "all-reduce": doctor_gpu.all_reduce,
        "clock": doctor.clock,
        "working directory": lambda: doctor.shadows(here),
        "ray": lambda: doctor_net.ray_findings(spec, local_ray.running(local_home()), settings()),
    }
    if spec is not None:
        url = spec.checkpoints.url
        if "://" not in url:
            from launcher.training.memory import checkpoint_bytes

            need = (checkpoint_bytes(spec) or 0.0) * (spec.checkpoints.keep + 1)
            places["checkpoints"] = (Path(url).expanduser().resolve(), need)
        listed["data"] = lambda: doctor_data.data(spec, cache_folder())
        listed["storage"] = lambda: doctor_net.storage(url)
        if spec.cluster.to == "kuberay":
            listed["kubernetes"] = lambda: doctor_net.kubernetes(spec)
        if spec.monitor is not None:
            at = spec.monitor
            token = os.environ.get(at.token_env, "")
            listed["monitor"] = lambda: doctor_net.monitor(at.url, at.token_env, token)
    listed["disk"] = lambda: doctor.disk(places)
    named = prometheus_url or os.environ.get("LOSSCAST_PROMETHEUS")
    listed["prometheus"] = lambda: doctor_net.prometheus(
        named or "http://127.0.0.1:9090", asked_for=bool(named)
    )
    return listed
