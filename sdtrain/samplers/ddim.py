"""DDIM (Song et al. 2021)."""

from itertools import pairwise

from torch import Tensor

from sdtrain.errors import UserError
from sdtrain.samplers.sampler import (
    Noise,
    Show,
    alpha_sigma_at,
    denoise_and_show,
    posterior_std,
    step_to,
)
from sdtrain.schedules import Schedule


def ddim(
    denoise,
    x: Tensor,
    grid: Tensor,
    schedule: Schedule,
    noise: Noise,
    show: Show | None = None,
    *,
    eta: float = 0.0,
) -> Tensor:
    """x_s = alpha_s x0 + sqrt(sigma_s^2 - std^2) eps + std z,  std = eta posterior_std.

    Song et al. 2021, eq. 12 and 16. eta = 0 is deterministic: Euler's method for x / alpha as a
    function of sigma / alpha. eta = 1 is ddpm on the same grid, and the ancestral Euler sampler.
    Raises UserError for eta outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise UserError("must lie in [0, 1]", key="sampler.eta", value=eta)
    for step, (t, s) in enumerate(pairwise(grid)):
        x0 = denoise_and_show(denoise, x, t, step, show)
        at_t = alpha_sigma_at(schedule, t, x)
        at_s = alpha_sigma_at(schedule, s, x)
        z = noise(step) if eta > 0 else None
        x = step_to(x, x0, at_t, at_s, eta * posterior_std(at_t, at_s), z)
    return denoise_and_show(denoise, x, grid[-1], len(grid) - 1, show)
