"""What a condition is made of, what the network is told, and the class between the two.

A new condition is one file with a subclass of Conditioner and one yaml in
configs/model/conditioner/.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn


@dataclass
class Inputs:
    """All that the condition of B samples may be made of.

    captions: B strings. labels [B] int64. dropped [B] bool: samples that lose their condition, so
    that the network also learns to do without it; training draws them from uniforms that travel
    with the batch, by the share model.caption_dropout. latent_size: (h, w) of the latents, for
    conditions that are laid beside them. depth [B, 1, H, W]: inverse depth at the picture's size, 1
    nearest and 0 farthest; None where the data have none.
    """

    captions: Sequence[str]
    labels: Tensor
    dropped: Tensor
    latent_size: tuple[int, int]
    depth: Tensor | None = None


@dataclass
class Conditioning:
    """What the network is told beside x_t and the time.

    context [B, L, D]: the sequence that cross-attention reads. channels [B, K, h, w]: maps that are
    laid beside x_t as further input channels, of the latents' size; None for K = 0.
    """

    context: Tensor
    channels: Tensor | None = None


READABLE = frozenset({"caption", "label", "depth"})
"""What a conditioner may read."""


class Conditioner(nn.Module):
    """Inputs -> Conditioning. A subclass says what it reads, and overrides what differs from the
    defaults here.
    """

    reads: ClassVar[frozenset[str]] = frozenset()
    """Of "caption", "label" and "depth": what it makes the condition of. Empty where there is no
    condition.
    """

    channels: int = 0
    """K: how many input channels it lays beside x_t."""

    context_dim: int
    """D: width of the context."""

    num_classes: int | None = None
    """Of one that reads labels: it knows those in [0, num_classes). None leaves it to `forward` to
    refuse others.
    """

    class_names: Sequence[str] = ()
    """What those classes are called, as far as that is known."""

    frozen: bool = False
    """Whether it is left as it is while the rest is trained. A frozen part is in no checkpoint; a
    run remembers the hash of its weights.
    """

    kept_files: ClassVar[Mapping[str, Sequence[str]]] = {}
    """Of the arguments that name a file, or a folder of files, which it reads beside its weights:
    the patterns of those in the folder. They are small: a run keeps a copy, and their hash.
    """

    def forward(self, inputs: Inputs) -> Conditioning:
        raise NotImplementedError

    def check_data(self, num_classes: int) -> None:
        """Raises UserError where it cannot read data of so many classes."""

    def count_truncated(self, captions: Sequence[str]) -> int:
        """How many of the captions it reads only the beginning of."""
        return 0

    @property
    def max_tokens(self) -> int | None:
        """Tokens of a caption that it reads, with the two that mark begin and end; None where that
        is no question.
        """
        return None
