"""Noise levels in geometric progression."""

import math

from sdtrain.errors import UserError
from sdtrain.schedules.schedule import Schedule


def geometric(
    *, sigma_min: float = 0.01, sigma_max: float = 100.0, num_timesteps: int = 1000
) -> Schedule:
    """sigma / alpha = sigma_min (sigma_max / sigma_min)^t (Song and Ermon 2019, section 4.1; Song et al. 2021, eq. 30): log_snr is linear."""
    if not 0 < sigma_min < sigma_max < math.inf:
        raise UserError(
            f"schedule.sigma_min={sigma_min:g} must lie above 0 and below schedule.sigma_max={sigma_max:g}."
        )
    top, slope = -2 * math.log(sigma_min), -2 * math.log(sigma_max / sigma_min)
    return Schedule(
        "geometric",
        lambda t: top + slope * t,
        lambda log_snr: (log_snr - top) / slope,
        num_timesteps=num_timesteps,
    )
