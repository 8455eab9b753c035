"""Training that knows nothing of its run: a DeepSpeed script as it is, or a function without a parameter `run`.

The first DeepSpeed engine that trains is watched: each of its updates is a step with the mean loss over ranks, its
learning rate and gradient norm.

Asked to stop, a script that saves goes on to its own next save, and ends when it begins the update after that: only the
script knows what belongs in its checkpoint. One that has not saved in this run yet ends after an update, and so does any whose
place is taken away rather than asked for.

What it saves with `engine.save_checkpoint(DIR)` it finds in DIR as ever, and the run keeps it too: a second copy under the
attempt's own path, committed like any other, with the script's client state. When an attempt goes on from such a checkpoint,
`engine.load_checkpoint(DIR)` loads the committed one, which was verified, in place of whatever DIR holds by then, and a DIR
that this machine lacks is put back first, for scripts that look before they load. A script that loads other places, or
nothing, does as it likes: the run then says from which step it really went on. Steps count the engine's updates.
"""

import functools
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from launcher.training.run import Run

NOTE = "losscast-script.json"
"""In a checkpoint: where the script itself saved it, and under which tag."""


class Stopped(BaseException):
    """Ends watched training at an update, past whatever the script catches."""


class Kept:
    """What the script saves, for the run to keep, and what the run has kept, for the script to load."""

    def __init__(self, run: Run, home: Path) -> None:
        self._run, self._home = run, home
        self._from = run.committed_checkpoint()
        self._note: dict[str, str] = {}
        self._loaded = self._told = self._waits = self._due = False
        run.awaits_save = self._from is not None
        if self._from is not None:
            with suppress(OSError, ValueError):
                self._note = json.loads((self._from / NOTE).read_text())
            self._put_back(self._from)

    def saved(self, engine: Any, write: Any, folder: str, tag: str, state: Any, more: dict[str, Any]) -> None:
        """The script has saved this engine's newest step under folder/tag."""
        step = int(engine.global_steps)
        if step == 0 or step != self._run.last_step or step == self._run.saved_step:
            return
        note = {"folder": self._name(folder), "tag": tag}
        again = _Again(engine, write, state, more, note if self._run.rank == 0 else None)
        self._run.save(again, step, wait=True)  # which one is the last, nobody knows
        self._run.awaits_save = True
        self._due = self._run.asked

    def may_go_on(self) -> None:
        """Called before an update is begun. Raises Stopped after the save that a wish to stop has waited for."""
        if self._due:
            self._run.stopped = True
            raise Stopped

    def went_on(self) -> None:
        """An update was told, and nobody who must be heard at once wants the end: say what a person's wish waits for."""
        if self._run.asked and not self._waits:
            self._waits = True
            self._run.say(
                f"asked to stop at step {self._run.last_step}: the script goes on to its next save, and ends there"
            )

    def place(self, folder: str, tag: str | None) -> tuple[str, str | None]:
        """From where to load instead of folder/tag."""
        asked = self._from is not None and self._name(folder) == self._note.get("folder")
        if self._from is None or not asked or tag not in (None, self._note.get("tag")):
            return folder, tag
        if not self._loaded:
            self._run.say(f"step {self._run.resume_step}, committed by the run, is loaded for {folder}")
        self._loaded = True
        return str(self._from.parent), self._from.name

    def began(self, step: int) -> None:
        """The first update in this attempt is this step."""
        if self._told:
            return
        self._told, ours, before = True, self._run.resume_step, step - 1
        if before != ours:
            has = f"has committed step {ours}" if ours else "has committed no checkpoint"
            went = f"went on from step {before} by itself" if before else "began anew, since it loaded none"
            hint = (
                f": engine.load_checkpoint({self._note['folder']!r}) would be given it" if self._note else ""
            )
            self._run.say(f"the run {has}, and the script {went}{hint}")
        self._run.begin(before)

    def ended(self) -> None:
        """The script has ended, or was asked to: say what a resume would find."""
        last, newest = self._run.last_step, self._run.saved_step or self._run.resume_step
        if self._run.stopped and newest < last:
            has = (
                f"the newest checkpoint it saved is of step {newest}"
                if newest
                else "it has saved no checkpoint"
            )
            self._run.say(
                f"the script is stopped at step {last}, and {has}: {last - newest} steps will be trained again"
            )
        elif last and not newest:
            self._run.say("the script saved no checkpoint with its engine: the run has none")

    def _name(self, folder: str) -> str:
        """The script's folder, as another machine would know it."""
        path = Path(os.path.abspath(folder))
        return str(path.relative_to(self._home)) if path.is_relative_to(self._home) else str(path)

    def _put_back(self, kept: Path) -> None:
        """Give the script's own folder back what it saved there, where this machine has nothing of it."""
        import torch.distributed as dist

        if self._note and os.environ.get("LOCAL_RANK", "0") == "0":
            folder, tag = self._home / self._note["folder"], self._note["tag"]
            if not (folder / "latest").exists() and not (folder / tag).exists():
                with suppress(OSError):
                    shutil.copytree(kept, folder / tag, ignore=shutil.ignore_patterns(NOTE))
                    (folder / "latest").write_text(tag)
        dist.barrier()


