"""The cosine schedule of Improved DDPM, as a table of betas."""

import math

import torch

from sdtrain.errors import UserError
from sdtrain.schedules.schedule import Schedule
from sdtrain.schedules.table import check_num_timesteps, from_betas


def cosine(
    *, offset: float = 0.008, max_beta: float = 0.999, num_timesteps: int = 1000
) -> Schedule:
    """alpha_bar(r) = cos^2(pi/2 (r + offset) / (1 + offset)), at r = i / T.

    beta_i = min(1 - alpha_bar((i+1)/T) / alpha_bar(i/T), max_beta) (Nichol and Dhariwal 2021, eq.
    17). cosine_log_snr is its continuous form.
    """
    if max_beta > 1:
        raise UserError("must be at most 1", key="schedule.max_beta", value=max_beta)
    check_num_timesteps(num_timesteps)
    r = torch.linspace(0, 1, num_timesteps + 1, dtype=torch.float64)
    alpha_bar = torch.cos((r + offset) / (1 + offset) * math.pi / 2) ** 2
    return from_betas(
        "cosine",
        (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=max_beta),
        "schedule.offset or schedule.max_beta",
    )
