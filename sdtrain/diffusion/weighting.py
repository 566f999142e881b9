"""Weights of the loss over noise levels, said in squared error of epsilon, so that they mean the same under every prediction."""

from typing import Protocol

from torch import Tensor


class Weighting(Protocol):
    def __call__(self, log_snr: Tensor, jacobian: Tensor) -> Tensor:
        """The weight on squared error of epsilon at log_snr; jacobian (d eps / d output)^2 of the same shape."""
        ...


class Simple:
    """Weight one on the network's own target (L_simple, Ho et al. 2020, eq. 14): w = 1 / J."""

    def __call__(self, log_snr: Tensor, jacobian: Tensor) -> Tensor:
        return 1 / jacobian
