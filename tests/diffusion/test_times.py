"""The laws by which training draws times: quantile and distribution function, what is realised, and
the points of a table.
"""

import functools
import inspect
import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
import yaml
from hydra.utils import get_object

from sdtrain.diffusion.times import LogitNormal, LogNormal, Uniform, Window
from sdtrain.errors import UserError
from sdtrain.paths import config_dir
from sdtrain.schedules.linear import linear
from sdtrain.schedules.modifiers import clip


def nodes(group):
    return {
        path.stem: yaml.safe_load(path.read_text())
        for path in sorted((config_dir() / group).glob("*.yaml"))
        if path.stem != "none"
    }


SCHEDULES = nodes("schedule")
TIMES = nodes("times")
SCHEDULES["table"]["betas"] = (1e-4 + 0.015 * np.linspace(0, 1, 1000) ** 2).tolist()
ELSEWHERE = {
    "log_normal": {"mean": -0.4, "std": 1.0},
    "logit_normal": {"mean": 0.5, "std": 0.8},
    "window": {"low": 0.3, "high": 0.9},
}


def made(node, **given):
    target = get_object(node["_target_"])
    takes = inspect.signature(target).parameters
    return target(
        **{key: value for key, value in node.items() if key != "_target_"},
        **{key: value for key, value in given.items() if key in takes},
    )


@functools.cache
def schedule_of(name):
    return made(SCHEDULES[name])


def log_normal_cdf(t, schedule, *, mean, std):
    """Of ln(sigma / alpha), cut to the schedule's levels."""
    law = NormalDist(mean, std)
    low, high = (
        law.cdf(-x / 2) if math.isfinite(x) else float(x < 0)
        for x in (schedule.log_snr_max, schedule.log_snr_min)
    )
    return (law.cdf(-schedule.log_snr(torch.tensor(t, dtype=torch.float64)).item() / 2) - low) / (
        high - low
    )


CDF = {
    "uniform": lambda t, schedule: t,
    "window": lambda t, schedule, *, low, high: min(max((t - low) / (high - low), 0), 1),
    "logit_normal": lambda t, schedule, *, mean, std: NormalDist(mean, std).cdf(
        math.log(t / (1 - t))
    ),
    "log_normal": log_normal_cdf,
}


def evenly(count):
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def test_every_law_with_a_formula_is_offered():
    assert set(CDF) <= set(TIMES)


