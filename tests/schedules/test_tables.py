"""The tables of configs/schedule are those of the papers, walked step by step and beside diffusers.

What a table should be is written here in numpy.
"""

import json
import math

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMScheduler
from hydra.utils import get_object

from sdtrain.diffusion import add_noise
from sdtrain.errors import UserError
from sdtrain.paths import config_dir
from sdtrain.schedules.cosine import cosine
from sdtrain.schedules.table import from_alphas_cumprod, from_betas, table

MY_BETAS = 1e-4 + 0.015 * np.linspace(0, 1, 1000) ** 2


def make(name, **changes):
    node = yaml.safe_load((config_dir() / "schedule" / f"{name}.yaml").read_text())
    if name == "table":
        node["betas"] = MY_BETAS.tolist()
    target = get_object(node.pop("_target_"))
    return target(**node | changes)


def cosine_betas(steps, offset=0.008, max_beta=0.999):
    bar = np.cos((np.arange(steps + 1) / steps + offset) / (1 + offset) * np.pi / 2) ** 2
    return np.minimum(1 - bar[1:] / bar[:-1], max_beta)


# The betas of the papers. A schedule that is not made of betas has no line here.
BETAS = {
    "linear": lambda steps: np.linspace(1e-4, 0.02, steps),
    "scaled_linear": lambda steps: np.linspace(0.00085**0.5, 0.012**0.5, steps) ** 2,
    "cosine": cosine_betas,
    "table": lambda steps: MY_BETAS,
}


@pytest.fixture(params=BETAS)
def tabled(request):
    """(schedule, its betas): the points of the first are made of the second."""
    return make(request.param), BETAS[request.param](1000)


def points(schedule):
    return torch.arange(schedule.num_timesteps, dtype=torch.float64) / (schedule.num_timesteps - 1)


def dense():
    return torch.linspace(0, 1, 20011, dtype=torch.float64)


def within_one_ulp(found, wanted):
    """found float32, wanted float64."""
    return (
        np.abs(found.double().numpy() - wanted) <= np.spacing(np.abs(wanted).astype(np.float32))
    ).all()


def test_exact_at_the_points_and_linear_between(tabled):
    schedule, betas = tabled
    assert schedule.discrete
    alpha_bar = np.cumprod(1 - betas)
    alpha, sigma = (
        c.flatten().numpy() for c in schedule.alpha_sigma(points(schedule), torch.float64)
    )
    # 1000 products round to 1e-13 at worst; numpy's 1 - alpha_bar cancels: 1e-16 of 4e-5, the
    # smallest.
    np.testing.assert_allclose(alpha**2, alpha_bar, rtol=1e-13)
    np.testing.assert_allclose(sigma**2, 1 - alpha_bar, rtol=3e-12)
    log_snr = np.log(alpha_bar / (1 - alpha_bar))
    halfway = (points(schedule)[1:] + points(schedule)[:-1]) / 2
    np.testing.assert_allclose(
        schedule.log_snr(halfway).numpy(), (log_snr[1:] + log_snr[:-1]) / 2, rtol=0, atol=3e-12
    )


def test_markov_chain_equals_the_closed_form(tabled):
    """x_i = sqrt(1 - beta_i) x_{i-1} + sqrt(beta_i) eps_i, walked step by step, has mean alpha x0
    and variance sigma^2.
    """
    schedule, betas = tabled
    mean = 1.0
    variance = 0.0
    means = []
    variances = []
    for beta in betas:
        mean, variance = mean * np.sqrt(1 - beta), (1 - beta) * variance + beta
        means.append(mean)
        variances.append(variance)
    alpha, sigma = (
        c.flatten().numpy() for c in schedule.alpha_sigma(points(schedule), torch.float64)
    )
    np.testing.assert_allclose(alpha, means, rtol=0, atol=2e-14)
    np.testing.assert_allclose(sigma**2, variances, rtol=0, atol=2e-14)


