"""Condition on a class label."""

from collections.abc import Sequence

import torch
from torch import nn

from sdtrain.conditioning.interface import Conditioner, Conditioning, Inputs
from sdtrain.errors import UserError


class ClassLabel(Conditioner):
    """Gives a context [B, 1, D]: one learned token per class, and one more for dropped labels.

    Args:
        num_classes: number of classes of the data; sdtrain replaces None by it.
        context_dim: width D.
        class_names: names of the classes, by label; None if they have none.

    Raises UserError if these do not fit together.
    """

    reads = frozenset({"label"})

    def __init__(
        self,
        *,
        num_classes: int | None,
        context_dim: int,
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if num_classes is None or num_classes < 1:
            raise UserError(
                "must be at least 1", key="model.conditioner.num_classes", value=num_classes
            )
        if class_names and len(class_names) != num_classes:
            raise UserError(
                f"has {len(class_names)} names for {num_classes} classes",
                key="model.conditioner.class_names",
                value=list(class_names),
            )
        self.num_classes = num_classes
        self.context_dim = context_dim
        self.class_names = tuple(class_names or ())
        self.embedding = nn.Embedding(num_classes + 1, context_dim)

    def forward(self, inputs: Inputs) -> Conditioning:
        """Return context [B, 1, D]. The labels must be in [0, num_classes)."""
        tokens = torch.where(inputs.dropped, self.num_classes, inputs.labels)
        return Conditioning(context=self.embedding(tokens)[:, None])

    def check_data(self, num_classes: int) -> None:
        """Raise UserError if the data have another number of classes."""
        if self.num_classes != num_classes:
            raise UserError(  # surplus embeddings would stay untrained
                f"differs from the number of classes in the data, {num_classes}",
                key="model.conditioner.num_classes",
                value=self.num_classes,
                remedy=f"Set model.conditioner.num_classes={num_classes}.",
            )
