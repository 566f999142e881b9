"""Guidance: one pass at scale 0 and 1, linear, the same of x0 and of the noise, rescaled per
picture, and only inside its interval.
"""

import math

import numpy as np
import pytest
import torch

from sdtrain.diffusion import Denoiser, classifier_free
from sdtrain.diffusion.guidance import CONDITIONED, UNCONDITIONED
from sdtrain.diffusion.prediction import Epsilon
from sdtrain.errors import UserError
from sdtrain.schedules.flow import flow
from sdtrain.schedules.linear import linear

ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))  # of linear(), made here


@pytest.fixture
def x():
    return torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Counted:
    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, x, t):
        self.calls += 1
        return self.function(x, t)


def told(conditional, unconditional):
    """Two denoisers, by what they are told."""
    return {CONDITIONED: conditional, UNCONDITIONED: unconditional}


def pair():
    return told(Counted(lambda x, t: x.sin() * 3.1), Counted(lambda x, t: x.cos() / 7))


def calls(denoisers):
    """How often each was asked: (conditional, unconditional)."""
    return denoisers[CONDITIONED].calls, denoisers[UNCONDITIONED].calls


def at(timestep):
    return torch.tensor(timestep / 999, dtype=torch.float64)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("scale", [0, 1, 0.0, 1.0])
def test_0_and_1_ask_one_network_and_pass_its_answer_on(scale, rescale, x):
    denoisers = pair()
    answer = classifier_free(denoisers, scale, linear(), rescale=rescale)(x, at(300))
    assert torch.equal(answer, x.sin() * 3.1 if scale else x.cos() / 7)
    assert calls(denoisers) == ((1, 0) if scale else (0, 1))


@pytest.mark.parametrize("scale", [-1.0, 0.5, 2.0, 7.5])
def test_linear_and_the_same_in_epsilon(scale, x):
    """Said of x0 or of the noise: with eps = eps_u + scale (eps_c - eps_u), x0 = (x - sigma eps) /
    alpha.
    """
    networks = [lambda x, timestep: x.sin() * 3.1, lambda x, timestep: x.cos() / 7]
    conditional, unconditional = (Denoiser(network, linear(), Epsilon()) for network in networks)
    answer = classifier_free(told(conditional, unconditional), scale, linear())(x, at(600))
    torch.testing.assert_close(
        answer,
        (1 - scale) * unconditional(x, at(600)) + scale * conditional(x, at(600)),
        rtol=0,
        atol=1e-12,
    )
    alpha = ALPHA_BAR[600] ** 0.5
    sigma = (1 - ALPHA_BAR[600]) ** 0.5
    eps = x.cos() / 7 + scale * (x.sin() * 3.1 - x.cos() / 7)
    torch.testing.assert_close(
        answer, (x - sigma * eps) / alpha, rtol=0, atol=1e-11
    )  # float64 over alpha = 0.16, values up to 200


@pytest.mark.parametrize("rescale", [0.25, 0.5, 1.0])
def test_rescale_brings_each_picture_to_the_conditional_deviation(rescale, x):
    """Wholly at 1; at 0.5 halfway; each picture by its own factor, and nothing but a factor."""
    plain, rescaled = (
        classifier_free(pair(), 5.0, linear(), rescale=r)(x, at(600)).numpy()
        for r in (0.0, rescale)
    )
    wanted = (1 - rescale) * plain.std((1, 2, 3)) + rescale * (x.sin() * 3.1).numpy().std((1, 2, 3))
    np.testing.assert_allclose(rescaled.std((1, 2, 3)), wanted, rtol=1e-14)
    factor = rescaled / plain
    np.testing.assert_allclose(
        factor, np.broadcast_to(factor[:, :1, :1, :1], factor.shape), rtol=1e-14
    )
    assert np.ptp(factor[:, 0, 0, 0]) > 1e-4  # the pictures differ
    one = classifier_free(pair(), 5.0, linear(), rescale=rescale)(x[1:2], at(600)).numpy()
    np.testing.assert_allclose(rescaled[1:2], one, rtol=1e-14)  # whatever else is in the batch


@pytest.mark.parametrize("schedule", [linear(), flow()], ids=lambda s: s.name)
def test_outside_its_interval_only_the_conditional_network_is_asked(schedule, x):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    levels = schedule.log_snr(t).tolist()
    for low, high in ((-2.0, 3.0), (None, 3.0), (-2.0, None), (None, None)):
        for place, log_snr in zip(t, levels, strict=True):
            denoisers = pair()
            guided = classifier_free(denoisers, 5.0, schedule, log_snr_min=low, log_snr_max=high)
            answer = guided(x, place)
            inside = (
                (-math.inf if low is None else low)
                <= log_snr
                <= (math.inf if high is None else high)
            )
            assert calls(denoisers) == (1, int(inside))
            torch.testing.assert_close(
                answer,
                x.cos() / 7 + 5 * (x.sin() * 3.1 - x.cos() / 7) if inside else x.sin() * 3.1,
                rtol=0,
                atol=1e-13,
            )


@pytest.mark.parametrize(
    ("key", "arguments"),
    [
        ("rescale", {"rescale": -0.1}),
        ("rescale", {"rescale": 1.1}),
        ("rescale", {"rescale": math.nan}),
        ("log_snr_min", {"log_snr_min": 1.0, "log_snr_max": 1.0}),
        ("log_snr_max", {"log_snr_min": 2.0, "log_snr_max": -2.0}),
        ("log_snr_min", {"log_snr_min": math.nan}),
    ],
)
def test_refusals_name_the_key(key, arguments):
    for scale in (0.0, 1.0, 5.0):  # a wrong key is wrong whether or not guidance is on
        with pytest.raises(UserError, match=rf"guidance\.{key}"):
            classifier_free(pair(), scale, linear(), **arguments)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_an_x0_that_is_too_large_is_scaled_down_and_no_other(scale):
    """Picture by picture, whatever the guidance; one that is within the bound is passed on bit for
    bit.
    """
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor(0.3)
    size = torch.tensor([0.1, 1.0, 500.0]).reshape(3, 1, 1, 1)
    denoisers = told(lambda x, t: x.sin() * size, lambda x, t: (x + 1).sin() * size)
    free = classifier_free(denoisers, scale, linear())(x, t)
    found = classifier_free(denoisers, scale, linear(), max_std=20.0)(x, t)
    assert torch.equal(found[:2], free[:2])
    assert free[2].std() > 100
    torch.testing.assert_close(found[2], free[2] / free[2].std(correction=0) * 20)
    with pytest.raises(UserError) as refused:
        classifier_free(denoisers, scale, linear(), max_std=0.0)
    assert refused.value.key == "guidance.max_std"
