"""The cosine schedule in continuous time."""

import math

import torch

from sdtrain.schedules.distributions import symmetric
from sdtrain.schedules.schedule import Schedule


def cosine_log_snr(
    *, log_snr_min: float = -10.0, log_snr_max: float = 10.0, num_timesteps: int = 1000
) -> Schedule:
    """alpha = cos(pi t / 2): log_snr = -2 ln tan(pi t / 2), truncated.

    Hoogeboom et al. 2023, "Simple diffusion", section 3.
    """
    return symmetric(
        "cosine_log_snr",
        lambda p: -2 * torch.tan(math.pi / 2 * p).log(),
        lambda x: 2 / math.pi * torch.atan(torch.exp(-x / 2)),
        log_snr_min=log_snr_min,
        log_snr_max=log_snr_max,
        num_timesteps=num_timesteps,
    )
