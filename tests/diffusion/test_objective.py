"""The objective against closed forms. The network of these tests is the exact one; its noise levels are made here, in numpy."""

import math

import numpy as np
import pytest
import torch

from sdtrain.diffusion import Debiased, Denoiser, Epsilon, Objective, Simple, Uniform, classifier_free
from sdtrain.schedules import linear

ALPHA_BAR = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
LEVELS = [0, 30, 150, 400, 999]
# A mixture of three Gaussians in the plane, the last of width 0.
MEANS = torch.tensor([[-1.2, 0.3], [0.8, 1.0], [0.5, -1.5]], dtype=torch.float64)
WIDTHS, WEIGHTS = torch.tensor([0.3, 0.6, 0.0], dtype=torch.float64), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def make(**times):
    return Objective(schedule=linear(), prediction=Epsilon(), weighting=Simple(), times=Uniform(**times))


def level(timestep):
    """(alpha, sigma) [B, 1, 1, 1] float64 of the timesteps that the network was fed."""
    alpha_bar = ALPHA_BAR[timestep.long()].reshape(-1, 1, 1, 1)
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def gaussian(std):
    """eps* for data N(0, std^2): sigma x / (alpha^2 std^2 + sigma^2)."""
    def network(x, timestep):
        alpha, sigma = level(timestep)
        return sigma * x / (alpha**2 * std**2 + sigma**2)
    return network


def responsibilities(x, alpha, sigma):
    """x [B, 2, 1, 1] to (r [B, K], v [B, K], x - alpha mu [B, K, 2]) of the mixture."""
    x, alpha, sigma = x.flatten(1).double(), alpha.reshape(-1, 1), sigma.reshape(-1, 1)
    v = alpha**2 * WIDTHS**2 + sigma**2
    offset = x[:, None] - alpha[..., None] * MEANS
    return (WEIGHTS.log() - offset.square().sum(2) / (2 * v) - v.log()).softmax(1), v, offset  # D/2 log v, D = 2


def mixture(x, timestep):
    """eps* = sigma sum_k r_k (x - alpha mu_k) / v_k."""
    alpha, sigma = level(timestep)
    r, v, offset = responsibilities(x, alpha, sigma)
    return sigma * (r[..., None] * offset / v[..., None]).sum(1)[..., None, None]


def draw_mixture(count, generator):
    which = torch.multinomial(WEIGHTS, count, replacement=True, generator=generator)
    return (MEANS[which] + WIDTHS[which, None] * torch.randn(count, 2, generator=generator))[..., None, None]


def times(place, count):
    return torch.full((count,), place / 999, dtype=torch.float64)


@pytest.mark.parametrize("place", LEVELS)
@pytest.mark.parametrize("std", [0.5, 1.0, 2.0])
def test_loss_floor(place, std, generator):
    """E|eps - eps*|^2 / D = a^2 d^2 / (a^2 d^2 + s^2). 131072 squared errors: 4 standard errors are 1.6 % of the floor."""
    x0, noise = std * torch.randn(2048, 4, 4, 4, generator=generator), torch.randn(2048, 4, 4, 4, generator=generator)
    losses = make().at(gaussian(std), x0, noise, times(place, 2048)).per_sample.double()
    signal = ALPHA_BAR[place].item() * std**2
    floor = signal / (signal + 1 - ALPHA_BAR[place].item())
    assert abs(losses.mean().item() - floor) < 4 * losses.std().item() / math.sqrt(2048)


def test_mean_floor_over_all_times(generator):
    """The law of t and the level at each t at once: the mean of the floors over the 1000 points."""
    std, count = 0.7, 40000
    x0, noise = std * torch.randn(count, 4, 1, 1, generator=generator), torch.randn(count, 4, 1, 1, generator=generator)
    losses = make()(gaussian(std), x0, noise, torch.rand(count, generator=generator, dtype=torch.float64)).per_sample.double()
    floor = (ALPHA_BAR * std**2 / (ALPHA_BAR * std**2 + 1 - ALPHA_BAR)).mean().item()
    assert abs(losses.mean().item() - floor) < 4 * losses.std().item() / math.sqrt(count)


