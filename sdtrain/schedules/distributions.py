"""Continuous schedules, defined by the distribution of log_snr when t is uniform.

t is the probability above log_snr. A distribution with unbounded support is truncated: [0, 1] is
mapped onto the part between log_snr_max and log_snr_min.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sdtrain.schedules.schedule import Curve, Schedule, curve_error

BOUNDS = "schedule.log_snr_min or schedule.log_snr_max"


def check_bounds(name: str, log_snr_min: float, log_snr_max: float, keys: str) -> None:
    """Raise UserError for bounds that are reversed or not finite."""
    if not -math.inf < log_snr_min < log_snr_max < math.inf:
        raise curve_error(
            f"schedule={name} has its bounds reversed or not finite: log_snr from {log_snr_max:g} "
            f"down to {log_snr_min:g}",
            keys,
        )


def truncated(
    name: str,
    log_snr_of: Callable[[Tensor, Tensor], Tensor],
    tails: Callable[[Tensor], tuple[Tensor, Tensor]],
    *,
    log_snr_min: float,
    log_snr_max: float,
    num_timesteps: int,
    keys: str = BOUNDS,
) -> Schedule:
    """Return the schedule of a distribution truncated to two bounds.

    Args:
        name: of the schedule.
        log_snr_of: maps the probabilities (above, below) a value of log_snr, which add up to 1, to
            the value. Both are passed, because 1 - p would lose all precision in a tail.
        tails: its inverse, from log_snr to (above, below).
        log_snr_min, log_snr_max: the bounds. Raises UserError if they are reversed or not finite.
        num_timesteps, keys: as in Schedule.
    """
    check_bounds(name, log_snr_min, log_snr_max, keys)
    above, below = tails(torch.tensor([log_snr_max, log_snr_min], dtype=torch.float64))
    above0, above1 = above.tolist()
    below0, below1 = below.tolist()

    def log_snr_at(t: Tensor) -> Tensor:
        log_snr = log_snr_of((1 - t) * above0 + t * above1, (1 - t) * below0 + t * below1)
        return log_snr.clamp(log_snr_min, log_snr_max)

    def time_of(log_snr: Tensor) -> Tensor:
        return (tails(log_snr)[0] - above0) / (above1 - above0)

    return Schedule(name, log_snr_at, time_of, num_timesteps=num_timesteps, keys=keys)


def symmetric(
    name: str,
    quantile: Curve,
    tail: Curve,
    *,
    log_snr_min: float,
    log_snr_max: float,
    num_timesteps: int,
    centre: float = 0.0,
    keys: str = BOUNDS,
) -> Schedule:
    """Return the schedule of a distribution that is symmetric about its centre.

    A bound beyond which the probability is less than 1e-9 is moved in to where it is 1e-9: a float
    t cannot resolve the levels beyond, and training would never draw them. Raises UserError if
    nothing is left between the bounds.

    Args:
        name: of the schedule.
        quantile: the inverse of tail.
        tail: maps a distance x >= 0 from the centre to the probability beyond it, in (0, 1/2].
        centre: log_snr of the centre.
        log_snr_min, log_snr_max, num_timesteps, keys: as in `truncated`.
    """
    check_bounds(name, log_snr_min, log_snr_max, keys)
    reach = quantile(torch.tensor(1e-9, dtype=torch.float64)).item()
    if not log_snr_min < centre + reach or not log_snr_max > centre - reach:  # also if NaN
        raise curve_error(
            f"schedule={name} lies around log_snr = {centre:g} and leaves nothing between its "
            f"bounds {log_snr_min:g} and {log_snr_max:g}",
            keys,
            alternative="or the key that sets its centre",
        )

    def log_snr_of(above: Tensor, below: Tensor) -> Tensor:
        side = torch.where(above < below, 1.0, -1.0)
        return centre + side * quantile(torch.minimum(above, below))

    def tails(log_snr: Tensor) -> tuple[Tensor, Tensor]:
        beyond = tail((log_snr - centre).abs())
        upper = log_snr >= centre
        return torch.where(upper, beyond, 1 - beyond), torch.where(upper, 1 - beyond, beyond)

    return truncated(
        name,
        log_snr_of,
        tails,
        log_snr_min=max(log_snr_min, centre - reach),
        log_snr_max=min(log_snr_max, centre + reach),
        num_timesteps=num_timesteps,
        keys=keys,
    )
