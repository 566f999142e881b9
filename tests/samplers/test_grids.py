"""Grids: the times that a sampler visits."""

import pytest
import torch
import yaml
from diffusers import EulerDiscreteScheduler
from hydra.utils import instantiate

from sdtrain.errors import UserError
from sdtrain.paths import config_dir
from sdtrain.samplers.grids import karras, leading, linspace, trailing, uniform_log_snr
from sdtrain.schedules.cosine_log_snr import cosine_log_snr
from sdtrain.schedules.flow import flow
from sdtrain.schedules.linear import linear
from sdtrain.schedules.modifiers import zero_terminal_snr
from sdtrain.schedules.scaled_linear import scaled_linear

FILES = [file for file in sorted((config_dir() / "grid").glob("*.yaml")) if file.stem != "none"]
SCHEDULES = [scaled_linear(), cosine_log_snr(), flow(), zero_terminal_snr(scaled_linear())]
KARRAS = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "timestep_spacing": "linspace",
    "use_karras_sigmas": True,
}
"""The Karras grid of diffusers, on the betas of Stable Diffusion."""


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def grid(request):
    return instantiate(yaml.safe_load(request.param.read_text()))


def test_karras_grid_is_theirs():
    """Their Karras sigmas from the ends of their table; sigma / alpha of our times."""
    theirs = EulerDiscreteScheduler(**KARRAS)
    theirs.set_timesteps(12)
    schedule = scaled_linear()
    alpha, sigma = schedule.alpha_sigma(karras(12, schedule), torch.float64)
    torch.testing.assert_close(
        (sigma / alpha).flatten().float(), theirs.sigmas[:-1], rtol=2e-4, atol=0
    )  # theirs come out of a float32 table


def test_grids_fall_within_the_schedule(grid):
    for schedule in SCHEDULES:
        for steps in (1, 2, 3, 10, 50, 999, 1000):
            times = grid(steps, schedule)
            assert times.dtype == torch.float64
            assert times.shape == (steps,)
            assert (times.diff() < 0).all()
            assert times.min() >= 0
            assert times.max() <= 1


@pytest.mark.parametrize("made", [trailing, leading, linspace])
def test_grids_of_timesteps_visit_the_points_of_the_table(made):
    schedule = scaled_linear()
    for steps in range(1, schedule.num_timesteps + 1, 7):
        times = made(steps, schedule)
        assert ((times * 999) - (times * 999).round()).abs().max() < 1e-9
    assert (made(1000, schedule) * 999).round().long().tolist() == list(range(999, -1, -1))


def test_ends_of_the_grids():
    schedule = scaled_linear()
    for steps in (1, 2, 3, 7, 30, 999, 1000):
        assert all(
            made(steps, schedule)[0] == 1 for made in (trailing, linspace, karras, uniform_log_snr)
        )
        assert leading(steps, schedule)[-1] == 0
    assert (trailing(4, schedule) * 999).round().tolist() == [999, 749, 499, 249]
    assert (leading(4, schedule) * 999).round().tolist() == [750, 500, 250, 0]
    assert (linspace(4, schedule) * 999).round().tolist() == [999, 666, 333, 0]
    assert trailing(3, linear(num_timesteps=10)).tolist() == [1, 6 / 9, 2 / 9]
    for made in (linspace, karras, uniform_log_snr):
        assert made(9, schedule)[-1].item() == pytest.approx(0, abs=1e-12)
    for made in (karras, uniform_log_snr):
        assert made(9, flow())[0] == 1  # pure noise, beyond the bounds of the grid
    # Where the schedule ends in log_snr = -inf the second time is at the first bound, and the rest
    # is even.
    log_snr = flow().log_snr(uniform_log_snr(11, flow(), log_snr_min=-8.0, log_snr_max=8.0))
    torch.testing.assert_close(
        log_snr[1:], torch.linspace(-8, 8, 11, dtype=torch.float64)[1:], rtol=0, atol=1e-12
    )


def test_karras_by_hand():
    """sigma_i^(1/rho) is linear in i: with rho = 1 sigma / alpha itself is."""
    alpha, sigma = flow().alpha_sigma(
        karras(5, flow(), rho=1.0, sigma_min=1.0, sigma_max=5.0), torch.float64
    )
    torch.testing.assert_close(
        (sigma / alpha).flatten()[1:], torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    )
    alpha, sigma = cosine_log_snr().alpha_sigma(
        karras(3, cosine_log_snr(), rho=2.0, sigma_min=0.04, sigma_max=4.0), torch.float64
    )
    torch.testing.assert_close(
        (sigma / alpha).flatten()[1:], torch.tensor([1.1**2, 0.04], dtype=torch.float64)
    )


@pytest.mark.parametrize(
    ("made", "bad"),
    [
        (karras, {"rho": 0.0}),
        (karras, {"sigma_min": 9.0, "sigma_max": 3.0}),
        (karras, {"sigma_min": 0.0}),
        (karras, {"sigma_min": 900.0, "sigma_max": 1e3}),
        (uniform_log_snr, {"log_snr_min": 3.0, "log_snr_max": -3.0}),
        (uniform_log_snr, {"log_snr_min": 20.0, "log_snr_max": 30.0}),
    ],
)
def test_bad_grids_are_refused_by_name(made, bad):
    with pytest.raises(UserError, match="grid") as refused:
        made(10, linear(), **bad)
    assert refused.value.key.partition(".")[0] == "grid"


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_bad_steps_are_refused(grid, steps):
    with pytest.raises(UserError, match="1000") as refused:
        grid(steps, linear())
    assert (refused.value.key, refused.value.value) == ("steps", steps)
