"""The effective weight against closed forms, and which objectives train the same."""

import math

import pytest
import torch

from sdtrain.diffusion.density import Density
from sdtrain.diffusion.effective_weight import (
    LOG_SNR_LIMIT,
    ComparedObjective,
    effective_weight,
    find_relations,
)
from sdtrain.diffusion.losses import MSE, Huber
from sdtrain.diffusion.objective import Objective
from sdtrain.diffusion.prediction import EDM, X0, Epsilon, Flow, V
from sdtrain.diffusion.times import LogNormal, Uniform, Window
from sdtrain.diffusion.weighting.epsilon import Epsilon as OnEpsilon
from sdtrain.diffusion.weighting.flat import Flat
from sdtrain.diffusion.weighting.min_snr import MinSNR
from sdtrain.diffusion.weighting.simple import Simple
from sdtrain.schedules.cosine_log_snr import cosine_log_snr
from sdtrain.schedules.flow import flow
from sdtrain.schedules.linear import linear
from sdtrain.schedules.scaled_linear import scaled_linear
from sdtrain.schedules.table import table


def objective(schedule, prediction=None, weighting=None, times=None, loss=None):
    return Objective(
        schedule=schedule,
        prediction=prediction or Epsilon(),
        weighting=weighting or Simple(),
        times=times or Uniform(),
        loss=loss,
    )


class SNRPlusOne:
    """w = 1 / J of v on a variance-preserving schedule: J = alpha^2 = SNR / (SNR + 1)."""

    def __call__(self, log_snr, jacobian):
        return 1 + (-log_snr).exp()


class SNROverSigma:
    """w = 1 / J of x0: J = SNR."""

    def __call__(self, log_snr, jacobian):
        return (-log_snr).exp()


class FlowWeight:
    """w = 1 / J of flow: J = (alpha / (alpha + sigma))^2, sigma / alpha = exp(-log_snr / 2)."""

    def __call__(self, log_snr, jacobian):
        return (1 + (-log_snr / 2).exp()) ** 2


def relations(*pairs):
    """Of (prediction's setting, objective) each, all with the same noise."""
    compared = []
    for prediction, one in pairs:
        loss = type(one.loss).__name__
        compared.append(ComparedObjective(one, prediction, loss, "gaussian"))
    return find_relations(compared)


@pytest.mark.parametrize("schedule", [cosine_log_snr(), linear(), scaled_linear()])
def test_it_has_unit_integral_over_the_levels_that_are_drawn(schedule):
    found = effective_weight(objective(schedule))
    low = max(schedule.log_snr_min, -LOG_SNR_LIMIT)
    high = min(schedule.log_snr_max, LOG_SNR_LIMIT)
    assert [found.log_snr[0].item(), found.log_snr[-1].item()] == pytest.approx([low, high])
    assert torch.trapezoid(found.weight, found.log_snr).item() == pytest.approx(1)


def test_the_cosine_curve_has_the_density_of_a_hyperbolic_secant():
    """log_snr = -2 ln tan(pi t / 2), so |dt / d log_snr| = sech(log_snr / 2) / (2 pi)."""
    found = effective_weight(objective(cosine_log_snr()))
    density = 1 / torch.cosh(found.log_snr / 2)
    density /= torch.trapezoid(density, found.log_snr)
    inside = slice(2, -2)  # a curve has ends
    assert torch.allclose(found.weight[inside], density[inside], rtol=1e-6)


def test_a_normal_law_of_levels_is_its_own_density():
    """ln(sigma / alpha) = -log_snr / 2 is normal, whatever the schedule."""
    law = LogNormal(mean=-1.2, std=1.2)
    found = effective_weight(objective(cosine_log_snr(), weighting=OnEpsilon(), times=law))
    density = (-((-found.log_snr / 2 + 1.2) ** 2) / (2 * 1.2**2)).exp()
    density /= torch.trapezoid(density, found.log_snr)
    inside = slice(2, -2)
    assert torch.allclose(found.weight[inside], density[inside], rtol=1e-4, atol=1e-9)


