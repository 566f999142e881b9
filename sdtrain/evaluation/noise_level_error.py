"""A validation number that is comparable between schedules: the error of epsilon by noise level.

It is the diffusion term of the variational bound (Kingma et al. 2021, eq. 15 and 17; Kingma and Gao
2023, eq. 8), in bits per latent dimension,

    1 / (2 D ln 2) * integral of E |eps - eps_hat|^2 over log_snr,

without the prior and decoder terms. It does not depend on the schedule, prediction or weighting of
a run. Where a schedule does not reach, the best linear denoiser replaces the network: it is a valid
predictor, so the integral covers the same range for every run.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

LEVELS = torch.linspace(-12, 12, 25, dtype=torch.float64)
"""The log_snrs [L] at which the error is measured."""


def bits_over(inside: Tensor) -> Tensor:
    """Return weights [L] of the trapezoid rule over the levels where `inside` [L] is true.

    errors [..., L] @ bits_over(inside) is the number of bits over that range.
    """
    half = (inside[1:] & inside[:-1]).double() * LEVELS.diff() / 2
    trapezoids = pad(half, (0, 1)) + pad(half, (1, 0))
    return trapezoids / (2 * math.log(2))


BITS = bits_over(torch.ones(len(LEVELS), dtype=torch.bool))
"""Weights [L] over the whole range of LEVELS."""


def network_errors(
    epsilon_error: Callable[[Tensor, Tensor, Tensor], Tensor],
    pictures: Tensor,
    levels: Tensor,
    size: int = 256,
    *,
    on_evaluation: Callable[[], None] | None = None,
) -> Tensor:
    """Return the errors [P, len(levels)] of the network, float64.

    Each is the mean of an antithetic pair: a picture with its noise, and with minus its noise.

    Args:
        epsilon_error: (index of the picture [B] int64, log_snr [B], sign of the noise [B]) -> mean
            squared error of epsilon [B].
        pictures: indices of the pictures, [P] int64.
        levels: log_snrs.
        size: largest B that epsilon_error is called with.
        on_evaluation: called before each call of epsilon_error; may raise to stop.
    """
    rows = torch.cartesian_prod(pictures, torch.arange(len(levels)), torch.arange(2))
    errors = [torch.zeros(0, dtype=torch.float64)]
    for part in rows.split(size):
        if not len(part):  # no pictures
            continue
        if on_evaluation:
            on_evaluation()
        picture, level, flipped = part.T
        errors.append(epsilon_error(picture, levels[level], 1 - 2 * flipped).double().cpu())
    return torch.cat(errors).view(len(pictures), len(levels), 2).mean(2)


def linear_errors(x0: Tensor, mean: Tensor, variance: Tensor, levels: Tensor = LEVELS) -> Tensor:
    """Return the errors [N, L] of the best linear denoiser, float64.

    It is the best for latents of `mean` and `variance`, which broadcast to x0 [N, C, h, w].

    eps_hat = sigma (x - alpha m) / (alpha^2 v + sigma^2), whose expectation over the noise is, with
    r = SNR:

        E (eps - eps_hat)^2 = ((r v)^2 + r (x0 - m)^2) / (1 + r v)^2.
    """
    variance = variance.double().cpu()
    squared_distance = (x0.double().cpu() - mean.double().cpu()).square()
    per_level = []
    for level in levels.tolist():
        # With powers of exp(-|log_snr|) alone, so that nothing overflows: numerator and denominator
        # are divided by r^2 if r is above 1.
        r = math.exp(min(level, 0.0))
        one = math.exp(min(-level, 0.0))
        numerator = (r * variance) ** 2 + r * one * squared_distance
        errors = numerator / (one + r * variance) ** 2
        per_level.append(errors.flatten(1).mean(1))
    return torch.stack(per_level, dim=1)


@dataclass
class NoiseLevelErrors:
    """Errors of N pictures at LEVELS.

    Args:
        errors: [N, L], of the network where `inside` is true, and of the linear denoiser elsewhere.
        linear: [N, L], of the linear denoiser.
        inside: [L] bool, whether the schedule reaches the level.
    """

    errors: Tensor
    linear: Tensor
    inside: Tensor

    @property
    def per_picture(self) -> Tensor:
        """Bits per latent dimension [N]."""
        return self.errors @ BITS

    def summary(self) -> dict[str, float]:
        """Return the mean bits per dimension, the bits saved against the linear denoiser, both with
        their standard errors over pictures, and the share of the sum that comes from the linear
        denoiser in place of the network. One picture alone has no standard errors."""
        bits = self.per_picture
        saved = (self.linear - self.errors) @ BITS
        by_level = self.errors.mean(0) * BITS
        numbers = {}
        for name, values in (("bits_per_dim", bits), ("bits_saved", saved)):
            numbers[name] = values.mean().item()
            if len(values) > 1:
                numbers[f"{name}_error"] = standard_error(values)
        stand_in = by_level[~self.inside].sum() / by_level.sum()
        return numbers | {"stand_in_share": stand_in.item()}


def standard_error(values: Tensor) -> float:
    """Return the standard error of the mean of values [N]; infinite for a single value."""
    if len(values) < 2:
        return math.inf
    return (values.std() / math.sqrt(len(values))).item()
