"""Noise levels in a geometric progression."""

import math

from sdtrain.errors import UserError
from sdtrain.schedules.schedule import Schedule


def geometric(
    *, sigma_min: float = 0.01, sigma_max: float = 100.0, num_timesteps: int = 1000
) -> Schedule:
    """sigma / alpha = sigma_min (sigma_max / sigma_min)^t: log_snr is linear.

    Song and Ermon 2019, section 4.1; Song et al. 2021, eq. 30.
    """
    if not 0 < sigma_min < sigma_max < math.inf:
        raise UserError(
            f"must lie above 0 and below schedule.sigma_max={sigma_max:g}",
            key="schedule.sigma_min",
            value=sigma_min,
        )
    top = -2 * math.log(sigma_min)
    slope = -2 * math.log(sigma_max / sigma_min)
    return Schedule(
        "geometric",
        lambda t: top + slope * t,
        lambda log_snr: (log_snr - top) / slope,
        num_timesteps=num_timesteps,
    )