@pytest.mark.parametrize("law", TIMES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_quantile_and_cdf_are_inverse(name, law):
    schedule = schedule_of(name)
    times = made(TIMES[law])
    u = evenly(5000)
    t = times.quantile(u, schedule)
    assert t.dtype == torch.float64 and (t.diff() > 0).all() and t.min() >= 0 and t.max() <= 1
    # A normal's tails to 1e-4 of it; time_of under laplace, where t is flat in log_snr, keeps 1e-16
    # of 1 in a share of 1e-9 of log_snr.
    torch.testing.assert_close(times.cdf(t, schedule), u, rtol=0, atol=1e-11)
    ends = times.quantile(torch.tensor([0.0, np.nextafter(1, 0)], dtype=torch.float64), schedule)
    assert ends.isfinite().all() and ends[0] >= 0 and ends[1] <= 1
    assert times.cdf(
        torch.tensor([0.0, 1.0], dtype=torch.float64), schedule
    ).tolist() == pytest.approx([0, 1], abs=1e-12)


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("law", CDF)
@pytest.mark.parametrize("name", SCHEDULES)
def test_cdf_by_hand(name, law, changed):
    node = TIMES[law] | (ELSEWHERE.get(law, {}) if changed else {})
    arguments = {
        key: value
        for key, value in node.items()
        if key not in ("_target_", "continuous", "stratified")
    }
    t = torch.linspace(0.001, 0.999, 101, dtype=torch.float64)
    wanted = [CDF[law](place, schedule_of(name), **arguments) for place in t.tolist()]
    np.testing.assert_allclose(
        made(node).cdf(t, schedule_of(name)).numpy(), wanted, rtol=0, atol=1e-13
    )


@pytest.mark.parametrize("law", CDF)
@pytest.mark.parametrize("name", SCHEDULES)
def test_realised_times_follow_the_law(name, law):
    """20,000 evenly spread uniforms: the share below each level is the law's to one draw, on points
    to half a point's share.
    """
    schedule = schedule_of(name)
    count = 20000
    arguments = {
        key: value
        for key, value in TIMES[law].items()
        if key not in ("_target_", "continuous", "stratified")
    }
    levels = np.linspace(0.002, 0.998, 61)
    wanted = np.array([CDF[law](place, schedule, **arguments) for place in levels.tolist()])
    realised = np.sort(made(TIMES[law] | {"continuous": True})(evenly(count), schedule).numpy())
    np.testing.assert_allclose(
        np.searchsorted(realised, levels) / count, wanted, rtol=0, atol=1.01 / count
    )
    twin = np.searchsorted(realised, levels + 0.002) / count
    assert np.abs(twin - wanted).max() > 2 / count, "the twin: times moved by 0.002 would be seen"


@pytest.mark.parametrize("law", TIMES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_training_on_a_table_draws_its_points_with_the_laws_shares(name, law):
    """Point i has the law of [i / T, (i + 1) / T), the stretch of time that is its own."""
    schedule = schedule_of(name)
    times = made(TIMES[law])
    count = 100000
    assert times.draws_points(schedule) == (schedule.discrete and not times.continuous)
    if not schedule.discrete:
        torch.testing.assert_close(
            times(evenly(999), schedule), times.quantile(evenly(999), schedule), rtol=0, atol=0
        )
        return
    place = times(evenly(count), schedule) * (schedule.num_timesteps - 1)
    torch.testing.assert_close(place, place.round(), rtol=0, atol=1e-9)
    edges = torch.arange(schedule.num_timesteps + 1, dtype=torch.float64) / schedule.num_timesteps
    share = times.cdf(edges, schedule).diff()
    found = place.round().long().bincount(minlength=schedule.num_timesteps) / count
    torch.testing.assert_close(
        found.double(), share, rtol=0, atol=1.01 / count + 1e-7
    )  # one draw, in float32
    times.continuous = True
    free = times(evenly(count), schedule) * (schedule.num_timesteps - 1)
    assert ((free - free.round()).abs() > 1e-3).double().mean() > 0.9


def test_every_argument_of_a_law_counts():
    u = evenly(100)
    schedule = linear()
    for law, changes in ELSEWHERE.items():
        for key, value in changes.items():
            assert not torch.equal(
                made(TIMES[law])(u, schedule), made(TIMES[law] | {key: value})(u, schedule)
            ), f"{law}.{key}"


def test_window_stays_inside():
    t = Window(low=0.25, high=0.5, continuous=True)(evenly(1000), linear())
    torch.testing.assert_close(t, 0.25 + 0.25 * evenly(1000), rtol=0, atol=1e-15)


def test_log_normal_gives_the_same_levels_under_every_schedule():
    """Cut to one range: the same log_snr for the same u, those of EDM's law, whatever the curve
    underneath.
    """
    u = evenly(500)
    law = NormalDist(-1.2, 1.2)
    first = law.cdf(-2.5)
    last = law.cdf(2)
    wanted = [-2 * law.inv_cdf(first + place * (last - first)) for place in u.tolist()]
    for name in SCHEDULES:
        schedule = clip(schedule_of(name), log_snr_min=-4.0, log_snr_max=5.0)
        found = schedule.log_snr(LogNormal(continuous=True)(u, schedule)).numpy()
        # log_snr moves up to 2e4 times as fast as t, which is good to 1e-15, where a law is cut far
        # out (laplace).
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-10, err_msg=name)


def test_uniform_is_uniform_on_every_schedule():
    for name in SCHEDULES:
        torch.testing.assert_close(
            Uniform(continuous=True)(evenly(100).float(), schedule_of(name)),
            evenly(100),
            rtol=0,
            atol=1e-7,
        )


@pytest.mark.parametrize(
    ("law", "key", "value"),
    [
        (LogNormal, "std", 0.0),
        (LogNormal, "std", -1.0),
        (LogitNormal, "std", 0.0),
        (LogitNormal, "std", math.nan),
        (functools.partial(Window, high=0.5), "low", 0.5),
        (functools.partial(Window, high=0.5), "low", -0.1),
        (functools.partial(Window, low=0.5), "high", 1.1),
    ],
)
def test_bad_arguments_are_refused_by_key(law, key, value):
    with pytest.raises(UserError, match=rf"times\.{key}"):
        law(**{key: value})


def test_a_law_that_misses_the_schedule_is_refused():
    with pytest.raises(UserError, match=r"times\.mean=40"):
        LogNormal(mean=40.0)(evenly(3), linear())
