"""Weightings against formulas by hand, the products with every prediction and their limits, and the
density behind `flat`.
"""

import functools
import inspect
import math

import numpy as np
import pytest
import torch
import yaml
from hydra.utils import get_object

from sdtrain.diffusion import Density, Objective, WeightingError, output_weight
from sdtrain.diffusion.prediction import X0, Epsilon, Flow, V
from sdtrain.diffusion.times import LogNormal, Uniform, Window
from sdtrain.diffusion.weighting.debiased import Debiased
from sdtrain.diffusion.weighting.edm import EDM
from sdtrain.diffusion.weighting.epsilon import Epsilon as OnNoise
from sdtrain.diffusion.weighting.flat import Flat
from sdtrain.diffusion.weighting.min_snr import MinSNR
from sdtrain.diffusion.weighting.sigmoid import Sigmoid
from sdtrain.diffusion.weighting.simple import Simple
from sdtrain.errors import UserError
from sdtrain.paths import config_dir
from sdtrain.schedules import Schedule
from sdtrain.schedules.flow import flow
from sdtrain.schedules.linear import linear
from sdtrain.schedules.modifiers import clip, zero_terminal_snr


def nodes(group):
    return {
        path.stem: yaml.safe_load(path.read_text())
        for path in sorted((config_dir() / group).glob("*.yaml"))
        if path.stem != "none"
    }


SCHEDULES = nodes("schedule")
PREDICTIONS = nodes("prediction")
WEIGHTINGS = nodes("weighting")
TIMES = nodes("times")
SCHEDULES["table"]["betas"] = (1e-4 + 0.015 * np.linspace(0, 1, 1000) ** 2).tolist()


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


@functools.cache
def density_of(name):
    """Of uniform times on that schedule."""
    return Density(schedule_of(name), Uniform())


@functools.cache
def levels_of(name):
    """3,001 times, and alpha and sigma there."""
    t = Uniform()(torch.linspace(0, 1, 3001, dtype=torch.float64), schedule_of(name))
    return t, *schedule_of(name).alpha_sigma(t, torch.float64)


def gauss_legendre(edges, order=12):
    """Nodes and weights of composite quadrature over [edges[0], edges[-1]]; exact to rounding for
    what is smooth between the edges.
    """
    nodes, weights = np.polynomial.legendre.leggauss(order)
    low = np.asarray(edges)[:-1, None]
    width = np.diff(edges)[:, None]
    return torch.from_numpy((low + width * (nodes + 1) / 2).ravel()), torch.from_numpy(
        (width * weights / 2).ravel()
    )


# The weights in squared error of epsilon, as the papers have them, of the snr. `simple` and `flat`
# are of the configuration, not of the snr.
BY_HAND = {
    "debiased": lambda snr, *, max_weight: np.minimum(1 / np.sqrt(snr), max_weight),
    # Karras et al. 2022: lambda(sigma) = (sigma^2 + d^2) / (sigma d)^2 on the error of x0, which is
    # sigma times that of epsilon.
    "edm": lambda snr, *, sigma_data: (1 / snr + sigma_data**2) / (sigma_data**2 / snr) / snr,
    "epsilon": lambda snr: np.ones_like(snr),
    "min_snr": lambda snr, *, gamma: np.minimum(snr, gamma) / snr,
    "p2": lambda snr, *, gamma, k: 1 / (k + snr) ** gamma,
    "sigmoid": lambda snr, *, bias: 1 / (1 + snr * np.exp(-bias)),
    "soft_min_snr": lambda snr, *, gamma: (
        1 / (1 / snr + 1 / gamma) / snr
    ),  # Crowson et al. 2024, on the error of x0
}
ELSEWHERE = {
    "debiased": {"max_weight": 3.0},
    "edm": {"sigma_data": 0.5},
    "min_snr": {"gamma": 2.0},
    "p2": {"gamma": 0.5, "k": 2.0},
    "sigmoid": {"bias": -1.0},
    "soft_min_snr": {"gamma": 9.0},
}
JACOBIAN = {
    "epsilon": lambda a, s: np.ones_like(a),
    "x0": lambda a, s: (a / s) ** 2,
    "v": lambda a, s: (a / (a**2 + s**2)) ** 2,
    "flow": lambda a, s: (a / (a + s)) ** 2,
    "edm": lambda a, s: a**2 / (a**2 + s**2),
}


