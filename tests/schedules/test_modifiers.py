"""Modifiers make a schedule of a schedule: every one over every schedule keeps what a schedule
promises, and does what its paper says.
"""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from hydra.utils import get_object

from sdtrain.assemble.objective import build_schedule
from sdtrain.errors import UserError
from sdtrain.paths import config_dir
from sdtrain.schedules.cosine_log_snr import cosine_log_snr
from sdtrain.schedules.edm import edm
from sdtrain.schedules.flow import flow
from sdtrain.schedules.laplace import laplace
from sdtrain.schedules.linear import linear
from sdtrain.schedules.modifiers import clip, shift, zero_terminal_snr
from sdtrain.schedules.sigmoid import sigmoid
from sdtrain.schedules.table import from_betas

BETAS = {
    "linear": np.linspace(1e-4, 0.02, 1000),
    "scaled_linear": np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2,
    "short": np.linspace(0.01, 0.3, 10),
}


def nodes(group):
    return {
        path.stem: yaml.safe_load(path.read_text())
        for path in sorted((config_dir() / group).glob("*.yaml"))
        if path.stem != "none"
    }


SCHEDULES = nodes("schedule")
MODIFIERS = {name: node[name] for name, node in nodes("modifiers").items()}
SCHEDULES["table"]["betas"] = BETAS["linear"].tolist()
MODIFIERS["clip"] |= {
    "log_snr_min": -4.0,
    "log_snr_max": 5.0,
}  # narrower than every schedule, so that it does something to each


def called(node, *given):
    return get_object(node["_target_"])(
        *given,
        **{key: value for key, value in node.items() if key not in ("_target_", "_partial_")},
    )


@functools.cache
def make(name):
    return called(SCHEDULES[name])


def dense():
    return torch.linspace(0, 1, 20011, dtype=torch.float64)


def points(schedule):
    return torch.arange(schedule.num_timesteps, dtype=torch.float64) / (schedule.num_timesteps - 1)


def refused(modifier, name):
    """What is refused, known here: alpha cannot be brought to 0 twice."""
    return (
        modifier == "zero_terminal_snr"
        and make(name).log_snr(torch.tensor(1.0)).item() == -math.inf
    )


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("modifier", MODIFIERS)
def test_every_modifier_over_every_schedule(modifier, name):
    old = make(name)
    if refused(modifier, name):
        with pytest.raises(UserError, match=r"modifiers=\[zero_terminal_snr\]"):
            called(MODIFIERS[modifier], old)
        return
    new = called(MODIFIERS[modifier], old)
    t = dense()
    log_snr = new.log_snr(t)
    assert log_snr.dtype == torch.float64
    assert (log_snr.diff() < 0).all() and log_snr[1:-1].isfinite().all()
    assert not torch.equal(log_snr, old.log_snr(t))
    # Two curves one after the other, each good to 1.2e-15 of t (test_schedules). Reached: 1.9e-15.
    torch.testing.assert_close(new.time_of(log_snr), t, rtol=0, atol=2e-14)
    assert new.time_of(log_snr[[0, -1]]).tolist() == [0, 1]
    assert new.time_of(torch.tensor([math.inf, -math.inf]), clamp=True).tolist() == [0, 1]
    assert (new.num_timesteps, new.discrete, new.straight) == (
        old.num_timesteps,
        old.discrete,
        old.straight,
    )
    alpha, sigma = new.alpha_sigma(t, torch.float64)
    constant = alpha + sigma if new.straight else alpha**2 + sigma**2
    torch.testing.assert_close(constant, torch.ones_like(alpha), rtol=0, atol=1e-15)
    for outside in [
        value for value in (new.log_snr_max + 1e-9, new.log_snr_min - 1e-9) if math.isfinite(value)
    ]:
        with pytest.raises(ValueError, match="outside"):
            new.time_of(torch.tensor([outside], dtype=torch.float64))


# Zero terminal SNR.


def algorithm_1(betas):
    """Lin et al. 2024, algorithm 1: alpha_bar after the rescaling."""
    root = np.sqrt(np.cumprod(1 - betas))
    first = root[0]
    last = root[-1]
    return ((root - last) * first / (first - last)) ** 2