def test_a_window_shows_its_own_levels_alone():
    """On the straight path log_snr = 2 ln((1 - t) / t)."""
    found = effective_weight(objective(flow(), V(), times=Window(low=0.25, high=0.75)))
    ends = [found.log_snr[0].item(), found.log_snr[-1].item()]
    assert ends == pytest.approx([-2 * math.log(3), 2 * math.log(3)])


def test_every_level_of_a_window_has_the_same_flat_weight():
    """Also the outermost, which rounding may put just outside."""
    schedule = scaled_linear()
    times = Window(low=0.0, high=0.5)
    flat = Flat(density=Density(schedule, times))
    found = effective_weight(objective(schedule, weighting=flat, times=times))
    width = found.log_snr[-1] - found.log_snr[0]
    torch.testing.assert_close(
        found.weight[1:-1] * width,
        torch.ones(len(found.weight) - 2, dtype=torch.float64),
        atol=0.01,
        rtol=0,
    )
    assert found.weight.isfinite().all()


@pytest.mark.parametrize(
    ("prediction", "weighting"),
    [(V(), SNRPlusOne()), (X0(), SNROverSigma()), (Flow(), FlowWeight()), (EDM(), SNRPlusOne())],
)
def test_an_unweighted_output_is_a_weight_on_epsilon(prediction, weighting):
    """Weight one on the network's own output says w = 1 / J on the error of epsilon."""
    schedule = scaled_linear()
    first, second = relations(
        ("other", objective(schedule, prediction, Simple())),
        ("epsilon", objective(schedule, Epsilon(), weighting)),
    )
    assert first.reparameterised == [1]
    assert second.reparameterised == [0]
    assert first.duplicates == second.duplicates == []


def test_a_table_is_the_curve_it_was_taken_from():
    betas = (torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).tolist()
    found = relations(
        ("epsilon", objective(table(betas=betas))),
        ("epsilon", objective(linear())),
        ("epsilon", objective(scaled_linear())),
    )
    assert [each.duplicates for each in found] == [[2], [], [0]]


def test_duplicates_and_other_parameterisations_among_many():
    schedule = scaled_linear()
    found = relations(
        ("epsilon", objective(schedule, Epsilon(), OnEpsilon())),
        ("epsilon", objective(schedule, Epsilon(), Simple())),
        ("v", objective(schedule, V(), OnEpsilon())),
        ("v", objective(schedule, V(), MinSNR())),
        ("epsilon", objective(schedule, Epsilon(), MinSNR(gamma=6.0))),
    )
    assert [each.duplicates for each in found] == [[1], [0], [], [], []]
    assert [each.reparameterised for each in found] == [[2], [2], [0, 1], [], []]


def test_another_loss_noise_or_number_of_timesteps_is_another_objective():
    schedule = scaled_linear()
    one = objective(schedule)
    settings = [
        ComparedObjective(one, "epsilon", "mse", "gaussian"),
        ComparedObjective(one, "epsilon", "mse", "offset"),
        ComparedObjective(objective(schedule, loss=Huber()), "epsilon", "huber", "gaussian"),
        ComparedObjective(objective(schedule, loss=MSE()), "epsilon", "mse", "gaussian"),
        None,
    ]
    found = find_relations(settings)
    assert [each.duplicates for each in found] == [[3], [], [], [0], []]
    coarse = objective(cosine_log_snr(num_timesteps=500))
    fine = objective(cosine_log_snr())
    assert coarse.schedule.num_timesteps == 500
    found = relations(("epsilon", coarse), ("epsilon", fine))
    assert [each.duplicates for each in found] == [[], []]


def test_another_output_is_the_same_objective_under_squares_alone():
    schedule = scaled_linear()
    found = relations(
        ("epsilon", objective(schedule, Epsilon(), OnEpsilon(), loss=Huber())),
        ("v", objective(schedule, V(), OnEpsilon(), loss=Huber())),
    )
    assert [each.reparameterised for each in found] == [[], []]


def test_levels_beyond_what_is_compared_have_no_weight():
    """At t = 1e-5 the straight path has log_snr = 23."""
    beyond = objective(flow(), V(), times=Window(low=0.0, high=1e-5))
    assert effective_weight(beyond) is None
    within = objective(flow(), V())
    found = relations(("v", beyond), ("v", beyond), ("v", within))
    assert [each.duplicates for each in found] == [[], [], []]
