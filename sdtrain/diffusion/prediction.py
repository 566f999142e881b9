"""What the network outputs, and how x0 is read from it."""

from typing import Protocol

import torch
from torch import Tensor


class Prediction(Protocol):
    """Stateless. x, x0, noise and output are [B, C, h, w]; alpha and sigma [B, 1, 1, 1]."""

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor: ...

    def x0(self, x: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor: ...

    def jacobian(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """(d epsilon / d output)^2: turns squared error of the output into squared error of epsilon."""
        ...


class Epsilon:
    """The network predicts the noise: target eps, x0 = (x - sigma eps) / alpha (Ho et al. 2020, eq. 12)."""

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return noise

    def x0(self, x: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x - sigma * output) / alpha

    def jacobian(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return torch.ones_like(alpha)
