"""What an error of the output costs, element by element."""

import torch
from torch import Tensor


class MSE:
    """error^2."""

    def __call__(self, error: Tensor) -> Tensor:
        return error.square()


class Huber:
    """error^2 up to delta, beyond it 2 delta |error| - delta^2: a few wild pixels pull no harder than others (Huber 1964, times 2)."""

    def __init__(self, *, delta: float = 1.0) -> None:
        if not delta > 0:
            raise ValueError(f"loss.delta={delta:g} must be above 0.")
        self.delta = delta

    def __call__(self, error: Tensor) -> Tensor:
        return torch.where(
            error.abs() <= self.delta, error.square(), self.delta * (2 * error.abs() - self.delta)
        )
