"""Every schedule of configs/schedule keeps what a schedule promises; curves follow the laws that they claim, tables are those of the papers.

What a curve or a table should be is written here in numpy. A schedule without a line in CURVES or BETAS still runs through everything else.
"""

import json
import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMScheduler
from hydra.utils import get_object

from sdtrain.diffusion import add_noise
from sdtrain.diffusion.times import Uniform
from sdtrain.errors import UserError
from sdtrain.paths import config_dir
from sdtrain.schedules import Schedule
from sdtrain.schedules.cosine import cosine
from sdtrain.schedules.flow import flow
from sdtrain.schedules.table import from_alphas_cumprod, from_betas, table

MY_BETAS = 1e-4 + 0.015 * np.linspace(0, 1, 1000) ** 2
CONFIGS = {
    path.stem: yaml.safe_load(path.read_text())
    for path in sorted((config_dir() / "schedule").glob("*.yaml"))
    if path.stem != "none"
}
CONFIGS["table"]["betas"] = MY_BETAS.tolist()


def make(name, **changes):
    node = CONFIGS[name] | changes
    return get_object(node["_target_"])(
        **{key: value for key, value in node.items() if key != "_target_"}
    )


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


def shifted_share(share, log_snr_min, log_snr_max, t):
    """The law that is cut: uniform t between the shares of the law above its two bounds. share(log_snr): that share of the whole law."""
    first, last = share(log_snr_max), share(log_snr_min)
    return first + t * (last - first)


def cosine_curve(t, *, log_snr_min, log_snr_max):
    """Hoogeboom et al. 2023, section 3 and appendix: the angle runs evenly between the bounds' own."""
    first, last = np.arctan(np.exp(-log_snr_max / 2)), np.arctan(np.exp(-log_snr_min / 2))
    return -2 * np.log(np.tan(first + t * (last - first)))


def laplace_curve(t, *, centre, scale, log_snr_min, log_snr_max):
    """Hang and Gu 2024, table 1: mu - b sgn(1/2 - t) ln(1 - 2 |t - 1/2|)."""

    def share(x):
        distance = np.longdouble(abs(x - centre))
        tail = np.exp(-distance / scale) / 2
        return tail if x > centre else 1 - tail

    t = shifted_share(
        share, log_snr_min, log_snr_max, t.astype(np.longdouble)
    )  # 80 bits, because 1 - 2 |t - 1/2| cancels in the tails
    return (centre - scale * np.sign(0.5 - t) * np.log(1 - 2 * np.abs(t - 0.5))).astype(np.float64)


def edm_curve(t, *, log_sigma_mean, log_sigma_std, sigma_min, sigma_max):
    """Karras et al. 2022, table 1: ln(sigma) ~ N(mean, std^2), small sigma first."""
    law = NormalDist(log_sigma_mean, log_sigma_std)
    first, last = law.cdf(math.log(sigma_min)), law.cdf(math.log(sigma_max))
    return np.array([-2 * law.inv_cdf(first + u * (last - first)) for u in t.tolist()])


def cauchy_curve(t, *, centre, scale, log_snr_min, log_snr_max):
    """Hang and Gu 2024, table 1: mu + gamma tan(pi / 2 (1 - 2 t))."""
    t = shifted_share(
        lambda x: 0.5 - np.arctan((x - centre) / scale) / np.pi, log_snr_min, log_snr_max, t
    )
    return centre + scale * np.tan(np.pi / 2 * (1 - 2 * t))


def sigmoid_curve(t, *, start, end, temperature, log_snr_min, log_snr_max):
    """Chen 2023, algorithm 1: gamma(t) = (S(e) - S(u)) / (S(e) - S(s)), u from s to e; cut where it reaches the bounds."""

    def logistic(x):
        return 1 / (1 + np.exp(-np.longdouble(x)))

    s, e = start / temperature, end / temperature
    first, last = logistic(s), logistic(e)
    at_bounds = [last - logistic(bound) * (last - first) for bound in (log_snr_max, log_snr_min)]
    u0, u1 = (np.log(p / (1 - p)) for p in at_bounds)
    gamma = (last - logistic(u0 + t.astype(np.longdouble) * (u1 - u0))) / (last - first)
    return (np.log(gamma) - np.log1p(-gamma)).astype(np.float64)


