"""Predictions against formulas by hand, and the certificate that they are one objective: one
network, read as each, the same loss and gradient.
"""

import inspect

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from hydra.utils import get_object

from sdtrain.diffusion import Density, Objective
from sdtrain.diffusion.prediction import EDM, X0, Epsilon, Flow, V
from sdtrain.diffusion.times import Uniform, Window
from sdtrain.errors import UserError
from sdtrain.paths import config_dir


def nodes(group):
    return {
        path.stem: yaml.safe_load(path.read_text())
        for path in sorted((config_dir() / group).glob("*.yaml"))
        if path.stem != "none"
    }


SCHEDULES = nodes("schedule")
PREDICTIONS = nodes("prediction")
WEIGHTINGS = nodes("weighting")
SCHEDULES["table"]["betas"] = (1e-4 + 0.015 * np.linspace(0, 1, 1000) ** 2).tolist()


def made(node, **given):
    target = get_object(node["_target_"])
    takes = inspect.signature(target).parameters
    return target(
        **{key: value for key, value in node.items() if key != "_target_"},
        **{key: value for key, value in given.items() if key in takes},
    )


def edm_target(x0, eps, a, s, sigma_data=1.0):
    """F = (x0 - c_skip y) / c_out at y = x / a and sigma' = s / a (Karras et al. 2022, table 1)."""
    noise = s / a
    c_skip = sigma_data**2 / (noise**2 + sigma_data**2)
    c_out = noise * sigma_data / (noise**2 + sigma_data**2) ** 0.5
    return (x0 - c_skip * (x0 + noise * eps)) / c_out


# What the network is to say, the way back, and (d eps / d output)^2, as the papers have them. A
# prediction without a line is held against the definitions alone.
TARGET = {
    "epsilon": lambda x0, eps, a, s: eps,
    "x0": lambda x0, eps, a, s: x0,
    "v": lambda x0, eps, a, s: a * eps - s * x0,
    "flow": lambda x0, eps, a, s: eps - x0,
    "edm": edm_target,
}
X0_OF = {
    "epsilon": lambda x, y, a, s: (x - s * y) / a,
    "x0": lambda x, y, a, s: y,
    "v": lambda x, y, a, s: (a * x - s * y) / (a**2 + s**2),
    "flow": lambda x, y, a, s: (x - s * y) / (a + s),
    "edm": lambda x, y, a, s: x / a / ((s / a) ** 2 + 1) + s / a / ((s / a) ** 2 + 1) ** 0.5 * y,
}
EPSILON_OF = {
    "epsilon": lambda x, y, a, s: y,
    "x0": lambda x, y, a, s: (x - a * y) / s,
    "v": lambda x, y, a, s: (s * x + a * y) / (a**2 + s**2),
    "flow": lambda x, y, a, s: (x + a * y) / (a + s),
}
JACOBIAN = {
    "epsilon": lambda a, s: np.ones_like(a),
    "x0": lambda a, s: (a / s) ** 2,
    "v": lambda a, s: (a / (a**2 + s**2)) ** 2,
    "flow": lambda a, s: (a / (a + s)) ** 2,
    "edm": lambda a, s: a**2 / (a**2 + s**2),
}


