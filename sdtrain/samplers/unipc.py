"""UniPC of order 2 with its corrector (Zhao et al. 2023, algorithms 1 and 2, for predicted x0)."""

import math

from torch import Tensor

from sdtrain.samplers.sampler import (
    Noise,
    Show,
    alpha_sigma_at,
    denoise_and_show,
    half_log_snr,
    step_to,
)
from sdtrain.schedules import Schedule


def unipc(
    denoise, x: Tensor, grid: Tensor, schedule: Schedule, noise: Noise, show: Show | None = None
) -> Tensor:
    """dpmpp_2m's step, repeated once the x0 at its end is known: effectively third order.

    The repetition needs no further denoising. With h the step in ln(alpha / sigma), the exact step
    is ddim's with the mean of x0 under the weights exp(l - h), l in [0, h]; in the repetition x0(l)
    is the parabola through the values one step before, at the start and at the end of the step.
    """
    half = half_log_snr(schedule, grid)
    h = math.inf
    h_before = math.inf
    start = x
    at_start = None
    x0_before = None
    slope = None
    for step, t in enumerate(grid):
        x0 = denoise_and_show(denoise, x, t, step, show)
        at_t = alpha_sigma_at(schedule, t, x)
        if math.isfinite(h):  # correct the step that led here
            new_slope = (x0 - x0_before) / h
            mean = x0_before + new_slope * h / 2
            if slope is not None:
                mean = _mean_of_parabola(x0_before, slope, new_slope, h, h_before)
            x = step_to(start, mean, at_start, at_t)
            slope = new_slope
            h_before = h
        if step + 1 < len(grid):
            h = half[step + 1] - half[step]
            ahead = x0 + slope * h / 2 if slope is not None and math.isfinite(h) else x0
            start = x
            at_start = at_t
            x0_before = x0
            x = step_to(x, ahead, at_t, alpha_sigma_at(schedule, grid[step + 1], x))
    return x0


def _mean_of_parabola(
    x0: Tensor, slope: Tensor, new_slope: Tensor, h: float, h_before: float
) -> Tensor:
    """Return the mean of x0(l) over the step h, under the weights exp(l - h).

    slope: of x0 over the step before, of length h_before. new_slope: of x0 over this step.
    """
    mean_l = h / -math.expm1(-h) - 1
    mean_l2 = h * h / -math.expm1(-h) - 2 * mean_l
    curvature = (new_slope - slope) / (h + h_before)
    return x0 + slope * mean_l + curvature * (mean_l2 + h_before * mean_l)
