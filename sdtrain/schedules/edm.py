"""The noise levels that EDM trains on."""

import math

import torch

from sdtrain.errors import UserError
from sdtrain.schedules.distributions import symmetric
from sdtrain.schedules.schedule import Schedule


def edm(
    *,
    log_sigma_mean: float = -1.2,
    log_sigma_std: float = 1.2,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    num_timesteps: int = 1000,
) -> Schedule:
    """ln(sigma / alpha) = -log_snr / 2 is normal, truncated so that sigma / alpha lies in
    [sigma_min, sigma_max].

    Karras et al. 2022, table 1.
    """
    for name, value in (
        ("sigma_min", sigma_min),
        ("sigma_max", sigma_max),
        ("log_sigma_std", log_sigma_std),
    ):
        if not value > 0:
            raise UserError("must be above 0", key=f"schedule.{name}", value=value)
    std = 2 * log_sigma_std
    return symmetric(
        "edm",
        lambda p: -std * torch.special.ndtri(p),
        lambda x: torch.special.ndtr(-x / std),
        centre=-2 * log_sigma_mean,
        log_snr_min=-2 * math.log(sigma_max),
        log_snr_max=-2 * math.log(sigma_min),
        num_timesteps=num_timesteps,
        keys="schedule.sigma_min or schedule.sigma_max",
    )
