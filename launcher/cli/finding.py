"""Which run a person means, and how its cluster is reached.

A run is named by its run.yaml, by its folder, or by its name: below ./runs, or wherever this machine last submitted it.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from launcher.errors import Failed, WrongInput

RUN_HELP = "run.yaml, the run's folder or az:// address, or its name"


def seconds(text: str) -> float:
    """A span that a person gives as an option, for argparse: a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: give a number of seconds above 0")
    return value


def home() -> Path:
    """This person's own state: LOSSCAST_HOME, or the user's state folder."""
    base = os.environ.get("LOSSCAST_HOME") or os.path.join(
        os.environ.get("XDG_STATE_HOME") or "~/.local/state", "losscast"
    )
    return Path(base).expanduser()


def local_home() -> Path:
    """Where the local Ray's token, logs and address lie."""
    return home() / "ray"


def remember(name: str, address: str) -> None:
    """Keep in mind where a run of that name was submitted to. Never raises: it is a convenience."""
    from launcher.storage.runfolder import read_json, write_whole

    path = home() / "known.json"
    try:
        known = read_json(path) or {}
        known.pop(name, None)
        write_whole(path, dict([*list(known.items())[-499:], (name, address)]))
    except (OSError, WrongInput):
        pass


def went_missing(folder: Any) -> bool:
    """True where this machine submitted the run to that very folder, and its spec is not in there now."""
    from launcher.storage.runfolder import read_json

    if folder.url is not None or folder.spec.exists():
        return False
    try:
        return (read_json(home() / "known.json") or {}).get(folder.name) == folder.address
    except (WrongInput, OSError):
        return False


def folder_of(run: str) -> Any:
    """The run's folder, from a run.yaml, a folder, an az:// address or a name. Raises WrongInput where there is none."""
    from launcher.runspec.document import instead_of
    from launcher.runspec.file import read_spec
    from launcher.storage.remote import refresh
    from launcher.storage.runfolder import RunFolder

    path = Path(run)
    if run.startswith("az://"):
        folder = RunFolder.at(run)
    elif path.is_dir():
        folder = RunFolder(path.resolve())
    elif path.is_file() or path.suffix in (".yaml", ".yml", ".json") or "/" in run:
        spec = read_spec(run)
        folder = RunFolder.of(spec.checkpoints.url, spec.name)
    else:
        folder = _by_name(run)
    refresh(folder)
    if not folder.spec.exists():
        how = "" if run.startswith("az://") else f" `losscast submit {run}` does that."
        if path.is_dir():
            how = f" {instead_of(path)}"
        if went_missing(folder):
            raise Failed(
                f"{folder.address}: {folder.name} was submitted to here from this machine, and is not here now: is its disk "
                f"mounted, or was it moved? If it was deleted, `losscast submit` begins it anew."
            )
        raise WrongInput(f"{folder.address}: no run was submitted to here.{how}")
    return folder


def spec_of(run: str) -> Any:
    """The spec a person means: of a run.yaml, or as it was submitted. Raises WrongInput where there is none."""
    from launcher.runspec.file import read_spec
    from launcher.runspec.model import RunSpec
    from launcher.storage.runfolder import read_json

    if Path(run).is_file() or not run or Path(run).suffix in (".yaml", ".yml", ".json"):
        return read_spec(run)
    return on_kubernetes(run) or RunSpec.from_dict(read_json(folder_of(run).spec))


def on_kubernetes(run: str) -> Any:
    """The spec of a run that is on Kubernetes: from its run.yaml, or its name as this machine submitted it. None for others."""
    from launcher.runspec.file import read_spec
    from launcher.runspec.model import RunSpec
    from launcher.storage.runfolder import read_json

    path = Path(run)
    if path.is_file():
        spec = read_spec(run)
        return spec if spec.cluster.to == "kuberay" else None
    if "/" in run:
        return None
    body = read_json(home() / "kuberay" / f"{run}.json")
    return None if body is None else RunSpec.from_dict(body)


def _by_name(name: str) -> Any:
    """A run below ./runs, or where this machine submitted it last."""
    from launcher.storage.runfolder import RunFolder, read_json

    if (Path("runs") / name / "spec.json").exists():
        return RunFolder((Path("runs") / name).resolve())
    try:
        known = (read_json(home() / "known.json") or {}).get(name)
    except WrongInput:
        known = None
    if known is not None and not known.startswith("az://") and not Path(known).is_dir():
        return RunFolder(Path(known))  # `folder_of` says that it went missing
    if known is None:
        raise WrongInput(
            f"{name}: no run of that name in ./runs, and this machine submitted none. "
            "Give its run.yaml or its folder."
        )
    return RunFolder.at(known)


def reach(dashboard: str) -> dict[str, str]:
    """RAY_* settings for a cluster: the local one's token, or the user's own environment."""
    from launcher.jobs import local_ray

    head = local_ray.running(local_home())
    if head is not None and head.dashboard == dashboard:
        return head.environment()
    return settings()


def settings() -> dict[str, str]:
    """The user's own RAY_AUTH_* settings; unset, a stray ~/.ray/auth_token would turn authentication on."""
    return {"RAY_AUTH_MODE": "disabled", **{k: v for k, v in os.environ.items() if k.startswith("RAY_AUTH_")}}


def job_of(facts: Any) -> Any:
    """What Ray says of a run's newest job: a `launcher.jobs.cluster.Job`, or the Failed that it was silent with. None where the
    run has no job."""
    from launcher.jobs.cluster import Cluster

    submission = facts.submission
    if submission is None:
        return None
    try:
        return Cluster(submission["dashboard"], reach(submission["dashboard"])).job(submission["job"])
    except Failed as error:
        return error


def standing_of(folder: Any, *, ask: bool = True) -> tuple[Any, str, Any]:
    """Facts, phase, and Ray's word (a Job, a Failed, or None). With `ask` false no cluster is asked."""
    from launcher.jobs.standing import facts_of, phase

    facts = facts_of(folder)
    job = job_of(facts) if ask and not facts.finished else None
    return facts, phase(facts, getattr(job, "status", None)), job


class JobLists:
    """Jobs of the clusters that runs were handed to, each cluster asked once, and not for long."""

    def __init__(self) -> None:
        self._known: dict[str, dict[str, str]] = {}

    def state(self, submission: Any) -> str | None:
        """Ray's word for a submission's job; None where its cluster is silent or does not know it."""
        from launcher.jobs.cluster import Cluster

        if submission is None:
            return None
        address = str(submission.get("dashboard"))
        if address not in self._known:
            try:
                jobs = Cluster(address, reach(address)).jobs(timeout_s=3.0)
                self._known[address] = {j.submission: j.status for j in jobs}
            except Failed:
                self._known[address] = {}
        return self._known[address].get(str(submission.get("job")))
