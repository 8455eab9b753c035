"""A callback for Hugging Face's Trainer.

    Trainer(..., args=TrainingArguments(logging_steps=1, ...), callbacks=[LosscastCallback(run)])

`run` is what an entrypoint of a losscast run is given; `MonitorLine(name, folder, url)` tells a monitor without one. The
Trainer says its loss every `logging_steps` updates, as the mean since the last time: 1 gives every step. An evaluation's
`eval_loss` goes with the next step told, or with the end. When the run is to stop, the Trainer saves and ends.

Needs transformers (pip install 'losscast[huggingface]'). Works with 4.50 to 5.
"""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from launcher.integrations.line import line_of


class LosscastCallback(TrainerCallback):
    """Tells losscast of what the Trainer logs."""

    def __init__(self, run: Any) -> None:
        self._line = line_of(run)
        self._val_loss: float | None = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        said = logs or {}
        if "eval_loss" in said:
            self._val_loss = float(said["eval_loss"])
        if "loss" not in said:
            return
        norm, lr = said.get("grad_norm"), said.get("learning_rate")
        stop = self._line.told(
            state.global_step,
            float(said["loss"]),
            lr=None if lr is None else float(lr),
            grad_norm=None if norm is None else float(norm),
            val_loss=self._val_loss,
        )
        self._val_loss = None
        if stop:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._line.close(state.global_step >= state.max_steps, self._val_loss)
