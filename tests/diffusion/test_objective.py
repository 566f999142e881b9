"""The objective against closed forms: the network of these tests is the exact one, its noise levels
and formulas are made here.
"""

import inspect
import math

import numpy as np
import pytest
import torch
import yaml
from hydra.utils import get_object

from sdtrain.diffusion import Denoiser, Density, Objective
from sdtrain.diffusion.losses import MSE, Huber
from sdtrain.diffusion.mixture import GaussianMixture
from sdtrain.diffusion.prediction import Epsilon, Flow, V
from sdtrain.diffusion.times import Uniform
from sdtrain.diffusion.weighting.simple import Simple
from sdtrain.errors import UserError
from sdtrain.paths import config_dir
from sdtrain.schedules.flow import flow
from sdtrain.schedules.linear import linear
from sdtrain.schedules.modifiers import zero_terminal_snr

ALPHA_BAR = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
LEVELS = [0, 30, 150, 400, 999]
# Three Gaussians in the plane, the last of width 0.
MIXTURE = GaussianMixture(
    torch.tensor([[-1.2, 0.3], [0.8, 1.0], [0.5, -1.5]], dtype=torch.float64),
    torch.tensor([0.3, 0.6, 0.0], dtype=torch.float64),
    torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64),
)


def nodes(group):
    return {
        path.stem: yaml.safe_load(path.read_text())
        for path in sorted((config_dir() / group).glob("*.yaml"))
        if path.stem != "none"
    }


SCHEDULES, PREDICTIONS, WEIGHTINGS, TIMES, LOSSES = (
    nodes(group) for group in ("schedule", "prediction", "weighting", "times", "loss")
)
SCHEDULES["table"]["betas"] = (1e-4 + 0.015 * np.linspace(0, 1, 1000) ** 2).tolist()


def made(node, **given):
    target = get_object(node["_target_"])
    takes = inspect.signature(target).parameters
    return target(
        **{key: value for key, value in node.items() if key != "_target_"},
        **{key: value for key, value in given.items() if key in takes},
    )


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def make(**times):
    return Objective(
        schedule=linear(), prediction=Epsilon(), weighting=Simple(), times=Uniform(**times)
    )


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


def mixture(x, timestep):
    return MIXTURE.epsilon(x.double(), *level(timestep))


def draw_mixture(count, generator):
    return MIXTURE.sample(count, generator)[..., None, None]


def times(place, count):
    return torch.full((count,), place / 999, dtype=torch.float64)


# The optimal network that the rest is held against.


def log_density(x, alpha, sigma):
    """ln p_t(x) of the mixture, x [B, 2], written as a density."""
    variance = alpha**2 * MIXTURE.stds**2 + sigma**2
    square = (x[:, None] - alpha * MIXTURE.means).square().sum(2)
    return (
        MIXTURE.weights.log() - square / (2 * variance) - (2 * math.pi * variance).log()
    ).logsumexp(1)


@pytest.mark.parametrize(
    ("alpha", "sigma"),
    [(0.999, 0.05), (0.8, 0.6), (0.5, 0.5), (0.1, 0.995), (0.9, 2.0), (0.0, 1.0)],
)
def test_the_mixtures_epsilon_is_minus_sigma_times_the_score(alpha, sigma, generator):
    x = torch.randn(2000, 2, generator=generator, dtype=torch.float64).requires_grad_()
    (score,) = torch.autograd.grad(log_density(x, alpha, sigma).sum(), x)
    a = torch.tensor(alpha, dtype=torch.float64)
    s = torch.tensor(sigma, dtype=torch.float64)
    eps = MIXTURE.epsilon(x.detach(), a, s)
    x0 = MIXTURE.x0(x.detach(), a, s)
    # A few roundings of numbers up to 5. Reached: 4e-15.
    torch.testing.assert_close(eps, -sigma * score, rtol=0, atol=1e-14)
    torch.testing.assert_close(alpha * x0 + sigma * eps, x.detach(), rtol=0, atol=1e-14)
    if alpha == 0:
        torch.testing.assert_close(
            x0, (MIXTURE.weights[:, None] * MIXTURE.means).sum(0).expand_as(x0), rtol=0, atol=1e-15
        )
    assert MIXTURE.epsilon(x.detach()[..., None, None], a, s).shape == (2000, 2, 1, 1)


