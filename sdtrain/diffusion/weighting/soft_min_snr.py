"""Min-SNR weights with a smooth transition instead of a corner."""

import math

from torch import Tensor

from sdtrain.errors import UserError


class SoftMinSNR:
    """w = gamma / (SNR + gamma): `sigmoid` with bias ln(gamma).

    On the squared error of x0 it is 1 / (1 / SNR + 1 / gamma) (Crowson et al. 2024, appendix).
    """

    def __init__(self, *, gamma: float = 4.0) -> None:
        if not gamma > 0:
            raise UserError("must be above 0", key="weighting.gamma", value=gamma)
        self.gamma = gamma

    def __call__(self, log_snr: Tensor, jacobian: Tensor) -> Tensor:
        return (math.log(self.gamma) - log_snr).sigmoid()
