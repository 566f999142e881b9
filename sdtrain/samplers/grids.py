"""Grids: the falling times that a sampler visits (names as in Lin et al. 2024, "Common diffusion noise schedules", table 2)."""

import torch
from torch import Tensor

from sdtrain.schedules import Schedule


def checked(steps: int, schedule: Schedule) -> int:
    if not 1 <= steps <= schedule.num_timesteps:
        raise ValueError(f"steps={steps} must lie between 1 and {schedule.num_timesteps}, the schedule's number of timesteps")
    return schedule.num_timesteps


def trailing(steps: int, schedule: Schedule) -> Tensor:
    """`steps` times, evenly spaced in timesteps, from the last one (t = 1, pure noise) down. [steps] float64."""
    last = checked(steps, schedule)
    return (torch.linspace(last, 0, steps + 1, dtype=torch.float64)[:-1].round() - 1) / (last - 1)


def leading(steps: int, schedule: Schedule) -> Tensor:
    """`steps` times, evenly spaced in timesteps, ending at the first one (t = 0). Starts below t = 1. [steps] float64."""
    last = checked(steps, schedule)
    return torch.arange(steps - 1, -1, -1, dtype=torch.float64) * (last // steps) / (last - 1)