def test_the_mixtures_samples_have_its_moments(generator):
    x = GaussianMixture.ring().sample(200000, generator)
    angle = np.arange(6) * np.pi / 3
    weights = np.array([1, 2, 3, 1, 2, 3]) / 12
    means = 1.2 * np.stack([np.cos(angle), np.sin(angle)], 1)
    mean = weights @ means
    variance = weights @ means**2 - mean**2 + 0.04
    np.testing.assert_allclose(x.mean(0), mean, rtol=0, atol=4 * np.sqrt(variance.max() / 200000))
    np.testing.assert_allclose(x.var(0), variance, rtol=4 * np.sqrt(2 / 200000))


# Loss floors.

TARGET = {
    "epsilon": lambda x0, eps, a, s: eps,
    "x0": lambda x0, eps, a, s: x0,
    "v": lambda x0, eps, a, s: a * eps - s * x0,
    "flow": lambda x0, eps, a, s: eps - x0,
    "edm": lambda x0, eps, a, s: (s * x0 - a * eps) / (a**2 + s**2) ** 0.5,
}
WEIGHT = {  # in squared error of epsilon
    "debiased": lambda snr: np.minimum(snr**-0.5, 20),
    "edm": lambda snr: 1 + 1 / snr,
    "epsilon": lambda snr: np.ones_like(snr),
    "min_snr": lambda snr: np.minimum(1, 5 / snr),
    "p2": lambda snr: 1 / (1 + snr),
    "sigmoid": lambda snr: 1 / (1 + snr * np.exp(-2.0)),
    "soft_min_snr": lambda snr: 4 / (4 + snr),
}


def test_every_formula_is_of_something_offered():
    assert set(TARGET) <= set(PREDICTIONS) and set(WEIGHT) <= set(WEIGHTINGS)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_loss_floor_of_every_schedule_prediction_and_weighting(name, prediction, generator):
    """Data N(0, d^2), the exact network: eps is missed by a^2 d^2 / (a^2 d^2 + s^2), which costs w
    of it; under `simple` that over J.

    Four levels of 8192 squared errors each: 4 standard errors are 6 % of the floor.
    """
    schedule = made(SCHEDULES[name])
    predicted = made(PREDICTIONS[prediction])
    d = 0.8
    count = 512
    t = torch.tensor([30, 300, 650, 950], dtype=torch.float64) / 999
    repeated = t.repeat_interleave(count)
    alpha, sigma = schedule.alpha_sigma(repeated, torch.float64)
    x0 = d * torch.randn(len(repeated), 1, 4, 4, generator=generator)
    noise = torch.randn(len(repeated), 1, 4, 4, generator=generator)
    x = alpha * x0 + sigma * noise
    best_x0 = alpha * d**2 * x / (alpha**2 * d**2 + sigma**2)
    best_eps = sigma * x / (alpha**2 * d**2 + sigma**2)
    best = TARGET.get(prediction, predicted.target)(best_x0, best_eps, alpha, sigma)

    a, s = (c.flatten().numpy() for c in schedule.alpha_sigma(t, torch.float64))
    floor = a**2 * d**2 / (a**2 * d**2 + s**2)
    one = np.ones_like(a)
    none = np.zeros_like(a)
    if prediction in TARGET:
        p = TARGET[prediction](one, none, a, s)
        q = TARGET[prediction](none, one, a, s)
        slope = (a / (a * q - s * p)) ** 2  # (d eps / d output)^2 at a given x
    else:
        slope = predicted.jacobian(torch.from_numpy(a), torch.from_numpy(s)).numpy()
    allowed = 0
    law = Uniform()
    for weighting, node in WEIGHTINGS.items():
        density = Density(schedule, law)
        try:
            objective = Objective(
                schedule=schedule,
                prediction=predicted,
                weighting=made(node, density=density),
                times=law,
            )
        except UserError:
            continue
        allowed += 1
        weight = (
            1 / slope
            if weighting == "simple"
            else 1 / density(schedule.log_snr(t)).numpy()
            if weighting == "flat"
            else None
        )
        if weight is None and weighting in WEIGHT:
            weight = WEIGHT[weighting]((a / s) ** 2)
        elif weight is None:
            weight = objective.weighting(schedule.log_snr(t), torch.from_numpy(slope)).numpy()
        losses = (
            objective.at(lambda x, timestep: best, x0, noise, repeated)
            .per_sample.double()
            .reshape(len(t), count)
            .numpy()
        )
        z = (losses.mean(1) - weight * floor) / (losses.std(1) / np.sqrt(count))
        assert np.abs(z).max() < 4, f"weighting={weighting}: {z}"
        assert (np.abs(losses.mean(1) / (1.3 * weight * floor) - 1) > 0.15).all(), (
            "the twin: 30 % too much would be seen"
        )
    # flat counts the first levels of laplace 5e8 times, and under x0 again 2e4 times: that may be
    # refused.
    assert allowed >= len(WEIGHTINGS) - (prediction == "x0") or schedule.log_snr_min == -math.inf
    assert (
        allowed > 0 or prediction == "epsilon"
    )  # simple works with every prediction that can be read


