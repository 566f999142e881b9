"""The interface of a condition that the UNet reads as further input channels, beside x_t.

A new one is one file with a subclass of ChannelCondition and one yaml in configs/model/channels/.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from sdtrain.conditioning.interface import Inputs


class ChannelCondition(nn.Module):
    """Turns Inputs into maps of the latents' size. It has no weights.

    Args:
        dropout: share of training samples without this condition. It is drawn for each condition
            apart, so that guidance can lead along one and leave the other.

    Raises ValueError for a dropout outside [0, 1].
    """

    reads: ClassVar[frozenset[str]] = frozenset()
    """Which of "caption", "label", "depth" and "mask" it reads."""

    channels: int
    """K: the number of channels that it concatenates to x_t."""

    def __init__(self, *, dropout: float) -> None:
        super().__init__()
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout={dropout} must lie in [0, 1]")  # the key is known elsewhere
        self.dropout = dropout

    def maps(self, inputs: Inputs) -> Tensor:
        """Return the maps [B, K, h, w] of all samples."""
        raise NotImplementedError

    def null(self, maps: Tensor) -> Tensor:
        """Return what takes the place of the maps [B, K, h, w] of a sample without this condition.

        By default, zeros.
        """
        return torch.zeros_like(maps)

    def forward(self, inputs: Inputs, dropped: Tensor) -> Tensor:
        """Return the maps [B, K, h, w]. dropped: [B] bool, the samples without this condition."""
        maps = self.maps(inputs)
        return torch.where(dropped.view(-1, 1, 1, 1), self.null(maps), maps)