def test_every_weighting_with_a_formula_is_offered():
    assert set(BY_HAND) | {"simple", "flat"} <= set(WEIGHTINGS) and set(JACOBIAN) <= set(
        PREDICTIONS
    )


@pytest.mark.parametrize("prediction", JACOBIAN)
@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("name", BY_HAND)
def test_what_is_charged_is_the_papers_weight_times_the_jacobian(name, changed, prediction):
    """For alpha and sigma of no relation to each other: w J says nothing of the schedule."""
    node = WEIGHTINGS[name] | (ELSEWHERE.get(name, {}) if changed else {})
    generator = torch.Generator().manual_seed(0)
    alpha, sigma = (
        torch.rand(2000, 1, 1, 1, generator=generator, dtype=torch.float64) ** 3 + 1e-4
        for _ in range(2)
    )
    a = alpha.numpy()
    s = sigma.numpy()
    weight = BY_HAND[name](
        (a / s) ** 2, **{key: value for key, value in node.items() if key != "_target_"}
    )
    charged = output_weight(made(node), made(PREDICTIONS[prediction]), alpha, sigma)
    assert charged.shape == alpha.shape and charged.dtype == torch.float64
    # exp(ln(snr)) loses |ln snr| / 2 ulp, 20 at most; the rest a few.
    np.testing.assert_allclose(charged.numpy(), weight * JACOBIAN[prediction](a, s), rtol=2e-14)


def test_min_snr_on_the_own_target_of_each_prediction():
    """min(SNR, g) / SNR for epsilon, min(SNR, g) for x0, min(SNR, g) / (SNR + 1) for v (Hang et al.
    2023).
    """
    snr = 10 ** np.linspace(-5, 5, 201)
    gamma = 5.0
    alpha, sigma = (
        torch.from_numpy(c).reshape(-1, 1, 1, 1)
        for c in (np.sqrt(snr / (snr + 1)), np.sqrt(1 / (snr + 1)))
    )
    least = np.minimum(snr, gamma)
    for prediction, wanted in ((Epsilon(), least / snr), (X0(), least), (V(), least / (snr + 1))):
        np.testing.assert_allclose(
            output_weight(MinSNR(gamma=gamma), prediction, alpha, sigma).flatten().numpy(),
            wanted,
            rtol=1e-14,
        )


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_simple_charges_one_everywhere(name, prediction):
    alpha, sigma = schedule_of(name).alpha_sigma(torch.linspace(0, 1, 1001), torch.float64)
    torch.testing.assert_close(
        output_weight(Simple(), made(PREDICTIONS[prediction]), alpha, sigma),
        torch.ones_like(alpha),
        rtol=0,
        atol=1e-15,
    )


def test_edm_weights_make_an_untrained_network_cost_one():
    """Gaussian data of width d make F = 0 the best output: E target^2 = 1, charged 1 / d^2 / (d eps
    / d F)^-2... = 1 at every level.
    """
    for sigma_data in (0.5, 1.0, 2.0):
        prediction = made(PREDICTIONS["edm"] | {"sigma_data": sigma_data})
        alpha, sigma = linear().alpha_sigma(torch.linspace(0, 1, 1000), torch.float64)
        p, q = (
            prediction.target(x0, 1 - x0, alpha, sigma)
            for x0 in (torch.ones_like(alpha), torch.zeros_like(alpha))
        )
        variance = p**2 * sigma_data**2 + q**2
        torch.testing.assert_close(
            output_weight(EDM(sigma_data=sigma_data), prediction, alpha, sigma) * variance,
            torch.ones_like(alpha),
            rtol=0,
            atol=1e-13,
        )


