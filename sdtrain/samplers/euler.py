"""Euler's method and its ancestral form, as Karras et al. 2022 and k-diffusion write them.

In x / alpha over sigma / alpha both are steps of ddim; configs/sampler puts them on the Karras
grid.
"""

from torch import Tensor

from sdtrain.samplers.ddim import ddim
from sdtrain.samplers.walk import Noise, Show
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
    """ddim with eta = 1: a step of Euler's to the level below, and fresh noise back up from it."""
    return ddim(denoise, x, grid, schedule, noise, show, eta=eta)
