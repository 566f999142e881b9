"""The signature that all samplers share, and the parts of a step.

    sampler(denoise, x, grid, schedule, noise, show) -> x0

A sampler is a function that steps from noise to data over a grid of times:

    denoise(x, t) -> x0, the expected data
    x [B, C, h, w], normal with variance alpha^2 + sigma^2 at grid[0]
    grid [n], falling float64 times
    noise(step) -> a standard normal tensor like x, keyed by each picture's seed
    show(step, x, x0), called at every step

It returns the x0 of the last time.

Every step is a' x0 + s' eps plus a correction, so that a start at alpha = 0 needs no special case
(Song et al. 2021, eq. 12). A step leads from time t to time s < t.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from sdtrain.schedules import Schedule

Noise = Callable[[int], Tensor]
Show = Callable[[int, Tensor, Tensor], None]
AlphaSigma = tuple[Tensor, Tensor]
"""(alpha, sigma) at one time."""


def alpha_sigma_at(schedule: Schedule, t: Tensor, x: Tensor) -> AlphaSigma:
    """Return (alpha, sigma) at time t, with the dtype of x (at least float32) and on its device.

    The grid stays on the CPU, because indexing a table with a GPU tensor would wait for the GPU.
    """
    alpha, sigma = schedule.alpha_sigma(t, torch.promote_types(x.dtype, torch.float32))
    return alpha.to(x.device), sigma.to(x.device)


def half_log_snr(schedule: Schedule, grid: Tensor) -> list[float]:
    """Return ln(alpha / sigma) at the times of the grid.

    It is the time variable of the exponential integrators (Lu et al. 2022, section 3).
    """
    return (schedule.log_snr(grid) / 2).tolist()


def step_to(
    x: Tensor,
    x0: Tensor,
    at_t: AlphaSigma,
    at_s: AlphaSigma,
    std: Tensor | float = 0.0,
    z: Tensor | None = None,
) -> Tensor:
    """Return x_s = alpha_s x0 + sqrt(sigma_s^2 - std^2) eps + std z.

    eps is the noise that x and x0 imply, (x - alpha_t x0) / sigma_t. Without z, std is ignored.
    """
    alpha_t, sigma_t = at_t
    alpha_s, sigma_s = at_s
    eps = (x - alpha_t * x0) / sigma_t
    if z is None:
        return alpha_s * x0 + sigma_s * eps
    return alpha_s * x0 + (sigma_s**2 - std**2).clamp(min=0).sqrt() * eps + std * z


def posterior_std(at_t: AlphaSigma, at_s: AlphaSigma) -> Tensor:
    """Return the standard deviation of q(x_s | x_t, x0), s < t.

    sigma_s / sigma_t sqrt(sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2) (Kingma et al. 2021, eq.
    25), which holds whether or not alpha^2 + sigma^2 = 1.
    """
    alpha_t, sigma_t = at_t
    alpha_s, sigma_s = at_s
    return sigma_s / sigma_t * (sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2).clamp(min=0).sqrt()


def denoise_and_show(denoise, x: Tensor, t: Tensor, step: int, show: Show | None) -> Tensor:
    """Return x0 = denoise(x, t), and pass it to `show`."""
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
