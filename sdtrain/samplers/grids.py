"""Grids: the falling times that a sampler visits.

Each is a function (steps, schedule) -> times, float64 [steps]. trailing, leading and linspace visit
timesteps, and are named as in Lin et al. 2024, "Common diffusion noise schedules", table 2. default
is one of the others, depending on the kind of schedule.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sdtrain.errors import UserError
from sdtrain.schedules import Schedule


def check_steps(steps: int, schedule: Schedule) -> None:
    """Raise UserError for fewer than 1 step, or more steps than the schedule has timesteps."""
    most = schedule.num_timesteps
    if not 1 <= steps <= most:
        raise UserError(
            f"must lie between 1 and {most}, the schedule's number of timesteps",
            key="steps",
            value=steps,
        )


def default(steps: int, schedule: Schedule) -> Tensor:
    """The grid that suits the schedule, see `default_grid`."""
    return default_grid(schedule)(steps, schedule)


def default_grid(schedule: Schedule) -> Callable[[int, Schedule], Tensor]:
    """Return the name of the default grid: `trailing` for a schedule with even_timesteps, otherwise
    `uniform_log_snr`.

    Tables of betas are made to be sampled at evenly spaced timesteps, as Stable Diffusion's tools
    do. In a continuous schedule, times are concentrated at the noise levels that training should
    draw most often: if these are few, even spacing leaves few steps for the rest of the noise
    range. A shifted table has the same problem.
    """
    return trailing if schedule.even_timesteps else uniform_log_snr


def trailing(steps: int, schedule: Schedule) -> Tensor:
    """Evenly spaced in timesteps, starting at the last one (t = 1, pure noise)."""
    check_steps(steps, schedule)
    size = schedule.num_timesteps
    timesteps = torch.linspace(size, 0, steps + 1, dtype=torch.float64)[:-1].round() - 1
    return timesteps / (size - 1)


def leading(steps: int, schedule: Schedule) -> Tensor:
    """Evenly spaced in timesteps, ending at the first one (t = 0); it starts below t = 1."""
    check_steps(steps, schedule)
    size = schedule.num_timesteps
    timesteps = torch.arange(steps - 1, -1, -1, dtype=torch.float64) * (size // steps)
    return timesteps / (size - 1)


def linspace(steps: int, schedule: Schedule) -> Tensor:
    """Return times whose timesteps are evenly spaced from t = 1 to t = 0, both included."""
    check_steps(steps, schedule)
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
    """Evenly spaced in (sigma / alpha)^(1 / rho) (Karras et al. 2022, eq. 5).

    The range is [sigma_min, sigma_max] as far as the schedule reaches it. The grid starts at t = 1
    whatever sigma_max is, because that is where x is noise.
    """
    if not 0 < rho < math.inf:
        raise UserError("must be above 0, and finite", key="grid.rho", value=rho)
    if not 0 < sigma_min < sigma_max < math.inf:
        raise UserError(
            f"must lie between 0 and grid.sigma_max={sigma_max:g}",
            key="grid.sigma_min",
            value=sigma_min,
        )
    check_steps(steps, schedule)
    low, high = reachable_bounds(schedule, -2 * math.log(sigma_max), -2 * math.log(sigma_min))
    first = math.exp(-low / 2 / rho)
    last = math.exp(-high / 2 / rho)
    roots = torch.linspace(first, last, steps, dtype=torch.float64)
    return times_from_noise(-2 * rho * roots.log(), schedule)


def uniform_log_snr(
    steps: int, schedule: Schedule, *, log_snr_min: float = -10.0, log_snr_max: float = 10.0
) -> Tensor:
    """Evenly spaced in log_snr (Lu et al. 2022, section 3), starting at t = 1.

    The range is [log_snr_min, log_snr_max] as far as the schedule reaches it.
    """
    if not -math.inf < log_snr_min < log_snr_max < math.inf:
        raise UserError(
            f"must lie below grid.log_snr_max={log_snr_max:g}",
            key="grid.log_snr_min",
            value=log_snr_min,
        )
    check_steps(steps, schedule)
    low, high = reachable_bounds(schedule, log_snr_min, log_snr_max)
    return times_from_noise(torch.linspace(low, high, steps, dtype=torch.float64), schedule)


def reachable_bounds(
    schedule: Schedule, log_snr_min: float, log_snr_max: float
) -> tuple[float, float]:
    """Return the bounds, moved in to the range of the schedule.

    Raises UserError if nothing is left between them.
    """
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


def times_from_noise(log_snr: Tensor, schedule: Schedule) -> Tensor:
    """Return the falling times of a rising log_snr; the first is set to t = 1."""
    t = schedule.time_of(log_snr, clamp=True)
    t[0] = 1.0
    return t