@pytest.mark.parametrize("place", LEVELS)
def test_orthogonality(place, generator):
    """eps* is a conditional expectation, so its error is orthogonal to every function of x_t: E[(eps - eps*) h(x_t)] = 0."""
    count, seen = 50000, {}
    x0, noise = draw_mixture(count, generator), torch.randn(count, 2, 1, 1, generator=generator)

    def network(x, timestep):
        seen["x"], seen["output"] = x.double(), mixture(x, timestep)
        return seen["output"]
    make().at(network, x0, noise, times(place, count))
    for h in (torch.ones_like, lambda x: x, torch.sin, lambda x: x**3):
        product = ((noise - seen["output"]) * h(seen["x"])).flatten(1)
        z = product.mean(0) / (product.std(0) / math.sqrt(count))
        assert z.abs().max() < 4


def test_what_the_network_is_fed(generator):
    """x_t = alpha x0 + sigma eps and the timestep of t, each sample its own level, float32 even if the latents are bfloat16."""
    fed = []
    x0, noise = torch.randn(1000, 2, 3, 3, generator=generator), torch.randn(1000, 2, 3, 3, generator=generator)
    t = torch.arange(1000, dtype=torch.float64) / 999
    make().at(lambda x, timestep: fed.append((x, timestep)) or x, x0, noise, t)
    make().at(lambda x, timestep: fed.append((x, timestep)) or x, torch.zeros(1000, 1, 1, 1).bfloat16(), torch.ones(1000, 1, 1, 1).bfloat16(), t)
    (x, timestep), (low, _) = fed
    alpha, sigma = level(torch.arange(1000))
    torch.testing.assert_close(x.double(), alpha * x0 + sigma * noise, rtol=0, atol=1e-6)  # three roundings of numbers up to 5
    assert timestep.dtype == torch.float32
    assert timestep.tolist() == list(range(1000))
    assert low.dtype == torch.float32
    ulp = np.spacing(sigma.float().flatten().numpy())
    assert (np.abs((low.double() - sigma).flatten().numpy()) <= ulp).all()


def test_epsilon_is_the_target_with_weight_one(generator):
    x0, noise, output = (torch.randn(1000, 2, 3, 3, generator=generator) for _ in range(3))
    t = torch.arange(1000, dtype=torch.float64) / 999
    output.requires_grad_()
    losses = make().at(lambda x, timestep: output, x0, noise, t)
    assert torch.equal(losses.t, t)
    # The same weight at every level: nothing but the mean over 18 elements, whose order of summing may differ by a few ulp.
    torch.testing.assert_close(losses.per_sample.double(), (noise.double() - output.double()).square().mean((1, 2, 3)), rtol=1e-6, atol=0)
    losses.per_sample.sum().backward()
    torch.testing.assert_close(output.grad, (output - noise).detach() * 2 / 18, rtol=1e-6, atol=1e-7)
    assert make().at(lambda x, timestep: noise, x0, noise, t).per_sample.eq(0).all()


def test_the_loss_is_float32_under_a_bfloat16_network(generator):
    noise = torch.randn(64, 2, 3, 3, generator=generator)
    output = noise + 1e-2
    losses = make().at(lambda x, timestep: output.bfloat16(), torch.zeros_like(noise), noise, times(500, 64)).per_sample
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), (output.bfloat16().double() - noise.double()).square().mean((1, 2, 3)), rtol=1e-5, atol=0)


def test_uniform_times_are_the_points_equally_likely():
    u = (torch.arange(5000, dtype=torch.float64) + 0.5) / 5000
    t = make()(lambda x, timestep: x, torch.zeros(5000, 1, 1, 1), torch.zeros(5000, 1, 1, 1), u).t
    assert ((t * 999).round().long().bincount(minlength=1000) == 5).all()
    torch.testing.assert_close(t * 999, (t * 999).round(), rtol=0, atol=1e-9)


