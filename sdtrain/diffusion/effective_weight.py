"""The effective weight of an objective, and which objectives train the same."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sdtrain.diffusion.density import Density
from sdtrain.diffusion.losses import MSE
from sdtrain.diffusion.objective import Objective

LOG_SNR_LIMIT = 20.0
"""A log_snr beyond it, to either side, is neither compared nor drawn."""

POINTS = 1001
"""At how many levels a weight is taken."""


@dataclass(frozen=True)
class EffectiveWeight:
    """The weight on squared error of epsilon, up to a factor.

    log_snr: [N] float64, rising, equally spaced.
    weight: [N] float64, of unit integral over log_snr.
    """

    log_snr: Tensor
    weight: Tensor

    def is_close_to(self, other: "EffectiveWeight") -> bool:
        """Whether both lie over the same levels with the same weight."""
        same_levels = torch.allclose(self.log_snr, other.log_snr, atol=1e-6)
        return same_levels and torch.allclose(self.weight, other.weight, rtol=1e-6, atol=1e-12)


def effective_weight(objective: Objective) -> EffectiveWeight | None:
    """Density of log_snr under the base law times w, over the levels that training draws.

    None where all of these lie beyond LOG_SNR_LIMIT.
    """
    schedule = objective.schedule
    # A law may draw from a part of [0, 1] alone.
    ends = torch.tensor([1.0, 0.0], dtype=torch.float64)
    drawn = objective.times.quantile(ends, schedule)
    low, high = schedule.log_snr(drawn).clamp(-LOG_SNR_LIMIT, LOG_SNR_LIMIT).tolist()
    if not low < high:
        return None
    log_snr = torch.linspace(low, high, POINTS, dtype=torch.float64)
    t = schedule.time_of(log_snr, clamp=True)
    alpha, sigma = schedule.alpha_sigma(t, torch.float64)
    jacobian = objective.prediction.jacobian(alpha.flatten(), sigma.flatten())
    density = Density(schedule, objective.times)(log_snr)
    weight = density * objective.weighting(log_snr, jacobian)
    return EffectiveWeight(log_snr, weight / torch.trapezoid(weight, log_snr))


@dataclass(frozen=True)
class ComparedObjective:
    """An objective, and what it is compared by.

    prediction, loss, noise: of any type; equal where the two settings are equal.
    """

    objective: Objective
    prediction: Any
    loss: Any
    noise: Any

    @cached_property
    def weight(self) -> EffectiveWeight | None:
        """As effective_weight says."""
        return effective_weight(self.objective)


@dataclass(frozen=True)
class Relations:
    """Places, in the list that was searched, of the objectives that are like one.

    duplicates: with the same prediction.
    reparameterised: the same objective, with another prediction.
    """

    duplicates: list[int]
    reparameterised: list[int]


def find_relations(compared: Sequence[ComparedObjective | None]) -> list[Relations]:
    """Of each objective, which of the others train the same; None stands for one that is unknown.

    Two are alike if their effective weights, which count up to a factor that Adam ignores, their
    loss, their noise and their number of timesteps are.
    """
    found = []
    for place, one in enumerate(compared):
        relations = Relations([], [])
        for other_place, other in enumerate(compared):
            if place == other_place or one is None or other is None:
                continue
            if not _are_alike(one, other):
                continue
            if one.prediction == other.prediction:
                relations.duplicates.append(other_place)
            elif isinstance(one.objective.loss, MSE):
                # Only a square turns from one output to another by a factor.
                relations.reparameterised.append(other_place)
        found.append(relations)
    return found


def _are_alike(one: ComparedObjective, other: ComparedObjective) -> bool:
    if one.weight is None or other.weight is None:
        return False
    timesteps = one.objective.schedule.num_timesteps
    return (
        one.loss == other.loss
        and one.noise == other.noise
        and timesteps == other.objective.schedule.num_timesteps
        and one.weight.is_close_to(other.weight)
    )
