"""Sigmoid weighting of the loss."""

import math

from torch import Tensor

from sdtrain.errors import UserError


class Sigmoid:
    """w = 1 / (1 + exp(log_snr - bias)).

    Kingma and Gao 2023, section 4; Hoogeboom et al. 2024, eq. 7.
    """

    def __init__(self, *, bias: float = 2.0) -> None:
        if not math.isfinite(bias):
            raise UserError("must be finite", key="weighting.bias", value=bias)
        self.bias = bias

    def __call__(self, log_snr: Tensor, jacobian: Tensor) -> Tensor:
        return (self.bias - log_snr).sigmoid()
