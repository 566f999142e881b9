"""The stochastic DPM-Solver++(2M).

Lu et al. 2022b, eq. 8 and section 5; k-diffusion's sample_dpmpp_2m_sde.
"""

import math
from itertools import pairwise

from torch import Tensor

from sdtrain.errors import UserError
from sdtrain.samplers.walk import Noise, Show, half_log_snr, level, look, step_to
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

    h is the step in ln(alpha / sigma). eta = 0 is dpmpp_2m; below 0 it raises UserError.
    """
    if not eta >= 0:
        raise UserError("must be at least 0", key="sampler.eta", value=eta)
    clock = half_log_snr(schedule, grid)
    before = None
    for step, (t, s) in enumerate(pairwise(grid)):
        x0 = look(denoise, x, t, step, show)
        ahead = x0
        h = clock[step + 1] - clock[step]
        then = level(schedule, s, x)
        if before is not None and h < math.inf:
            ahead = x0 + h / (2 * (clock[step] - clock[step - 1])) * (x0 - before)
        std = then[1] * math.sqrt(-math.expm1(-2 * eta * h)) if eta else 0.0
        z = noise(step) if eta else None
        x = step_to(x, ahead, level(schedule, t, x), then, std, z)
        before = x0
    return look(denoise, x, grid[-1], len(grid) - 1, show)