CURVES = {
    "cosine_log_snr": cosine_curve,
    "laplace": laplace_curve,
    "edm": edm_curve,
    "cauchy": cauchy_curve,
    "sigmoid": sigmoid_curve,
    "flow": lambda t: 2 * np.log((1 - t) / t),
    "geometric": lambda t, *, sigma_min, sigma_max: (
        -2 * np.log(sigma_min * (sigma_max / sigma_min) ** t)
    ),
}
# Values other than the yaml's: every argument must go where the paper has it.
ELSEWHERE = {
    "cosine_log_snr": {"log_snr_min": -7.0, "log_snr_max": 9.0},
    "laplace": {"centre": 1.0, "scale": 0.8, "log_snr_min": -6.0},
    "edm": {"log_sigma_mean": -0.4, "log_sigma_std": 1.0, "sigma_min": 0.01, "sigma_max": 20.0},
    "cauchy": {"centre": -0.5, "scale": 0.7, "log_snr_max": 8.0},
    "sigmoid": {"start": -2.0, "end": 3.5, "temperature": 0.9, "log_snr_min": -8.0},
    "geometric": {"sigma_min": 0.02, "sigma_max": 50.0},
}


@pytest.fixture(params=CONFIGS)
def schedule(request):
    return make(request.param)


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


def test_every_schedule_with_a_formula_is_offered():
    assert set(CURVES) | set(BETAS) <= set(CONFIGS)


# What every schedule promises.


def test_log_snr_falls_strictly_and_only_the_ends_may_be_infinite(schedule):
    log_snr = schedule.log_snr(dense())
    assert log_snr.dtype == torch.float64
    assert (log_snr.diff() < 0).all()
    assert log_snr[1:-1].isfinite().all()
    assert (schedule.log_snr_max, schedule.log_snr_min) == (log_snr[0].item(), log_snr[-1].item())
    assert (
        schedule.log_snr(torch.tensor(0.25)).item()
        == schedule.log_snr(torch.tensor([0.25], dtype=torch.float64)).item()
    )


def test_alpha_and_sigma_are_views_of_log_snr(schedule):
    t = dense()
    alpha, sigma = schedule.alpha_sigma(t, torch.float64)
    assert alpha.shape == sigma.shape == (len(t), 1, 1, 1)
    constant = alpha + sigma if schedule.straight else alpha**2 + sigma**2
    torch.testing.assert_close(
        constant, torch.ones_like(alpha), rtol=0, atol=1e-15
    )  # a few roundings of numbers below 1
    # Squares, root and log each lose a few ulp: 1e-15 in log_snr, whatever its size; under flow that of t near 1 is one of 1 - t.
    inner = slice(1, -1)
    torch.testing.assert_close(
        schedule.log_snr(t)[inner],
        2 * (alpha / sigma).log().flatten()[inner],
        rtol=1e-14,
        atol=1e-14,
    )
    assert schedule.alpha_sigma(t[5])[0].shape == (1, 1, 1, 1)


def test_float32_coefficients_to_one_ulp(schedule):
    """Tables are float64; float32 comes last. The relation to log_snr is written again, in numpy."""
    t = dense()
    log_snr = schedule.log_snr(t).numpy()
    with np.errstate(over="ignore"):
        if schedule.straight:
            wanted = 1 / (1 + np.exp(-log_snr / 2)), 1 / (1 + np.exp(log_snr / 2))
        else:
            wanted = 1 / np.sqrt(1 + np.exp(-log_snr)), 1 / np.sqrt(1 + np.exp(log_snr))
    for found, value in zip(schedule.alpha_sigma(t), wanted, strict=True):
        assert found.dtype == torch.float32
        assert within_one_ulp(found.flatten(), value)


def test_inverse(schedule):
    t = dense()[:-11].reshape(100, 200)  # a shape of its own
    # t is of order 1 and log_snr falls by 6 a unit of it where it is flattest: its rounding of 2e-15 is 3e-16 of t. Reached: 1.3e-15.
    torch.testing.assert_close(schedule.time_of(schedule.log_snr(t)), t, rtol=0, atol=1e-14)
    ends = schedule.log_snr(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert schedule.time_of(ends).tolist() == [0, 1]


def test_inverse_refuses_what_lies_outside_or_takes_it_to_the_end(schedule):
    high, low = schedule.log_snr_max, schedule.log_snr_min
    middle = schedule.log_snr(torch.tensor(0.5)).item()
    for outside in [value for value in (high + 1e-9, low - 1e-9) if math.isfinite(value)]:
        with pytest.raises(ValueError, match="outside"):
            schedule.time_of(torch.tensor([middle, outside], dtype=torch.float64))
    beyond = torch.tensor([math.inf, high + 1, low - 1, -math.inf], dtype=torch.float64)
    assert schedule.time_of(beyond, clamp=True).tolist() == [0, 0, 1, 1]


def test_timestep(schedule):
    fed = schedule.timestep(points(schedule))
    assert fed.dtype == torch.float32
    assert fed.tolist() == list(
        range(schedule.num_timesteps)
    )  # integers, exactly: float32 swallows the rounding of i / (T-1)
    assert (
        schedule.timestep(torch.tensor([0.5], dtype=torch.float64)).item()
        == (schedule.num_timesteps - 1) / 2
    )


def test_nearest_point_gives_each_point_an_equal_stretch(schedule):
    size = schedule.num_timesteps
    u = (torch.arange(7 * size, dtype=torch.float64) + 0.5) / (7 * size)
    place = schedule.nearest_point(u) * (size - 1)
    torch.testing.assert_close(place, place.round(), rtol=0, atol=1e-9)
    assert (place.round().long().bincount(minlength=size) == 7).all()
    assert schedule.nearest_point(
        torch.tensor([0, np.nextafter(1, 0), 1], dtype=torch.float64)
    ).tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    "name", [name for name in CONFIGS if "num_timesteps" in CONFIGS[name] and name != "table"]
)
def test_length_is_the_users(name):
    assert make(name, num_timesteps=7).num_timesteps == 7
    for wrong in (1, 0, -2):
        with pytest.raises(UserError, match=r"schedule\.num_timesteps"):
            make(name, num_timesteps=wrong)