@pytest.mark.parametrize("name", BETAS)
def test_zero_terminal_is_algorithm_1(name):
    betas = BETAS[name]
    schedule = zero_terminal_snr(from_betas(name, torch.from_numpy(betas), "schedule.betas"))
    alpha, sigma = (
        c.flatten().numpy() for c in schedule.alpha_sigma(points(schedule), torch.float64)
    )
    np.testing.assert_allclose(
        alpha, np.sqrt(algorithm_1(betas)), rtol=1e-10, atol=1e-14
    )  # a difference of roots: 1e-13 of 1e-3 beside the end
    np.testing.assert_allclose(sigma, np.sqrt(1 - algorithm_1(betas)), rtol=1e-11, atol=0)
    theirs = torch.cumprod(1 - rescale_zero_terminal_snr(torch.from_numpy(betas)), 0)
    np.testing.assert_allclose(
        alpha**2, theirs.numpy(), rtol=1e-8, atol=1e-14
    )  # it goes through betas and back


def test_zero_terminal_has_parity_with_diffusers():
    theirs = DDPMScheduler(
        trained_betas=BETAS["linear"].tolist(), rescale_betas_zero_snr=True
    ).alphas_cumprod.double()
    schedule = zero_terminal_snr(linear())
    alpha = schedule.alpha_sigma(points(schedule), torch.float64)[0].flatten()
    # Its tables are float32; the last level is 2^-24 there instead of 0.
    torch.testing.assert_close(alpha[:-1] ** 2, theirs[:-1], rtol=0, atol=2e-6)
    assert alpha[-1] == 0


@pytest.mark.parametrize(
    "name", [name for name in SCHEDULES if not refused("zero_terminal_snr", name)]
)
def test_zero_terminal_keeps_the_first_level_and_ends_in_noise(name):
    old = make(name)
    new = zero_terminal_snr(old)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert (
        abs(new.log_snr(ends)[0].item() - old.log_snr(ends)[0].item()) < 1e-10
    )  # two roundings of 1 - sigma^2 / 2 are 2e-16, of sigma^2 = 4e-6
    for dtype in (torch.float32, torch.float64):
        alpha, sigma = (c.flatten() for c in new.alpha_sigma(ends, dtype))
        assert (alpha[1].item(), sigma[1].item()) == (0, 1)
    # alpha' = (alpha - alpha_1) alpha_0 / (alpha_0 - alpha_1) at every t, the ones between the
    # points of a table too.
    t = dense()
    log_snr = old.log_snr(t).numpy()
    alpha = 1 / np.sqrt(1 + np.exp(-log_snr))
    wanted = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    np.testing.assert_allclose(
        new.alpha_sigma(t, torch.float64)[0].flatten().numpy(), wanted, rtol=0, atol=1e-14
    )
    # Continuous up to the end: alpha falls to 0 with the distance from it, under laplace as late as
    # its tail of 1e-9 begins.
    near = 1 - torch.tensor([1e-4, 1e-6, 1e-8, 1e-10, 1e-12], dtype=torch.float64)
    alpha = new.alpha_sigma(near, torch.float64)[0].flatten()
    assert (alpha.diff() < 0).all() and 0 < alpha[-1] < 1e-5


def test_zero_terminal_is_refused_on_what_ends_in_noise():
    for schedule in (flow(), zero_terminal_snr(linear()), shift(zero_terminal_snr(linear()))):
        with pytest.raises(UserError, match=r"modifiers=\[zero_terminal_snr\]"):
            zero_terminal_snr(schedule)


# Shift.


