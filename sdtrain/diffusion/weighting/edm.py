"""EDM weighting of the loss."""

from torch import Tensor

from sdtrain.errors import UserError


class EDM:
    """w = 1 + sigma^2 / (alpha sigma_data)^2.

    As a weight on the squared error of x0 it is (s^2 + sigma_data^2) / (s sigma_data)^2 at
    s = sigma / alpha (Karras et al. 2022, table 1).
    sigma_data: the standard deviation of the latents.
    """

    def __init__(self, *, sigma_data: float = 1.0) -> None:
        if not sigma_data > 0:
            raise UserError("must be above 0", key="weighting.sigma_data", value=sigma_data)
        self.sigma_data = sigma_data

    def __call__(self, log_snr: Tensor, jacobian: Tensor) -> Tensor:
        return 1 + (-log_snr).exp() / self.sigma_data**2
