"""The variational bound, path by path."""

import math

import numpy as np
import pytest
import torch

from sdtrain.samplers.sampler import posterior_std, step_to
from sdtrain.schedules.table import from_betas


def normal(x, mean, variance):
    return -0.5 * ((x - mean) ** 2 / variance + torch.log(2 * math.pi * variance))


def path_gap(betas, d, shift=0):
    """log p(x_0:T) - log q(x_1:T | x0) - log p(x0) on 64 paths, for data N(0, d^2) and the exact
    network.

    q walks by the betas of the paper; p steps with the levels of the schedule and the reverse step
    of the samplers: given x0 it is N(step_to(x, x0), posterior_std^2), x0 itself is N(x0*, V) given
    x. shift: the levels are taken so many points too late.
    """
    schedule = from_betas(
        "mine",
        torch.from_numpy(np.append(betas, betas[-1])[: len(betas) + shift]),
        "schedule.betas",
    )
    generator = torch.Generator().manual_seed(0)
    beta = torch.from_numpy(betas)[:, None]
    x0 = d * torch.randn(1, 64, generator=generator, dtype=torch.float64)
    path = []
    last = x0
    for b, z in zip(
        beta, torch.randn(len(beta), 1, 64, generator=generator, dtype=torch.float64), strict=True
    ):
        last = (1 - b).sqrt() * last + b.sqrt() * z
        path.append(last)
    x = torch.cat(path)  # [T, 64]
    forward = normal(x, (1 - beta).sqrt() * torch.cat([x0, x[:-1]]), beta).sum(0)

    place = (torch.arange(len(beta)) + shift).double() / (schedule.num_timesteps - 1)
    alpha, sigma = (c.reshape(-1, 1) for c in schedule.alpha_sigma(place, torch.float64))
    marginal = alpha**2 * d**2 + sigma**2
    best, left = alpha * d**2 * x / marginal, d**2 * sigma**2 / marginal  # E[x0 | x], Var[x0 | x]
    now = (alpha[1:], sigma[1:])
    then = (alpha[:-1], sigma[:-1])
    std = posterior_std(now, then)
    mean = step_to(x[1:], best[1:], now, then, std, torch.zeros(()))
    slope = step_to(
        torch.zeros(()), torch.ones(()), now, then, std, torch.zeros(())
    )  # of the mean in x0
    reverse = normal(x[:-1], mean, std**2 + slope**2 * left[1:]).sum(0)
    ends = normal(x[-1], torch.zeros(()), marginal[-1]) + normal(x0[0], best[0], left[0])
    return (
        (
            ends
            + reverse
            - forward
            - normal(x0[0], torch.zeros(()), torch.tensor(d**2, dtype=torch.float64))
        )
        .abs()
        .max()
        .item()
    )


@pytest.mark.parametrize("d", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(
    "betas",
    [
        np.linspace(1e-4, 0.02, 1000),
        np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2,
        np.linspace(0.01, 0.3, 20),
        np.array([0.2, 0.5]),
    ],
    ids=["linear", "scaled_linear", "short", "two"],
)
def test_pathwise_bound(betas, d):
    """With the exact reverse conditionals the bound is no bound: log p(x_0:T) - log q(x_1:T | x0) =
    log p(x0) on every path.
    """
    # 1000 terms whose variance, a difference of sigma^2, keeps 1e-16 / 1e-4 of itself, up or down.
    # Reached: 2.4e-12.
    assert path_gap(betas, d) < 1e-10
    assert path_gap(betas, d, shift=1) > 1e-3, "the twin: levels one point late"