@pytest.mark.parametrize("place", LEVELS)
@pytest.mark.parametrize("std", [0.5, 1.0, 2.0])
def test_loss_floor(place, std, generator):
    """E|eps - eps*|^2 / D = a^2 d^2 / (a^2 d^2 + s^2). 131072 squared errors: 4 standard errors are
    1.6 % of the floor.
    """
    x0 = std * torch.randn(2048, 4, 4, 4, generator=generator)
    noise = torch.randn(2048, 4, 4, 4, generator=generator)
    losses = make().at(gaussian(std), x0, noise, times(place, 2048)).per_sample.double()
    signal = ALPHA_BAR[place].item() * std**2
    floor = signal / (signal + 1 - ALPHA_BAR[place].item())
    assert abs(losses.mean().item() - floor) < 4 * losses.std().item() / math.sqrt(2048)


@pytest.mark.parametrize("prediction", [V(), Flow()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("schedule", [flow(), zero_terminal_snr(linear())], ids=lambda s: s.name)
def test_loss_floor_in_pure_noise_and_on_pure_data(schedule, prediction, generator):
    """At t = 1 x says nothing of x0: the best output is 0, and the target's whole variance is left:
    of v d^2, of flow 1 + d^2 less that of eps, which x is. At t = 0 of flow x says nothing of eps.
    """
    d = 0.8
    count = 4096
    noise = torch.randn(4096, 1, 2, 2, generator=generator)
    x0 = d * torch.randn(count, 1, 2, 2, generator=generator)
    objective = Objective(
        schedule=schedule, prediction=prediction, weighting=Simple(), times=Uniform()
    )
    losses = objective.at(
        lambda x, timestep: x if isinstance(prediction, Flow) else torch.zeros_like(x),
        x0,
        noise,
        times(999, count),
    ).per_sample.double()
    assert abs(losses.mean().item() - d**2) < 4 * losses.std().item() / math.sqrt(count)
    if schedule.log_snr_max == math.inf:
        losses = objective.at(
            lambda x, timestep: -x if isinstance(prediction, Flow) else torch.zeros_like(x),
            x0,
            noise,
            times(0, count),
        ).per_sample.double()
        assert abs(losses.mean().item() - 1) < 4 * losses.std().item() / math.sqrt(count)


def test_mean_floor_over_all_times(generator):
    """The law of t and the level at each t at once: the mean of the floors over the 1000 points. A
    latent scale off by 5 % is seen.
    """
    std = 0.7
    count = 40000
    x0 = std * torch.randn(count, 4, 1, 1, generator=generator)
    noise = torch.randn(count, 4, 1, 1, generator=generator)
    u = torch.rand(count, generator=generator, dtype=torch.float64)
    losses = make()(gaussian(std), x0, noise, u).per_sample.double()
    floor = (ALPHA_BAR * std**2 / (ALPHA_BAR * std**2 + 1 - ALPHA_BAR)).mean().item()
    assert abs(losses.mean().item() - floor) < 4 * losses.std().item() / math.sqrt(count)
    wrong = make()(gaussian(std), 1.2 * x0, noise, u).per_sample.double()
    assert abs(wrong.mean().item() - floor) > 4 * wrong.std().item() / math.sqrt(count), (
        "the twin: a latent scale of 1.2"
    )


@pytest.mark.parametrize("place", LEVELS)
def test_orthogonality(place, generator):
    """eps* is a conditional expectation, so its error is orthogonal to every function of x_t:
    E[(eps - eps*) h(x_t)] = 0.
    """
    count = 50000
    seen = {}
    x0 = draw_mixture(count, generator)
    noise = torch.randn(count, 2, 1, 1, generator=generator)

    def network(x, timestep):
        seen["x"], seen["output"] = x.double(), mixture(x, timestep)
        return seen["output"]

    make().at(network, x0, noise, times(place, count))
    for h in (torch.ones_like, lambda x: x, torch.sin, lambda x: x**3):
        product = ((noise - seen["output"]) * h(seen["x"])).flatten(1)
        z = product.mean(0) / (product.std(0) / math.sqrt(count))
        assert z.abs().max() < 4


# What goes in and what comes out.


def test_what_the_network_is_fed(generator):
    """x_t = alpha x0 + sigma eps and the timestep of t, each sample its own level."""
    fed = []
    x0 = torch.randn(1000, 2, 3, 3, generator=generator)
    noise = torch.randn(1000, 2, 3, 3, generator=generator)
    make().at(
        lambda x, timestep: fed.append((x, timestep)) or x,
        x0,
        noise,
        torch.arange(1000, dtype=torch.float64) / 999,
    )
    ((x, timestep),) = fed
    alpha, sigma = level(torch.arange(1000))
    torch.testing.assert_close(
        x.double(), alpha * x0 + sigma * noise, rtol=0, atol=1e-6
    )  # three roundings of numbers up to 5
    assert timestep.dtype == torch.float32
    assert timestep.tolist() == list(range(1000))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", SCHEDULES)
def test_no_noise_is_lost_to_low_precision(name, dtype, generator):
    """x0 = 0 and eps = 1 in whatever precision the latents come: the network sees sigma to one
    float32 ulp at every t, the first ones too.
    """
    schedule = made(SCHEDULES[name])
    fed = []
    count = 1000
    t = torch.arange(count, dtype=torch.float64) / (count - 1)
    objective = Objective(schedule=schedule, prediction=V(), weighting=Simple(), times=Uniform())
    with torch.autocast(
        "cpu", dtype=dtype, enabled=dtype != torch.float32
    ):  # as trainer.precision=16-mixed and bf16-mixed do
        losses = objective.at(
            lambda x, timestep: fed.append(x) or x,
            torch.zeros(count, 1, 1, 1, dtype=dtype),
            torch.ones(count, 1, 1, 1, dtype=dtype),
            t,
        )
    log_snr = schedule.log_snr(t).numpy()
    with np.errstate(over="ignore"):
        sigma = (
            1 / (1 + np.exp(log_snr / 2)) if schedule.straight else 1 / np.sqrt(1 + np.exp(log_snr))
        )
    assert fed[0].dtype == losses.per_sample.dtype == torch.float32
    found = fed[0].double().flatten().numpy()
    assert (np.abs(found - sigma) <= np.spacing(sigma.astype(np.float32))).all()
    assert (found[1:] > 0).all() and (np.diff(found) >= 0).all()


def test_input_noise_goes_to_the_network_and_the_target_stays(generator):
    x0, noise, added = (
        torch.randn(100, 2, 3, 3, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    t = torch.arange(100, dtype=torch.float64) * 9 / 999
    fed = []
    objective = Objective(schedule=linear(), prediction=V(), weighting=Simple(), times=Uniform())
    losses = objective.at(lambda x, timestep: fed.append(x) or x, x0, noise, t, added)
    alpha, sigma = level(torch.arange(100) * 9)
    torch.testing.assert_close(fed[0], alpha * x0 + sigma * added, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        losses.per_sample,
        (alpha * noise - sigma * x0 - fed[0]).square().mean((1, 2, 3)),
        rtol=1e-12,
        atol=0,
    )


@pytest.mark.parametrize("prediction", TARGET)
def test_the_own_target_with_weight_one(prediction, generator):
    """Under `simple`, what papers call unweighted, and its gradient; a network that is right costs
    nothing.
    """
    x0, noise, output = (torch.randn(1000, 2, 3, 3, generator=generator) for _ in range(3))
    t = torch.arange(1000, dtype=torch.float64) / 999
    objective = Objective(
        schedule=linear(),
        prediction=made(PREDICTIONS[prediction]),
        weighting=Simple(),
        times=Uniform(),
    )
    target = TARGET[prediction](x0.double(), noise.double(), *level(torch.arange(1000))).float()
    output.requires_grad_()
    losses = objective.at(lambda x, timestep: output, x0, noise, t)
    assert torch.equal(losses.t, t)
    # float32: targets up to 5 round to 5e-7, errors are of order 1, and 18 of them are averaged.
    torch.testing.assert_close(
        losses.per_sample, (target - output).square().mean((1, 2, 3)), rtol=3e-6, atol=0
    )
    losses.per_sample.sum().backward()
    torch.testing.assert_close(
        output.grad, (output - target).detach() * 2 / 18, rtol=1e-6, atol=1e-6
    )
    assert objective.at(lambda x, timestep: target, x0, noise, t).per_sample.max() < 1e-12


def test_the_loss_is_float32_under_a_bfloat16_network(generator):
    noise = torch.randn(64, 2, 3, 3, generator=generator)
    output = noise + 1e-2
    losses = (
        make()
        .at(lambda x, timestep: output.bfloat16(), torch.zeros_like(noise), noise, times(500, 64))
        .per_sample
    )
    assert losses.dtype == torch.float32
    torch.testing.assert_close(
        losses.double(),
        (output.bfloat16().double() - noise.double()).square().mean((1, 2, 3)),
        rtol=1e-5,
        atol=0,
    )


def test_uniform_times_are_the_points_equally_likely():
    u = (torch.arange(5000, dtype=torch.float64) + 0.5) / 5000
    t = make()(lambda x, timestep: x, torch.zeros(5000, 1, 1, 1), torch.zeros(5000, 1, 1, 1), u).t
    assert ((t * 999).round().long().bincount(minlength=1000) == 5).all()
    torch.testing.assert_close(t * 999, (t * 999).round(), rtol=0, atol=1e-9)


def test_continuous_times_cover_the_interval():
    u = (torch.arange(5000, dtype=torch.float64) + 0.5) / 5000
    fed = []
    network = lambda x, timestep: fed.append(timestep) or x  # noqa: E731
    t = make(continuous=True)(network, torch.zeros(5000, 1, 1, 1), torch.zeros(5000, 1, 1, 1), u).t
    # t has the law of u: equal spacing, so 5 in every thousandth, from one end to the other, also
    # between the points of the table.
    torch.testing.assert_close(t.sort().values, u, rtol=0, atol=1e-15)
    torch.testing.assert_close(fed[0].double(), u * 999, rtol=1e-7, atol=0)
    assert (fed[0] != fed[0].round()).float().mean() > 0.9


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("law", TIMES)
def test_every_law_and_loss_gives_finite_losses_of_its_own_times(law, loss, generator):
    """Through __call__: the times are the law's for these uniforms, the losses those at them."""
    objective = Objective(
        schedule=linear(),
        prediction=V(),
        weighting=Simple(),
        times=made(TIMES[law]),
        loss=made(LOSSES[loss]),
    )
    x0, noise = (torch.randn(64, 1, 2, 2, generator=generator) for _ in range(2))
    u = torch.rand(64, generator=generator, dtype=torch.float64)
    losses = objective(lambda x, timestep: x.tanh(), x0, noise, u)
    assert losses.per_sample.isfinite().all() and (losses.per_sample >= 0).all()
    again = objective.at(lambda x, timestep: x.tanh(), x0, noise, losses.t)
    assert torch.equal(again.per_sample, losses.per_sample)


def test_losses_by_hand(generator):
    error = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.25, 2.0, 10.0])
    assert MSE()(error).tolist() == [9, 1, 0.25, 0, 0.0625, 4, 100]
    assert Huber(delta=1.0)(error).tolist() == [5, 1, 0.25, 0, 0.0625, 3, 19]  # 2 |e| - 1 beyond 1
    assert Huber(delta=0.5)(error).tolist() == [
        2.75,
        0.75,
        0.25,
        0,
        0.0625,
        1.75,
        9.75,
    ]  # |e| - 1/4 beyond 1/2
    assert Huber(delta=100.0)(error).tolist() == MSE()(error).tolist()
    theirs = torch.nn.functional.huber_loss(error, torch.zeros(7), reduction="none", delta=0.7) * 2
    torch.testing.assert_close(Huber(delta=0.7)(error), theirs, rtol=1e-6, atol=0)
    wild = error.clone().requires_grad_()
    Huber(delta=1.0)(wild).sum().backward()
    assert wild.grad.tolist() == [-2, -2, -1, 0, 0.5, 2, 2]  # bounded by 2 delta
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(UserError) as refused:
            Huber(delta=wrong)
        assert refused.value.key == "loss.delta"


@pytest.mark.parametrize("place", LEVELS)
def test_denoiser_is_the_posterior_mean_of_a_mixture(place, generator):
    """E[x0 | x], by Bayes over the modes, read from eps* by the denoiser."""
    alpha, sigma = level(torch.tensor([place]))
    x = (
        alpha * draw_mixture(256, generator)
        + sigma * torch.randn(256, 2, 1, 1, generator=generator).double()
    )
    a = alpha.item()
    s = sigma.item()
    v = a**2 * MIXTURE.stds**2 + s**2
    offset = x.flatten(1)[:, None] - a * MIXTURE.means
    r = (MIXTURE.weights.log() - offset.square().sum(2) / (2 * v) - v.log()).softmax(1)
    mean = (r[..., None] * (MIXTURE.means + (a * MIXTURE.stds**2 / v)[:, None] * offset)).sum(1)[
        ..., None, None
    ]
    read = Denoiser(mixture, linear(), Epsilon())(x, torch.tensor(place / 999, dtype=torch.float64))
    torch.testing.assert_close(
        read, mean, rtol=0, atol=1e-12
    )  # float64, divided by alpha = 0.006 at worst
    low = Denoiser(lambda x, timestep: mixture(x, timestep).bfloat16(), linear(), Epsilon())(
        x.float(), torch.tensor(place / 999, dtype=torch.float64)
    )
    assert low.dtype == torch.float32


@pytest.mark.parametrize("prediction", TARGET)
@pytest.mark.parametrize("name", ["linear", "flow", "edm"])
def test_denoiser_reads_x0_from_every_prediction(name, prediction, generator):
    schedule = made(SCHEDULES[name])
    t = torch.tensor(0.6, dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma(t, torch.float64)
    x = (
        alpha * draw_mixture(256, generator)
        + sigma * torch.randn(256, 2, 1, 1, generator=generator).double()
    )
    x0 = MIXTURE.x0(x, alpha, sigma)
    output = TARGET[prediction](x0, (x - alpha * x0) / sigma, alpha, sigma)
    read = Denoiser(lambda shown, timestep: output, schedule, made(PREDICTIONS[prediction]))(x, t)
    torch.testing.assert_close(read, x0, rtol=0, atol=1e-13)
