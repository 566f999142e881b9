"""Ancestral sampling of DDPM (Ho et al. 2020, algorithm 2)."""

from itertools import pairwise

from torch import Tensor

from sdtrain.samplers.sampler import Noise, Show, alpha_sigma_at, denoise_and_show
from sdtrain.schedules import Schedule


def ddpm(
    denoise, x: Tensor, grid: Tensor, schedule: Schedule, noise: Noise, show: Show | None = None
) -> Tensor:
    """x_s ~ q(x_s | x_t, x0), the Gaussian posterior between any two times s < t.

    Ho et al. 2020, eq. 6-7; Kingma et al. 2021, eq. 25. a = alpha_t / alpha_s,
    v = sigma_t^2 - a^2 sigma_s^2:
    mean = (a sigma_s^2 x_t + alpha_s v x0) / sigma_t^2,  variance = v sigma_s^2 / sigma_t^2.
    """
    for step, (t, s) in enumerate(pairwise(grid)):
        x0 = denoise_and_show(denoise, x, t, step, show)
        alpha_t, sigma_t = alpha_sigma_at(schedule, t, x)
        alpha_s, sigma_s = alpha_sigma_at(schedule, s, x)
        a = alpha_t / alpha_s
        v = (sigma_t**2 - a**2 * sigma_s**2).clamp(min=0)
        mean = (a * sigma_s**2 * x + alpha_s * v * x0) / sigma_t**2
        x = mean + v.sqrt() * sigma_s / sigma_t * noise(step)
    return denoise_and_show(denoise, x, grid[-1], len(grid) - 1, show)
