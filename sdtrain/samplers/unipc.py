"""UniPC of order 2 with its corrector (Zhao et al. 2023, algorithms 1 and 2, for predicted x0)."""

import math

from torch import Tensor

from sdtrain.samplers.walk import Noise, Show, half_log_snr, level, look, step_to
from sdtrain.schedules import Schedule


def unipc(
    denoise, x: Tensor, grid: Tensor, schedule: Schedule, noise: Noise, show: Show | None = None
) -> Tensor:
    """dpmpp_2m's step, taken again when the x0 at its end is known: third order in effect.

    The second time costs no denoising. With h the step in ln(alpha / sigma), the exact step is
    ddim's with the mean of x0 under weights exp(l - h), l in [0, h]; the second time x0(l) is the
    parabola through the answers before, at and after the step.
    """
    clock = half_log_snr(schedule, grid)
    h = math.inf
    h_before = math.inf
    start = x
    level_before = None
    x0_before = None
    slope = None
    for step, t in enumerate(grid):
        x0 = look(denoise, x, t, step, show)
        now = level(schedule, t, x)
        if math.isfinite(h):  # the step that led here is corrected
            new = (x0 - x0_before) / h
            mean = x0_before + new * h / 2
            if slope is not None:
                mean = _mean_of_parabola(x0_before, slope, new, h, h_before)
            x = step_to(start, mean, level_before, now)
            slope = new
            h_before = h
        if step + 1 < len(grid):
            h = clock[step + 1] - clock[step]
            ahead = x0 + slope * h / 2 if slope is not None and math.isfinite(h) else x0
            start = x
            level_before = now
            x0_before = x0
            x = step_to(x, ahead, now, level(schedule, grid[step + 1], x))
    return x0


def _mean_of_parabola(x0: Tensor, slope: Tensor, new: Tensor, h: float, h_before: float) -> Tensor:
    """Mean of x0(l) over the step h, under its weights.

    slope, new: of x0 over the step before, of length h_before, and over this one.
    """
    of_l = h / -math.expm1(-h) - 1  # the mean of l under the weights
    of_l2 = h * h / -math.expm1(-h) - 2 * of_l  # that of l^2
    return x0 + slope * of_l + (new - slope) / (h + h_before) * (of_l2 + h_before * of_l)