def test_every_prediction_with_a_formula_is_offered():
    assert set(TARGET) <= set(PREDICTIONS)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def draw(generator, count=500):
    """x0, eps [B, 2, 3, 3]; alpha, sigma [B, 1, 1, 1], of no relation to each other."""
    x0, eps = (
        torch.randn(count, 2, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    alpha, sigma = (
        0.05 + 1.45 * torch.rand(count, 1, 1, 1, generator=generator, dtype=torch.float64)
        for _ in range(2)
    )
    return x0, eps, alpha, sigma


@pytest.mark.parametrize("name", PREDICTIONS)
def test_target_x0_and_epsilon_are_consistent_for_any_alpha_and_sigma(name, generator):
    prediction, (x0, eps, alpha, sigma) = made(PREDICTIONS[name]), draw(generator)
    x = alpha * x0 + sigma * eps
    output = prediction.target(x0, eps, alpha, sigma)
    # Divided by 0.05 at least: 20 roundings of numbers up to 5, and squared coefficients up to 30
    # times each other.
    torch.testing.assert_close(prediction.x0(x, output, alpha, sigma), x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(prediction.epsilon(x, output, alpha, sigma), eps, rtol=0, atol=1e-12)
    # Any output, not only the right one, is read as a pair that makes x.
    other = torch.randn(x.shape, generator=generator, dtype=torch.float64).requires_grad_()
    read_x0, read_eps = (
        read(x, other, alpha, sigma) for read in (prediction.x0, prediction.epsilon)
    )
    torch.testing.assert_close(alpha * read_x0 + sigma * read_eps, x, rtol=0, atol=1e-12)
    (slope,) = (
        torch.autograd.grad(read_eps.sum(), other)
        if read_eps.requires_grad
        else (torch.zeros_like(other),)
    )
    torch.testing.assert_close(
        slope**2, prediction.jacobian(alpha, sigma).expand_as(x), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("name", TARGET)
def test_formulas_by_hand(name, generator):
    prediction, (x0, eps, alpha, sigma) = made(PREDICTIONS[name]), draw(generator)
    x = alpha * x0 + sigma * eps
    output = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    close = {"rtol": 1e-12, "atol": 1e-12}  # a dozen roundings, divided by 0.05 twice
    torch.testing.assert_close(
        prediction.target(x0, eps, alpha, sigma), TARGET[name](x0, eps, alpha, sigma), **close
    )
    torch.testing.assert_close(
        prediction.x0(x, output, alpha, sigma), X0_OF[name](x, output, alpha, sigma), **close
    )
    if name in EPSILON_OF:
        torch.testing.assert_close(
            prediction.epsilon(x, output, alpha, sigma),
            EPSILON_OF[name](x, output, alpha, sigma),
            **close,
        )
    np.testing.assert_allclose(
        prediction.jacobian(alpha, sigma).numpy(),
        JACOBIAN[name](alpha.numpy(), sigma.numpy()),
        rtol=1e-13,
    )


def test_edm_at_any_sigma_data(generator):
    x0, eps, alpha, sigma = draw(generator)
    for sigma_data in (0.5, 1.0, 2.0):
        prediction = EDM(sigma_data=sigma_data)
        target = edm_target(x0, eps, alpha, sigma, sigma_data)
        x = alpha * x0 + sigma * eps
        torch.testing.assert_close(
            prediction.target(x0, eps, alpha, sigma), target, rtol=1e-12, atol=1e-12
        )
        shown = x / alpha / ((sigma / alpha) ** 2 + sigma_data**2).sqrt()  # c_in y
        torch.testing.assert_close(
            prediction.network_input(x, alpha, sigma), shown, rtol=1e-12, atol=0
        )
        # c_in^2 (sigma'^2 + sigma_data^2) = 1: data of that width are shown at unit variance.
        unit = prediction.network_input(torch.ones_like(alpha), alpha, sigma) ** 2 * (
            sigma**2 + alpha**2 * sigma_data**2
        )
        torch.testing.assert_close(unit, torch.ones_like(unit), rtol=0, atol=1e-15)
    root = (alpha**2 + sigma**2).sqrt()
    a = alpha / root
    s = sigma / root
    torch.testing.assert_close(
        EDM().target(x0, eps, a, s), -V().target(x0, eps, a, s), rtol=1e-13, atol=1e-14
    )


@pytest.mark.parametrize("name", [name for name in PREDICTIONS if name != "epsilon"])
def test_pure_noise_and_pure_data_can_be_read(name, generator):
    """At alpha = 0 x0 is read from the output alone, at sigma = 0 it is x."""
    prediction = made(PREDICTIONS[name])
    x0 = torch.randn(4, 2, 3, 3, generator=generator)
    eps = torch.randn(4, 2, 3, 3, generator=generator)
    one = torch.ones(4, 1, 1, 1)
    none = torch.zeros(4, 1, 1, 1)
    torch.testing.assert_close(
        prediction.x0(eps, prediction.target(x0, eps, none, one), none, one), x0, rtol=0, atol=2e-6
    )  # float32
    torch.testing.assert_close(
        prediction.epsilon(eps, prediction.target(x0, eps, none, one), none, one),
        eps,
        rtol=0,
        atol=2e-6,
    )
    torch.testing.assert_close(
        prediction.x0(x0, prediction.target(x0, eps, one, none), one, none), x0, rtol=0, atol=2e-6
    )
    assert prediction.jacobian(none, one).eq(0).all()


def test_epsilon_says_nothing_of_x0_in_pure_noise():
    assert Epsilon().determinant(torch.zeros(1), torch.ones(1)).item() == 0
    assert all(
        p.determinant(torch.zeros(1), torch.ones(1)).item() != 0 for p in (X0(), V(), Flow(), EDM())
    )


def test_bad_sigma_data_is_refused():
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(UserError) as refused:
            EDM(sigma_data=wrong)
        assert refused.value.key == "prediction.sigma_data"


class Net:
    """A network of two convolutions with weights of its own for every sample of the batch, so that
    the gradients come level by level.
    """

    def __init__(self, levels, generator):
        self.levels = levels
        shapes = [(8, 2, 3, 3), (8,), (8,), (2, 8, 3, 3), (2,)]
        weights = [
            0.4 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
        ]
        self.weights = [w.expand(levels, *w.shape).clone() for w in weights]

    def to(self, dtype):
        self.weights = [w.detach().to(dtype).requires_grad_() for w in self.weights]
        return self

    def __call__(self, x, timestep):
        first, bias, time, second, last = self.weights

        def convolved(x, kernel, bias):
            flat = F.conv2d(
                x.reshape(1, -1, *x.shape[2:]),
                kernel.flatten(0, 1),
                bias.flatten(),
                padding=1,
                groups=self.levels,
            )
            return flat.reshape(self.levels, -1, *x.shape[2:])

        hidden = torch.tanh(
            convolved(x, first, bias)
            + (time * timestep[:, None].to(x.dtype) / 999)[..., None, None]
        )
        return convolved(hidden, second, last)


def certificate(name, dtype, t, generator, weightings=WEIGHTINGS):
    """(loss [B] and gradients [B, weights] of the network read as eps, {(prediction, weighting):
    the same through Objective}) in epsilon error.

    alpha and sigma of the conversion are the schedule's; that they are right is shown elsewhere.
    """
    schedule = made(SCHEDULES[name])
    found = {}
    net = Net(len(t), generator).to(dtype)
    x0, noise = (
        torch.randn(len(t), 2, 5, 5, generator=generator, dtype=torch.float64).to(dtype)
        for _ in range(2)
    )
    alpha, sigma = schedule.alpha_sigma(t, dtype)
    x = alpha * x0 + sigma * noise
    timestep = (t * (schedule.num_timesteps - 1)).to(torch.float32)

    def measured(loss):
        gradients = torch.autograd.grad(loss.sum(), net.weights)
        return loss.detach(), torch.cat([g.flatten(1) for g in gradients], 1)

    for prediction_name, node in PREDICTIONS.items():
        prediction = made(node)

        def network(shown, fed, prediction_name=prediction_name, prediction=prediction):
            assert torch.equal(fed, timestep)
            eps = net(x, fed)
            return TARGET.get(prediction_name, prediction.target)(
                (x - sigma * eps) / alpha, eps, alpha, sigma
            )

        for weighting_name in weightings:
            times = (
                Window(low=0.001, high=0.999)
                if schedule.log_snr_max == float("inf")
                else Uniform(continuous=True)
            )  # else x0 has infinite weight
            try:
                weighting = made(WEIGHTINGS[weighting_name], density=Density(schedule, times))
                objective = Objective(
                    schedule=schedule, prediction=prediction, weighting=weighting, times=times
                )
            except UserError:
                continue
            found[prediction_name, weighting_name] = measured(
                objective.at(network, x0, noise, t).per_sample
            )
    return measured((net(x, timestep) - noise).square().mean((1, 2, 3))), found


@pytest.mark.parametrize("name", SCHEDULES)
def test_one_network_read_as_each_prediction_has_one_loss_and_one_gradient(name, generator):
    t = torch.linspace(0.005, 0.995, 20, dtype=torch.float64)
    (loss, gradient), found = certificate(name, torch.float64, t, generator)
    assert {prediction for prediction, weighting in found if weighting == "epsilon"} >= {
        "v",
        "flow",
        "x0",
        "edm",
    } & set(PREDICTIONS)
    for prediction in PREDICTIONS:
        if (prediction, "epsilon") in found:  # weight one on the noise, whatever is predicted
            torch.testing.assert_close(found[prediction, "epsilon"][0], loss, rtol=1e-9, atol=0)
            difference = (found[prediction, "epsilon"][1] - gradient).norm(dim=1) / gradient.norm(
                dim=1
            )
            assert difference.max() < 1e-9
    for weighting in WEIGHTINGS.keys() - {
        "simple"
    }:  # simple is the weighting that depends on the prediction
        same = [value for (_, its), value in found.items() if its == weighting]
        for its_loss, its_gradient in same[1:]:
            torch.testing.assert_close(its_loss, same[0][0], rtol=1e-9, atol=0)
            assert ((its_gradient - same[0][1]).norm(dim=1) / same[0][1].norm(dim=1)).max() < 1e-9


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_same_in_float32(name, generator):
    """Up to |log_snr| = 10; x0 loses 6e-6 at 7 already, because what it says is the small rest of a
    large number.
    """
    t = torch.linspace(0.005, 0.995, 20, dtype=torch.float64)
    t = t[made(SCHEDULES[name]).log_snr(t).abs() <= 10]
    (loss, gradient), found = certificate(name, torch.float32, t, generator, ["epsilon"])
    for prediction in PREDICTIONS:
        if (prediction, "epsilon") in found:
            torch.testing.assert_close(found[prediction, "epsilon"][0], loss, rtol=1e-4, atol=0)
            assert (
                (found[prediction, "epsilon"][1] - gradient).norm(dim=1) / gradient.norm(dim=1)
            ).max() < 1e-4


def test_a_wrong_jacobian_would_be_seen(generator):
    """The twin: v with the jacobian of flow."""

    class Wrong(V):
        def jacobian(self, alpha, sigma):
            return Flow().jacobian(alpha, sigma)

    prediction, (x0, _, alpha, sigma) = Wrong(), draw(generator)
    other = torch.randn(x0.shape, generator=generator, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(prediction.epsilon(x0, other, alpha, sigma).sum(), other)
    assert not torch.allclose(slope**2, prediction.jacobian(alpha, sigma).expand_as(x0), rtol=1e-3)
