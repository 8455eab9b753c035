"""A callback for Lightning's Trainer.

    Trainer(..., callbacks=[LosscastCallback(run)])

`run` is what an entrypoint of a losscast run is given; `MonitorLine(name, folder, url)` tells a monitor without one. A step
is told when the optimizer has made one: with the mean loss of the micro-batches it was made from, the first optimizer's
learning rate, and the metric `val_loss` where the module has logged one since. When the run is to stop, so does Lightning,
after which its ModelCheckpoint may save as it always does.

Needs lightning (pip install 'losscast[lightning]'). Works with 2.4 to 2.6, automatic optimization.
"""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from launcher.integrations.line import line_of


class LosscastCallback(Callback):
    """Tells losscast of every optimizer step."""

    def __init__(self, run: Any) -> None:
        self._line = line_of(run)
        self._step: int | None = None
        self._loss: Any = 0.0
        self._val_loss: float | None = None
        self._finished = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Lightning has divided each micro-batch's loss by how many there are
        self._loss = self._loss + (outputs["loss"] if isinstance(outputs, dict) else outputs).detach()
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        lr = trainer.optimizers[0].param_groups[0]["lr"] if trainer.optimizers else None
        stop = self._line.told(self._step, float(self._loss), lr=lr, val_loss=self._val_loss)
        self._loss, self._val_loss = 0.0, None
        if stop:
            trainer.should_stop = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = trainer.callback_metrics.get("val_loss")
        if found is not None and not trainer.sanity_checking:
            self._val_loss = float(found)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finished = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":  # an exception comes by here too, and is no end
            self._line.close(self._finished and not trainer.interrupted, self._val_loss)
