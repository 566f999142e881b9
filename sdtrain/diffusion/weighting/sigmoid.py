"""Sigmoid weights."""

from torch import Tensor


class Sigmoid:
    """w = 1 / (1 + exp(log_snr - bias)) (Kingma and Gao 2023, section 4; Hoogeboom et al. 2024, eq. 7)."""

    def __init__(self, *, bias: float = 2.0) -> None:
        self.bias = bias

    def __call__(self, log_snr: Tensor, jacobian: Tensor) -> Tensor:
        return (self.bias - log_snr).sigmoid()
