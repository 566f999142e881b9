"""The stochastic DPM-Solver++(2M).

Lu et al. 2022b, eq. 8 and section 5; k-diffusion's sample_dpmpp_2m_sde.
"""

import math
from itertools import pairwise

from torch import Tensor

from sdtrain.errors import UserError
from sdtrain.samplers.sampler import (
    Noise,
    Show,
    alpha_sigma_at,
    denoise_and_show,
    half_log_snr,
    step_to,
)
from sdtrain.schedules import Schedule


def dpmpp_2m_sde(
    denoise,
    x: Tensor,
    grid: Tensor,
    schedule: Schedule,
    noise: Noise,
    show: Show | None = None,
    *,
    eta: float = 1.0,
) -> Tensor:
    """dpmpp_2m's step with std = sigma_s sqrt(1 - exp(-2 eta h)) of fresh noise.

    h is the step in ln(alpha / sigma). eta = 0 is dpmpp_2m. Raises UserError for eta < 0.
    """
    if not eta >= 0:
        raise UserError("must be at least 0", key="sampler.eta", value=eta)
    half = half_log_snr(schedule, grid)
    x0_before = None
    for step, (t, s) in enumerate(pairwise(grid)):
        x0 = denoise_and_show(denoise, x, t, step, show)
        ahead = x0
        h = half[step + 1] - half[step]
        at_s = alpha_sigma_at(schedule, s, x)
        if x0_before is not None and h < math.inf:
            ahead = x0 + h / (2 * (half[step] - half[step - 1])) * (x0 - x0_before)
        std = at_s[1] * math.sqrt(-math.expm1(-2 * eta * h)) if eta else 0.0
        z = noise(step) if eta else None
        x = step_to(x, ahead, alpha_sigma_at(schedule, t, x), at_s, std, z)
        x0_before = x0
    return denoise_and_show(denoise, x, grid[-1], len(grid) - 1, show)
