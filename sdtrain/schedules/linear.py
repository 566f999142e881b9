"""The linear schedule of DDPM."""

import torch

from sdtrain.schedules.schedule import Schedule
from sdtrain.schedules.table import check_num_timesteps, from_betas


def linear(
    *, beta_start: float = 1e-4, beta_end: float = 0.02, num_timesteps: int = 1000
) -> Schedule:
    """beta_i rises linearly from beta_start to beta_end (Ho et al. 2020, section 4)."""
    check_num_timesteps(num_timesteps)
    betas = torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)
    return from_betas("linear", betas, "schedule.beta_start or schedule.beta_end")
