"""A class label as condition."""

import torch
from torch import Tensor, nn

from sdtrain.types import Conditioning


class ClassLabel(nn.Module):
    """One learned token per class, and one more for a dropped label. context [B, 1, D].

    Args:
        num_classes: the data's number of classes.
        context_dim: width D.
    """

    reads = "label"

    def __init__(self, *, num_classes: int, context_dim: int) -> None:
        super().__init__()
        self.num_classes, self.context_dim = num_classes, context_dim
        self.embedding = nn.Embedding(num_classes + 1, context_dim)

    def forward(self, captions: list[str], labels: Tensor, drop: Tensor) -> Conditioning:
        """labels [B] int64 in [0, num_classes), drop [B] bool."""
        return Conditioning(
            context=self.embedding(torch.where(drop, self.num_classes, labels))[:, None]
        )
