"""Min-SNR weights."""

from torch import Tensor


class MinSNR:
    """w = min(1, gamma / SNR) (Hang et al. 2023, section 3.4, there min(SNR, gamma) on the error of x0)."""

    def __init__(self, *, gamma: float = 5.0) -> None:
        if not gamma > 0:
            raise ValueError(f"weighting.gamma={gamma:g} must be above 0.")
        self.gamma = gamma

    def __call__(self, log_snr: Tensor, jacobian: Tensor) -> Tensor:
        return (self.gamma * (-log_snr).exp()).clamp(max=1)
