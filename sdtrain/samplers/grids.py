"""Grids: the falling times that a sampler visits.

Each is a function (steps, schedule) -> [steps] float64 that starts where its name says. trailing,
leading and linspace are named as in Lin et al. 2024, "Common diffusion noise schedules", table 2,
and visit timesteps. default is one of the others, by the kind of schedule.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sdtrain.errors import UserError
from sdtrain.schedules import Schedule


def check(steps: int, schedule: Schedule) -> None:
    """Raises UserError for a number of steps that the schedule does not have."""
    most = schedule.num_timesteps
    if not 1 <= steps <= most:
        raise UserError(
            f"must lie between 1 and {most}, the schedule's number of timesteps",
            key="steps",
            value=steps,
        )


def default(steps: int, schedule: Schedule) -> Tensor:
    """The grid that the schedule asks for, see `default_of`."""
    return default_of(schedule)(steps, schedule)


def default_of(schedule: Schedule) -> Callable[[int, Schedule], Tensor]:
    """`trailing` where the schedule's timesteps are evenly spread, else `uniform_log_snr`.

    A table is made with its timesteps in mind, and the tools of Stable Diffusion visit them so. The
    times of a curve lie where training is to look often: a narrow law leaves a few steps for most
    of the noise, and so does a table that was shifted.
    """
    return trailing if schedule.even_timesteps else uniform_log_snr


def trailing(steps: int, schedule: Schedule) -> Tensor:
    """Evenly spaced in timesteps, from the last one (t = 1, pure noise) down."""
    check(steps, schedule)
    size = schedule.num_timesteps
    timesteps = torch.linspace(size, 0, steps + 1, dtype=torch.float64)[:-1].round() - 1
    return timesteps / (size - 1)


def leading(steps: int, schedule: Schedule) -> Tensor:
    """Evenly spaced in timesteps, ending at the first one (t = 0). Starts below t = 1."""
    check(steps, schedule)
    size = schedule.num_timesteps
    timesteps = torch.arange(steps - 1, -1, -1, dtype=torch.float64) * (size // steps)
    return timesteps / (size - 1)


def linspace(steps: int, schedule: Schedule) -> Tensor:
    """Evenly spaced in timesteps from t = 1 to t = 0, both visited."""
    check(steps, schedule)
    last = schedule.num_timesteps - 1
    return torch.linspace(last, 0, steps, dtype=torch.float64).round() / last


def karras(
    steps: int,
    schedule: Schedule,
    *,
    rho: float = 7.0,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
) -> Tensor:
    """(sigma / alpha)^(1 / rho) evenly spaced (Karras et al. 2022, eq. 5).

    Within sigma_min, sigma_max and the schedule's own ends. Starts at t = 1 whatever sigma_max is,
    since that is where x is noise.
    """
    if not 0 < rho < math.inf:
        raise UserError("must be above 0, and finite", key="grid.rho", value=rho)
    if not 0 < sigma_min < sigma_max < math.inf:
        raise UserError(
            f"must lie between 0 and grid.sigma_max={sigma_max:g}",
            key="grid.sigma_min",
            value=sigma_min,
        )
    check(steps, schedule)
    low, high = ends(schedule, -2 * math.log(sigma_max), -2 * math.log(sigma_min))
    first = math.exp(-low / 2 / rho)
    last = math.exp(-high / 2 / rho)
    roots = torch.linspace(first, last, steps, dtype=torch.float64)
    return from_noise(-2 * rho * roots.log(), schedule)


def uniform_log_snr(
    steps: int, schedule: Schedule, *, log_snr_min: float = -10.0, log_snr_max: float = 10.0
) -> Tensor:
    """log_snr evenly spaced (Lu et al. 2022, section 3).

    Within the bounds and the schedule's own ends. Starts at t = 1.
    """
    if not -math.inf < log_snr_min < log_snr_max < math.inf:
        raise UserError(
            f"must lie below grid.log_snr_max={log_snr_max:g}",
            key="grid.log_snr_min",
            value=log_snr_min,
        )
    check(steps, schedule)
    low, high = ends(schedule, log_snr_min, log_snr_max)
    return from_noise(torch.linspace(low, high, steps, dtype=torch.float64), schedule)


def ends(schedule: Schedule, log_snr_min: float, log_snr_max: float) -> tuple[float, float]:
    """The bounds, as far as the schedule goes. UserError where nothing is left between them."""
    low = max(log_snr_min, schedule.log_snr_min)
    high = min(log_snr_max, schedule.log_snr_max)
    if not low < high:
        raise UserError(
            f"grid lies outside the log_snr of schedule={schedule.name}, "
            f"from {schedule.log_snr_min:g} to {schedule.log_snr_max:g}",
            key="grid",
            remedy="Change grid.",
        )
    return low, high


def from_noise(log_snr: Tensor, schedule: Schedule) -> Tensor:
    """Rising log_snr to times; the first is t = 1."""
    t = schedule.time_of(log_snr, clamp=True)
    t[0] = 1.0
    return t
