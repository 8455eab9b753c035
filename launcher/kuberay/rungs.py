"""The rungs of a ladder as RayJobs: the `launcher.jobs.climbing.Place` that is a Kubernetes cluster.

With a queue all rungs are handed in at once, and Kueue lets each in when there is room for the whole of it. Without one
they go one after another unless told otherwise: pods of two runs that each got half of their machines would wait for
the other half for ever.

The points of the law are read from the runs' storage, so that has to be within reach of whoever climbs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from launcher.errors import Failed, Held, WrongInput
from launcher.jobs.climbing import Rung, told_by_storage
from launcher.jobs.submit import may_submit
from launcher.kuberay import client
from launcher.kuberay.api import RAY_JOBS, Api
from launcher.kuberay.why import ENDED, phase
from launcher.runspec.model import RunSpec

OVER = ENDED | {"stopped", "absent"}
DIGEST = "losscast/spec-digest"


def refuse_out_of_sight(specs: Sequence[RunSpec]) -> None:
    """Raise WrongInput where the results of these runs could not be read from here: before anything is paid for."""
    for url in sorted({s.checkpoints.url for s in specs}):
        if not url.startswith("az://") and not Path(url).is_dir():
            raise WrongInput(
                f"checkpoints.url: {url} is a folder of the cluster's pods and none of this machine, and a law is made of what "
                f"the runs leave there. Use az://account/container/prefix, or mount that volume here at {url}."
            )


class KubePlace:
    """The Kubernetes cluster behind an `Api`."""

    def __init__(self, api: Api, specs: Sequence[RunSpec]) -> None:
        self._api = api
        self._spaces = sorted({client.names(s)[0] for s in specs})
        self._queued = all(s.kubernetes is not None and s.kubernetes.queue for s in specs)

    def room(self) -> Mapping[str, float] | None:
        """None with a queue; no room otherwise, in which one rung at a time goes."""
        for space in self._spaces:
            self._api.list(RAY_JOBS, space)  # a cluster that can't be used is told at once
        return None if self._queued else {}

    def start(self, rung: Rung) -> None:
        spec = rung.spec
        namespace, name = client.names(spec)
        job = self._api.find(RAY_JOBS, namespace, name)
        if phase(job) not in OVER and job is not None:
            if (job["metadata"].get("annotations") or {}).get(DIGEST) != spec.digest:
                raise Held(
                    f"{name}: RayJob {namespace}/{name} is {phase(job)}, and trains another spec of that name. "
                    "Stop it with `losscast stop --now`, or rename the ladder."
                )
            if self._asleep(spec, phase(job)):
                client.resume(self._api, spec)
            return
        may_submit(spec)
        client.submit(self._api, spec)

    def look(self, rung: Rung) -> Rung | None:
        namespace, name = client.names(rung.spec)
        word = phase(self._api.find(RAY_JOBS, namespace, name))
        if word in OVER or self._asleep(rung.spec, word):
            return None
        if word == "running":
            return replace(rung, state="running", why="")
        return replace(rung, state="waiting", why=word)

    def _asleep(self, spec: RunSpec, word: str) -> bool:
        """A person let it rest: what Kueue suspends by itself comes back by itself."""
        if word == "suspended":
            return True
        if word != "pending":
            return False
        work = client.seen(self._api, spec).workload
        return work is not None and (work.get("spec") or {}).get("active") is False

    def outcome(self, rung: Rung) -> str:
        """The storage's word for what failed; the cluster's for what never got that far, was taken out or deleted."""
        spec = rung.spec
        try:
            namespace, name = client.names(spec)
            job = self._api.find(RAY_JOBS, namespace, name)
            word = phase(job)
            if word == "absent":
                return f"its RayJob {namespace}/{name} was deleted"
            if word not in OVER:
                return "suspended by a person; the same command lets it go on"
            cluster = client.why(self._api, spec).headline
        except Failed as error:
            cluster = str(error)
        try:
            return told_by_storage(rung)
        except (WrongInput, OSError, Failed):
            return cluster

    def rest(self, rungs: Sequence[Rung]) -> None:
        """Suspend each: its pods commit before they go, and the next ladder lets it go on."""
        for rung in rungs:
            try:
                client.suspend(self._api, rung.spec)
            except (WrongInput, Failed):
                # it ended in the meantime, or Kueue has not looked at it yet and no pod of it runs
                if phase(self._api.find(RAY_JOBS, *client.names(rung.spec))) not in OVER:
                    client.delete(self._api, rung.spec)
