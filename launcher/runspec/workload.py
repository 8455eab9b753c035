"""What is trained: the built-in gpt, or the user's own function or script."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from launcher.runspec.keys import Count, Part, Positive, as_tuple, no_flag


class Gpt(Part):
    """The built-in decoder-only transformer. No biases, norms without a gain."""

    kind: Literal["gpt"] = "gpt"
    """The built-in model."""
    layers: Annotated[Positive, Field(le=1000)]
    """Transformer blocks."""
    width: Annotated[Positive, Field(le=1_000_000)]
    """Residual stream, in features."""
    heads: Positive
    """Attention heads; `width` must divide by it."""
    context: Positive
    """Tokens in a sequence."""
    vocab: Annotated[Count, Field(ge=2)] | None = None
    """Size of the vocabulary; with `tokenizer: bytes` it is 256 and may be left out."""
    positions: Literal["rotary", "learned"] = "rotary"
    """How a token knows its place: turned queries and keys, or a learned vector each."""
    tied: bool = True
    """The output head is the token embedding."""
    mlp_ratio: Annotated[Positive, Field(le=64)] = 4
    """Hidden features of the feed-forward layer, over `width`."""
    patch: Annotated[Literal[1, 2, 4], BeforeValidator(no_flag)] | None = None
    """Side of an image's patches, in pixels: the decoder reads an image (data.path: digits) before its text."""

    @property
    def is_script(self) -> bool:
        """Never: losscast's own loop trains it."""
        return False


class Entrypoint(Part):
    """The user's own training: a function or a script, called once on every rank. See `launcher.training.userrun`."""

    kind: Literal["entrypoint"] = "entrypoint"
    """A model of the user's own; follows from `entrypoint`."""
    entrypoint: Annotated[str, Field(pattern=r"^([A-Za-z_][\w.]*:[A-Za-z_]\w*|[\w./-]+\.py)$")]
    """module:function, or the path of a script (train.py) that runs unchanged."""
    args: dict[str, Any] | Annotated[tuple[str | int | float, ...], BeforeValidator(as_tuple)] = Field(
        default_factory=dict
    )
    """A mapping, handed to the function as it is; for a script the list of its arguments."""
    params: Positive | None = None
    """Parameters in the model, if known: lets `plan` estimate memory, hours and loss."""
    context: Positive | None = None
    """Tokens in a sequence, if there are sequences."""

    @property
    def is_script(self) -> bool:
        """A script, not a function. Its checkpoints are those it saves: checkpoints.every_steps says nothing of them."""
        return self.entrypoint.endswith(".py")


def which_workload(value: Any) -> str:
    """gpt or entrypoint, as a section that is yet to be checked says; another `kind` as it is written."""
    if isinstance(value, dict):
        return "entrypoint" if "entrypoint" in value else str(value.get("kind", "gpt"))
    return str(getattr(value, "kind", "gpt"))


Workload = Annotated[
    Annotated[Gpt, Tag("gpt")] | Annotated[Entrypoint, Tag("entrypoint")],
    Discriminator(which_workload),
]
