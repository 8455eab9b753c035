"""The built-in transformer as stages of DeepSpeed's pipeline, made of the same parts as the whole one.

A stage holds what `launcher.training.memory` says it holds: blocks spread evenly, earlier stages taking what is left over; the first
stage the embeddings, the last one the readout. A tied readout is a second copy of the embedding on the last stage, and
DeepSpeed adds the two gradients.

Layer by layer: embed, [place], block 0 .. block n-1, readout. `names` gives the whole model's name of every parameter.
"""

import contextlib
import sys
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch import Tensor, nn

from launcher.workloads.gpt import (
    Block,
    GPTShape,
    draw,
    logits_of,
    loss_of,
    parameter_groups,
    place,
    rotary_table,
    run_block,
)


class Embed(nn.Module):
    """Token ids (B, T) to the stream; tied, its weight is the readout as well."""

    def __init__(self, shape: GPTShape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape.vocab, shape.width))

    def forward(self, tokens: Any) -> Any:
        if isinstance(tokens, tuple):  # patches first, and the text behind them
            return tokens[0], nn.functional.embedding(tokens[1], self.weight)
        return nn.functional.embedding(tokens, self.weight)


class Patches(nn.Module):
    """Puts an image's patches before the text about it."""

    def __init__(self, shape: GPTShape) -> None:
        super().__init__()
        self.patches = nn.Linear(shape.patch_values, shape.width, bias=False)

    def forward(self, both: tuple[Tensor, Tensor]) -> Tensor:
        patches, text = both
        return torch.cat((self.patches(patches.to(text.dtype)), text), dim=1)


class Place(nn.Module):
    """Adds a learned vector to each position."""

    def __init__(self, shape: GPTShape) -> None:
        super().__init__()
        self.position = nn.Embedding(shape.context, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        return place(x, self.position.weight)


class PipeBlock(nn.Module):
    """One block, with the table of positions it turns queries and keys by."""

    table: Tensor | None

    def __init__(self, shape: GPTShape, recompute: bool) -> None:
        super().__init__()
        self.block, self.recompute = Block(shape), recompute
        rotary = shape.positions == "rotary"
        table = rotary_table(shape.context, shape.width // shape.heads) if rotary else None
        self.register_buffer("table", table, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return run_block(self.block, x, self.table, self.recompute)


class Head(nn.Module):
    """A readout of its own."""

    def __init__(self, shape: GPTShape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape.vocab, shape.width))

    def forward(self, x: Tensor) -> Tensor:
        return logits_of(x, self.weight)


def read_out(embed: Embed, x: Tensor) -> Tensor:
    """The readout of a tied model."""
    return logits_of(x, embed.weight)


class PipedGPT(PipelineModule):
    """This rank's stage of the model."""

    def __init__(self, shape: GPTShape, stage_layers: list[int], recompute: bool, seed: int) -> None:
        self.shape, self._stage_layers = shape, stage_layers
        self.poisoned = False
        """A drill: the next losses become NaN."""
        front: list[Any] = [TiedLayerSpec("embed", Embed, shape) if shape.tied else LayerSpec(Embed, shape)]
        self._whole_names = [{"weight": "embed.weight"}]
        if shape.patch_values:
            front.append(LayerSpec(Patches, shape))
            self._whole_names.append({"patches.weight": "patches.weight"})
        if shape.positions == "learned":
            front.append(LayerSpec(Place, shape))
            self._whole_names.append({"position.weight": "position.weight"})
        self._front = len(front)
        blocks = [LayerSpec(PipeBlock, shape, recompute) for _ in range(shape.layers)]
        for i in range(shape.layers):
            parts = ("qkv", "out", "up", "down")
            self._whole_names.append({f"block.{p}.weight": f"blocks.{i}.{p}.weight" for p in parts})
        back = (
            TiedLayerSpec("embed", Embed, shape, forward_fn=read_out)
            if shape.tied
            else LayerSpec(Head, shape)
        )
        self._whole_names.append({"weight": "head.weight"})
        with contextlib.redirect_stdout(sys.stderr):  # it prints its stages, and stdout is for data
            super().__init__(layers=[*front, *blocks, back], num_stages=len(stage_layers), loss_fn=self._loss)
        draw(self.names().items(), shape, seed)
        for p in self.parameters():
            # what DeepSpeed reads to know whose gradients the norm of the whole model still lacks: without it a plain
            # fp32 pipeline clips by the first stage's norm. A tied copy is counted where the original is.
            p.model_parallel = not getattr(p, "ds_pipe_replicated", False)  # type: ignore[attr-defined]

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        loss = loss_of(logits, targets)
        return loss * float("nan") if self.poisoned else loss

    def _partition_layers(self, method: str = "uniform") -> None:
        """Stages as `launcher.training.memory` counts them, in place of DeepSpeed's own balancing."""
        ends = [self._front + sum(self._stage_layers[: i + 1]) for i in range(len(self._stage_layers))]
        self.parts = [0, *ends[:-1], ends[-1] + 1]
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])

    def names(self) -> dict[str, nn.Parameter]:
        """This stage's parameters by the whole model's names."""
        found: dict[str, nn.Parameter] = {}
        for name, p in self.named_parameters():
            if name.startswith("tied_modules.embed."):
                found["embed.weight"] = p
            else:
                layer, _, inner = name.partition(".")
                found[self._whole_names[int(layer)][inner]] = p
        return found

    def groups(self, base_width: int | None, weight_decay: float) -> list[dict]:
        """Optimizer groups of this stage: its blocks' matrices, and what is around them. Two on every stage, since ZeRO's
        norm of the gradients meets all stages once a group: a stage in the middle parts its matrices in two."""
        named = list(self.names().items())
        groups = parameter_groups(
            [p for n, p in named if n.startswith("blocks")],
            [p for n, p in named if not n.startswith("blocks")],
            self.shape.width,
            base_width,
            weight_decay,
        )
        if len(groups) == 1:
            (whole,) = groups
            groups = [{**whole, "params": part} for part in (whole["params"][:1], whole["params"][1:])]
        return groups
