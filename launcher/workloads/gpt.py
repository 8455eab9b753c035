"""A decoder-only transformer, small enough to read and regular enough that a ladder of its sizes extrapolates.

Pre-norm (RMSNorm without a gain), causal self-attention with rotary or learned positions, an MLP with squared
ReLU, no biases, the output head tied to the embedding or its own matrix.

Initialisation and learning rates follow the width the way maximal-update parametrisation asks (Yang et al. 2022,
arXiv:2203.03466, table 8, Adam column), so that one learning rate serves every size of a ladder:

    hidden matrices   std 1/sqrt(fan_in),  learning rate x base_width / width
    embeddings        std 1,               learning rate as given
    logits            x . e / width        (the readout's 1/width multiplier, on tied and untied heads alike)

Residual branches start at zero (their last matrix is zero), so that depth changes nothing at the first step.

With images the model is KOSMOS-like (Huang et al. 2023, arXiv:2302.14045): one decoder reads an image's patches, each
embedded by one matrix, and then the text about it; loss is on the text alone.

The same parts make the whole model here and the stages of `launcher.workloads.gpt_pipe`. Every parameter is drawn from
the seed in one order over the whole model, so that all layouts start from the same numbers.

Shapes: B sequences, T positions, V vocabulary, W width, P patches an image, A values a patch.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IGNORED = -100
"""A target that counts for nothing: the position of a patch."""


@dataclass(frozen=True)
class GPTShape:
    """The sizes of one model. `launcher.runspec.accounting` counts its parameters and FLOPs without torch."""

    layers: int
    width: int
    heads: int
    context: int
    vocab: int = 256
    mlp_ratio: int = 4
    positions: str = "rotary"
    tied: bool = True
    patch_values: int = 0
    """Numbers in one patch of an image; 0 is a model of text alone."""


def rotary_table(context: int, head_width: int) -> Tensor:
    """Cosines and sines of every position, (2, context, head_width // 2). Su et al. 2021, arXiv:2104.09864."""
    even = head_width // 2 * 2
    frequency = 1.0 / (10_000 ** (torch.arange(0, even, 2, dtype=torch.float32) / even))
    angle = torch.outer(torch.arange(context, dtype=torch.float32), frequency)
    return torch.stack((angle.cos(), angle.sin()))


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """x (B, heads, T, head_width) turned by its positions; pairs are (first half, second half), and the last
    feature of an odd width stays as it is."""
    cos, sin = table[0, : x.shape[-2]].to(x.dtype), table[1, : x.shape[-2]].to(x.dtype)
    half = table.shape[-1]
    a, b = x[..., :half], x[..., half : 2 * half]
    return torch.cat((a * cos - b * sin, a * sin + b * cos, x[..., 2 * half :]), dim=-1)


def normed(x: Tensor) -> Tensor:
    """RMSNorm over the last axis, without a gain."""
    return F.rms_norm(x, (x.shape[-1],))


class Block(nn.Module):
    """Attention, then the MLP, each added to the stream. (B, T, W) to (B, T, W)."""

    def __init__(self, shape: GPTShape) -> None:
        super().__init__()
        width, self.head_width = shape.width, shape.width // shape.heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, shape.mlp_ratio * width, bias=False)
        self.down = nn.Linear(shape.mlp_ratio * width, width, bias=False)

    def forward(self, x: Tensor, table: Tensor | None) -> Tensor:
        batch, length, _ = x.shape
        # a tensor-parallel rank has some of the heads: how many, its share of the projection tells
        q, k, v = self.qkv(normed(x)).view(batch, length, 3, -1, self.head_width).permute(2, 0, 3, 1, 4)
        if table is not None:
            q, k = rotate(q, table), rotate(k, table)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, -1))
        return x + self.down(F.relu(self.up(normed(x))).square())


def run_block(block: Block, x: Tensor, table: Tensor | None, recompute: bool) -> Tensor:
    """The block's output; with `recompute` backward computes everything in it again from `x`."""
    if recompute and torch.is_grad_enabled():
        kept: Tensor = checkpoint(block, x, table, use_reentrant=False, preserve_rng_state=False)  # type: ignore[assignment]
        return kept
    return block(x, table)


def place(x: Tensor, position: Tensor | None) -> Tensor:
    """The stream with what positions add to it, if anything."""
    return x if position is None else x + position[: x.shape[1]]


