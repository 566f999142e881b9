"""No condition, for unconditional diffusion."""

import torch

from sdtrain.conditioning.interface import Conditioner, Conditioning, Inputs


class Nothing(Conditioner):
    """Returns a context [B, 1, D] of zeros, as cross-attention needs a sequence of some length."""

    def __init__(self, *, context_dim: int) -> None:
        super().__init__()
        self.context_dim = context_dim
        self.register_buffer("token", torch.zeros(1, 1, context_dim), persistent=False)

    def forward(self, inputs: Inputs) -> Conditioning:
        return Conditioning(context=self.token.expand(len(inputs.dropped), 1, self.context_dim))
