"""Modifiers turn a schedule into another one.

Each applies to any schedule; modifiers=[a,b] applies a, then b.
"""

import math

import torch
from torch import Tensor

from sdtrain.errors import UserError
from sdtrain.schedules.schedule import Schedule, curve_error


def zero_terminal_snr(schedule: Schedule) -> Schedule:
    """alpha' = (alpha - alpha_1) alpha_0 / (alpha_0 - alpha_1).

    The level at t = 0 stays, and alpha is 0 at t = 1 (Lin et al. 2024, "Common diffusion noise
    schedules and sample steps are flawed", algorithm 1). Raises UserError if alpha ends in 0
    already.
    """
    if schedule.log_snr_min == -math.inf:
        raise UserError(
            f"modifiers=[zero_terminal_snr] has no effect: schedule={schedule.name} already "
            "ends in alpha = 0",
            key="modifiers",
            remedy="Remove it from modifiers.",
        )
    first = schedule.alpha_sigma(torch.tensor(0.0), torch.float64)[0].item()
    last = schedule.alpha_sigma(torch.tensor(1.0), torch.float64)[0].item()

    # alpha' = alpha - lost. sigma' is computed without a difference that would cancel at t = 0: on
    # a straight path 1 - alpha' = sigma + lost, otherwise 1 - alpha'^2 = sigma^2 + lost (alpha +
    # alpha').
    def log_snr(t: Tensor) -> Tensor:
        alpha, sigma = schedule.alpha_sigma_of(schedule.log_snr(t))
        lost = last * (first - alpha) / (first - last)
        new = alpha - lost
        variance = (sigma + lost) ** 2 if schedule.straight else sigma**2 + lost * (alpha + new)
        return torch.where(t == 1, -math.inf, 2 * new.log() - variance.log())

    def time_of(log_snr: Tensor) -> Tensor:
        new, sigma = schedule.alpha_sigma_of(log_snr)
        lost = last * (first - new) / first
        variance = (sigma - lost) ** 2 if schedule.straight else sigma**2 - lost * (2 * new + lost)
        t = schedule.time_of(2 * (new + lost).log() - variance.log(), clamp=True)
        return torch.where(log_snr == -math.inf, 1.0, t)

    # Lin et al. also sample it at evenly spaced timesteps.
    return schedule.modified("zero_terminal_snr", log_snr, time_of, "schedule", even_timesteps=True)


def shift(schedule: Schedule, *, factor: float = 3.0) -> Schedule:
    """log_snr' = log_snr - 2 ln(factor): sigma / alpha becomes `factor` times as large.

    Larger pictures need a factor above 1. Hoogeboom et al. 2023, "Simple diffusion", eq. 4; for
    schedule=flow it is Esser et al. 2024, eq. 23.
    """
    if not 1e-3 <= factor <= 1e3 or factor == 1:
        raise UserError(
            "must lie between 0.001 and 1000, and not be 1, which changes nothing",
            key="modifiers.shift.factor",
            value=factor,
        )
    offset = -2 * math.log(factor)
    return schedule.modified(
        "shift",
        lambda t: schedule.log_snr(t) + offset,
        lambda log_snr: schedule.time_of(log_snr - offset, clamp=True),
        "modifiers.shift.factor",
    )


def clip(schedule: Schedule, *, log_snr_min: float = -10.0, log_snr_max: float = 10.0) -> Schedule:
    """The part of the curve between two bounds, stretched to t in [0, 1].

    A bound beyond the curve's own end has no effect. Raises UserError if neither bound has one, or
    if nothing is left between them.
    """
    keys = "modifiers.clip.log_snr_min or modifiers.clip.log_snr_max"
    low = max(log_snr_min, schedule.log_snr_min)
    high = min(log_snr_max, schedule.log_snr_max)
    if not low < high:
        raise curve_error(
            f"modifiers.clip leaves nothing of schedule={schedule.name}, whose log_snr runs from "
            f"{schedule.log_snr_max:g} to {schedule.log_snr_min:g}: the bounds {log_snr_min:g} and "
            f"{log_snr_max:g} are reversed or beyond it",
            keys,
        )
    if (low, high) == (schedule.log_snr_min, schedule.log_snr_max):
        raise curve_error(
            f"modifiers.clip has no effect: schedule={schedule.name} lies between {low:g} and "
            f"{high:g}",
            keys,
            alternative="or remove clip from modifiers",
        )
    start, end = schedule.time_of(torch.tensor([high, low], dtype=torch.float64)).tolist()
    return schedule.modified(
        "clip",
        lambda t: schedule.log_snr(torch.lerp(*t.new_tensor([start, end]), t)),
        lambda log_snr: (schedule.time_of(log_snr, clamp=True) - start) / (end - start),
        keys,
    )
