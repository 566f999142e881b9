"""Every schedule of configs/schedule keeps what a schedule promises; curves follow the laws that
they claim.

What a curve should be is written here in numpy. A schedule without a line in CURVES still runs
through everything else. Tables: test_tables.py.
"""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
import yaml
from hydra.utils import get_object

from sdtrain.diffusion.times import Uniform
from sdtrain.errors import UserError
from sdtrain.paths import config_dir
from sdtrain.schedules import Schedule
from sdtrain.schedules.flow import flow

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


def shifted_share(share, log_snr_min, log_snr_max, t):
    """The law that is cut: uniform t between the shares of the law above its two bounds.
    share(log_snr): that share of the whole law.
    """
    first = share(log_snr_max)
    last = share(log_snr_min)
    return first + t * (last - first)


def cosine_curve(t, *, log_snr_min, log_snr_max):
    """Hoogeboom et al. 2023, section 3: the angle runs evenly between those of the bounds."""
    first = np.arctan(np.exp(-log_snr_max / 2))
    last = np.arctan(np.exp(-log_snr_min / 2))
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
    first = law.cdf(math.log(sigma_min))
    last = law.cdf(math.log(sigma_max))
    return np.array([-2 * law.inv_cdf(first + u * (last - first)) for u in t.tolist()])


def cauchy_curve(t, *, centre, scale, log_snr_min, log_snr_max):
    """Hang and Gu 2024, table 1: mu + gamma tan(pi / 2 (1 - 2 t))."""
    t = shifted_share(
        lambda x: 0.5 - np.arctan((x - centre) / scale) / np.pi, log_snr_min, log_snr_max, t
    )
    return centre + scale * np.tan(np.pi / 2 * (1 - 2 * t))


def sigmoid_curve(t, *, start, end, temperature, log_snr_min, log_snr_max):
    """Chen 2023, algorithm 1: gamma(t) = (S(e) - S(u)) / (S(e) - S(s)), u from s to e; cut where it
    reaches the bounds.
    """

    def logistic(x):
        return 1 / (1 + np.exp(-np.longdouble(x)))

    s = start / temperature
    e = end / temperature
    first = logistic(s)
    last = logistic(e)
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


def points(schedule):
    return torch.arange(schedule.num_timesteps, dtype=torch.float64) / (schedule.num_timesteps - 1)


def dense():
    return torch.linspace(0, 1, 20011, dtype=torch.float64)


def within_one_ulp(found, wanted):
    """found float32, wanted float64."""
    return (
        np.abs(found.double().numpy() - wanted) <= np.spacing(np.abs(wanted).astype(np.float32))
    ).all()


def test_every_curve_with_a_formula_is_offered():
    assert set(CURVES) <= set(CONFIGS)


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
    # Squares, root and log each lose a few ulp: 1e-15 in log_snr, whatever its size; under flow
    # that of t near 1 is one of 1 - t.
    inner = slice(1, -1)
    torch.testing.assert_close(
        schedule.log_snr(t)[inner],
        2 * (alpha / sigma).log().flatten()[inner],
        rtol=1e-14,
        atol=1e-14,
    )
    assert schedule.alpha_sigma(t[5])[0].shape == (1, 1, 1, 1)


def test_float32_coefficients_to_one_ulp(schedule):
    """Tables are float64; float32 comes last. The relation to log_snr is written in numpy."""
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
    # t is of order 1 and log_snr falls by 6 a unit of it where it is flattest: its rounding of
    # 2e-15 is 3e-16 of t. Reached: 1.3e-15.
    torch.testing.assert_close(schedule.time_of(schedule.log_snr(t)), t, rtol=0, atol=1e-14)
    ends = schedule.log_snr(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert schedule.time_of(ends).tolist() == [0, 1]


def test_inverse_refuses_what_lies_outside_or_takes_it_to_the_end(schedule):
    high = schedule.log_snr_max
    low = schedule.log_snr_min
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
    place = schedule.snap_to_points(u) * (size - 1)
    torch.testing.assert_close(place, place.round(), rtol=0, atol=1e-9)
    assert (place.round().long().bincount(minlength=size) == 7).all()
    assert schedule.snap_to_points(
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
    # The formulas here cancel in the tails: 1e-16 of a share of 1e-6 (edm) is 1e-10 of it. Reached:
    # 3e-12.
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
    """100,000 times as training draws them, evenly spread uniforms: the share of them below each
    level is the law's to one draw.
    """
    changes = ELSEWHERE.get(name, {}) if changed else {}
    count = 100000
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
