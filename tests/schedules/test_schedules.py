"""Every schedule of configs/schedule keeps what a schedule promises, and the tables are those of the papers."""

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMScheduler
from hydra.utils import instantiate

from sdtrain import schedules
from sdtrain.diffusion import add_noise
from sdtrain.errors import UserError
from sdtrain.paths import config_dir

CONFIGS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((config_dir() / "schedule").glob("*.yaml")) if path.stem != "none"}


def cosine_betas(steps):
    bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - bar[1:] / bar[:-1], 0.999)


# The betas of the papers in numpy, and the same in diffusers' words. A schedule that is not made of betas has no line here.
BETAS = {
    "linear": lambda steps: np.linspace(1e-4, 0.02, steps),
    "scaled_linear": lambda steps: np.linspace(0.00085**0.5, 0.012**0.5, steps) ** 2,
    "cosine": cosine_betas,
}
DIFFUSERS = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}


@pytest.fixture(params=CONFIGS)
def schedule(request):
    return instantiate(CONFIGS[request.param])


@pytest.fixture(params=BETAS)
def table(request):
    """(schedule, its betas): points() of the first are made of the second."""
    return instantiate(CONFIGS[request.param]), BETAS[request.param](1000)


def points(schedule):
    return torch.arange(schedule.num_timesteps, dtype=torch.float64) / (schedule.num_timesteps - 1)


def dense():
    return torch.linspace(0, 1, 20011, dtype=torch.float64)


def test_alpha_and_sigma_are_views_of_log_snr(schedule):
    t = dense()
    alpha, sigma = schedule.alpha_sigma(t, torch.float64)
    assert alpha.shape == sigma.shape == (len(t), 1, 1, 1)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=0, atol=1e-15)  # a few roundings of numbers below 1
    # Squares, root and log each lose a few ulp: 1e-15 in log_snr, whatever its size.
    torch.testing.assert_close(schedule.log_snr(t), (alpha / sigma).log().flatten() * 2, rtol=1e-14, atol=1e-14)
    assert schedule.alpha_sigma(t[5])[0].shape == (1, 1, 1, 1)
    assert schedule.alpha_sigma(t)[0].dtype == torch.float32


def test_log_snr_falls_strictly(schedule):
    log_snr = schedule.log_snr(dense())
    assert log_snr.dtype == torch.float64
    assert log_snr.isfinite().all()
    assert (log_snr.diff() < 0).all()


