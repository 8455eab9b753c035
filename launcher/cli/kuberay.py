"""The commands on a run whose `cluster.to` is kuberay: what `submit`, `status`, `why`, `logs`, `stop` and `resume` do then.

The job's standing is the cluster's word; step, loss and checkpoints are the run's own storage's, where that can be reached
from here (az:// with your own login; a volume of the cluster can't).
"""

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

from launcher.errors import one_line


def may_submit_there(spec: Any) -> None:
    """Refuse what can't run, and a run that its storage says is held, finished, or another one. A storage that can't be
    reached from here is said and left to the job, which looks again."""
    from launcher.errors import Held, WrongInput
    from launcher.jobs.submit import may_submit
    from launcher.runspec.doubts import refused

    problems = refused(spec)
    if problems:
        raise WrongInput("\n".join(f"{', '.join(p.keys)}: {p.message}" for p in problems))
    if in_reach(spec):
        try:
            may_submit(spec)
        except (Held, WrongInput):
            raise
        except Exception as error:  # whatever the storage's library raises
            _say(f"warning: {spec.checkpoints.url} can't be read from here: {one_line(error, 200)}")


def in_reach(spec: Any) -> bool:
    """True where the run's own storage may be asked from here: az://, or a shared disk that this machine has mounted too."""
    from launcher.storage.runfolder import RunFolder

    url = spec.checkpoints.url
    return url.startswith("az://") or RunFolder.of(url, spec.name).spec.is_file()


def storage(spec: Any, what: str) -> Any:
    """The folder of a run of whose storage something is wanted. Raises WrongInput where it is out of reach."""
    from launcher.errors import WrongInput
    from launcher.storage.remote import refresh
    from launcher.storage.runfolder import RunFolder

    if not in_reach(spec):
        raise WrongInput(
            f"{what}, and {spec.checkpoints.url} of {spec.name} is a disk of the cluster that is "
            "not mounted here. Use a machine or a pod that has it, or checkpoints at az://."
        )
    folder = RunFolder.of(spec.checkpoints.url, spec.name)
    refresh(folder)
    return folder


def hand_over(
    spec: Any, args: argparse.Namespace, said: str, prediction: dict[str, Any] | None, *, again: bool = False
) -> int:
    """Submit, or let go on, and with --follow stay until the end."""
    from launcher.kuberay import client as kuberay_client
    from launcher.kuberay.api import connect

    api = connect()
    print(f"cluster {api.context or 'of the current context'}: {api.host}", file=sys.stderr)
    if again:
        done = kuberay_client.resume(api, spec, prediction=prediction)
    else:
        done = kuberay_client.submit(api, spec, prediction=prediction, say=_say)
    remember(spec)
    if args.json:
        print(json.dumps({"run": spec.name, "resumed": True} if done is None else vars(done)))
    else:
        print(f"{spec.name}: goes on" if done is None else done.job)
    if args.follow:
        return _follow(api, spec)
    print(
        "next: " + "   ".join(f"losscast {c} {said}" for c in ("logs -f", "status", "why", "stop")),
        file=sys.stderr,
    )
    return 0


def status(spec: Any, args: argparse.Namespace) -> int:
    """The RayJob, and what the run's storage says."""
    from launcher.kuberay import client as kuberay_client
    from launcher.kuberay.api import connect

    found = kuberay_client.status(connect(), spec)
    found |= _stored(spec)
    if args.json:
        print(json.dumps(found))
        return 0
    print(line(found))
    if found["phase"] not in ("running", "succeeded"):
        print(f"next: losscast why {args.run}", file=sys.stderr)
    return 0


def line(found: dict[str, Any]) -> str:
    """One line for a person."""
    from launcher.jobs.standing import damage

    parts = [f"{found['run']}: {found['phase'] or 'its cluster was not asked'}"]
    if found.get("step") is not None:
        parts.append(f"step {found['step']} of {found['total_steps']}")
    if found.get("checkpoint_step") is not None:
        parts.append(f"checkpoint at {found['checkpoint_step']}")
    if found.get("damaged"):
        parts.append(damage(found["damaged"]))
    if found.get("loss") is not None:
        parts.append(f"loss {found['loss']:.4f}")
    if found.get("workers"):
        parts.append(f"{found['workers_ready'] or 0} of {found['workers']} workers ready")
    if found.get("clusters_lost"):
        parts.append(f"{found['clusters_lost']} clusters lost")
    return ", ".join(parts)


def listed() -> tuple[list[dict[str, Any]], int]:
    """Where each run stands that this machine handed to Kubernetes, as `status --json` has it, and how many could not be
    read. A cluster that can't be asked is said once, and leaves their phases open (None)."""
    from launcher.cli.finding import home
    from launcher.errors import Failed, WrongInput
    from launcher.kuberay import client as kuberay_client
    from launcher.kuberay.api import connect
    from launcher.kuberay.refusals import Away
    from launcher.runspec.model import RunSpec
    from launcher.storage.runfolder import read_json

    found: list[dict[str, Any]] = []
    api, bad = None, 0
    away = False
    for path in sorted((home() / "kuberay").glob("*.json")):
        try:
            spec = RunSpec.from_dict(read_json(path))
        except (WrongInput, OSError) as error:
            _say(f"{path.stem}: can't be read: {one_line(error, 200)}")
            bad += 1
            continue
        said: dict[str, Any] = {"run": spec.name, "phase": None}
        try:
            if not away:
                api = api or connect()
                said = kuberay_client.status(api, spec)
        except Failed as error:
            away = api is None or isinstance(error, Away)
            _say(f"warning: {'' if away else spec.name + ': '}{one_line(error, 200)}")
        found.append(said | _stored(spec))
    return found, bad