class _Again:
    """An engine that writes what the script has just saved once more, somewhere else."""

    def __init__(
        self, engine: Any, write: Any, state: Any, more: dict[str, Any], note: dict[str, str] | None
    ) -> None:
        self._engine, self._write, self._state, self._more, self._note = engine, write, state, more, note

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def save_checkpoint(self, folder: str, tag: str, client_state: Any, save_latest: bool) -> None:
        """As DeepSpeed's; the client state is the script's."""
        self._write(
            self._engine, folder, tag=tag, client_state=self._state, save_latest=save_latest, **self._more
        )
        if self._note is not None:
            with suppress(OSError):  # a full disk fails the save itself
                Path(folder, tag, NOTE).write_text(json.dumps(self._note))


@contextmanager
def watched(run: Run, home: Path) -> Iterator[None]:
    """While it lasts, every update of the first DeepSpeed engine that trains in this process is told to the run, and what
    it saves is kept. Relative paths start at `home`."""
    import torch.distributed as dist
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.pipe.engine import PipelineEngine

    join = dist.init_process_group
    kept = Kept(run, home)
    if run.resume_step == 0:
        run.begin(0)
    chosen: list[Any] = []
    losses: list[Any] = []
    backward, step, train_batch = DeepSpeedEngine.backward, DeepSpeedEngine.step, PipelineEngine.train_batch
    save, load = DeepSpeedEngine.save_checkpoint, DeepSpeedEngine.load_checkpoint

    def is_ours(engine: Any) -> bool:
        if not chosen:
            chosen.append(engine)
        return chosen[0] is engine

    def told(engine: Any, loss: Any) -> None:
        kept.began(int(engine.global_steps))
        norm = engine.get_global_grad_norm()
        rates = [group["lr"] for group in engine.optimizer.param_groups]
        if run.step(
            int(engine.global_steps),
            loss,
            lr=float(rates[0]),
            grad_norm=None if norm is None else float(norm),
        ):
            raise Stopped
        kept.went_on()

    def new_backward(engine: Any, loss: Any, *args: Any, **more: Any) -> Any:
        if is_ours(engine) and not isinstance(engine, PipelineEngine):
            kept.may_go_on()
            losses.append(loss.detach())
        return backward(engine, loss, *args, **more)

    def new_step(engine: Any, *args: Any, **more: Any) -> Any:
        before = engine.global_steps
        answer = step(engine, *args, **more)
        if is_ours(engine) and engine.global_steps > before and losses:
            loss = sum(losses) / len(losses)
            losses.clear()
            told(engine, loss)
        return answer

    def new_train_batch(engine: Any, *args: Any, **more: Any) -> Any:
        if is_ours(engine):
            kept.may_go_on()
        loss = train_batch(engine, *args, **more)
        if is_ours(engine):
            told(engine, loss)
        return loss

    @functools.wraps(save)
    def new_save(
        engine: Any,
        save_dir: Any,
        tag: Any = None,
        client_state: Any = None,
        save_latest: bool = True,
        **more: Any,
    ) -> Any:
        state = {} if client_state is None else client_state
        answer = save(engine, save_dir, tag=tag, client_state=state, save_latest=save_latest, **more)
        if chosen and chosen[0] is engine:
            name = f"global_step{engine.global_steps}" if tag is None else str(tag)  # DeepSpeed's own
            kept.saved(engine, save, str(save_dir), name, state, more)
        return answer

    @functools.wraps(load)
    def new_load(engine: Any, load_dir: Any, tag: Any = None, *args: Any, **more: Any) -> Any:
        folder, tag = kept.place(str(load_dir), tag)
        return load(engine, folder, tag, *args, **more)

    def new_join(*args: Any, **more: Any) -> None:
        if not dist.is_initialized():  # losscast has joined already, and a second time is an error
            join(*args, **more)

    dist.init_process_group = new_join
    DeepSpeedEngine.backward, DeepSpeedEngine.step = new_backward, new_step  # type: ignore[method-assign]
    DeepSpeedEngine.save_checkpoint, DeepSpeedEngine.load_checkpoint = new_save, new_load  # type: ignore[method-assign]
    PipelineEngine.train_batch = new_train_batch  # type: ignore[method-assign]
    try:
        yield
        kept.ended()
    except (Stopped, SystemExit):
        kept.ended()
        raise
    finally:
        DeepSpeedEngine.backward, DeepSpeedEngine.step = backward, step  # type: ignore[method-assign]
        DeepSpeedEngine.save_checkpoint, DeepSpeedEngine.load_checkpoint = save, load  # type: ignore[method-assign]
        PipelineEngine.train_batch = train_batch  # type: ignore[method-assign]
        dist.init_process_group = join
