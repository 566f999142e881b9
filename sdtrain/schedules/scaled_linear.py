"""The schedule of Stable Diffusion."""

import torch

from sdtrain.errors import UserError
from sdtrain.schedules.schedule import Schedule
from sdtrain.schedules.table import check_num_timesteps, from_betas


def scaled_linear(
    *, beta_start: float = 0.00085, beta_end: float = 0.012, num_timesteps: int = 1000
) -> Schedule:
    """sqrt(beta_i) rises linearly from sqrt(beta_start) to sqrt(beta_end).

    Rombach et al. 2022, appendix.
    """
    for name, value in (("beta_start", beta_start), ("beta_end", beta_end)):
        if value < 0:
            problem = "must lie between 0 and 1, because its square root is taken"
            raise UserError(problem, key=f"schedule.{name}", value=value)
    check_num_timesteps(num_timesteps)
    roots = torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64)
    return from_betas("scaled_linear", roots**2, "schedule.beta_start or schedule.beta_end")