def why(spec: Any, args: argparse.Namespace) -> int:
    """A headline, the evidence, what to do."""
    from launcher.kuberay import client as kuberay_client
    from launcher.kuberay.api import connect

    word = kuberay_client.why(connect(), spec)
    if args.json:
        body = {"run": spec.name, "reason": word.headline, "evidence": word.evidence, "advice": word.advice}
        print(json.dumps({**body, **word.facts}))
        return 0
    print(f"{spec.name}: {word.facts.get('phase', 'absent')}: {word.headline}")
    for text in word.evidence:
        print(f"  {text}")
    for text in word.advice:
        print(f"next: {text}", file=sys.stderr)
    return 0


def logs(spec: Any, args: argparse.Namespace) -> int:
    """The job's output from its submitter pod; what ranks printed lies with the run."""
    from launcher.kuberay import client as kuberay_client
    from launcher.kuberay.api import connect

    api = connect()
    if args.follow:
        return _follow(api, spec)
    lines = kept_or(spec, kuberay_client.logs(api, spec))
    if args.tail is not None:
        lines = list(lines)[-args.tail :] if args.tail else []
    for line in lines:
        print(line)
    return 0


def kept_or(spec: Any, lines: Iterator[str]) -> Iterator[str]:
    """The lines; where no pod has any (any more), what was copied to the run's storage."""
    from launcher.errors import Failed
    from launcher.kuberay.refusals import Away, Forbidden

    try:
        first = next(lines, None)
    except (Away, Forbidden):
        raise
    except Failed as error:
        text = _stored_log(spec)
        if text is None:
            raise error from None
        yield from text.splitlines()
        return
    if first is not None:
        yield first
        yield from lines


def _stored_log(spec: Any) -> str | None:
    """The newest job's output as the run's storage has it; None where there is none, or it can't be reached."""
    if not in_reach(spec):
        return None
    from launcher.storage.remote import store_of
    from launcher.storage.runfolder import RunFolder

    try:
        store = store_of(RunFolder.of(spec.checkpoints.url, spec.name))
        logs = [i.key for i in store.list("output/") if i.key.endswith(".log")]
        newest = min(logs, key=lambda key: store.age_s(key) or 0.0, default=None)
        return None if newest is None else store.get(newest).decode(errors="replace")
    except Exception as error:  # whatever the storage's library raises
        _say(f"warning: {spec.checkpoints.url} can't be read from here: {one_line(error, 200)}")
        return None


def stop(spec: Any, args: argparse.Namespace) -> int:
    """Each pod commits before it goes; with --now the job is deleted too."""
    from launcher.kuberay import client as kuberay_client
    from launcher.kuberay.api import connect

    api = connect()
    if args.now:
        there = kuberay_client.delete(api, spec)
        _say(
            f"{spec.name}: "
            + ("its RayJob is deleted" if there else "there is no RayJob of this name, and none is left")
        )
        return 0
    before = kuberay_client.suspend(api, spec)
    did = "it waits no longer" if before == "pending" else "its pods were asked to commit and go"
    _say(f"{spec.name}: {did}; the job is kept. next: losscast resume {args.run}")
    return 0


def _follow(api: Any, spec: Any) -> int:
    """Say why it waits until it has begun, then print what it prints. 0 when it ended well."""
    from launcher.kuberay import client as kuberay_client
    from launcher.kuberay.client import follow

    for now in follow(api, spec):
        if now["phase"] in ("running", "succeeded", "failed", "stopped"):
            break
        print(f"{spec.name}: {now['phase']}: {kuberay_client.why(api, spec).headline}", file=sys.stderr)
    for line in kuberay_client.logs(api, spec, follow=True):
        print(line, flush=True)
    end = kuberay_client.status(api, spec)["phase"]
    print(f"{spec.name}: {end}", file=sys.stderr)
    return 0 if end in ("succeeded", "stopped") else 1


def _stored(spec: Any) -> dict[str, Any]:
    """Step, checkpoint and loss from the run's storage; empty where it can't be reached."""
    if not in_reach(spec):
        return {}
    from launcher.jobs.standing import answer, facts_of
    from launcher.storage.remote import refresh
    from launcher.storage.runfolder import RunFolder

    try:
        folder = RunFolder.of(spec.checkpoints.url, spec.name)
        refresh(folder)
        said = answer(facts_of(folder), "")
    except Exception as error:  # whatever the storage's library raises: the cluster's word stands alone then
        print(
            f"warning: {spec.checkpoints.url} can't be read from here: {one_line(error, 200)}",
            file=sys.stderr,
        )
        return {}
    told = ("step", "total_steps", "checkpoint_step", "damaged", "loss", "predicted", "attempt")
    return {key: said[key] for key in told}


def remember(spec: Any) -> None:
    """So that its name is enough from now on. Never raises: it is a convenience."""
    from launcher.cli.finding import home
    from launcher.storage.runfolder import write_whole

    try:
        write_whole(home() / "kuberay" / f"{spec.name}.json", spec.to_dict())
    except OSError:
        return


def _say(text: str) -> None:
    print(text, file=sys.stderr)