def test_noise_is_not_lost_in_low_precision(tabled):
    """What reaches the picture is sigma to one float32 ulp at every point, the first ones above
    all, where 1 - alpha_bar cancels.
    """
    schedule, betas = tabled
    sigma = np.sqrt(1 - np.cumprod(1 - betas))
    coefficients = schedule.alpha_sigma(points(schedule))
    noised = add_noise(
        torch.zeros(1000, 1, 1, 1), torch.ones(1000, 1, 1, 1), *coefficients
    ).flatten()
    assert noised.dtype == torch.float32
    assert within_one_ulp(noised, sigma)
    half = torch.from_numpy(np.cumprod(1 - betas)).bfloat16()
    assert not within_one_ulp((1 - half).sqrt().float(), sigma), (
        "the twin: the same from a half-precision table"
    )


def test_parity_with_diffusers(tabled):
    schedule, betas = tabled
    theirs = DDPMScheduler(num_train_timesteps=1000, trained_betas=betas.tolist())
    alpha, sigma = schedule.alpha_sigma(points(schedule), torch.float64)
    # Its betas and their product are float32: 2000 roundings of 3e-8 that go up and down add to
    # sqrt(2000) 3e-8 = 1.3e-6, times 3; a factor 1 - beta near 0, as cosine's last, 1 - 0.999,
    # carries 6e-8 / 1e-3 = 6e-5 alone.
    close = 4e-6 + 6e-8 / (1 - betas.max())
    torch.testing.assert_close(
        alpha.flatten()[:-1] ** 2, theirs.alphas_cumprod.double()[:-1], rtol=1e-5, atol=0
    )
    torch.testing.assert_close(
        alpha.flatten()[-1] ** 2, theirs.alphas_cumprod.double()[-1], rtol=close, atol=0
    )
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(1000, 2, 3, 3, generator=generator) for _ in range(2))
    # Values up to 5; its 1 - alpha_bar in float32 rounds to 6e-8 of 1e-4, half of it after the
    # root: 3e-4 of sigma = 0.01, 3e-6.
    torch.testing.assert_close(
        theirs.add_noise(x0, noise, torch.arange(1000)).double(),
        alpha * x0 + sigma * noise,
        rtol=0,
        atol=2e-5,
    )
    torch.testing.assert_close(
        theirs.get_velocity(x0, noise, torch.arange(1000)).double(),
        alpha * noise - sigma * x0,
        rtol=0,
        atol=2e-5,
    )


@pytest.mark.parametrize("name", [name for name in BETAS if name != "table"])
@pytest.mark.parametrize("steps", [2, 7])
def test_a_table_of_any_length(name, steps):
    made = make(name, num_timesteps=steps)
    np.testing.assert_allclose(
        made.alpha_sigma(points(made), torch.float64)[0].flatten().numpy() ** 2,
        np.cumprod(1 - BETAS[name](steps)),
        rtol=1e-12,
    )


def test_the_keys_of_the_cosine_table_count():
    made = cosine(offset=0.1, max_beta=0.5, num_timesteps=50)
    np.testing.assert_allclose(
        made.alpha_sigma(points(made), torch.float64)[0].flatten().numpy() ** 2,
        np.cumprod(1 - cosine_betas(50, 0.1, 0.5)),
        rtol=1e-12,
    )


def test_a_last_beta_of_1_ends_in_noise():
    """alpha is exactly 0 there, falls to it in a straight line, and the inverse follows."""
    schedule = from_betas(
        "mine", torch.tensor([0.1, 0.2, 0.3, 1.0], dtype=torch.float64), "schedule.betas"
    )
    t = torch.linspace(2 / 3, 1, 11, dtype=torch.float64)
    alpha, sigma = (c.flatten() for c in schedule.alpha_sigma(t, torch.float64))
    wanted = math.sqrt(0.9 * 0.8 * 0.7) * (1 - t) * 3
    torch.testing.assert_close(alpha, wanted, rtol=0, atol=1e-15)
    torch.testing.assert_close(sigma, (1 - wanted**2).sqrt(), rtol=0, atol=1e-15)
    assert (alpha[-1], sigma[-1]) == (0, 1)
    dense_t = dense()
    torch.testing.assert_close(
        schedule.time_of(schedule.log_snr(dense_t)), dense_t, rtol=0, atol=1e-14
    )


