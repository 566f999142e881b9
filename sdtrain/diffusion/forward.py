"""The forward process."""

from torch import Tensor


def add_noise(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x_t = alpha x0 + sigma noise (Ho et al. 2020, eq. 4).

    x0 and noise [B, C, h, w], alpha and sigma [B, 1, 1, 1], all float32.
    """
    return alpha * x0 + sigma * noise
