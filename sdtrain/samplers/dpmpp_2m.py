"""DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2)."""

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


def dpmpp_2m(
    denoise, x: Tensor, grid: Tensor, schedule: Schedule, noise: Noise, show: Show | None = None
) -> Tensor:
    """Second order with one denoising per step: ddim's step with x0 extrapolated half a step ahead.

    The extrapolation is x0 + h / (2 h_before) (x0 - x0_before), where h is the step in
    ln(alpha / sigma). A step that is infinite, from alpha = 0 or to sigma = 0, is first order.
    """
    half = half_log_snr(schedule, grid)
    x0_before = None
    for step, (t, s) in enumerate(pairwise(grid)):
        x0 = denoise_and_show(denoise, x, t, step, show)
        ahead = x0
        h = half[step + 1] - half[step]
        if x0_before is not None and h < float("inf"):
            ahead = x0 + h / (2 * (half[step] - half[step - 1])) * (x0 - x0_before)
        x = step_to(x, ahead, alpha_sigma_at(schedule, t, x), alpha_sigma_at(schedule, s, x))
        x0_before = x0
    return denoise_and_show(denoise, x, grid[-1], len(grid) - 1, show)
