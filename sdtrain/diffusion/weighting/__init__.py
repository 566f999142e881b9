"""Weights of the loss over noise levels, one per file.

They are weights on the squared error of epsilon, so that they mean the same under every prediction.
"""

from typing import Protocol

from torch import Tensor

from sdtrain.diffusion.prediction import Prediction

NEAR_ZERO = 1e-12


class Weighting(Protocol):
    """A weight as a function of the level."""

    def __call__(self, log_snr: Tensor, jacobian: Tensor) -> Tensor:
        """The weight w on squared error of epsilon at log_snr.

        jacobian: J = (d eps / d output)^2, of the same shape; both float64.
        """
        ...


def charge(weighting: Weighting, prediction: Prediction, alpha: Tensor, sigma: Tensor) -> Tensor:
    """w J: what is charged per squared error of the network's own output.

    alpha and sigma float64; the same shape. Where one of them is 0 the product is a limit, often of
    inf times 0: it is taken just beside, at 1e-12.
    """
    alpha = alpha.clamp(min=NEAR_ZERO)
    sigma = sigma.clamp(min=NEAR_ZERO)
    jacobian = prediction.jacobian(alpha, sigma)
    return weighting(2 * (alpha / sigma).log(), jacobian) * jacobian


__all__ = ["Weighting", "charge"]
