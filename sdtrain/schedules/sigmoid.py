"""The sigmoid schedule."""

import math

import torch

from sdtrain.errors import UserError
from sdtrain.schedules.distributions import truncated
from sdtrain.schedules.schedule import Schedule


def sigmoid(
    *,
    start: float = -3.0,
    end: float = 3.0,
    temperature: float = 1.0,
    log_snr_min: float = -10.0,
    log_snr_max: float = 10.0,
    num_timesteps: int = 1000,
) -> Schedule:
    """alpha^2 = (S(e) - S(u)) / (S(e) - S(s)),  u = s + t (e - s),  S the logistic function.

    s = start / temperature, e = end / temperature; truncated to the bounds. Jabri et al. 2022,
    algorithm of appendix B; Chen 2023, "On the importance of noise scheduling", algorithm 1.
    """
    if not start < end:
        raise UserError(f"must lie below schedule.end={end:g}", key="schedule.start", value=start)
    if not temperature > 0:
        raise UserError("must be above 0", key="schedule.temperature", value=temperature)
    s = start / temperature
    e = end / temperature

    def log_snr_of(above, below):
        # S(a) - S(b) = sinh((a - b) / 2) / (2 cosh(a / 2) cosh(b / 2)), which does not cancel near
        # the ends.
        width = (e - s) / 2
        return (
            torch.sinh(below * width).log()
            - torch.sinh(above * width).log()
            + math.log(math.cosh(s / 2) / math.cosh(e / 2))
        )

    def tails(log_snr):
        first = 1 / (1 + math.exp(-s))
        last = 1 / (1 + math.exp(-e))
        u = torch.logit(first + (last - first) * (-log_snr).sigmoid())
        return (u - s) / (e - s), (e - u) / (e - s)

    return truncated(
        "sigmoid",
        log_snr_of,
        tails,
        log_snr_min=log_snr_min,
        log_snr_max=log_snr_max,
        num_timesteps=num_timesteps,
    )
