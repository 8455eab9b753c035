"""A decoder-only transformer, small enough to read and regular enough that a ladder of its sizes extrapolates.

Pre-norm (RMSNorm without a gain), causal self-attention with rotary or learned positions, an MLP with squared
ReLU, no biases, the output head tied to the embedding or its own matrix.

Initialisation and learning rates follow the width the way maximal-update parametrisation asks (Yang et al. 2022,
arXiv:2203.03466, table 8, Adam column), so that one learning rate serves every size of a ladder:

    hidden matrices   std 1/sqrt(fan_in),  learning rate x base_width / width
    embeddings        std 1,               learning rate as given
    logits            x . e / width        (the readout's 1/width multiplier, on tied and untied heads alike)

Residual branches start at zero (their last matrix is zero), so that depth changes nothing at the first step.

Shapes: B sequences, T positions, V vocabulary, W width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class GPTShape:
    """The sizes of one model. `launcher.accounting` counts its parameters and FLOPs without torch."""

    layers: int
    width: int
    heads: int
    context: int
    vocab: int = 256
    mlp_ratio: int = 4
    positions: str = "rotary"
    tied: bool = True


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
        width, self.heads = shape.width, shape.heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, shape.mlp_ratio * width, bias=False)
        self.down = nn.Linear(shape.mlp_ratio * width, width, bias=False)

    def forward(self, x: Tensor, table: Tensor | None) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            self.qkv(normed(x)).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        )
        if table is not None:
            q, k = rotate(q, table), rotate(k, table)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.relu(self.up(normed(x))).square())


class GPT(nn.Module):
    """Tokens in, mean cross-entropy out."""

    rotary: Tensor

    def __init__(self, shape: GPTShape) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(shape.vocab, shape.width)
        learned = shape.positions == "learned"
        self.position = nn.Embedding(shape.context, shape.width) if learned else None
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.head = None if shape.tied else nn.Linear(shape.width, shape.vocab, bias=False)
        # rotary alone: a buffer that is cheap to make and never saved
        self.register_buffer(
            "rotary", rotary_table(shape.context, shape.width // shape.heads), persistent=False
        )

    def initialise(self, seed: int) -> None:
        """Draw every parameter from `seed` alone, the same on every rank and in every layout."""
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in self.named_parameters():
                if name.endswith(("out.weight", "down.weight")):
                    p.zero_()
                elif name.startswith(("embed", "position", "head")):
                    p.normal_(0.0, 1.0, generator=draw)
                else:
                    p.normal_(0.0, p.shape[1] ** -0.5, generator=draw)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean loss in nats per token. tokens, targets (B, T), integers below V."""
        x = self.embed(tokens)
        if self.position is not None:
            x = x + self.position.weight[: tokens.shape[1]]
        table = None if self.position is not None else self.rotary
        for block in self.blocks:
            x = block(x, table)
        weight = self.embed.weight if self.head is None else self.head.weight
        logits = normed(x) @ weight.t() / self.shape.width
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def parameter_groups(self, base_width: int | None, weight_decay: float) -> list[dict]:
        """Optimizer groups with `lr_scale`, the factor on the base learning rate (1 without a base width)."""
        hidden = [p for n, p in self.named_parameters() if n.startswith("blocks")]
        outer = [p for n, p in self.named_parameters() if not n.startswith("blocks")]
        scale = base_width / self.shape.width if base_width else 1.0
        return [
            {"params": hidden, "lr_scale": scale, "weight_decay": weight_decay},
            {"params": outer, "lr_scale": 1.0, "weight_decay": 0.0},
        ]
