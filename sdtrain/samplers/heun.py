"""Heun's method (Karras et al. 2022, algorithm 1)."""

import math
from itertools import pairwise

from torch import Tensor

from sdtrain.samplers.walk import Noise, Show, half_log_snr, level, look, step_to
from sdtrain.schedules import Schedule


def heun(
    denoise, x: Tensor, grid: Tensor, schedule: Schedule, noise: Noise, show: Show | None = None
) -> Tensor:
    """Second order: an Euler step in x / alpha over sigma / alpha, then the mean of its two slopes.

    x_s = alpha_s x0 + sigma_s eps + alpha_s (sigma_s / alpha_s - sigma_t / alpha_t) (eps' - eps) /
    2, the slopes being eps at the step's ends. Two denoisings a step, one in the last; a step from
    alpha = 0, or to sigma = 0, is Euler's, and so is one that is too long for the second slope.
    """
    ratios = [math.exp(-half) for half in half_log_snr(schedule, grid)]
    for step, (t, s) in enumerate(pairwise(grid)):
        x0 = look(denoise, x, t, step, show)
        now = level(schedule, t, x)
        then = level(schedule, s, x)
        alpha_t, sigma_t = now
        alpha_s, sigma_s = then
        euler = step_to(x, x0, now, then)
        if second_slope_helps(ratios[step], ratios[step + 1]):
            change = (euler - alpha_s * denoise(euler, s)) / sigma_s - (x - alpha_t * x0) / sigma_t
            euler = euler + (sigma_s - alpha_s / alpha_t * sigma_t) / 2 * change
        x = euler
    return look(denoise, x, grid[-1], len(grid) - 1, show)


def second_slope_helps(start: float, end: float) -> bool:
    """Whether Heun's step from sigma / alpha = start to end errs less than Euler's.

    For latents of unit variance that are normal, where all is known: y = x / alpha has the slope
    y r / (1 + r^2) at r = sigma / alpha, and its path is sqrt(1 + r^2). Where start is many times
    `end`, Heun's step arrives near y / 2 / (1 + end^2), however small the ratio is that is right:
    its second slope, of the lower noise, is not that of the way. False where a ratio is not finite
    or 0.
    """
    if not 0 < end < start < math.inf:
        return False
    exact = math.hypot(1, end) / math.hypot(1, start)
    slope = 1 / (1 / start + start)
    euler = 1 + (end - start) * slope
    heun_ = 1 + (end - start) / 2 * (slope + euler / (1 / end + end))
    return abs(heun_ - exact) < abs(euler - exact)
