"""The effective weight of an objective, and the search for objectives that train the same."""

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
"""A log_snr with a larger absolute value is neither compared nor plotted."""

POINTS = 1001
"""The number of levels at which an effective weight is computed."""


@dataclass(frozen=True)
class EffectiveWeight:
    """The weight on the squared error of epsilon, up to a factor.

    log_snr: [N] float64, rising, equally spaced.
    weight: [N] float64, with an integral of 1 over log_snr.
    """

    log_snr: Tensor
    weight: Tensor

    def is_close_to(self, other: "EffectiveWeight") -> bool:
        """Return whether `other` has the same noise levels and weights, up to rounding."""
        same_levels = torch.allclose(self.log_snr, other.log_snr, atol=1e-6)
        return same_levels and torch.allclose(self.weight, other.weight, rtol=1e-6, atol=1e-12)


def effective_weight(objective: Objective) -> EffectiveWeight | None:
    """Return the density of log_snr times the weight w, over the levels that training draws.

    Returns None if all of these lie beyond LOG_SNR_LIMIT.
    """
    schedule = objective.schedule
    # A distribution of times may cover only a part of [0, 1].
    ends = torch.tensor([1.0, 0.0], dtype=torch.float64)
    end_times = objective.times.quantile(ends, schedule)
    low, high = schedule.log_snr(end_times).clamp(-LOG_SNR_LIMIT, LOG_SNR_LIMIT).tolist()
    if not low < high:
        return None
    log_snr = torch.linspace(low, high, POINTS, dtype=torch.float64)
    t = schedule.time_of(log_snr, clamp=True)
    alpha, sigma = schedule.alpha_sigma(t, torch.float64)
    jacobian = objective.prediction.jacobian(alpha.flatten(), sigma.flatten())
    density = Density(schedule, objective.times)(log_snr)
    weight = density * objective.weighting(log_snr, jacobian)
    # The first or last level may lie just outside, where weighting=flat divides by a density of 0.
    weight = torch.where(density > 0, weight, 0.0)
    return EffectiveWeight(log_snr, weight / torch.trapezoid(weight, log_snr))


@dataclass(frozen=True)
class ComparedObjective:
    """An objective and the settings by which it is compared with others.

    prediction, loss, noise: of any type; they are equal where the settings are equal.
    """

    objective: Objective
    prediction: Any
    loss: Any
    noise: Any

    @cached_property
    def weight(self) -> EffectiveWeight | None:
        """See effective_weight."""
        return effective_weight(self.objective)


@dataclass(frozen=True)
class Relations:
    """The indices, in the list that was searched, of the objectives that equal a given one.

    duplicates: those with the same prediction.
    reparameterised: those with another prediction.
    """

    duplicates: list[int]
    reparameterised: list[int]


def find_relations(compared: Sequence[ComparedObjective | None]) -> list[Relations]:
    """Return, for each objective, which of the others are the same; None is an unknown objective.

    Two are the same if their loss, noise and number of timesteps are equal, and their effective
    weights are equal up to a factor, which Adam ignores.
    """
    all_relations = []
    for index, one in enumerate(compared):
        relations = Relations([], [])
        for other_index, other in enumerate(compared):
            if index == other_index or one is None or other is None:
                continue
            if not _is_same_objective(one, other):
                continue
            if one.prediction == other.prediction:
                relations.duplicates.append(other_index)
            elif isinstance(one.objective.loss, MSE):
                # Only under a squared error do two outputs' errors differ by a factor.
                relations.reparameterised.append(other_index)
        all_relations.append(relations)
    return all_relations


def _is_same_objective(one: ComparedObjective, other: ComparedObjective) -> bool:
    if one.weight is None or other.weight is None:
        return False
    timesteps = one.objective.schedule.num_timesteps
    return (
        one.loss == other.loss
        and one.noise == other.noise
        and timesteps == other.objective.schedule.num_timesteps
        and one.weight.is_close_to(other.weight)
    )
