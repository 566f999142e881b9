"""The interface of a condition: its inputs, what the network gets, and the conditioner between.

A new condition is one file with a subclass of Conditioner and one yaml in
configs/model/conditioner/.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn


@dataclass(frozen=True)
class MaskedPictures:
    """B pictures of which a part is drawn anew.

    image: [B, 3, H, W] in [-1, 1]. mask: [B, 1, H, W], 1 where it is drawn anew, 0 where it is
    kept. encode: pictures to latents [B, C, h, w] of unit variance.
    """

    image: Tensor
    mask: Tensor
    encode: Callable[[Tensor], Tensor]

    def __getitem__(self, indices: Tensor) -> "MaskedPictures":
        """Return those with these indices [N] int64."""
        return MaskedPictures(self.image[indices], self.mask[indices], self.encode)


@dataclass
class Inputs:
    """The inputs of a conditioner for B samples.

    captions: B strings. labels: [B] int64. dropped: [B] bool, the samples that lose their
    condition, so that the network also learns to work without one; in training a share of
    model.caption_dropout, chosen by the uniforms in the batch. latent_size: (h, w) of the latents,
    for conditions that are concatenated to them. depth: [B, 1, H, W], inverse depth at the
    picture's size, 1 nearest and 0 farthest; None if the data have none. tokens: what the
    conditioner's `tokenize` has made of the captions, with empty ones in place of those dropped;
    None if that has not been done yet. context: [B, L, D], what a frozen conditioner has made of
    the captions before, with that of the empty one in place of those dropped; or None.
    channels_dropped: {name of a channel condition: [B] bool}, the samples that lose that one; those
    that are not named are kept. masked: the pictures to inpaint, for conditions that read "mask".
    """

    captions: Sequence[str]
    labels: Tensor
    dropped: Tensor
    latent_size: tuple[int, int]
    depth: Tensor | None = None
    tokens: Tensor | None = None
    context: Tensor | None = None
    channels_dropped: Mapping[str, Tensor] = field(default_factory=dict)
    masked: MaskedPictures | None = None


@dataclass
class Conditioning:
    """The condition in the form that the network takes, beside x_t and the time.

    context: [B, L, D], the sequence for cross-attention. channels: [B, K, h, w], maps of the
    latents' size that are concatenated to x_t as further input channels; None for K = 0.
    """

    context: Tensor
    channels: Tensor | None = None


READABLE = frozenset({"caption", "label", "depth", "mask"})
"""What a conditioner may have in `reads`."""


class Conditioner(nn.Module):
    """Turns Inputs into a Conditioning. A subclass overrides what differs from the defaults."""

    reads: ClassVar[frozenset[str]] = frozenset()
    """Which of "caption", "label" and "depth" it reads. Empty if there is no condition."""

    channels: int = 0
    """K: the number of channels that it concatenates to x_t."""

    context_dim: int
    """D: the width of the context."""

    num_classes: int | None = None
    """The labels that it can read are in [0, num_classes). None leaves this check to `forward`."""

    class_names: Sequence[str] = ()
    """Names of the classes, by label; empty if they are not known."""

    tokenize: Callable[[Sequence[str]], Tensor] | None = None
    """B captions -> tokens [B, L], for the workers of the data loader, which need a picklable
    function without the network. None if it reads no captions, or tokenizes them in `forward`.
    """

    frozen: bool = False
    """Whether it is excluded from training. Checkpoints do not store a frozen part; a run records
    the hash of its weights.
    """

    takes_context: ClassVar[bool] = False
    """Whether, if it is frozen, it takes `Inputs.context` instead of running. Its conditioning is
    then a context alone, a function of the caption, float32.
    """

    kept_files: ClassVar[Mapping[str, Sequence[str]]] = {}
    """{constructor argument: patterns}, for arguments that name a file, or a folder of files, that
    it reads beside its weights; the patterns select files in the folder. A run keeps a copy of
    these files, which should be small, and their hash.
    """

    def forward(self, inputs: Inputs) -> Conditioning:
        """Return the conditioning of the inputs."""
        raise NotImplementedError

    def check_data(self, num_classes: int) -> None:
        """Raise UserError if it cannot read data with this number of classes."""

    def count_truncated(self, captions: Sequence[str]) -> int:
        """Return how many of the captions it would truncate."""
        return 0

    @property
    def tokens_key(self) -> str | None:
        """Identifies what `count_truncated` depends on beside the captions, so that its result can
        be remembered; None if that is not known.
        """
        return None

    @property
    def max_tokens(self) -> int | None:
        """The number of tokens of a caption that it reads, with the two that mark begin and end;
        None if it reads no captions or has no such limit.
        """
        return None
