"""What every sampler is: a function that walks from noise to data over a grid of times.

    sampler(denoise, x, grid, schedule, noise, show) -> x0

denoise(x, t) -> x0; x [B, C, h, w] normal with variance alpha^2 + sigma^2 at grid[0]; grid [n]
falling float64 times; noise(step) a standard normal tensor like x, keyed by each picture's seed;
show(step, x, x0) is called at every step. The walk ends in the last x0.

Every step is a' x0 + s' eps plus a correction, so that alpha = 0 at the start is nothing special
(Song et al. 2021, eq. 12).
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from sdtrain.schedules import Schedule

Noise = Callable[[int], Tensor]
Show = Callable[[int, Tensor, Tensor], None]
Level = tuple[Tensor, Tensor]
"""(alpha, sigma)."""


def level(schedule: Schedule, t: Tensor, x: Tensor) -> Level:
    """(alpha, sigma) at time t, with x's dtype and on its device.

    The grid itself stays on the CPU: indexing a table by it would wait for a GPU.
    """
    alpha, sigma = schedule.alpha_sigma(t, torch.promote_types(x.dtype, torch.float32))
    return alpha.to(x.device), sigma.to(x.device)


def half_log_snr(schedule: Schedule, grid: Tensor) -> list[float]:
    """ln(alpha / sigma) at the times of the grid: the clock of the exponential integrators.

    Lu et al. 2022, section 3.
    """
    return (schedule.log_snr(grid) / 2).tolist()


def step_to(
    x: Tensor,
    x0: Tensor,
    now: Level,
    then: Level,
    std: Tensor | float = 0.0,
    z: Tensor | None = None,
) -> Tensor:
    """x_s = alpha_s x0 + sqrt(sigma_s^2 - std^2) eps + std z, with the eps that x and x0 imply."""
    alpha_t, sigma_t = now
    alpha_s, sigma_s = then
    eps = (x - alpha_t * x0) / sigma_t
    if z is None:
        return alpha_s * x0 + sigma_s * eps
    return alpha_s * x0 + (sigma_s**2 - std**2).clamp(min=0).sqrt() * eps + std * z


def posterior_std(now: Level, then: Level) -> Tensor:
    """Standard deviation of q(x_s | x_t, x0), s < t.

    sigma_s / sigma_t sqrt(sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2) (Kingma et al. 2021, eq.
    25); it holds whether or not alpha^2 + sigma^2 = 1.
    """
    alpha_t, sigma_t = now
    alpha_s, sigma_s = then
    return sigma_s / sigma_t * (sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2).clamp(min=0).sqrt()


def look(denoise, x: Tensor, t: Tensor, step: int, show: Show | None) -> Tensor:
    """x0 at this step, which is passed to `show`."""
    x0 = denoise(x, t)
    if show:
        show(step, x, x0)
    return x0


class Sampler(Protocol):
    """The signature of a sampler."""

    def __call__(
        self,
        denoise,
        x: Tensor,
        grid: Tensor,
        schedule: Schedule,
        noise: Noise,
        show: Show | None = None,
    ) -> Tensor: ...
