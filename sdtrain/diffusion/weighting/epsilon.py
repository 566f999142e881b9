"""Weight one on the error of epsilon, whatever the network predicts."""

import torch
from torch import Tensor


class Epsilon:
    """w = 1. Under prediction=epsilon it is the same as `simple`."""

    def __call__(self, log_snr: Tensor, jacobian: Tensor) -> Tensor:
        return torch.ones_like(log_snr)
