"""The Laplace schedule."""

import torch

from sdtrain.errors import UserError
from sdtrain.schedules.distributions import symmetric
from sdtrain.schedules.schedule import Schedule


def laplace(
    *,
    centre: float = 0.0,
    scale: float = 0.5,
    log_snr_min: float = -10.0,
    log_snr_max: float = 10.0,
    num_timesteps: int = 1000,
) -> Schedule:
    """log_snr = centre - scale sgn(1/2 - t) ln(1 - 2 |t - 1/2|).

    A Laplace distribution, truncated to the bounds. Hang and Gu 2024, table 1.
    """
    if not scale > 0:
        raise UserError("must be above 0", key="schedule.scale", value=scale)
    return symmetric(
        "laplace",
        lambda p: -scale * (2 * p).log(),
        lambda x: torch.exp(-x / scale) / 2,
        centre=centre,
        log_snr_min=log_snr_min,
        log_snr_max=log_snr_max,
        num_timesteps=num_timesteps,
    )
