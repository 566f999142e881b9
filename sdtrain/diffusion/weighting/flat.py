"""The weights of the variational bound."""

from collections.abc import Callable

from torch import Tensor


class Flat:
    """w = 1 / density: every log_snr counts equally.

    The loss is the integral of the squared error of epsilon over log_snr, per dimension; the
    diffusion term of the variational bound is D / 2 times that (Kingma et al. 2021, eq. 18).

    Args:
        density: maps log_snr to its density under the schedule and the distribution of times
            (sdtrain.diffusion.density); it is not set in the yaml but passed when the weighting is
            built.
    """

    def __init__(self, *, density: Callable[[Tensor], Tensor]) -> None:
        self.density = density

    def __call__(self, log_snr: Tensor, jacobian: Tensor) -> Tensor:
        return 1 / self.density(log_snr)