@pytest.mark.parametrize(
    ("weighting", "prediction", "at_noise", "at_data"),
    [
        (OnNoise(), Epsilon(), 1, 1),
        (OnNoise(), V(), 0, 1),
        (OnNoise(), Flow(), 0, 1),
        (OnNoise(), X0(), 0, math.inf),
        (MinSNR(gamma=5.0), Epsilon(), 1, 0),
        (MinSNR(gamma=5.0), X0(), 0, 5),
        (MinSNR(gamma=5.0), V(), 0, 0),
        (Debiased(max_weight=20.0), Epsilon(), 20, 0),
        (Debiased(max_weight=20.0), V(), 0, 0),
        (EDM(sigma_data=0.5), Epsilon(), math.inf, 1),
        (EDM(sigma_data=0.5), V(), 4, 1),
        (EDM(sigma_data=0.5), Flow(), 4, 1),
        (EDM(sigma_data=0.5), X0(), 4, math.inf),
        (Sigmoid(bias=2.0), Epsilon(), 1, 0),
        (Sigmoid(bias=2.0), X0(), 0, math.e**2),
        (Sigmoid(bias=2.0), V(), 0, 0),
    ],
)
def test_products_at_the_ends(weighting, prediction, at_noise, at_data):
    """Where alpha or sigma is 0 the product is its limit; there it is taken at 1e-12, so an
    infinite one is 1e24, and a zero 1e-12 at most.
    """
    alpha = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1)
    found = output_weight(weighting, prediction, alpha, 1 - alpha).flatten().tolist()
    for value, wanted in zip(found, (at_noise, at_data), strict=True):
        assert (
            value > 1e20
            if wanted == math.inf
            else value == pytest.approx(wanted, rel=1e-10, abs=1e-10)
        )


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("debiased", "max_weight", 0.0),
        ("edm", "sigma_data", 0.0),
        ("edm", "sigma_data", math.nan),
        ("min_snr", "gamma", 0.0),
        ("min_snr", "gamma", -1.0),
        ("p2", "gamma", -0.1),
        ("p2", "k", 0.0),
        ("soft_min_snr", "gamma", 0.0),
    ],
)
def test_bad_arguments_are_refused_by_key(name, key, value):
    with pytest.raises(UserError) as refused:
        made(WEIGHTINGS[name] | {key: value})
    assert refused.value.key == f"weighting.{key}"


# The density of log_snr, and flat.


def grid(schedule, *inner):
    """Edges in log_snr, fine enough, with the places where a density may have a corner among them.
    Infinite ends stand at t = 1e-6 from them.
    """
    t = torch.tensor([1e-6, 1 - 1e-6], dtype=torch.float64)
    high = (
        schedule.log_snr_max
        if math.isfinite(schedule.log_snr_max)
        else schedule.log_snr(t)[0].item()
    )
    low = (
        schedule.log_snr_min
        if math.isfinite(schedule.log_snr_min)
        else schedule.log_snr(t)[1].item()
    )
    inner = [
        x
        for x in schedule.log_snr(torch.tensor(inner, dtype=torch.float64)).tolist()
        if low < x < high
    ]
    return np.unique(np.concatenate([np.linspace(low, high, 400), inner]))