def test_inverse(schedule):
    t = dense()[:-11].reshape(100, 200)  # a shape of its own, and both ends below
    # log_snr rounds to 4e-15 at most and falls by 6 a unit of t where it is flattest: 1e-14 of t is room enough.
    torch.testing.assert_close(schedule.time_of(schedule.log_snr(t)), t, rtol=0, atol=1e-14)
    ends = schedule.log_snr(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert schedule.time_of(ends).tolist() == [0, 1]


def test_inverse_refuses_what_lies_outside(schedule):
    top, bottom = schedule.log_snr(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
    for outside in (top + 1e-9, bottom - 1e-9):
        with pytest.raises(ValueError, match="outside"):
            schedule.time_of(torch.tensor([(top + bottom) / 2, outside], dtype=torch.float64))


def test_timestep(schedule):
    fed = schedule.timestep(points(schedule))
    assert fed.dtype == torch.float32
    assert fed.tolist() == list(range(schedule.num_timesteps))  # integers, exactly: float32 swallows the rounding of i / (T-1)
    assert schedule.timestep(torch.tensor([0.5], dtype=torch.float64)).item() == (schedule.num_timesteps - 1) / 2


def test_exact_at_the_points(table):
    schedule, betas = table
    alpha_bar = np.cumprod(1 - betas)
    alpha, sigma = (c.flatten().numpy() for c in schedule.alpha_sigma(points(schedule), torch.float64))
    # 1000 products round to 1e-13 at worst; numpy's 1 - alpha_bar cancels: 1e-16 of 4e-5, the smallest.
    np.testing.assert_allclose(alpha**2, alpha_bar, rtol=1e-13)
    np.testing.assert_allclose(sigma**2, 1 - alpha_bar, rtol=3e-12)
    log_snr = np.log(alpha_bar / (1 - alpha_bar))
    halfway = (points(schedule)[1:] + points(schedule)[:-1]) / 2
    np.testing.assert_allclose(schedule.log_snr(halfway).numpy(), (log_snr[1:] + log_snr[:-1]) / 2, rtol=0, atol=3e-12)


def test_markov_chain_equals_the_closed_form(table):
    """x_i = sqrt(1 - beta_i) x_{i-1} + sqrt(beta_i) eps_i, walked step by step, has mean alpha x0 and variance sigma^2."""
    schedule, betas = table
    mean, variance, means, variances = 1.0, 0.0, [], []
    for beta in betas:
        mean, variance = mean * np.sqrt(1 - beta), (1 - beta) * variance + beta
        means.append(mean)
        variances.append(variance)
    alpha, sigma = (c.flatten().numpy() for c in schedule.alpha_sigma(points(schedule), torch.float64))
    np.testing.assert_allclose(alpha, means, rtol=0, atol=2e-14)
    np.testing.assert_allclose(sigma**2, variances, rtol=0, atol=2e-14)


def test_noise_is_not_lost_in_low_precision(table):
    """What reaches the picture is sigma to one float32 ulp at every point, the first ones above all, where 1 - alpha_bar cancels."""
    schedule, betas = table
    sigma = np.sqrt(1 - np.cumprod(1 - betas))
    coefficients = schedule.alpha_sigma(points(schedule))
    noised = add_noise(torch.zeros(1000, 1, 1, 1), torch.ones(1000, 1, 1, 1), *coefficients).flatten().numpy()
    assert noised.dtype == np.float32
    assert (np.abs(noised - sigma) <= np.spacing(sigma.astype(np.float32))).all()


@pytest.mark.parametrize("name", DIFFUSERS)
def test_parity_with_diffusers(name):
    alpha = instantiate(CONFIGS[name]).alpha_sigma(points(schedules.linear()), torch.float64)[0].flatten()
    theirs = DDPMScheduler(num_train_timesteps=1000, **DIFFUSERS[name]).alphas_cumprod.double()
    # Its betas and their product are float32: 2000 roundings of 3e-8 that go up and down add to sqrt(2000) 3e-8 = 1.3e-6, times 3;
    # cosine's last factor, 1 - 0.999, carries 6e-8 / 1e-3 = 6e-5 alone.
    torch.testing.assert_close(alpha[:-1] ** 2, theirs[:-1], rtol=4e-6, atol=0)
    torch.testing.assert_close(alpha[-1] ** 2, theirs[-1], rtol=6e-5, atol=0)


def test_training_time_takes_each_point_equally_often(schedule):
    size = schedule.num_timesteps
    u = (torch.arange(7 * size, dtype=torch.float64) + 0.5) / (7 * size)
    place = schedule.training_time(u) * (size - 1)
    torch.testing.assert_close(place, place.round(), rtol=0, atol=1e-9)
    assert (place.round().long().bincount(minlength=size) == 7).all()
    edges = schedule.training_time(torch.tensor([0, np.nextafter(1, 0)], dtype=torch.float64))
    assert edges.tolist() == [0, 1]


@pytest.mark.parametrize("name", BETAS)
@pytest.mark.parametrize("steps", [2, 7])
def test_length_is_the_users(name, steps):
    made = instantiate(CONFIGS[name] | {"num_timesteps": steps})
    assert made.num_timesteps == steps
    np.testing.assert_allclose(made.alpha_sigma(points(made), torch.float64)[0].flatten().numpy() ** 2, np.cumprod(1 - BETAS[name](steps)), rtol=1e-12)


@pytest.mark.parametrize(
    ("curve", "key", "value"),
    [
        ("linear", "beta_start", 0.0), ("linear", "beta_start", -1e-4), ("linear", "beta_start", float("nan")), ("linear", "beta_end", 1.0),
        ("scaled_linear", "beta_start", -1e-4), ("scaled_linear", "beta_end", 1.5), ("cosine", "max_beta", 1.0), ("cosine", "max_beta", 0.0),
        ("linear", "num_timesteps", 1), ("linear", "num_timesteps", 0), ("linear", "num_timesteps", -1), ("scaled_linear", "num_timesteps", -1),
        ("cosine", "num_timesteps", 1), ("cosine", "num_timesteps", -2),
    ],
)
def test_bad_betas_are_refused_by_name(curve, key, value):
    with pytest.raises(UserError, match=rf"schedule\.{key}"):
        getattr(schedules, curve)(**{key: value})


@pytest.mark.parametrize("betas", [[0.1], [], [[0.1, 0.2]], [0.1, 1.0], [0.1, 0.0], [0.1, float("nan")]])
def test_a_table_refuses_what_is_no_table(betas):
    with pytest.raises(UserError, match="schedule=mine"):
        schedules.TableSchedule("mine", torch.tensor(betas))