def test_a_curve_that_rises_or_stops_is_refused():
    """The guard of every schedule, on curves that break it in four ways."""
    for curve in (
        lambda t: t,
        lambda t: -t.clamp(max=0.5),
        lambda t: t * math.nan,
        lambda t: torch.where(t > 0.5, -math.inf, -t),
    ):
        with pytest.raises(UserError, match=r"schedule=mine.*Change schedule\.mine"):
            Schedule("mine", curve, lambda x: -x, keys="schedule.mine")
    assert Schedule("mine", lambda t: -t, lambda x: -x).log_snr_min == -1


# Curves.


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("name", CURVES)
def test_closed_form(name, changed):
    changes = ELSEWHERE.get(name, {}) if changed else {}
    arguments = {
        key: value
        for key, value in (CONFIGS[name] | changes).items()
        if key not in ("_target_", "num_timesteps")
    }
    t = dense()[1:-1]
    found = make(name, **changes).log_snr(t).numpy()
    # The formulas here cancel in the tails: 1e-16 of a share of 1e-6 (edm) is 1e-10 of it. Reached: 3e-12.
    np.testing.assert_allclose(found, CURVES[name](t.numpy(), **arguments), rtol=0, atol=1e-9)


# The law that log_snr follows when t is uniform, as its share below x, before it is cut.
LAWS = {
    "laplace": lambda x, *, centre, scale, **_: (
        0.5 * math.exp((x - centre) / scale)
        if x < centre
        else 1 - 0.5 * math.exp((centre - x) / scale)
    ),
    "cauchy": lambda x, *, centre, scale, **_: 0.5 + math.atan((x - centre) / scale) / math.pi,
    "edm": lambda x, *, log_sigma_mean, log_sigma_std, **_: NormalDist(
        -2 * log_sigma_mean, 2 * log_sigma_std
    ).cdf(x),
    "cosine_log_snr": lambda x, **_: 2 / math.pi * math.atan(math.exp(x / 2)),  # hyperbolic secant
    "flow": lambda x, **_: 1 / (1 + math.exp(-x / 2)),  # logistic of scale 2
    "geometric": lambda x, **_: x,  # uniform
}


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("name", LAWS)
def test_realised_log_snr_follows_the_claimed_law(name, changed):
    """100,000 times as training draws them, evenly spread uniforms: the share of them below each level is the law's to one draw."""
    changes, count = ELSEWHERE.get(name, {}) if changed else {}, 100000
    arguments = {
        key: value
        for key, value in (CONFIGS[name] | changes).items()
        if key not in ("_target_", "num_timesteps")
    }
    schedule = make(name, **changes)
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    realised = np.sort(schedule.log_snr(Uniform()(u, schedule)).numpy())

    def law(x):
        return LAWS[name](x, **arguments)

    low, high = (
        law(x) if math.isfinite(x) else float(x > 0)
        for x in (schedule.log_snr_min, schedule.log_snr_max)
    )
    levels = np.linspace(realised[0], realised[-1], 201)[1:-1]
    wanted = np.array([(law(x) - low) / (high - low) for x in levels])
    np.testing.assert_allclose(
        np.searchsorted(realised, levels) / count, wanted, rtol=0, atol=1.01 / count
    )
    middle = np.searchsorted(realised, levels + 0.01) / count
    assert np.abs(middle - wanted).max() > 2.02 / count, (
        "the twin: a law shifted by 0.01 would be seen"
    )


def test_flow_is_the_straight_path():
    t = dense()
    alpha, sigma = (c.flatten() for c in flow().alpha_sigma(t, torch.float64))
    torch.testing.assert_close(alpha, 1 - t, rtol=0, atol=2e-16)
    torch.testing.assert_close(sigma, t, rtol=0, atol=2e-16)
    assert (alpha[0], sigma[0], alpha[-1], sigma[-1]) == (1, 0, 0, 1)
    assert (flow().log_snr_max, flow().log_snr_min) == (math.inf, -math.inf)


