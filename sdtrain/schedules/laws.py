"""Continuous schedules, described by the law that log_snr follows when t is uniform.

t is the share of the law that lies above log_snr. A law with unbounded support is cut: [0, 1] is
mapped onto the part between log_snr_max and log_snr_min.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sdtrain.schedules.schedule import Curve, Schedule, curve_error

BOUNDS = "schedule.log_snr_min or schedule.log_snr_max"


def check_bounds(name: str, log_snr_min: float, log_snr_max: float, keys: str) -> None:
    """Raises UserError for bounds that are reversed or not finite."""
    if not -math.inf < log_snr_min < log_snr_max < math.inf:
        raise curve_error(
            f"schedule={name} has its bounds reversed or not finite: log_snr from {log_snr_max:g} "
            f"down to {log_snr_min:g}",
            keys,
        )


def cut(
    name: str,
    log_snr_of: Callable[[Tensor, Tensor], Tensor],
    shares: Callable[[Tensor], tuple[Tensor, Tensor]],
    *,
    log_snr_min: float,
    log_snr_max: float,
    num_timesteps: int,
    keys: str = BOUNDS,
) -> Schedule:
    """The schedule of a law between two bounds.

    Args:
        name: of the schedule.
        log_snr_of: the shares (above, below) of a point, which add to 1, to the point. Both travel,
            because 1 - share keeps nothing of a tail.
        shares: its inverse.
        log_snr_min, log_snr_max: the bounds; UserError where they are reversed or not finite.
        num_timesteps, keys: as in Schedule.
    """
    check_bounds(name, log_snr_min, log_snr_max, keys)
    above, below = shares(torch.tensor([log_snr_max, log_snr_min], dtype=torch.float64))
    above0, above1 = above.tolist()
    below0, below1 = below.tolist()

    def log_snr_at(t: Tensor) -> Tensor:
        point = log_snr_of((1 - t) * above0 + t * above1, (1 - t) * below0 + t * below1)
        return point.clamp(log_snr_min, log_snr_max)

    def time_of(log_snr: Tensor) -> Tensor:
        return (shares(log_snr)[0] - above0) / (above1 - above0)

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
    """The schedule of a law that is symmetric about its centre.

    A bound beyond which less than 1e-9 of the law lies is moved in to there: a float t has no room
    for the levels behind it, and training would never see them. UserError where nothing is left
    between the bounds.

    Args:
        name: of the schedule.
        quantile: the inverse of tail.
        tail: a distance x >= 0 from the centre to the share of the law beyond it, in (0, 1/2].
        centre: log_snr of the centre.
        log_snr_min, log_snr_max, num_timesteps, keys: as in `cut`.
    """
    check_bounds(name, log_snr_min, log_snr_max, keys)
    reach = quantile(torch.tensor(1e-9, dtype=torch.float64)).item()
    if not log_snr_min < centre + reach or not log_snr_max > centre - reach:  # NaN too
        raise curve_error(
            f"schedule={name} lies around log_snr = {centre:g} and leaves nothing between its "
            f"bounds {log_snr_min:g} and {log_snr_max:g}",
            keys,
            or_else="or what centres it",
        )

    def log_snr_of(above: Tensor, below: Tensor) -> Tensor:
        side = torch.where(above < below, 1.0, -1.0)
        return centre + side * quantile(torch.minimum(above, below))

    def shares(log_snr: Tensor) -> tuple[Tensor, Tensor]:
        beyond = tail((log_snr - centre).abs())
        upper = log_snr >= centre
        return torch.where(upper, beyond, 1 - beyond), torch.where(upper, 1 - beyond, beyond)

    return cut(
        name,
        log_snr_of,
        shares,
        log_snr_min=max(log_snr_min, centre - reach),
        log_snr_max=min(log_snr_max, centre + reach),
        num_timesteps=num_timesteps,
        keys=keys,
    )
