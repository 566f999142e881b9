"""Grids: the falling times that a sampler visits. Each is a function (steps, schedule) -> [steps] float64 that starts where its name says.

trailing, leading and linspace are named as in Lin et al. 2024, "Common diffusion noise schedules", table 2, and visit timesteps.
"""

import math

import torch
from torch import Tensor

from sdtrain.schedules import Schedule


def check(steps: int, schedule: Schedule) -> None:
    if not 1 <= steps <= schedule.num_timesteps:
        raise ValueError(
            f"steps={steps} must lie between 1 and {schedule.num_timesteps}, the schedule's number of timesteps"
        )


def trailing(steps: int, schedule: Schedule) -> Tensor:
    """Evenly spaced in timesteps, from the last one (t = 1, pure noise) down."""
    check(steps, schedule)
    return (
        torch.linspace(schedule.num_timesteps, 0, steps + 1, dtype=torch.float64)[:-1].round() - 1
    ) / (schedule.num_timesteps - 1)


def leading(steps: int, schedule: Schedule) -> Tensor:
    """Evenly spaced in timesteps, ending at the first one (t = 0). Starts below t = 1."""
    check(steps, schedule)
    return (
        torch.arange(steps - 1, -1, -1, dtype=torch.float64)
        * (schedule.num_timesteps // steps)
        / (schedule.num_timesteps - 1)
    )


def linspace(steps: int, schedule: Schedule) -> Tensor:
    """Evenly spaced in timesteps from t = 1 to t = 0, both visited."""
    check(steps, schedule)
    return torch.linspace(schedule.num_timesteps - 1, 0, steps, dtype=torch.float64).round() / (
        schedule.num_timesteps - 1
    )


def karras(
    steps: int,
    schedule: Schedule,
    *,
    rho: float = 7.0,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
) -> Tensor:
    """(sigma / alpha)^(1 / rho) evenly spaced (Karras et al. 2022, eq. 5), within sigma_min, sigma_max and the schedule's own ends.

    Starts at t = 1 whatever sigma_max is, since that is where x is noise.
    """
    if not 0 < rho < math.inf or not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(
            f"grid.rho={rho:g} must be above 0, and grid.sigma_min={sigma_min:g} between 0 and grid.sigma_max={sigma_max:g}"
        )
    check(steps, schedule)
    first, last = (
        math.exp(-end / 2 / rho)
        for end in ends(schedule, -2 * math.log(sigma_max), -2 * math.log(sigma_min))
    )
    return from_noise(
        -2 * rho * torch.linspace(first, last, steps, dtype=torch.float64).log(), schedule
    )


def uniform_log_snr(
    steps: int, schedule: Schedule, *, log_snr_min: float = -10.0, log_snr_max: float = 10.0
) -> Tensor:
    """log_snr evenly spaced (Lu et al. 2022, section 3), within the bounds and the schedule's own ends. Starts at t = 1."""
    if not -math.inf < log_snr_min < log_snr_max < math.inf:
        raise ValueError(
            f"grid.log_snr_min={log_snr_min:g} must lie below grid.log_snr_max={log_snr_max:g}"
        )
    check(steps, schedule)
    return from_noise(
        torch.linspace(*ends(schedule, log_snr_min, log_snr_max), steps, dtype=torch.float64),
        schedule,
    )


def ends(schedule: Schedule, log_snr_min: float, log_snr_max: float) -> tuple[float, float]:
    """The bounds, as far as the schedule goes."""
    low, high = max(log_snr_min, schedule.log_snr_min), min(log_snr_max, schedule.log_snr_max)
    if not low < high:
        raise ValueError(
            f"grid lies outside the log_snr of schedule={schedule.name}, from {schedule.log_snr_min:g} to {schedule.log_snr_max:g}"
        )
    return low, high


def from_noise(log_snr: Tensor, schedule: Schedule) -> Tensor:
    """Rising log_snr to times; the first is t = 1."""
    t = schedule.time_of(log_snr, clamp=True)
    t[0] = 1.0
    return t
