"""Euler's method and its ancestral form, as Karras et al. 2022 and k-diffusion write them.

Written for x / alpha as a function of sigma / alpha, both are steps of ddim; configs/sampler puts
them on the Karras grid.
"""

from torch import Tensor

from sdtrain.samplers.ddim import ddim
from sdtrain.samplers.sampler import Noise, Show
from sdtrain.schedules import Schedule


def euler(
    denoise, x: Tensor, grid: Tensor, schedule: Schedule, noise: Noise, show: Show | None = None
) -> Tensor:
    """ddim without noise: d(x / alpha) = eps d(sigma / alpha)."""
    return ddim(denoise, x, grid, schedule, noise, show)


def euler_ancestral(
    denoise,
    x: Tensor,
    grid: Tensor,
    schedule: Schedule,
    noise: Noise,
    show: Show | None = None,
    *,
    eta: float = 1.0,
) -> Tensor:
    """ddim with eta = 1: an Euler step to a lower noise level, then fresh noise back up."""
    return ddim(denoise, x, grid, schedule, noise, show, eta=eta)
