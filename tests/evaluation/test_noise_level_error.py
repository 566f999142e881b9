"""The number over noise levels against closed forms: of data and networks with known errors."""

import math

import numpy as np
import pytest
import torch
import yaml
from hydra.utils import get_object

from sdtrain.diffusion import Objective
from sdtrain.diffusion.losses import Huber
from sdtrain.diffusion.times import Uniform
from sdtrain.diffusion.weighting.min_snr import MinSNR
from sdtrain.diffusion.weighting.simple import Simple
from sdtrain.errors import UserError
from sdtrain.evaluation.noise_level_error import (
    BITS,
    LEVELS,
    NoiseLevelErrors,
    linear_errors,
    network_errors,
    standard_error,
)
from sdtrain.paths import config_dir

SHAPE = (4, 8, 8)
STD = 0.8


def nodes(group):
    return {
        path.stem: yaml.safe_load(path.read_text())
        for path in sorted((config_dir() / group).glob("*.yaml"))
        if path.stem != "none"
    }


SCHEDULES = nodes("schedule")
PREDICTIONS = nodes("prediction")
SCHEDULES["table"]["betas"] = (1e-4 + 0.015 * np.linspace(0, 1, 1000) ** 2).tolist()


def made(node):
    return get_object(node["_target_"])(
        **{key: value for key, value in node.items() if key != "_target_"}
    )


def gaussian(count, seed):
    """Latents N(0, STD^2) and their noise, [count, *SHAPE] float64."""
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randn(count, *SHAPE, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, *SHAPE, generator=generator, dtype=torch.float64)
    return STD * x0, noise


def ideal(schedule, prediction):
    """The best network for these latents: x0_hat = alpha STD^2 x / (alpha^2 STD^2 + sigma^2), said
    as the prediction says it."""

    def network(x, timestep):
        alpha, sigma = schedule.alpha_sigma(
            timestep.double() / (schedule.num_timesteps - 1), torch.float64
        )
        if prediction.network_input(torch.ones_like(alpha), alpha, sigma).ne(1).any():
            x = x / prediction.network_input(torch.ones_like(alpha), alpha, sigma)
        total = (alpha * STD) ** 2 + sigma**2
        p, q = prediction.coefficients(alpha, sigma)
        return (p * alpha * STD**2 + q * sigma) * x / total

    return network


def measured(schedule, prediction, count=64, seed=0, weighting=None, loss=None):
    objective = Objective(
        schedule=schedule,
        prediction=prediction,
        weighting=weighting or Simple(),
        times=Uniform(),
        loss=loss,
    )
    x0, noise = gaussian(count, seed)
    network = ideal(schedule, prediction)
    inside = (LEVELS >= schedule.log_snr_min) & (LEVELS <= schedule.log_snr_max)

    def error(picture, log_snr, sign):
        return objective.epsilon_error(
            network, x0[picture], noise[picture] * sign.view(-1, 1, 1, 1), schedule.time_of(log_snr)
        )

    errors = linear_errors(x0, torch.zeros(1), torch.full((1,), STD**2))
    linear = errors.clone()
    errors[:, inside] = network_errors(error, torch.arange(count), LEVELS[inside])
    return NoiseLevelErrors(errors, linear, inside)


# The integral of d^2 r / (d^2 r + 1) over log r is ln(1 + d^2 r).
CLOSED = (math.log1p(STD**2 * math.exp(12)) - math.log1p(STD**2 * math.exp(-12))) / (
    2 * math.log(2)
)


def pairs():
    """Each schedule with one prediction, so that each prediction meets several schedules."""
    predictions = list(PREDICTIONS)
    for place, schedule in enumerate(SCHEDULES):
        yield schedule, predictions[place % len(predictions)]


@pytest.mark.parametrize(("schedule", "prediction"), list(pairs()))
def test_the_ideal_denoiser_of_gaussian_latents_has_the_closed_form(schedule, prediction):
    schedule, prediction = made(SCHEDULES[schedule]), made(PREDICTIONS[prediction])
    try:
        found = measured(schedule, prediction, 512)
    except UserError:
        assert schedule.log_snr_min == -math.inf  # from which epsilon cannot be read
        return
    numbers = found.summary()
    assert numbers["bits_per_dim"] == pytest.approx(CLOSED, rel=0.01)
    assert abs(numbers["bits_per_dim"] - CLOSED) < 4 * numbers["bits_per_dim_error"] + 1e-3
    floor = STD**2 / (STD**2 + (-LEVELS).exp())
    assert torch.allclose(found.errors.mean(0), floor, rtol=0.02)


