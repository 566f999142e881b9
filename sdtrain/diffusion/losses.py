"""Losses as functions of the error target - output, element by element."""

import torch
from torch import Tensor

from sdtrain.errors import UserError


class MSE:
    """error^2."""

    def __call__(self, error: Tensor) -> Tensor:
        return error.square()


class Huber:
    """error^2 up to delta, beyond it 2 delta |error| - delta^2 (Huber 1964, times 2).

    It limits the gradient of outliers.
    """

    def __init__(self, *, delta: float = 1.0) -> None:
        if not delta > 0:
            raise UserError("must be above 0", key="loss.delta", value=delta)
        self.delta = delta

    def __call__(self, error: Tensor) -> Tensor:
        beyond = self.delta * (2 * error.abs() - self.delta)
        return torch.where(error.abs() <= self.delta, error.square(), beyond)
