"""DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2)."""

from itertools import pairwise

from torch import Tensor

from sdtrain.samplers.walk import Noise, Show, half_log_snr, level, look, step_to
from sdtrain.schedules import Schedule


def dpmpp_2m(
    denoise, x: Tensor, grid: Tensor, schedule: Schedule, noise: Noise, show: Show | None = None
) -> Tensor:
    """Second order with one denoising a step: ddim's step with x0 extrapolated half a step ahead.

    x0 + h / (2 h_before) (x0 - x0_before), h the step in ln(alpha / sigma). First order where a
    step is infinite: from alpha = 0, to sigma = 0.
    """
    clock = half_log_snr(schedule, grid)
    before = None
    for step, (t, s) in enumerate(pairwise(grid)):
        x0 = look(denoise, x, t, step, show)
        ahead = x0
        h = clock[step + 1] - clock[step]
        if before is not None and h < float("inf"):
            ahead = x0 + h / (2 * (clock[step] - clock[step - 1])) * (x0 - before)
        x = step_to(x, ahead, level(schedule, t, x), level(schedule, s, x))
        before = x0
    return look(denoise, x, grid[-1], len(grid) - 1, show)
