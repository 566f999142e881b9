"""A class label as condition."""

import torch
from torch import nn

from sdtrain.conditioning.interface import Conditioner, Conditioning, Inputs
from sdtrain.errors import UserError


class ClassLabel(Conditioner):
    """One learned token per class, and one more for a dropped label. context [B, 1, D].

    Args:
        num_classes: the data's number of classes.
        context_dim: width D.
    """

    reads = frozenset({"label"})

    def __init__(self, *, num_classes: int, context_dim: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.context_dim = context_dim
        self.embedding = nn.Embedding(num_classes + 1, context_dim)

    def forward(self, inputs: Inputs) -> Conditioning:
        """labels in [0, num_classes)."""
        tokens = torch.where(inputs.dropped, self.num_classes, inputs.labels)
        return Conditioning(context=self.embedding(tokens)[:, None])

    def check_data(self, num_classes: int) -> None:
        if self.num_classes < num_classes:
            raise UserError(
                f"is less than the {num_classes} classes of the data",
                key="model.conditioner.num_classes",
                value=self.num_classes,
                remedy=f"Set model.conditioner.num_classes={num_classes}.",
            )