def test_a_wrong_network_is_charged_more():
    schedule = made(SCHEDULES["scaled_linear"])
    prediction = made(PREDICTIONS["epsilon"])
    objective = Objective(
        schedule=schedule, prediction=prediction, weighting=Simple(), times=Uniform()
    )
    x0, noise = gaussian(64, 0)
    levels = LEVELS[(LEVELS >= schedule.log_snr_min) & (LEVELS <= schedule.log_snr_max)]
    best = ideal(schedule, prediction)
    at = schedule.time_of

    def error(network):
        error = lambda i, level, sign: objective.epsilon_error(  # noqa: E731
            network, x0[i], noise[i] * sign.view(-1, 1, 1, 1), at(level)
        )
        return network_errors(error, torch.arange(64), levels).mean(0)

    assert (error(lambda x, t: 0.9 * best(x, t)) > error(best)).all()
    assert torch.allclose(
        error(lambda x, t: 0 * x), torch.ones(len(levels), dtype=torch.float64), rtol=0.05
    )


def test_neither_weighting_nor_loss_changes_it():
    schedule = made(SCHEDULES["cosine"])
    prediction = made(PREDICTIONS["v"])
    plain = measured(schedule, prediction, 8)
    other = measured(schedule, prediction, 8, weighting=MinSNR(gamma=5.0), loss=Huber(delta=0.1))
    assert torch.equal(plain.errors, other.errors)


def test_the_stated_error_is_the_spread_over_repeats():
    schedule = made(SCHEDULES["scaled_linear"])
    prediction = made(PREDICTIONS["epsilon"])
    found = [measured(schedule, prediction, 48, seed).summary() for seed in range(20)]
    spread = torch.tensor([numbers["bits_per_dim"] for numbers in found]).std().item()
    assert 0.65 < spread / np.mean([numbers["bits_per_dim_error"] for numbers in found]) < 1.5


def test_linear_errors_are_the_mean_over_noise():
    """Of the denoiser written out, for latents that it does not fit."""
    generator = torch.Generator().manual_seed(0)
    x0 = 0.5 + 1.5 * torch.randn(3, *SHAPE, generator=generator, dtype=torch.float64)
    mean = torch.tensor([0.1, -0.2, 0.0, 0.3]).view(1, 4, 1, 1)
    variance = torch.tensor([0.5, 1.0, 2.0, 0.8]).view(1, 4, 1, 1)
    found = linear_errors(x0, mean, variance)
    noise = torch.randn(4000, *SHAPE, generator=generator, dtype=torch.float64)
    for place in (2, 9, 12, 14, 20):
        alpha = LEVELS[place].sigmoid().sqrt()
        sigma = (-LEVELS[place]).sigmoid().sqrt()
        guess = (
            sigma
            * (alpha * x0[:, None] + sigma * noise - alpha * mean)
            / (alpha**2 * variance + sigma**2)
        )
        per_noise = (noise - guess).square().flatten(2).mean(2)
        assert (
            (per_noise.mean(1) - found[:, place]).abs() < 4 * per_noise.std(1) / 4000**0.5
        ).all()


def test_it_is_finite_at_the_far_ends():
    far = linear_errors(
        torch.ones(1, 1, 1, 1), torch.zeros(1), torch.ones(1), torch.tensor([-800.0, 800.0])
    )
    assert far.tolist() == [[0.0, 1.0]]


def test_the_share_of_the_stand_in():
    errors = torch.ones(2, len(LEVELS), dtype=torch.float64)
    inside = LEVELS.abs() < 6.5
    numbers = NoiseLevelErrors(errors, 2 * errors, inside).summary()
    assert numbers["stand_in_share"] == pytest.approx(1 - 13 / 24) and numbers[
        "bits_per_dim"
    ] == pytest.approx(12 / math.log(2))
    assert (
        numbers["bits_saved"] == pytest.approx(12 / math.log(2))
        and numbers["bits_per_dim_error"] == 0
    )
    assert standard_error(torch.ones(1)) == math.inf and BITS.sum().item() == pytest.approx(
        12 / math.log(2)
    )

    alone = NoiseLevelErrors(errors[:1], 2 * errors[:1], inside).summary()
    assert alone.keys() == {"bits_per_dim", "bits_saved", "stand_in_share"}


def test_each_picture_meets_each_level_once_with_both_signs():
    asked = []

    def error(picture, log_snr, sign):
        asked.extend(zip(picture.tolist(), log_snr.tolist(), sign.tolist(), strict=True))
        return picture * 100 + log_snr + 0.25 * sign

    found = network_errors(error, torch.arange(3), torch.tensor([-1.0, 2.0]), size=5)
    assert sorted(asked) == sorted(
        (i, level, sign) for i in range(3) for level in (-1.0, 2.0) for sign in (-1, 1)
    )
    assert found.tolist() == [[-1.0, 2.0], [99.0, 102.0], [199.0, 202.0]]
    assert torch.equal(
        network_errors(error, torch.tensor([2, 0]), torch.tensor([-1.0, 2.0]), size=3),
        found[[2, 0]],
    )
    assert network_errors(error, torch.arange(0), torch.tensor([-1.0, 2.0])).shape == (
        0,
        2,
    )  # a rank for which there is no picture
