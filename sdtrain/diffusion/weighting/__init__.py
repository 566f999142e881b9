"""Weights of the loss by noise level, one per file.

They apply to the squared error of epsilon, so that they mean the same under every prediction.
"""

from typing import Protocol

from torch import Tensor

from sdtrain.diffusion.prediction import Prediction

NEAR_ZERO = 1e-12


class Weighting(Protocol):
    """A weight as a function of the noise level."""

    def __call__(self, log_snr: Tensor, jacobian: Tensor) -> Tensor:
        """Return the weight w on the squared error of epsilon at log_snr.

        jacobian: J = (d eps / d output)^2, of the same shape; both float64.
        """
        ...


def output_weight(
    weighting: Weighting, prediction: Prediction, alpha: Tensor, sigma: Tensor
) -> Tensor:
    """Return w J, the weight on the squared error of the network's own output.

    alpha, sigma: float64, of one shape, which the result has too. Where one of them is 0 the
    product is a limit, often of inf times 0; it is evaluated at 1e-12 instead.
    """
    alpha = alpha.clamp(min=NEAR_ZERO)
    sigma = sigma.clamp(min=NEAR_ZERO)
    jacobian = prediction.jacobian(alpha, sigma)
    return weighting(2 * (alpha / sigma).log(), jacobian) * jacobian


__all__ = ["Weighting", "output_weight"]
