"""Parameters, FLOPs and tokens, counted by stated conventions. Pure arithmetic, no torch.

Parameters   all of them: token embedding and learned positions included, a tied head once. No biases, and
             norms without a gain have none.
FLOPs        one multiply-add is 2. Training a token costs 6 per parameter: 2 forward, 4 backward. The embedding
             is counted as if multiplied (Kaplan et al. 2020 leave it out; Hoffmann et al. 2022 keep it). Attention
             scores are apart: 12 * layers * width * context a token, the causal half not taken off.
Loss         nats per token of the run's own tokenizer.

Sources: Kaplan et al. 2020, arXiv:2001.08361, section 2.1; Hoffmann et al. 2022, arXiv:2203.15556, appendix F;
Chowdhery et al. 2022, arXiv:2204.02311, appendix B (model FLOPs utilisation, attention term).
"""

from dataclasses import dataclass

from launcher.runspec.model import Gpt, RunSpec

CONVENTION = {
    "embeddings_counted": True,
    "tied_once": True,
    "flops_per_param_token": 6,
    "unit": "nats/token",
}
"""What a law fitted to our runs must say of itself to be compared with them."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """Counts of parameters by part; `total` is the N of a scaling law."""

    embedding: int
    positions: int
    attention: int
    mlp: int
    head: int
    patches: int = 0
    """The matrix that embeds an image's patches."""

    @property
    def blocks(self) -> int:
        """Those of the transformer blocks: all but embeddings, positions and head."""
        return self.attention + self.mlp

    @property
    def total(self) -> int:
        return self.embedding + self.positions + self.patches + self.blocks + self.head


def gpt_parameters(gpt: Gpt) -> Parameters:
    """Count by part. Raises ValueError while the vocabulary is unknown."""
    if gpt.vocab is None:
        raise ValueError("vocab is unknown: set workload.vocab, or data.tokenizer to bytes")
    w = gpt.width
    return Parameters(
        embedding=gpt.vocab * w,
        positions=gpt.context * w if gpt.positions == "learned" else 0,
        attention=gpt.layers * 4 * w * w,
        mlp=gpt.layers * 2 * gpt.mlp_ratio * w * w,
        head=0 if gpt.tied else gpt.vocab * w,
        patches=gpt.patch**2 * w if gpt.patch else 0,
    )


def parameter_count(spec: RunSpec) -> int | None:
    """N of this run; None for a user's own workload that states none."""
    if isinstance(spec.workload, Gpt):
        return gpt_parameters(spec.workload).total
    return spec.workload.params


def flops_per_token(spec: RunSpec) -> float | None:
    """6 N: what scaling laws mean by compute. None where N is unknown."""
    n = parameter_count(spec)
    return None if n is None else 6.0 * n


def attention_flops_per_token(spec: RunSpec) -> float:
    """Attention scores and their product with the values, forward and backward; counted for MFU, not for laws."""
    if not isinstance(spec.workload, Gpt):
        return 0.0
    return 12.0 * spec.workload.layers * spec.workload.width * spec.workload.context


def total_tokens(spec: RunSpec) -> int:
    """Tokens the run will have seen at its end: whole batches."""
    return spec.total_steps * spec.train.batch_tokens


def total_flops(spec: RunSpec) -> float | None:
    """6 N D over the whole run; None where N is unknown."""
    per_token = flops_per_token(spec)
    return None if per_token is None else per_token * total_tokens(spec)
