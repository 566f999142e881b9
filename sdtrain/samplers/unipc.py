"""UniPC of order 2 with its corrector (Zhao et al. 2023, algorithms 1 and 2, for networks that predict x0)."""

import math

from torch import Tensor

from sdtrain.samplers.walk import Noise, Show, half_log_snr, level, look, step_to
from sdtrain.schedules import Schedule


def unipc(
    denoise, x: Tensor, grid: Tensor, schedule: Schedule, noise: Noise, show: Show | None = None
) -> Tensor:
    """dpmpp_2m's step, taken again when the x0 at its end is known, which costs no denoising: third order in effect.

    With h the step in ln(alpha / sigma), the exact step is ddim's with the mean of x0 under weights exp(l - h), l in [0, h]; the second
    time x0(l) is the parabola through the answers before, at and after the step.
    """
    clock, h, h_before, slope = half_log_snr(schedule, grid), math.inf, math.inf, None
    start, x0, was = x, x, None
    for step, t in enumerate(grid):
        after, now = look(denoise, x, t, step, show), level(schedule, t, x)
        if math.isfinite(
            h
        ):  # the step that led here, corrected; mean of l and of l^2 under its weights
            of_l, new = h / -math.expm1(-h) - 1, (after - x0) / h
            of_l2, half = h * h / -math.expm1(-h) - 2 * of_l, x0 + new * h / 2
            x = step_to(
                start,
                half
                if slope is None
                else x0 + slope * of_l + (new - slope) / (h + h_before) * (of_l2 + h_before * of_l),
                was,
                now,
            )
            slope, h_before = new, h
        if step + 1 < len(grid):
            h, start, x0, was = clock[step + 1] - clock[step], x, after, now
            ahead = x0 + slope * h / 2 if slope is not None and math.isfinite(h) else x0
            x = step_to(x, ahead, now, level(schedule, grid[step + 1], x))
    return after
