"""Heun's method (Karras et al. 2022, algorithm 1)."""

from itertools import pairwise

from torch import Tensor

from sdtrain.samplers.walk import Noise, Show, level, look, step_to
from sdtrain.schedules import Schedule


def heun(
    denoise, x: Tensor, grid: Tensor, schedule: Schedule, noise: Noise, show: Show | None = None
) -> Tensor:
    """Second order: an Euler step in x / alpha over sigma / alpha, then the mean of its two slopes.

    x_s = alpha_s x0 + sigma_s eps + alpha_s (sigma_s / alpha_s - sigma_t / alpha_t) (eps' - eps) /
    2, the slopes being eps at the step's ends. Two denoisings a step, one in the last; a step from
    alpha = 0, or to sigma = 0, is Euler's.
    """
    ends = schedule.log_snr(grid).isfinite().tolist()
    for step, (t, s) in enumerate(pairwise(grid)):
        x0 = look(denoise, x, t, step, show)
        now = level(schedule, t, x)
        then = level(schedule, s, x)
        alpha_t, sigma_t = now
        alpha_s, sigma_s = then
        euler = step_to(x, x0, now, then)
        if ends[step] and ends[step + 1]:
            change = (euler - alpha_s * denoise(euler, s)) / sigma_s - (x - alpha_t * x0) / sigma_t
            euler = euler + (sigma_s - alpha_s / alpha_t * sigma_t) / 2 * change
        x = euler
    return look(denoise, x, grid[-1], len(grid) - 1, show)