# Tables.


def test_exact_at_the_points_and_linear_between(tabled):
    schedule, betas = tabled
    assert schedule.points
    alpha_bar = np.cumprod(1 - betas)
    alpha, sigma = (
        c.flatten().numpy() for c in schedule.alpha_sigma(points(schedule), torch.float64)
    )
    # 1000 products round to 1e-13 at worst; numpy's 1 - alpha_bar cancels: 1e-16 of 4e-5, the smallest.
    np.testing.assert_allclose(alpha**2, alpha_bar, rtol=1e-13)
    np.testing.assert_allclose(sigma**2, 1 - alpha_bar, rtol=3e-12)
    log_snr = np.log(alpha_bar / (1 - alpha_bar))
    halfway = (points(schedule)[1:] + points(schedule)[:-1]) / 2
    np.testing.assert_allclose(
        schedule.log_snr(halfway).numpy(), (log_snr[1:] + log_snr[:-1]) / 2, rtol=0, atol=3e-12
    )


def test_markov_chain_equals_the_closed_form(tabled):
    """x_i = sqrt(1 - beta_i) x_{i-1} + sqrt(beta_i) eps_i, walked step by step, has mean alpha x0 and variance sigma^2."""
    schedule, betas = tabled
    mean, variance, means, variances = 1.0, 0.0, [], []
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
    """What reaches the picture is sigma to one float32 ulp at every point, the first ones above all, where 1 - alpha_bar cancels."""
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
    # Its betas and their product are float32: 2000 roundings of 3e-8 that go up and down add to sqrt(2000) 3e-8 = 1.3e-6, times 3;
    # a factor 1 - beta near 0, as cosine's last, 1 - 0.999, carries 6e-8 / 1e-3 = 6e-5 alone.
    close = 4e-6 + 6e-8 / (1 - betas.max())
    torch.testing.assert_close(
        alpha.flatten()[:-1] ** 2, theirs.alphas_cumprod.double()[:-1], rtol=1e-5, atol=0
    )
    torch.testing.assert_close(
        alpha.flatten()[-1] ** 2, theirs.alphas_cumprod.double()[-1], rtol=close, atol=0
    )
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(1000, 2, 3, 3, generator=generator) for _ in range(2))
    # Values up to 5; its 1 - alpha_bar in float32 rounds to 6e-8 of 1e-4, half of it after the root: 3e-4 of sigma = 0.01, 3e-6.
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
    of_list, of_file = (
        table(**{key: values}, num_timesteps=5),
        table(**{key: str(path)}, num_timesteps=5),
    )
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
    ("name", "key", "value"),
    [
        ("linear", "beta_start", 0.0),
        ("linear", "beta_start", -1e-4),
        ("linear", "beta_start", math.nan),
        ("linear", "beta_end", 1.5),
        ("linear", "beta_end", math.inf),
        ("scaled_linear", "beta_start", -1e-4),
        ("scaled_linear", "beta_end", 1.5),
        ("scaled_linear", "beta_end", math.nan),
        ("cosine", "max_beta", 0.0),
        ("cosine", "max_beta", -0.5),
        ("cosine", "offset", -0.5),
        ("cosine", "offset", -1.0),
        ("cosine_log_snr", "log_snr_min", 10.0),
        ("cosine_log_snr", "log_snr_min", 11.0),
        ("cosine_log_snr", "log_snr_max", -math.inf),
        ("cosine_log_snr", "log_snr_max", math.inf),
        ("cosine_log_snr", "log_snr_min", -math.inf),
        ("cosine_log_snr", "log_snr_max", math.nan),
        ("laplace", "log_snr_min", 20.0),
        ("laplace", "scale", 0.0),
        ("laplace", "scale", -1.0),
        ("laplace", "scale", math.nan),
        ("cauchy", "log_snr_max", -20.0),
        ("cauchy", "scale", 0.0),
        ("sigmoid", "log_snr_min", 12.0),
        ("sigmoid", "temperature", 0.0),
        ("sigmoid", "start", 3.0),
        ("sigmoid", "end", -4.0),
        ("edm", "sigma_min", 0.0),
        ("edm", "sigma_min", 90.0),
        ("edm", "sigma_max", -1.0),
        ("edm", "sigma_max", math.inf),
        ("edm", "log_sigma_std", 0.0),
        ("geometric", "sigma_min", 0.0),
        ("geometric", "sigma_max", 0.001),
    ],
)
def test_what_is_no_schedule_is_refused_by_key(name, key, value):
    with pytest.raises(UserError, match=rf"schedule\.{key}"):
        make(name, **{key: value})


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
