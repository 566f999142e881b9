"""Min-SNR weights without the corner."""

import math

from torch import Tensor


class SoftMinSNR:
    """w = gamma / (SNR + gamma), 1 / (1 / SNR + 1 / gamma) on the error of x0 (Crowson et al. 2024, appendix): `sigmoid` with bias ln(gamma)."""

    def __init__(self, *, gamma: float = 4.0) -> None:
        if not gamma > 0:
            raise ValueError(f"weighting.gamma={gamma:g} must be above 0.")
        self.gamma = gamma

    def __call__(self, log_snr: Tensor, jacobian: Tensor) -> Tensor:
        return (math.log(self.gamma) - log_snr).sigmoid()
