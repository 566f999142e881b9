"""The sigmoid schedule."""

import math

import torch

from sdtrain.errors import UserError
from sdtrain.schedules.laws import cut
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
    """alpha^2 = (S(e) - S(u)) / (S(e) - S(s)),  s = start / temperature, e = end / temperature, u = s + t (e - s), S the logistic function.

    Jabri et al. 2022, algorithm of appendix B; Chen 2023, "On the importance of noise scheduling", algorithm 1; cut to its bounds.
    """
    if not start < end or not temperature > 0:
        raise UserError(
            f"schedule.start={start:g} must lie below schedule.end={end:g}, and schedule.temperature={temperature:g} above 0."
        )
    s, e = start / temperature, end / temperature

    def log_snr_of(above, below):
        # S(a) - S(b) = sinh((a - b) / 2) / (2 cosh(a / 2) cosh(b / 2)), so that nothing cancels near the ends.
        width = (e - s) / 2
        return (
            torch.sinh(below * width).log()
            - torch.sinh(above * width).log()
            + math.log(math.cosh(s / 2) / math.cosh(e / 2))
        )

    def shares(log_snr):
        first, last = 1 / (1 + math.exp(-s)), 1 / (1 + math.exp(-e))
        u = torch.logit(first + (last - first) * (-log_snr).sigmoid())
        return (u - s) / (e - s), (e - u) / (e - s)

    return cut(
        "sigmoid",
        log_snr_of,
        shares,
        log_snr_min=log_snr_min,
        log_snr_max=log_snr_max,
        num_timesteps=num_timesteps,
    )
