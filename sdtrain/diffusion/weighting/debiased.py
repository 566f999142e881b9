"""Debiased weighting of the loss."""

import torch
from torch import Tensor

from sdtrain.errors import UserError


class Debiased:
    """Debiased weighting: w = min(1 / sqrt(SNR), max_weight) on the squared error of epsilon.

    Yu et al. 2023, "Debias the Training of Diffusion Models", eq. 12. An error of epsilon
    corresponds to an error of x0 that is 1 / sqrt(SNR) times as large. With constant weight, the
    highest noise levels are learned last, although the prompt matters most there. The bound
    max_weight is ours: without it, the last few levels would dominate the loss of a schedule that
    ends near alpha = 0.
    """

    def __init__(self, *, max_weight: float = 20.0) -> None:
        if not max_weight > 0:
            raise UserError("must be above 0", key="weighting.max_weight", value=max_weight)
        self.max_weight = max_weight

    def __call__(self, log_snr: Tensor, jacobian: Tensor) -> Tensor:
        return torch.exp(-log_snr / 2).clamp(max=self.max_weight)
