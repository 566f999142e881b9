"""The Cauchy schedule."""

import math

import torch

from sdtrain.errors import UserError
from sdtrain.schedules.distributions import symmetric
from sdtrain.schedules.schedule import Schedule


def cauchy(
    *,
    centre: float = 0.0,
    scale: float = 1.0,
    log_snr_min: float = -10.0,
    log_snr_max: float = 10.0,
    num_timesteps: int = 1000,
) -> Schedule:
    """Return the schedule whose log_snr follows a Cauchy distribution, truncated to the bounds.

    log_snr = centre + scale tan(pi / 2 (1 - 2 t)) before truncation. Hang and Gu 2024, table 1.
    """
    if not scale > 0:
        raise UserError("must be above 0", key="schedule.scale", value=scale)
    return symmetric(
        "cauchy",
        lambda p: scale / torch.tan(math.pi * p),
        lambda x: torch.atan2(torch.full_like(x, scale), x) / math.pi,
        centre=centre,
        log_snr_min=log_snr_min,
        log_snr_max=log_snr_max,
        num_timesteps=num_timesteps,
    )
