"""No condition: unconditional diffusion."""

import torch
from torch import Tensor, nn

from sdtrain.types import Conditioning


class Nothing(nn.Module):
    """A context of one zero token, for networks whose cross-attention wants something to look at. context [B, 1, D] is all zeros."""

    reads = "nothing"

    def __init__(self, *, context_dim: int) -> None:
        super().__init__()
        self.context_dim = context_dim
        self.register_buffer("token", torch.zeros(1, 1, context_dim), persistent=False)

    def forward(self, captions: list[str], labels: Tensor, drop: Tensor) -> Conditioning:
        return Conditioning(context=self.token.expand(len(drop), 1, self.context_dim))
