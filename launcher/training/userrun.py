"""A run whose training is the user's own: a function that is told about its run, or a DeepSpeed script that knows nothing of it.

    workload: {entrypoint: my_train:main, args: {width: 64}}    main(run, width=64), or main(width=64)
    workload: {entrypoint: train.py, args: [--epochs, 3]}       as `python train.py --epochs 3` on every rank

It is called once on every rank, with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set and the working
directory on sys.path: that of `losscast submit`, or kubernetes.working_dir.

A function with a parameter `run` gets a `Run`: resume, batches of the run's data order, and one call a step that records,
reports, saves when it is due, and says when to stop. A script, and a function without it, is watched: see
`launcher.training.script`.
"""

import importlib
import inspect
import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.data.tokens import WORKING_DIR
from launcher.errors import WrongInput
from launcher.runspec.model import Entrypoint
from launcher.storage.runfolder import write_whole
from launcher.training.assignment import Outcome, result_row
from launcher.training.run import Run
from launcher.training.script import Stopped, watched


def train_user(
    assignment: Any, stop: Callable[[], bool], save: Callable[[], bool], beat: Callable[[int, str], None]
) -> Any:
    """Run the user's entrypoint on this rank; as `launcher.training.loop.train`. The process group has been joined."""
    from launcher.storage.remote import publish

    run = Run(assignment, stop, save, beat)
    began, finished = time.monotonic(), False
    try:
        _call(run)
        finished = not run.stopped or run.last_step >= run.total_steps
    except Stopped:
        pass
    finally:
        run.close(finished)
    seconds = time.monotonic() - began
    if finished and run.rank == 0:
        row = result_row(run.spec, assignment, run.val_loss, seconds, run.last_step)
        write_whole(run._folder.result, row)
        publish(run._folder, run._folder.result, run._folder.curve(run.attempt))
    return Outcome(step=run.last_step, finished=finished, val_loss=run.val_loss, seconds=seconds)


def _call(run: Run) -> None:
    workload = run.spec.workload
    assert isinstance(workload, Entrypoint)
    pods = run.spec.kubernetes
    home = Path(os.environ.get(WORKING_DIR) or (pods and pods.working_dir) or ".").resolve()
    if not home.is_dir():
        raise WrongInput(
            f"workload.entrypoint: {home} is not on this machine, and {workload.entrypoint} is looked for there. "
            "Submit from a folder on a shared disk, or with kubernetes.working_dir."
        )
    sys.path.insert(0, str(home))  # behind ours: launcher and monitor are imported by now
    if workload.is_script:
        script = home / workload.entrypoint
        if not script.is_file():
            raise WrongInput(f"workload.entrypoint: no script {workload.entrypoint} in {home}")
        argv, where = sys.argv, Path.cwd()
        sys.argv = [str(script), *map(str, workload.args)]
        os.chdir(home)
        try:
            with watched(run, home):
                runpy.run_path(str(script), run_name="__main__")
        except SystemExit as error:
            if error.code not in (None, 0):
                raise RuntimeError(f"{workload.entrypoint} exited with {error.code}") from error
        finally:
            sys.argv = argv
            os.chdir(where)
        return
    function = _function(workload.entrypoint, home)
    assert isinstance(workload.args, dict)
    if "run" in inspect.signature(function).parameters:
        run.begin(run.resume_step)
        function(run=run, **workload.args)
        return
    with watched(run, home):
        function(**workload.args)


def _function(entrypoint: str, home: Path) -> Callable[..., Any]:
    module, _, name = entrypoint.partition(":")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise  # something that the user's module imports: its own trace says more
        raise WrongInput(f"workload.entrypoint: no module {module} in {home}, nor installed") from error
    function = getattr(found, name, None)
    if not callable(function):
        where = getattr(found, "__file__", module)
        raise WrongInput(f"workload.entrypoint: {where} has no function {name}")
    return function
