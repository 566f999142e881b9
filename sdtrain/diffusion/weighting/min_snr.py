"""Min-SNR weighting of the loss."""

from torch import Tensor

from sdtrain.errors import UserError


class MinSNR:
    """w = min(1, gamma / SNR), which is min(SNR, gamma) on the squared error of x0.

    Hang et al. 2023, section 3.4.
    """

    def __init__(self, *, gamma: float = 5.0) -> None:
        if not gamma > 0:
            raise UserError("must be above 0", key="weighting.gamma", value=gamma)
        self.gamma = gamma

    def __call__(self, log_snr: Tensor, jacobian: Tensor) -> Tensor:
        return (self.gamma * (-log_snr).exp()).clamp(max=1)