@pytest.mark.parametrize("law", TIMES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_density_integrates_to_one(name, law):
    schedule = schedule_of(name)
    times = made(TIMES[law])
    density = Density(schedule, times)
    if schedule.discrete:  # sums over the points are trapezoid sums
        log_snr = schedule.log_snr(torch.arange(1000, dtype=torch.float64) / 999)
        assert abs(-np.trapezoid(density(log_snr).numpy(), log_snr.numpy()) - 1) < 1e-12
        times.continuous = True  # and below, the same law over the whole interval
        density = Density(schedule, times)
        edges = np.unique(
            np.concatenate(
                [
                    log_snr.numpy(),
                    schedule.log_snr(torch.tensor([0.5], dtype=torch.float64)).numpy(),
                ]
            )
        )
    else:
        edges = grid(schedule, 0.5)
    log_snr, weight = gauss_legendre(edges)
    ends = schedule.time_of(torch.tensor([edges[-1], edges[0]]), clamp=True)
    share = (
        times.cdf(ends, schedule).diff().item()
    )  # all of it, but for what is left out at infinite ends
    assert share > 1 - 1e-5
    # 12 nodes in each of 400 pieces leave nothing of a smooth function; cut laws carry the 1e-9 of
    # laplace's tails, where t is flat.
    assert (density(log_snr) * weight).sum().item() == pytest.approx(share, abs=1e-8)


@pytest.mark.parametrize("law", TIMES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_density_is_that_of_the_realised_times(name, law):
    """200,000 evenly spread draws, counted between 60 levels, against the integral of the density
    between them.
    """
    schedule = schedule_of(name)
    times = made(TIMES[law])
    count = 200000
    times.continuous = (
        True  # on points, the histogram is of 1000 lines; their shares are tested with the times
    )
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    realised = np.sort(schedule.log_snr(times(u, schedule)).numpy())
    edges = (
        grid(schedule, 0.5)
        if not schedule.discrete
        else np.sort(schedule.log_snr(torch.arange(1999, dtype=torch.float64) / 1998).numpy())
    )
    log_snr, weight = gauss_legendre(edges)
    mass = (Density(schedule, times)(log_snr) * weight).reshape(-1, 12).sum(1).numpy()
    below = np.concatenate([[0], np.cumsum(mass)])
    missing = 0 if math.isfinite(schedule.log_snr_min) else 1e-5
    np.testing.assert_allclose(
        np.searchsorted(realised, edges) / count, below, rtol=0, atol=1.1 / count + 1e-8 + missing
    )  # one draw


@pytest.mark.parametrize("law", TIMES)
@pytest.mark.parametrize(
    "name", [name for name in SCHEDULES if math.isfinite(schedule_of(name).log_snr_min)]
)
def test_density_has_no_holes(name, law):
    """At single points, such as the ends and the centre of a symmetric law, it is what it is beside
    them.
    """
    schedule = schedule_of(name)
    times = made(TIMES[law])
    times.continuous = True
    density = Density(schedule, times)
    for t in (
        (0.25, 0.4375) if law == "logit_normal" else (0.0, 0.25, 0.4375, 1.0)
    ):  # that law falls off the ends faster than a step can follow
        level = schedule.log_snr(torch.tensor(t, dtype=torch.float64)).item()
        step = 1e-7
        beside = [
            x
            for x in (level - step, level + step)
            if schedule.log_snr_min <= x <= schedule.log_snr_max
        ]
        at = density(torch.tensor([level], dtype=torch.float64)).item()
        near = density(torch.tensor(beside, dtype=torch.float64)).tolist()
        assert 0.999 * min(near) - 1e-300 <= at <= 1.001 * max(near) + 1e-300, (
            f"t = {t}: {at}, beside {near}"
        )
    for centre in (0.0, 2.4):
        at, near = (
            density(torch.tensor(x, dtype=torch.float64)).tolist()
            for x in ([centre], [centre - 1e-7, centre + 1e-7])
        )
        assert 0.999 * min(near) <= at[0] <= 1.001 * max(near), (
            f"log_snr = {centre}: {at}, beside {near}"
        )


def mean_square(log_snr, d):
    """E|eps - eps*|^2 per dimension for data N(0, d^2): a^2 d^2 / (a^2 d^2 + s^2), of log_snr
    alone.
    """
    return 1 / (1 + torch.exp(-log_snr) / d**2)


def likelihood_difference(low, high, d):
    """I-MMSE (Guo et al. 2005): 1/2 integral of MMSE d(snr) = 1/2 ln(1 + d^2 snr) between the ends,
    the Gaussian's mutual information.
    """
    return 0.5 * (math.log1p(d**2 * math.exp(high)) - math.log1p(d**2 * math.exp(low)))


def expected_loss(schedule, times, t, weight, d):
    """The mean loss over a quadrature of times, through what the objective charges, the network the
    best for data N(0, d^2).
    """
    charged = output_weight(
        Flat(density=Density(schedule, times)), V(), *schedule.alpha_sigma(t, torch.float64)
    ).flatten()
    per_v = (
        mean_square(schedule.log_snr(t), d)
        / V().jacobian(*schedule.alpha_sigma(t, torch.float64)).flatten()
    )
    return (charged * per_v * weight).sum().item()


@pytest.mark.parametrize("d", [0.6, 2.0])
@pytest.mark.parametrize("name", SCHEDULES)
def test_flat_is_the_likelihood_whatever_the_schedule(name, d):
    """The mean loss under `flat`, halved, is a difference of Gaussian log-likelihoods that knows
    only the ends: 9 digits.
    """
    schedule = (
        schedule_of(name)
        if math.isfinite(schedule_of(name).log_snr_min)
        else clip(schedule_of(name))
    )
    size = schedule.num_timesteps
    if schedule.discrete:  # log_snr is linear between the points: 12 nodes each
        t, weight = gauss_legendre(np.linspace(0, 1, size))
        times = Uniform(continuous=True)
    else:
        # The curve is steep at the ends, where laplace has t - 0 down to 1e-9: pieces of equal
        # log_snr resolve it.
        edges = schedule.time_of(
            torch.linspace(schedule.log_snr_max, schedule.log_snr_min, 401, dtype=torch.float64),
            clamp=True,
        ).numpy()
        t, weight = gauss_legendre(
            np.unique(np.concatenate([edges[np.abs(edges - 0.5) > 1e-6], [0.5]]))
        )
        times = Uniform()
    wanted = likelihood_difference(schedule.log_snr_min, schedule.log_snr_max, d)
    assert expected_loss(schedule, times, t, weight, d) / 2 == pytest.approx(wanted, rel=1e-9)
    if (
        schedule.discrete
    ):  # as training draws them, each point 1 in T: the trapezoid sum over log_snr
        points = torch.arange(size, dtype=torch.float64) / (size - 1)
        log_snr = schedule.log_snr(points)
        trapezoid = -np.trapezoid(mean_square(log_snr, d).numpy(), log_snr.numpy())
        found = expected_loss(
            schedule, Uniform(), points, torch.full((size,), 1 / size, dtype=torch.float64), d
        )
        assert found == pytest.approx(trapezoid, rel=1e-12)
        assert found / 2 == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("name", ["linear", "edm", "cosine_log_snr"])
def test_flat_divides_the_law_of_the_times_out(name):
    """log_normal instead of uniform, on the same levels: the same mean loss."""
    schedule = clip(schedule_of(name), log_snr_min=-4.0, log_snr_max=5.0)
    times = LogNormal(continuous=True)
    edges = np.unique(
        np.concatenate(
            [
                schedule.log_snr(torch.linspace(0, 1, 4001, dtype=torch.float64)).numpy(),
                np.linspace(-4, 5, 400)[1:-1],
            ]
        )
    )[::-1]
    if schedule.discrete:  # the corners are those of the table underneath
        corners = schedule_of(name).log_snr(torch.arange(1000, dtype=torch.float64) / 999).numpy()
        edges = np.unique(np.concatenate([edges, corners[(corners > -4) & (corners < 5)]]))[::-1]
    inner = torch.from_numpy(edges.copy()).clamp(schedule.log_snr_min, schedule.log_snr_max)
    u, weight = gauss_legendre(times.cdf(schedule.time_of(inner), schedule).clamp(0, 1).numpy(), 4)
    assert expected_loss(schedule, times, times(u, schedule), weight, 0.6) / 2 == pytest.approx(
        likelihood_difference(-4, 5, 0.6), rel=1e-8
    )


# What cannot be trained.


def objective(schedule, prediction, weighting, times=None):
    times = times or Uniform()
    return Objective(
        schedule=schedule,
        prediction=prediction,
        weighting=weighting or Flat(density=Density(schedule, times)),
        times=times,
    )


@pytest.mark.parametrize("schedule", [flow(), zero_terminal_snr(linear())], ids=lambda s: s.name)
def test_epsilon_is_refused_where_sampling_starts_in_pure_noise(schedule):
    for weighting in (Simple(), MinSNR(), OnNoise()):
        with pytest.raises(
            UserError, match=r"prediction=[Ee]psilon.*prediction=v or prediction=flow"
        ):
            objective(schedule, Epsilon(), weighting)
    for prediction in (V(), X0(), Flow()):
        objective(schedule, prediction, Simple())


@pytest.mark.parametrize(
    ("schedule", "prediction", "weighting"),
    [
        (flow(), X0(), OnNoise()),
        (flow(), X0(), EDM()),
        (flow(), X0(), Debiased()),  # (alpha / sigma)^2 is infinite at sigma = 0
        (flow(), V(), None),  # every log_snr alike, out to infinity
    ],
)
def test_an_infinite_product_is_refused(schedule, prediction, weighting):
    with pytest.raises(
        WeightingError,
        match=r"weighting=.*infinite.*another weighting \(simple .* modifiers=\[clip\]",
    ):
        objective(schedule, prediction, weighting)


@pytest.mark.parametrize("prediction", [V(), Flow(), X0()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize(
    "weighting", [MinSNR(), OnNoise(), Sigmoid(), Debiased()], ids=lambda w: type(w).__name__
)
def test_no_weight_where_sampling_starts_is_refused(weighting, prediction):
    """w is bounded and J is 0 at alpha = 0."""
    with pytest.raises(
        WeightingError, match=r"weighting=.*no weight to the level where sampling starts"
    ):
        objective(zero_terminal_snr(linear()), prediction, weighting)
    objective(linear(), prediction, weighting)  # the same where alpha is not 0


def test_edm_weights_train_the_level_of_pure_noise():
    objective(zero_terminal_snr(linear()), V(), EDM())
    objective(flow(), Flow(), EDM())
    with pytest.raises(WeightingError):
        objective(flow(), Flow(), OnNoise())


def test_what_is_never_visited_is_not_held_against_a_configuration():
    """Under flow x0 has infinite weight at t = 0 alone: a window that leaves that out may have it,
    and one that leaves it in may not.
    """
    objective(flow(), X0(), EDM(), Window(low=0.1, high=0.9))
    with pytest.raises(WeightingError):
        objective(flow(), X0(), EDM(), Window(low=0.0, high=0.9))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_what_is_offered_is_finite_or_refused(name, prediction, weighting):
    """Every combination either raises UserError or charges finite weights on all its levels, and
    something where sampling starts.
    """
    schedule = schedule_of(name)
    try:
        found = objective(
            schedule,
            made(PREDICTIONS[prediction]),
            made(WEIGHTINGS[weighting], density=density_of(name)),
        )
    except UserError as error:
        assert "weighting" in str(error) or "prediction" in str(error)
        # laplace has a density of 2e-9 at t = 0, where x0 counts 2e4 times: 1e13 is as good as
        # infinite.
        assert schedule.log_snr_min == -math.inf or (weighting, prediction) == ("flat", "x0"), (
            "refused though every level is finite"
        )
        return
    t, alpha, sigma = levels_of(name)
    charged = output_weight(found.weighting, found.prediction, alpha, sigma)
    assert charged.isfinite().all()
    assert (charged >= 0).all()
    assert charged[t == 1].gt(1e-12).all()


def test_the_guard_on_products_sees_a_weighting_of_ones_own():
    class Steep:
        def __call__(self, log_snr, jacobian):
            return torch.where(log_snr < -10, torch.inf, 1.0)

    with pytest.raises(WeightingError, match="weighting=.*infinite"):
        objective(linear(), Epsilon(), Steep())  # ends at -10.1
    objective(clip(linear(), log_snr_min=-9.0), Epsilon(), Steep())
    assert issubclass(WeightingError, UserError) and isinstance(linear(), Schedule)