def logits_of(x: Tensor, readout: Tensor) -> Tensor:
    """(B, T, V) scores of the stream (B, T, W) under the readout (V, W)."""
    return normed(x) @ readout.t() / readout.shape[1]


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean loss in nats per token over the targets that count."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)


def draw(
    named: Iterable[tuple[str, Tensor]],
    whole: GPTShape,
    seed: int,
    opened: Callable[[Tensor], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Fill the parameters `named` (whole-model name, parameter) with what the whole model holds there under `seed`.

    Every parameter of the whole model is drawn, in its order, and thrown away where it is not asked for: the numbers are
    the same whoever holds them, and memory never exceeds one matrix more than what is held.

    opened  within opened(parameter) it has its whole shape, and what is written is kept: for parameters that lie in shards
    """
    mine = dict(named)
    numbers = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        order = [(name, p.shape) for name, p in GPT(whole).named_parameters()]
    with torch.no_grad():
        for name, size in order:
            p = mine.get(name)
            with nullcontext() if p is None else opened(p):
                if name.endswith(("out.weight", "down.weight")):
                    if p is not None:
                        p.zero_()
                    continue
                std = 1.0 if name.startswith(("embed", "position", "head")) else size[1] ** -0.5
                in_place = p is not None and p.device.type == "cpu" and p.dtype == torch.float32
                here = p if p is not None and in_place else torch.empty(size)
                here.normal_(0.0, std, generator=numbers)
                if p is not None and p is not here:
                    p.copy_(here)


def parameter_groups(
    hidden: Iterable[Tensor], outer: Iterable[Tensor], width: int, base_width: int | None, weight_decay: float
) -> list[dict]:
    """Optimizer groups with `lr_scale`, the factor on the base learning rate (1 without a base width). None is empty."""
    groups = [
        {
            "params": list(hidden),
            "lr_scale": base_width / width if base_width else 1.0,
            "weight_decay": weight_decay,
        },
        {"params": list(outer), "lr_scale": 1.0, "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


class GPT(nn.Module):
    """Tokens in, mean cross-entropy out."""

    rotary: Tensor

    def __init__(self, shape: GPTShape, recompute: bool = False) -> None:
        super().__init__()
        self.shape, self.recompute = shape, recompute
        self.embed = nn.Embedding(shape.vocab, shape.width)
        learned = shape.positions == "learned"
        self.position = nn.Embedding(shape.context, shape.width) if learned else None
        self.patches = nn.Linear(shape.patch_values, shape.width, bias=False) if shape.patch_values else None
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.head = None if shape.tied else nn.Linear(shape.width, shape.vocab, bias=False)
        # rotary alone: a buffer that is cheap to make and never saved
        self.register_buffer(
            "rotary", rotary_table(shape.context, shape.width // shape.heads), persistent=False
        )

    def initialise(
        self, seed: int, opened: Callable[[Tensor], AbstractContextManager[Any]] = nullcontext
    ) -> None:
        """Draw every parameter from `seed` alone, the same on every rank and in every layout; `opened` as for `draw`."""
        draw(self.named_parameters(), self.shape, seed, opened)

    def forward(self, *batch: Tensor) -> Tensor:
        """Mean loss in nats per token. batch: tokens (B, T) and targets (B, T); with images patches (B, P, A), tokens
        (B, T - P) and targets (B, T). Tokens and targets are integers below V, a target may be IGNORED."""
        *inputs, targets = batch
        x = self.embed(inputs[-1])
        if self.patches is not None:
            x = torch.cat((self.patches(inputs[0].to(x.dtype)), x), dim=1)
        x = place(x, None if self.position is None else self.position.weight)
        table = None if self.position is not None else self.rotary
        for block in self.blocks:
            x = run_block(block, x, table, self.recompute)  # type: ignore[arg-type]
        return loss_of(logits_of(x, self.embed.weight if self.head is None else self.head.weight), targets)

    def groups(self, base_width: int | None, weight_decay: float) -> list[dict]:
        """Optimizer groups: the blocks' matrices, and what is around them."""
        named = list(self.named_parameters())
        return parameter_groups(
            [p for n, p in named if n.startswith("blocks")],
            [p for n, p in named if not n.startswith("blocks")],
            self.shape.width,
            base_width,
            weight_decay,
        )
