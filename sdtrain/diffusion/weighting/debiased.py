"""Debiased weights."""

import torch
from torch import Tensor

from sdtrain.errors import UserError


class Debiased:
    """w = min(1 / sqrt(SNR), max_weight) on squared error of epsilon.

    Yu et al. 2023, "Debias the Training of Diffusion Models", eq. 12. An error of epsilon is an
    error of x0 that is 1 / sqrt(SNR) times as large. With weight one, the network learns last what
    little of the data is left at the highest noise levels, where the prompt decides what the
    picture will be. The bound is an addition of ours: without it, a schedule that ends near
    alpha = 0 would be trained on its last few levels only.
    """

    def __init__(self, *, max_weight: float = 20.0) -> None:
        if not max_weight > 0:
            raise UserError("must be above 0", key="weighting.max_weight", value=max_weight)
        self.max_weight = max_weight

    def __call__(self, log_snr: Tensor, jacobian: Tensor) -> Tensor:
        return torch.exp(-log_snr / 2).clamp(max=self.max_weight)