@pytest.mark.parametrize("factor", [0.5, 3.0, 8.0])
@pytest.mark.parametrize("name", SCHEDULES)
def test_shift_multiplies_sigma_over_alpha(name, factor):
    old = make(name)
    t = dense()[1:-1]
    new = shift(old, factor=factor)
    np.testing.assert_allclose(
        new.log_snr(t).numpy(), old.log_snr(t).numpy() - 2 * np.log(factor), rtol=0, atol=1e-14
    )
    ratios = [
        (sigma / alpha).flatten()
        for alpha, sigma in (s.alpha_sigma(t, torch.float64) for s in (new, old))
    ]
    torch.testing.assert_close(ratios[0], factor * ratios[1], rtol=1e-13, atol=0)


@pytest.mark.parametrize("factor", [0.5, 3.0, 8.0])
def test_shift_under_flow_is_that_of_stable_diffusion_3(factor):
    """t' = f t / (1 + (f - 1) t) (Esser et al. 2024, eq. 23), still on the straight line."""
    t = dense()
    alpha, sigma = (c.flatten() for c in shift(flow(), factor=factor).alpha_sigma(t, torch.float64))
    moved = factor * t / (1 + (factor - 1) * t)
    torch.testing.assert_close(sigma, moved, rtol=0, atol=1e-15)
    torch.testing.assert_close(alpha, 1 - moved, rtol=0, atol=1e-15)


@pytest.mark.parametrize("factor", [0.0, -1.0, math.inf, math.nan, 1.0])
def test_shift_refuses(factor):
    with pytest.raises(UserError, match=r"modifiers\.shift\.factor"):
        shift(linear(), factor=factor)


# Clip.


