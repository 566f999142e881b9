"""DDIM (Song et al. 2021)."""

from itertools import pairwise

from torch import Tensor

from sdtrain.samplers.walk import Noise, Show, coefficients
from sdtrain.schedules import Schedule


def ddim(denoise, x: Tensor, grid: Tensor, schedule: Schedule, noise: Noise, show: Show | None = None, *, eta: float = 0.0) -> Tensor:
    """x_s = alpha_s x0 + sqrt(sigma_s^2 - std^2) eps + std z,  std = eta sigma_s / sigma_t sqrt(1 - alpha_t^2 / alpha_s^2).

    Song et al. 2021, eq. 12 and 16. eta = 0 is deterministic, eta = 1 is ddpm on the same grid. eta outside [0, 1] raises ValueError.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"sampler.eta={eta:g} must lie in [0, 1]")
    for step, (t, s) in enumerate(pairwise(grid)):
        x0 = denoise(x, t)
        if show:
            show(step, x, x0)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = coefficients(schedule, t, x), coefficients(schedule, s, x)
        eps = (x - alpha_t * x0) / sigma_t
        std = eta * sigma_s / sigma_t * (1 - (alpha_t / alpha_s) ** 2).clamp(min=0).sqrt()
        x = alpha_s * x0 + (sigma_s**2 - std**2).clamp(min=0).sqrt() * eps
        if eta > 0:
            x = x + std * noise(step)
    x0 = denoise(x, grid[-1])
    if show:
        show(len(grid) - 1, x, x0)
    return x0
