"""The cosine schedule of Improved DDPM."""

import math

import torch

from sdtrain.schedules.schedule import TableSchedule, timesteps


def cosine(*, offset: float = 0.008, max_beta: float = 0.999, num_timesteps: int = 1000) -> TableSchedule:
    """alpha_bar(r) = cos^2(pi/2 (r + offset) / (1 + offset)), beta_i = min(1 - alpha_bar((i+1)/T) / alpha_bar(i/T), max_beta).

    Nichol and Dhariwal 2021, eq. 17.
    """
    r = torch.linspace(0, 1, timesteps(num_timesteps) + 1, dtype=torch.float64)
    alpha_bar = torch.cos((r + offset) / (1 + offset) * math.pi / 2) ** 2
    return TableSchedule("cosine", (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=max_beta), "schedule.offset or schedule.max_beta")