@pytest.mark.parametrize("curve", [cosine_log_snr, laplace, sigmoid, edm])
def test_clip_of_a_cut_law_is_the_law_cut_there(curve):
    bounds = {"log_snr_min": -4.0, "log_snr_max": 5.0}
    direct = (
        curve(**bounds)
        if curve is not edm
        else edm(sigma_min=math.exp(-2.5), sigma_max=math.exp(2))
    )
    t = dense()
    # The ends come out of an inverse, good to 2e-15 of t; where laplace is steepest, log_snr moves
    # 2e4 times as fast as t.
    torch.testing.assert_close(
        clip(curve(), **bounds).log_snr(t), direct.log_snr(t), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_clip_runs_along_the_old_curve_between_the_bounds(name):
    old = make(name)
    new = clip(old, log_snr_min=-4.0, log_snr_max=5.0)
    ends = new.log_snr(torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(
        ends, torch.tensor([5.0, -4.0], dtype=torch.float64), rtol=0, atol=1e-10
    )
    place = old.time_of(new.log_snr(dense()[1:-1]), clamp=True)  # even steps in the old time
    torch.testing.assert_close(
        place.diff(), place.diff().mean().expand(len(place) - 1), rtol=0, atol=1e-12
    )


def test_a_bound_beyond_the_curve_leaves_its_end():
    half = clip(linear(), log_snr_min=-4.0, log_snr_max=100.0)
    assert half.log_snr_max == linear().log_snr_max and abs(half.log_snr_min + 4) < 1e-12
    assert clip(flow(), log_snr_min=-5.0, log_snr_max=math.inf).log_snr_max == math.inf


@pytest.mark.parametrize(
    "bounds",
    [(5.0, -5.0), (2.0, 2.0), (50.0, 60.0), (-60.0, -50.0), (math.nan, 5.0), (-100.0, 100.0)],
)
def test_clip_refuses(bounds):
    """Reversed, empty, beyond the curve, not a number, or of no effect."""
    with pytest.raises(
        UserError, match=r"modifiers\.clip\.log_snr_min or modifiers\.clip\.log_snr_max"
    ):
        clip(linear(), log_snr_min=bounds[0], log_snr_max=bounds[1])


# Several.


def test_modifiers_apply_in_the_order_in_which_they_stand():
    def made(*names):
        return build_schedule(
            {
                "schedule": SCHEDULES["linear"],
                "modifiers": {name: MODIFIERS[name] for name in names},
            }
        )

    first = made("shift", "clip")
    second = made("clip", "shift")
    by = 2 * math.log(MODIFIERS["shift"]["factor"])
    # linear runs from 9.2 to -10.1, shifted by -2.2 from 7.0 to -12.3: both bounds cut either.
    assert (first.log_snr_max, first.log_snr_min) == pytest.approx((5.0, -4.0), abs=1e-10)
    assert (second.log_snr_max, second.log_snr_min) == pytest.approx(
        (5.0 - by, -4.0 - by), abs=1e-10
    )
    assert first.name == "linear+shift+clip"
    assert build_schedule({"schedule": SCHEDULES["linear"], "modifiers": None}).name == "linear"
    third = made("zero_terminal_snr", "shift")
    assert third.log_snr_min == -math.inf
    t = dense()[:-1]
    torch.testing.assert_close(
        third.log_snr(t), zero_terminal_snr(linear()).log_snr(t) - by, rtol=0, atol=1e-14
    )


def test_modifiers_of_modifiers_keep_the_inverse():
    t = dense()
    for schedule in (
        shift(zero_terminal_snr(linear()), factor=0.3),
        zero_terminal_snr(clip(linear(), log_snr_max=5.0)),
        shift(clip(flow()), factor=5.0),
    ):
        torch.testing.assert_close(schedule.time_of(schedule.log_snr(t)), t, rtol=0, atol=1e-12)


ORDERS = [
    order
    for count in (2, 3)
    for order in itertools.permutations(("clip", "shift", "zero_terminal_snr"), count)
]


@pytest.mark.parametrize("order", ORDERS, ids="+".join)
@pytest.mark.parametrize("name", SCHEDULES)
def test_modifiers_on_top_of_each_other(name, order):
    """In every order over every schedule, straight ones too: it inverts, and zero_terminal_snr
    keeps the first level and falls to alpha = 0 without a jump. A combination may only be refused
    because alpha is 0 already, or because a clip has nothing left to cut.
    """
    made = build_schedule({"schedule": SCHEDULES[name]})
    for step in order:
        try:
            after = build_schedule(
                {
                    "schedule": SCHEDULES[name],
                    "modifiers": {each: MODIFIERS[each] for each in order[: order.index(step) + 1]},
                }
            )
        except UserError as refusal:
            assert "has no effect" in str(refusal)
            return
        if step == "zero_terminal_snr":
            assert (
                after.log_snr_max == pytest.approx(made.log_snr_max, abs=1e-9)
                and after.log_snr_min == -math.inf
            )
            near = 1 - 10.0 ** -torch.arange(3, 10, dtype=torch.float64)
            alpha = after.alpha_sigma(near, torch.float64)[0].flatten()
            assert (alpha.diff() < 0).all() and alpha[-1] < 0.02 * alpha[
                0
            ]  # a law with tails falls steeply at the very end
        made = after
    t = torch.linspace(0, 1, 1003, dtype=torch.float64)
    level = made.log_snr(t)
    finite = level.isfinite()
    torch.testing.assert_close(
        made.log_snr(made.time_of(level))[finite], level[finite], rtol=0, atol=1e-6
    )
    alpha, sigma = made.alpha_sigma(t, torch.float64)
    torch.testing.assert_close(
        alpha + sigma if made.straight else alpha**2 + sigma**2,
        torch.ones_like(alpha),
        rtol=0,
        atol=1e-15,
    )


@pytest.mark.parametrize(
    "narrow",
    [
        functools.partial(laplace, scale=0.1),
        functools.partial(laplace, scale=0.25, centre=9.0),
        functools.partial(edm, log_sigma_std=0.3),
    ],
)
def test_a_narrow_law_is_cut_where_nothing_of_it_is_left(narrow):
    """So that every level within the ends has a time of its own: a float64 near t = 1 has no room
    for tails below 1e-16.
    """
    made = narrow()
    level = torch.linspace(made.log_snr_min, made.log_snr_max, 5001, dtype=torch.float64)
    assert (made.time_of(level).diff() < 0).all()
    assert (made.log_snr(made.time_of(level)) - level).abs().max() < 1e-6


def test_a_law_outside_its_bounds_is_refused():
    for where in (50.0, -50.0, math.nan):
        with pytest.raises(UserError, match="laplace lies around"):
            laplace(centre=where)
