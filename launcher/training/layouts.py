"""One update and one evaluation, the same from outside whether the model is whole on a rank or lies in stages over several.

A replica is what reads one share of a batch: a rank, or the pp or tp ranks that hold a model together. Every rank of a
replica is given the same share, and knows the replica's loss afterwards. Losses are nats per token.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

Part = tuple[Sequence[Tensor], Tensor]
"""Inputs and targets of some sequences, on this rank's device."""


class Layout(Protocol):
    """How this rank takes part in computing."""

    replica: int
    """Which share of a batch this rank reads, below dp."""

    def update(
        self, parts: list[Part], poisoned: bool, lap: Callable[[], None], tell: Callable[[Tensor], None]
    ) -> None:
        """One optimizer update over the micro-batches of a share.

        lap   called when this rank has computed something by itself, where the layout lets it
        tell  called once, with the share's mean loss, and where possible before the last gradients are computed
        """
        ...

    def loss(self, part: Part) -> Tensor | None:
        """The loss on a part without learning from it; None on ranks that do not come to know it. All ranks of all
        replicas must call it equally often."""
        ...


def layout_of(engine: Any, pp: int, tp: int) -> Layout:
    """The layout that an engine was built for."""
    return Stages(engine) if pp > 1 else Whole(engine, tp)


class Whole:
    """Every rank computes the whole model, or its slice of every layer: data parallel, ZeRO, tensor parallel."""

    def __init__(self, engine: Any, tp: int) -> None:
        import torch.distributed as dist

        self._engine = engine
        self.replica = dist.get_rank() // tp

    def update(
        self, parts: list[Part], poisoned: bool, lap: Callable[[], None], tell: Callable[[Tensor], None]
    ) -> None:
        total: Any = 0.0
        for index, (inputs, targets) in enumerate(parts):
            loss = self._engine(*inputs, targets)
            lap()
            if poisoned:
                loss = loss * float("nan")
            total = total + loss.detach()
            if index == len(parts) - 1:  # travels while the last gradients are computed
                tell(total / len(parts))
            self._engine.backward(loss)
            self._engine.step()

    def loss(self, part: Part) -> Tensor:
        self._engine.eval()
        with torch.no_grad():
            loss = self._engine.module(*part[0], part[1])
        self._engine.train()
        return loss


class Stages:
    """A pipeline: this rank computes some of the layers."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.replica = int(engine.grid.get_data_parallel_id())
        self._shape: torch.Size | None = None

    def update(
        self, parts: list[Part], poisoned: bool, lap: Callable[[], None], tell: Callable[[Tensor], None]
    ) -> None:
        self._engine.module.poisoned = poisoned
        self._engine.train_batch(self._feed(parts))
        tell(self._engine.dp_group_loss)

    def loss(self, part: Part) -> Tensor | None:
        found = self._engine.eval_batch(
            self._feed([part]), reduce_output=None, bcast_loss=False, num_micro_batches=1
        )
        return found[0] if self._engine.is_last_stage() else None

    def _feed(self, parts: list[Part]) -> Iterator[tuple[Any, Tensor]]:
        shape = parts[0][1].shape
        if shape != self._shape:  # stages agree anew on what they send each other
            self._engine.reset_activation_shape()
            self._shape = shape
        return iter([(inputs if len(inputs) > 1 else inputs[0], targets) for inputs, targets in parts])