def test_continuous_times_cover_the_interval():
    u, fed = (torch.arange(5000, dtype=torch.float64) + 0.5) / 5000, []
    network = lambda x, timestep: fed.append(timestep) or x  # noqa: E731
    t = make(continuous=True)(network, torch.zeros(5000, 1, 1, 1), torch.zeros(5000, 1, 1, 1), u).t
    # t has the law of u: equal spacing, so 5 in every thousandth, from one end to the other, also between the points of the table.
    torch.testing.assert_close(t.sort().values, u, rtol=0, atol=1e-15)
    torch.testing.assert_close(fed[0].double(), u * 999, rtol=1e-7, atol=0)
    assert (fed[0] != fed[0].round()).float().mean() > 0.9


@pytest.mark.parametrize("place", LEVELS)
def test_denoiser_is_the_posterior_mean_of_a_mixture(place, generator):
    """E[x0 | x] = sum_k r_k (mu_k + alpha s_k^2 / v_k (x - alpha mu_k)), read from eps* by the denoiser."""
    alpha, sigma = level(torch.tensor([place]))
    x = alpha * draw_mixture(256, generator) + sigma * torch.randn(256, 2, 1, 1, generator=generator).double()
    r, v, offset = responsibilities(x, alpha, sigma)
    mean = (r[..., None] * (MEANS + (alpha.flatten() * WIDTHS**2 / v)[..., None] * offset)).sum(1)[..., None, None]
    read = Denoiser(mixture, linear(), Epsilon())(x, torch.tensor(place / 999, dtype=torch.float64))
    torch.testing.assert_close(read, mean, rtol=0, atol=1e-12)  # float64, divided by alpha = 0.006 at worst
    low = Denoiser(lambda x, timestep: mixture(x, timestep).bfloat16(), linear(), Epsilon())(x.float(), torch.tensor(place / 999, dtype=torch.float64))
    assert low.dtype == torch.float32


class Counted:
    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, x, t):
        self.calls += 1
        return self.function(x, t)


@pytest.mark.parametrize("scale", [0, 1, 0.0, 1.0])
def test_guidance_0_and_1_ask_one_network_and_pass_its_answer_on(scale, generator):
    x, t = torch.randn(4, 3, 2, 2, generator=generator), torch.tensor(0.3)
    conditional, unconditional = Counted(lambda x, t: x.sin() * 3.1), Counted(lambda x, t: x.cos() / 7)
    answer = classifier_free(conditional, unconditional, scale)(x, t)
    assert torch.equal(answer, x.sin() * 3.1 if scale else x.cos() / 7)
    assert (conditional.calls, unconditional.calls) == ((1, 0) if scale else (0, 1))


@pytest.mark.parametrize("scale", [-1.0, 0.5, 2.0, 7.5])
def test_guidance_is_linear_and_the_same_in_epsilon(scale, generator):
    """Said of x0 or of the noise: with eps = eps_u + scale (eps_c - eps_u), x0 = (x - sigma eps) / alpha."""
    x, t = torch.randn(4, 3, 2, 2, generator=generator, dtype=torch.float64), torch.tensor(600 / 999, dtype=torch.float64)
    networks = [lambda x, timestep: x.sin() * 3.1, lambda x, timestep: x.cos() / 7]
    conditional, unconditional = (Denoiser(network, linear(), Epsilon()) for network in networks)
    answer = classifier_free(conditional, unconditional, scale)(x, t)
    torch.testing.assert_close(answer, (1 - scale) * unconditional(x, t) + scale * conditional(x, t), rtol=0, atol=1e-12)
    alpha, sigma = level(torch.tensor([600]))
    eps = x.cos() / 7 + scale * (x.sin() * 3.1 - x.cos() / 7)
    torch.testing.assert_close(answer, (x - sigma * eps) / alpha, rtol=0, atol=1e-11)  # float64 over alpha = 0.16, values up to 200


def test_debiased_weights_by_hand():
    log_snr = torch.tensor([-20.0, -4.0, 0.0, 4.0])
    assert Debiased()(log_snr, torch.ones(4)).tolist() == pytest.approx([20.0, 7.389056, 1.0, 0.1353353])
    with pytest.raises(ValueError, match=r"weighting\.max_weight=0"):
        Debiased(max_weight=0.0)
