"""What the network predicts, and how x0 and eps are computed from its output."""

import torch
from torch import Tensor

from sdtrain.errors import UserError


class Prediction:
    """The network's output y = p x0 + q eps, with (p, q) a function of (alpha, sigma).

    All else follows from two equations:

        x = alpha x0 + sigma eps,  y = p x0 + q eps,  d = alpha q - sigma p:
        x0 = (q x - sigma y) / d,  eps = (alpha y - p x) / d,  d eps / d y = alpha / d at a given x.

    x, x0, noise and output are [B, C, h, w]; alpha and sigma [B, 1, 1, 1].
    """

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return (p, q), each in the shape of alpha."""
        raise NotImplementedError

    def determinant(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return d; where it is 0, x0 cannot be recovered from the output."""
        p, q = self.coefficients(alpha, sigma)
        return alpha * q - sigma * p

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return y, the regression target of the output."""
        p, q = self.coefficients(alpha, sigma)
        return p * x0 + q * noise

    def x0(self, x: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return the x0 that the output at x implies."""
        _, q = self.coefficients(alpha, sigma)
        return (q * x - sigma * output) / self.determinant(alpha, sigma)

    def epsilon(self, x: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return the eps that the output at x implies."""
        p, _ = self.coefficients(alpha, sigma)
        return (alpha * output - p * x) / self.determinant(alpha, sigma)

    def jacobian(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return J = (d eps / d output)^2, squared error of epsilon per squared error of output."""
        return (alpha / self.determinant(alpha, sigma)) ** 2

    def network_input(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return the network's input for x."""
        return x


class Epsilon(Prediction):
    """The noise: x0 = (x - sigma eps) / alpha, which cannot recover x0 at alpha = 0.

    Ho et al. 2020, eq. 12.
    """

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(alpha), torch.ones_like(alpha)


class X0(Prediction):
    """The clean data: eps = (x - alpha x0) / sigma."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(alpha), torch.zeros_like(alpha)

    def x0(self, x: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return output  # also where sigma is 0


class V(Prediction):
    """The network predicts v = alpha eps - sigma x0.

    Hence x0 = (alpha x - sigma v) / (alpha^2 + sigma^2).

    Salimans and Ho 2022, section 4.
    """

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return -sigma, alpha


class Flow(Prediction):
    """u = eps - x0, the velocity of the straight path: x0 = (x - sigma u) / (alpha + sigma).

    Lipman et al. 2023; Liu et al. 2022.
    """

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(alpha), torch.ones_like(alpha)


class EDM(Prediction):
    """F of Karras et al. 2022, table 1: D = c_skip y + c_out F(c_in y) with y = x / alpha.

    For latents of standard deviation sigma_data. With r^2 = sigma^2 + (alpha sigma_data)^2 the
    three coefficients amount to F = (sigma x0 / sigma_data - alpha sigma_data eps) / r, and the
    network's input is x / r, of unit variance at every level. At sigma_data = 1, F is -v, and r is
    1 where alpha^2 + sigma^2 is 1.
    """

    def __init__(self, *, sigma_data: float = 1.0) -> None:
        if not sigma_data > 0:
            raise UserError("must be above 0", key="prediction.sigma_data", value=sigma_data)
        self.sigma_data = sigma_data

    def root(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return r, in the shape of alpha."""
        return (sigma**2 + (alpha * self.sigma_data) ** 2).sqrt()

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        root = self.root(alpha, sigma)
        return sigma / (self.sigma_data * root), -alpha * self.sigma_data / root

    def network_input(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return x / self.root(alpha, sigma)
