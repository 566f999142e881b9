"""A small network on a ring of six Gaussians, trained through the objective, reaches the loss of
the exact denoiser: noise, time, target, loss and optimizer at once."""

import math

import pytest
import torch
from torch import nn

from sdtrain.diffusion import Objective
from sdtrain.diffusion.mixture import GaussianMixture
from sdtrain.diffusion.prediction import X0, Epsilon, Flow, V
from sdtrain.diffusion.times import Uniform
from sdtrain.diffusion.weighting.simple import Simple
from sdtrain.schedules.cosine_log_snr import cosine_log_snr
from sdtrain.schedules.flow import flow

RING = GaussianMixture.ring()


class MLP(nn.Module):
    """x [B, 2, 1, 1], and the timestep as sines of six frequencies."""

    def __init__(self, width=128):
        super().__init__()
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.arange(-1, 5))
        self.first, self.time = nn.Linear(2, width), nn.Linear(2 * len(self.frequencies) + 1, width)
        self.middle = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
        self.last = nn.Linear(width, 2)

    def forward(self, x, timestep):
        t = timestep[:, None] / 999
        time = self.time(
            torch.cat([t, (t * self.frequencies).sin(), (t * self.frequencies).cos()], 1)
        )
        hidden = nn.functional.silu(self.first(x.flatten(1)) + time)
        for layer in self.middle:
            hidden = hidden + nn.functional.silu(layer(hidden) + time)
        return self.last(hidden)[..., None, None]


def exact(objective):
    """The best output at x_t, from the mixture's own formulas. alpha and sigma of the timestep are
    the schedule's.
    """

    def network(x, timestep):
        alpha, sigma = objective.schedule.alpha_sigma(timestep.double() / 999, torch.float64)
        x0 = RING.x0(x.double(), alpha, sigma)
        eps = RING.epsilon(x.double(), alpha, sigma)
        targets = {
            Epsilon: lambda: eps,
            X0: lambda: x0,
            V: lambda: alpha * eps - sigma * x0,
            Flow: lambda: eps - x0,
        }
        return targets[type(objective.prediction)]()

    return network


def excess(objective, network, count=200000):
    """(mean loss of the network less the exact one's on the same draws, its standard error)."""
    generator = torch.Generator().manual_seed(1)
    differences = []
    with torch.no_grad():
        for _ in range(count // 20000):
            x0 = RING.sample(20000, generator).float()[..., None, None]
            noise = torch.randn(20000, 2, 1, 1, generator=generator)
            u = torch.rand(20000, generator=generator, dtype=torch.float64)
            mine, best = (
                objective(which, x0, noise, u).per_sample.double()
                for which in (network, exact(objective))
            )
            differences.append(mine - best)
    difference = torch.cat(differences)
    return difference.mean().item(), difference.std().item() / math.sqrt(len(difference))


def trained(objective, steps=3500, batch=512):
    torch.manual_seed(0)
    network = MLP()
    generator = torch.Generator().manual_seed(0)
    averaged = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3, betas=(0.9, 0.99))
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x0 = RING.sample(batch, generator).float()[..., None, None]
        noise = torch.randn(batch, 2, 1, 1, generator=generator)
        u = (
            torch.arange(batch, dtype=torch.float64)
            + torch.rand(batch, generator=generator, dtype=torch.float64)
        ) / batch
        optimizer.zero_grad()
        objective(network, x0, noise, u).per_sample.mean().backward()
        optimizer.step()
        decay.step()
        averaged.update_parameters(network)
    return averaged


def objective_of(schedule, prediction):
    return Objective(schedule=schedule, prediction=prediction, weighting=Simple(), times=Uniform())


@pytest.mark.slow
def test_a_small_network_reaches_the_floor():
    """In mean squared error of the own target. The exact network is the floor: nothing lies below
    it but by chance. For Epsilon of a linear schedule: test_unet.py.
    """
    objective = objective_of(flow(), Flow())
    above, error = excess(objective, trained(objective))
    print(f"floor + {above:.5f} +- {error:.5f}")
    assert above < 0.005
    assert above > -4 * error


@pytest.mark.parametrize("prediction", [Epsilon, V, X0, Flow])
def test_the_exact_network_is_the_floor(prediction):
    """Twins of the slow test, without training: whatever is off by a little, by a network that is
    wrong by 0.1 or one that sees a wrong time, lies above the floor by more than is allowed there.
    """
    objective = objective_of(cosine_log_snr(), prediction())
    best = exact(objective)
    assert excess(objective, best, 20000)[0] == 0
    above, error = excess(objective, lambda x, timestep: best(x, timestep) + 0.1, 20000)
    assert abs(above - 0.01) < 4 * error  # by Pythagoras: the error squared
    late, error = excess(
        objective, lambda x, timestep: best(x, (timestep + 100).clamp(max=999)), 20000
    )
    assert late > 0.005 + 4 * error
