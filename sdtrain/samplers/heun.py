"""Heun's method (Karras et al. 2022, algorithm 1)."""

import math
from itertools import pairwise

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


def heun(
    denoise, x: Tensor, grid: Tensor, schedule: Schedule, noise: Noise, show: Show | None = None
) -> Tensor:
    """Second order: an Euler step for x / alpha over sigma / alpha, then the mean of two slopes.

    x_s = alpha_s x0 + sigma_s eps + alpha_s (sigma_s / alpha_s - sigma_t / alpha_t) (eps' - eps) /
    2, where the slopes are eps at both ends of the step. Two denoisings per step, one at the last.
    A step from alpha = 0 or to sigma = 0 is an Euler step, and so is one that is too long for the
    second slope to help.
    """
    ratios = [math.exp(-half) for half in half_log_snr(schedule, grid)]  # sigma / alpha
    for step, (t, s) in enumerate(pairwise(grid)):
        x0 = denoise_and_show(denoise, x, t, step, show)
        at_t = alpha_sigma_at(schedule, t, x)
        at_s = alpha_sigma_at(schedule, s, x)
        alpha_t, sigma_t = at_t
        alpha_s, sigma_s = at_s
        euler = step_to(x, x0, at_t, at_s)
        if second_slope_helps(ratios[step], ratios[step + 1]):
            change = (euler - alpha_s * denoise(euler, s)) / sigma_s - (x - alpha_t * x0) / sigma_t
            euler = euler + (sigma_s - alpha_s / alpha_t * sigma_t) / 2 * change
        x = euler
    return denoise_and_show(denoise, x, grid[-1], len(grid) - 1, show)


def second_slope_helps(start: float, end: float) -> bool:
    """Return whether a Heun step is more accurate than an Euler step between two noise ratios.

    start, end: values of r = sigma / alpha. The steps are compared on latents distributed as
    N(0, 1), for which the solution is known: y = x / alpha obeys dy / dr = y r / (1 + r^2), so y is
    proportional to sqrt(1 + r^2). If `start` is many times `end`, the slope at `end` is far from
    the average slope over the step, and a Heun step, which averages both slopes, can be far off.
    Returns False if a ratio is 0 or not finite.
    """
    if not 0 < end < start < math.inf:
        return False
    exact = math.hypot(1, end) / math.hypot(1, start)
    slope = 1 / (1 / start + start)
    euler = 1 + (end - start) * slope
    heun_ = 1 + (end - start) / 2 * (slope + euler / (1 / end + end))
    return abs(heun_ - exact) < abs(euler - exact)
