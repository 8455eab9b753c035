"""A run of a monitor, told again to W&B, MLflow or TensorBoard, so that people keep the screen they are used to.

A mirror reads the monitor's API and nothing else: training knows nothing of it, and when it ends nobody trains worse. Each
step is told once, with what was expected of it. Those screens keep the first word for a step, so steps that are trained
again after a restart keep the old one there; the monitor has the true curve.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from monitor.errors import Failed, WrongInput, unwritable

EXPECTED = ("expected", "lower", "upper", "gap_sigma")
"""Of a sample, what the judge adds to it."""
ASIDE = ("step", "attempt", "time", "mean")
BLOCK = 5000
"""Steps asked for at a time."""


class Sink(Protocol):
    """Where a run is told again."""

    def newest(self) -> int:
        """The last step that it has, -1 for none."""
        ...

    def tell(self, step: int, time_s: float, values: Mapping[str, float]) -> None:
        """One step's numbers, by name."""
        ...

    def close(self) -> None:
        """All that was told is kept when this returns."""
        ...


def values_of(sample: Mapping[str, Any]) -> dict[str, float]:
    """A sample's numbers by the names a mirror shows; what was expected under `line/`. Infinities and NaN are kept."""
    out: dict[str, float] = {}
    for name, value in sample.items():
        if name in ASIDE or value is None:
            continue
        number = float(value) if isinstance(value, (int, float, str)) and _is_number(value) else None
        if number is not None:
            out[f"line/{name}" if name in EXPECTED else name] = number
    return out


def _is_number(value: Any) -> bool:
    return not isinstance(value, str) or value in ("NaN", "Infinity", "-Infinity")


def mirror(
    ask: Callable[[str], Any],
    run: str,
    sink: Sink,
    *,
    follow: bool,
    every_s: float = 10.0,
    say: Callable[[str], None] = lambda words: None,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Tell `sink` every step of a run that it has not yet; how many.

    ask     an API path to its JSON (`monitor.cli.watch.asker`)
    follow  go on until the run has ended. Meanwhile a monitor that is away is waited for, and a step is told at the
            second look, when the judge has said what it expected
    """
    last, told, ready = sink.newest(), 0, -1
    while True:
        try:
            standing = ask(f"/v1/runs/{run}")
            ended = standing["phase"] == "ended"
            newest = last
            for sample in _between(ask, run, last, standing.get("step")):
                newest = max(newest, sample["step"])
                if not follow or ended or sample["step"] <= ready:
                    sink.tell(sample["step"], float(sample.get("time") or 0.0), values_of(sample))
                    last, told = sample["step"], told + 1
            ready = newest
        except Failed as error:
            if not follow:
                raise
            say(f"{error}; tried again in {every_s:.0f} s")
            ended = False
        if ended or not follow:
            return told
        sleep(every_s)


def _between(ask: Callable[[str], Any], run: str, last: int, newest: int | None) -> Any:
    """Samples of the steps after `last` up to `newest` at least, in order. None: it has made none."""
    while newest is not None and last < newest:
        yield from ask(f"/v1/runs/{run}/samples?from={last + 1}&to={last + BLOCK}")["samples"]
        last += BLOCK


class Wandb:
    """A run of Weights & Biases with the run's own name as its id, gone on with when it is there already."""

    def __init__(self, run: str, project: str) -> None:
        try:
            import wandb
        except ImportError:
            raise Failed("W&B needs its package: pip install 'losscast[wandb]'") from None
        try:
            self._run: Any = wandb.init(
                project=project, id=run, name=run, resume="allow", settings=wandb.Settings(silent=True)
            )
        except Exception as error:  # its own kinds: no key, no network, a project that is not ours
            raise Failed(
                f"W&B: {error}. `wandb login` first, or set WANDB_MODE=offline and `wandb sync` later"
            ) from error

    def newest(self) -> int:
        return int(self._run.step) - 1 if self._run.step else -1

    def tell(self, step: int, time_s: float, values: Mapping[str, float]) -> None:
        # W&B keeps one time a row, its own; the sender's is a column
        self._run.log({**values, "time": time_s}, step=step)

    def close(self) -> None:
        self._run.finish()


class Mlflow:
    """A run of an MLflow experiment, found again by its tag `losscast.run`."""

    MOST = 1000
    """Metrics that MLflow takes at a time."""

    def __init__(self, run: str, experiment: str) -> None:
        try:
            from mlflow.exceptions import MlflowException
            from mlflow.tracking import MlflowClient
        except ImportError:
            raise Failed("MLflow needs its package: pip install 'losscast[mlflow]'") from None
        try:
            self._client: Any = MlflowClient()
            found = self._client.get_experiment_by_name(experiment)
            there = found.experiment_id if found else self._client.create_experiment(experiment)
            runs = self._client.search_runs([there], f"tags.`losscast.run` = '{run}'", max_results=1)
            made = (
                runs[0] if runs else self._client.create_run(there, tags={"losscast.run": run}, run_name=run)
            )
        except MlflowException as error:
            raise Failed(f"MLflow: {error}. MLFLOW_TRACKING_URI says where it is") from error
        self._id: str = made.info.run_id
        self._held: list[Any] = []

    def newest(self) -> int:
        return max((m.step for m in self._client.get_metric_history(self._id, "loss")), default=-1)

    def tell(self, step: int, time_s: float, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        if len(self._held) + len(values) > self.MOST:
            self._flush()
        self._held += [Metric(name, value, int(1000 * time_s), step) for name, value in values.items()]

    def _flush(self) -> None:
        if self._held:
            self._client.log_batch(self._id, metrics=self._held)
        self._held = []

    def close(self) -> None:
        self._flush()
        self._client.set_terminated(self._id)


class TensorBoard:
    """An event file in FOLDER/RUN, begun anew each time: TensorBoard would show two as one."""

    def __init__(self, run: str, folder: Path) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError:
            raise Failed(
                "TensorBoard's event files need it: pip install 'losscast[tensorboard]', or export to .csv"
            ) from None
        place = folder / run
        if place.exists() and any(place.iterdir()):
            raise WrongInput(
                f"{place}: holds something already; TensorBoard would show both as one. Give another folder"
            )
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(place, error, "Give a folder that is there and can be written.") from None
        # made by protobuf when they are imported: no types to see
        self._events: Any = event_pb2
        self._summaries: Any = summary_pb2
        self._writer = EventFileWriter(str(place))

    def newest(self) -> int:
        return -1

    def tell(self, step: int, time_s: float, values: Mapping[str, float]) -> None:
        summary = self._summaries.Summary(
            value=[
                self._summaries.Summary.Value(tag=name, simple_value=value) for name, value in values.items()
            ]
        )
        self._writer.add_event(self._events.Event(step=step, wall_time=time_s, summary=summary))

    def close(self) -> None:
        self._writer.close()