FORMATS = {
    "json": json.dumps,
    "lines": lambda values: "\n".join(map(repr, values)) + "\n",
    "commas": lambda values: ", ".join(map(repr, values)),
    "bom": lambda values: "\ufeff" + json.dumps(values),
    "semicolons": lambda values: ";\n".join(map(repr, values)),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("key", ["betas", "alphas_cumprod"])
def test_a_table_from_a_list_or_a_file(form, key, tmp_path):
    betas = [0.1, 0.02, 0.3, 0.25, 1e-5]
    values = betas if key == "betas" else np.cumprod(1 - np.array(betas)).tolist()
    path = tmp_path / "a table, of mine.txt"
    path.write_text(FORMATS[form](values), encoding="utf-8")
    of_list = table(**{key: values}, num_timesteps=5)
    of_file = table(**{key: str(path)}, num_timesteps=5)
    t = points(of_list)
    np.testing.assert_allclose(
        of_list.alpha_sigma(t, torch.float64)[0].flatten().numpy() ** 2,
        np.cumprod(1 - np.array(betas)),
        rtol=1e-14,
    )
    assert torch.equal(of_list.log_snr(t), of_file.log_snr(t))


def test_alphas_cumprod_may_end_in_0():
    assert (
        table(alphas_cumprod=[0.9, 0.5, 0.0], num_timesteps=3)
        .alpha_sigma(torch.tensor(1.0))[0]
        .item()
        == 0
    )


# Refusals: each names the key to change.


@pytest.mark.parametrize(
    "betas",
    [
        [0.1],
        [],
        [[0.1, 0.2]],
        [0.1, 0.0],
        [0.1, -0.2],
        [0.1, 1.1],
        [0.1, math.nan],
        [0.1, 1.0, 0.1],
        [0.1, 1.0, 1.0],
    ],
)
def test_betas_that_are_no_table(betas):
    with pytest.raises(UserError, match=r"schedule=mine.*schedule\.betas"):
        from_betas("mine", torch.tensor(betas), "schedule.betas")


@pytest.mark.parametrize(
    "values",
    [
        [0.9],
        [],
        [[0.9, 0.8]],
        [1.0, 0.9],
        [0.9, 0.9],
        [0.8, 0.9],
        [0.9, -0.1],
        [0.9, math.nan],
        [0.9, 0.0, 0.0],
    ],
)
def test_alphas_cumprod_that_are_no_table(values):
    with pytest.raises(UserError, match=r"schedule=mine.*schedule\.alphas_cumprod"):
        from_alphas_cumprod("mine", torch.tensor(values), "schedule.alphas_cumprod")


def test_a_table_says_which_of_its_keys_is_wrong(tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("0.1 one 0.2")
    binary = tmp_path / "binary"
    binary.write_bytes(bytes(range(128, 256)))
    nested = tmp_path / "nested.json"
    nested.write_text('[[0.1], {"a": 1}]')
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    for path in (words, binary, nested, empty, tmp_path / "missing", tmp_path):
        with pytest.raises(UserError, match=r"schedule\.alphas_cumprod="):
            table(alphas_cumprod=str(path), num_timesteps=3)
    with pytest.raises(
        UserError, match=r"schedule\.betas has 2 timesteps.*schedule\.num_timesteps=2"
    ):
        table(betas=[0.1, 0.2], num_timesteps=1000)
    with pytest.raises(UserError, match=r"schedule\.betas or schedule\.alphas_cumprod"):
        table()
    with pytest.raises(UserError, match=r"schedule\.betas or schedule\.alphas_cumprod"):
        table(betas=[0.1, 0.2], alphas_cumprod=[0.9, 0.8], num_timesteps=2)
