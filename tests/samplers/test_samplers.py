"""Samplers against closed forms: the exact denoiser of a Gaussian mixture, Bayes, an integrator of
our own, and diffusers.
"""

import math
from itertools import product

import numpy as np
import pytest
import torch
import yaml
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from hydra.utils import instantiate

from sdtrain.audit.orders import convergence_orders, deterministic_samplers, rms_errors
from sdtrain.diffusion import Denoiser
from sdtrain.diffusion.prediction import Epsilon
from sdtrain.errors import UserError
from sdtrain.paths import config_dir
from sdtrain.samplers.ddim import ddim
from sdtrain.samplers.ddpm import ddpm
from sdtrain.samplers.grids import leading, linspace, trailing
from sdtrain.schedules.cosine_log_snr import cosine_log_snr
from sdtrain.schedules.flow import flow
from sdtrain.schedules.linear import linear
from sdtrain.schedules.modifiers import clip, zero_terminal_snr
from sdtrain.schedules.scaled_linear import scaled_linear


def configs(group):
    """Every option of a group by name. sampler/euler brings its grid along, and has its own node
    one level down.
    """
    nodes = {
        path.stem: yaml.safe_load(path.read_text())
        for path in sorted((config_dir() / group).glob("*.yaml"))
        if path.stem != "none"
    }
    return {name: node.get(group, node) for name, node in nodes.items()}


SAMPLERS = configs("sampler")
GRIDS = configs("grid")
ORDERED = deterministic_samplers()
SCHEDULES = {
    "table": scaled_linear,
    "curve": cosine_log_snr,
    "flow": flow,
    "zero terminal SNR": lambda: zero_terminal_snr(scaled_linear()),
}
INDIRECT = ["sampler", "grid"]
ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))  # of linear(), made here
RADIUS = 1.2
WIDTH = 0.2
WEIGHTS = torch.tensor([0.3, 0.1, 0.2, 0.1, 0.05, 0.25], dtype=torch.float64)
CENTRES = RADIUS * torch.stack(
    [
        (torch.arange(6).double() * math.pi / 3).cos(),
        (torch.arange(6).double() * math.pi / 3).sin(),
    ],
    1,
)


def paired(values):
    """(sampler, grid, value) for each sampler on each grid. With up to six values, each of them
    meets every sampler and every grid.
    """
    cases = []
    for row, sampler in enumerate(SAMPLERS):
        for column, grid in enumerate(GRIDS):
            cases.append((sampler, grid, values[(row + column) % len(values)]))
    return cases


def test_each_pair_is_among_the_cases():
    for values in ([1, 3], [1, 2, 7], list(SCHEDULES)):
        cases = paired(values)
        assert {(sampler, grid) for sampler, grid, _ in cases} == set(product(SAMPLERS, GRIDS))
        assert {(sampler, value) for sampler, _, value in cases} == set(product(SAMPLERS, values))
        assert {(grid, value) for _, grid, value in cases} == set(product(GRIDS, values))


@pytest.fixture(params=SAMPLERS)
def sampler(request):
    return instantiate(SAMPLERS[request.param])


@pytest.fixture(params=GRIDS)
def grid(request):
    return instantiate(GRIDS[request.param])


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def ring(schedule):
    """The exact denoiser of the ring, x [B, 2, 1, 1]: sum_k r_k (mu_k + alpha width^2 / v (x -
    alpha mu_k)), finite at alpha = 0. It asks the schedule for its level alone, in float64.

    Of |x - alpha mu_k|^2 only the product 2 alpha x mu_k differs between modes, as all of them are
    equally far from 0: r = softmax_k(ln w_k + alpha x mu_k / v).
    """

    def denoise(x, t):
        alpha, sigma = (c.item() for c in schedule.alpha_sigma(t, torch.float64))
        v = alpha**2 * WIDTH**2 + sigma**2
        points = x.flatten(1).double().T  # [2, B]: a softmax over rows takes a sixth of the time
        share = (WEIGHTS.log()[:, None] + (CENTRES * (alpha / v)) @ points).softmax(0)
        pull = alpha * WIDTH**2 / v
        mean = (CENTRES.T @ share) * (1 - alpha * pull) + pull * points
        return mean.T[..., None, None].to(x.dtype)

    return denoise


def even_in_log_snr(steps, schedule, low, high):
    return schedule.time_of(torch.linspace(low, high, steps, dtype=torch.float64))


def test_the_ring_comes_out(sampler, generator):
    """From standard normal noise, over 250 steps: mean, covariance, share of each mode and width of
    the modes.

    A step is 0.077 of log_snr, and the variance inside a mode is what suffers most: an error of
    first order is of that size. All else is smaller than chance, of which 4 standard errors are
    allowed.
    """
    schedule = linear()
    count = 8000
    steps = 250
    low, high = schedule.log_snr(torch.tensor([1.0, 0.0], dtype=torch.float64)).tolist()
    grid = even_in_log_snr(steps, schedule, low, high)

    def noise(step):
        return torch.randn(count, 2, 1, 1, generator=generator, dtype=torch.float64)

    samples = sampler(ring(schedule), noise(0), grid, schedule, noise).flatten(1)
    # The walk ends in E[x0 | x] at alpha_bar_0 = 1 - 1e-4: the width of a mode is that of the
    # posterior's mean.
    signal = ALPHA_BAR[0] * WIDTH**2
    inner = WIDTH**2 * signal / (signal + 1 - ALPHA_BAR[0])
    mean = (WEIGHTS[:, None] * CENTRES).sum(0)
    covariance = (
        (WEIGHTS[:, None, None] * CENTRES[:, :, None] * CENTRES[:, None]).sum(0)
        - mean.outer(mean)
        + inner * torch.eye(2)
    )
    deviation = samples - mean
    products = deviation[:, :, None] * deviation[:, None]
    assert ((deviation.mean(0)).abs() < 4 * covariance.diag().sqrt() / math.sqrt(count)).all()
    assert ((products.mean(0) - covariance).abs() < 4 * products.std(0) / math.sqrt(count)).all()
    distance, which = (samples[:, None] - CENTRES).square().sum(2).min(1)
    share = which.bincount(minlength=6) / count
    assert ((share - WEIGHTS).abs() < 4 * (WEIGHTS * (1 - WEIGHTS) / count).sqrt()).all()
    assert abs(distance.mean().item() / 2 / inner - 1) < 4 / math.sqrt(count) + (high - low) / (
        steps - 1
    )  # 2 count squares: relative s.e. 1 / sqrt(count)


@pytest.mark.parametrize(("sampler", "grid", "steps"), paired([1, 2, 7]), indirect=INDIRECT)
def test_shape_of_the_walk(sampler, grid, steps, generator):
    """Each step is shown once, in order, beginning with the noise itself; the last x0 is the
    answer; float32 stays float32.
    """
    schedule = scaled_linear()
    shown = []
    x = torch.randn(3, 2, 1, 1, generator=generator)
    answer = sampler(
        ring(schedule),
        x.clone(),
        grid(steps, schedule),
        schedule,
        lambda step: torch.full_like(x, step + 0.5),
        lambda *seen: shown.append(seen),
    )
    assert [step for step, _, _ in shown] == list(range(steps))
    assert torch.equal(shown[0][1], x)
    assert torch.equal(shown[-1][2], answer)
    assert answer.dtype == torch.float32
    assert answer.isfinite().all()
    assert torch.equal(
        answer,
        sampler(
            ring(schedule),
            x,
            grid(steps, schedule),
            schedule,
            lambda step: torch.full_like(x, step + 0.5),
        ),
    )


@pytest.mark.parametrize(("sampler", "grid", "steps"), paired([1, 3]), indirect=INDIRECT)
def test_the_walk_lives_where_x_lives(sampler, grid, steps):
    """x on another device than the grid. torch's meta device checks shapes and devices, so no GPU
    is needed; and it has no numbers to read back, so a walk that waits for its device at every step
    fails too.
    """
    x = torch.empty(2, 3, 4, 4, device="meta")
    answer = sampler(
        lambda x, t: x, x, grid(steps, linear()), linear(), lambda step: torch.empty_like(x)
    )
    assert answer.device.type == "meta"
    assert answer.shape == x.shape


ORDER = {"ddim": (0.95, 1.05), "heun": (1.9, 2.1), "dpmpp_2m": (1.9, 2.1), "unipc": (2.7, 3.3)}


@pytest.mark.parametrize("name", ORDERED)
def test_convergence_order(name):
    """Without the last step into data, on grids even in log_snr: doubling the steps divides the
    error by 2^order.
    """
    measured = convergence_orders(rms_errors(ORDERED[name], [80, 160, 320], count=32))
    low, high = ORDER.get(
        name, (0.95, 10)
    )  # a sampler that is not listed converges at least to first order
    assert all(low < order < high for order in measured), measured


def test_an_order_is_seen_to_be_missed():
    """The twins: a denoiser asked a little beside its time does not converge, nor does one whose
    answer is off by a thousandth.
    """

    def beside(denoise, x, grid, schedule, noise, show=None):
        return ddim(lambda x, t: denoise(x, 0.98 * t), x, grid, schedule, noise, show)

    def impatient(denoise, x, grid, schedule, noise, show=None):
        answers = []
        return ORDERED["heun"](
            lambda x, t: answers.append(denoise(x, t)) or answers[-1] * (1 + 1e-3),
            x,
            grid,
            schedule,
            noise,
            show,
        )

    assert max(convergence_orders(rms_errors(beside, [80, 160, 320], count=32))) < 0.5
    assert max(convergence_orders(rms_errors(impatient, [80, 160, 320], count=32))) < 1.5


def test_the_stochastic_samplers_are_not_listed_as_deterministic():
    assert {"ddim", "heun", "dpmpp_2m"} <= ORDERED.keys()
    assert not {"ddpm", "euler_ancestral", "dpmpp_2m_sde"} & ORDERED.keys()


@pytest.mark.parametrize(("sampler", "grid", "name"), paired(list(SCHEDULES)), indirect=INDIRECT)
def test_every_sampler_on_every_kind_of_schedule(sampler, grid, name, generator):
    """Finite from alpha = 0 on, in float32 too, and every sample within a mode of the ring: 3 % may
    stray at 40 steps.
    """
    schedule = SCHEDULES[name]()
    times = grid(40, schedule)
    noise = torch.randn(41, 500, 2, 1, 1, generator=generator)
    samples = (
        sampler(ring(schedule), noise[-1], times, schedule, noise.__getitem__).flatten(1).double()
    )
    assert samples.isfinite().all()
    distance = (samples[:, None] - CENTRES).square().sum(2).min(1).values.sqrt()
    assert (distance > 4 * WIDTH).float().mean() < 0.03


def test_every_sampler_may_end_without_noise(sampler, generator):
    """At t = 0 flow has sigma = 0: the last step in log_snr is infinite."""
    schedule = flow()
    noise = torch.randn(11, 50, 2, 1, 1, generator=generator)
    grid = linspace(10, schedule)
    samples = sampler(ring(schedule), noise[-1], grid, schedule, noise.__getitem__)
    assert samples.isfinite().all()


@pytest.mark.parametrize("name", SCHEDULES)
def test_ddim_is_euler_in_x_over_alpha(name, generator):
    """d(x / alpha) = eps d(sigma / alpha); under flow it is the straight-line step x + (s - t) (eps
    - x0).
    """
    schedule = SCHEDULES[name]()
    x, x0 = torch.randn(2, 50, 3, 1, 1, generator=generator, dtype=torch.float64)
    for t, s in ((0.9, 0.6), (0.4, 0.395), (0.05, 0.0001)):
        grid = torch.tensor([t, s], dtype=torch.float64)
        stepped = ddim(lambda x, time, t=t, x0=x0: x0 if time == t else x, x, grid, schedule, None)
        (a_t, a_s), (s_t, s_s) = (
            c.flatten().tolist() for c in schedule.alpha_sigma(grid, torch.float64)
        )
        eps = (x - a_t * x0) / s_t
        scale = max(
            1.0, a_s / a_t * s_t, 1 / s_t
        )  # what the two ways of writing it may round differently
        torch.testing.assert_close(
            stepped, a_s * (x / a_t + (s_s / a_s - s_t / a_t) * eps), rtol=0, atol=1e-14 * scale
        )
        if name == "flow":
            torch.testing.assert_close(
                stepped, x + (s - t) * (eps - x0), rtol=0, atol=1e-14 * scale
            )


@pytest.mark.parametrize("steps", [200])
def test_unit_gaussian_data_keep_their_deviation_wherever_a_walk_begins(grid, steps, generator):
    """From the deviation that such data have at the first time, sqrt(alpha^2 + sigma^2), also on a
    straight path cut above alpha = 0.
    """
    for schedule in (
        clip(flow(), log_snr_min=-2.0, log_snr_max=10.0),
        clip(linear(), log_snr_min=-2.0),
        flow(),
    ):
        times = grid(steps, schedule)
        alpha, sigma = (c.item() for c in schedule.alpha_sigma(times[0], torch.float64))
        denoise = lambda x, t, s=schedule: x * ratio(*s.alpha_sigma(t, torch.float64))  # noqa: E731
        x = torch.randn(20000, 1, 1, 1, generator=generator, dtype=torch.float64) * math.sqrt(
            alpha**2 + sigma**2
        )
        drawn = ddim(denoise, x, times, schedule, None)
        assert drawn.std().item() == pytest.approx(
            1, abs=0.04
        )  # 4 standard errors are 0.02; the step of the grid is the rest


def ratio(alpha, sigma):
    return alpha / (alpha**2 + sigma**2)  # E[x0 | x] / x of data N(0, 1)


def test_ddim_up_and_down_returns(generator):
    """Inversion: data to noise along the same grid turned round, and back. The way back misses by
    the step, to first order.
    """
    schedule = linear()
    missed = []
    start = (
        CENTRES.repeat(10, 1) + WIDTH * torch.randn(60, 2, generator=generator, dtype=torch.float64)
    )[..., None, None]
    for steps in (100, 200, 400):
        grid = even_in_log_snr(steps + 1, schedule, -6.0, 6.0)
        seen = []
        ddim(
            ring(schedule),
            start,
            grid.flip(0),
            schedule,
            None,
            lambda step, x, x0, seen=seen: seen.append(x),
        )
        ddim(
            ring(schedule),
            seen[-1],
            grid,
            schedule,
            None,
            lambda step, x, x0, seen=seen: seen.append(x),
        )
        missed.append((seen[-1] - start).square().mean().sqrt().item())
    assert all(0.9 < order < 1.1 for order in convergence_orders(missed)), missed


@pytest.mark.parametrize("steps", [5, 50])
def test_ddim_with_eta_1_is_ddpm(grid, steps, generator):
    schedule = linear()
    x, *noise = torch.randn(steps + 1, 64, 2, 1, 1, generator=generator, dtype=torch.float64)
    walks = [
        walk(ring(schedule), x, grid(steps, schedule), schedule, noise.__getitem__, **more)
        for walk, more in ((ddim, {"eta": 1.0}), (ddpm, {}))
    ]
    torch.testing.assert_close(
        *walks, rtol=0, atol=1e-12
    )  # float64; 1 - (alpha_t / alpha_s)^2 loses 1e-14 in a step


@pytest.mark.parametrize(("place", "after"), [(999, 998), (999, 500), (300, 299), (120, 7), (1, 0)])
def test_posterior_is_the_product_of_bayes(place, after, generator):
    """q(x_s | x_t, x0) ~ N(x_s; alpha_s x0, sigma_s^2) N(x_t; a x_s, v): precisions add, means add
    weighted by precision.
    """
    x_t, x0 = torch.randn(2, 50, 3, 1, 1, generator=generator, dtype=torch.float64)
    grid = torch.tensor([place, after], dtype=torch.float64) / 999
    betas = np.linspace(1e-4, 0.02, 1000)
    alpha_s = math.sqrt(ALPHA_BAR[after])
    variance_s = 1 - ALPHA_BAR[after]
    a = math.sqrt(np.prod(1 - betas[after + 1 : place + 1]))
    v = -math.expm1(np.log1p(-betas[after + 1 : place + 1]).sum())
    precision = 1 / variance_s + a**2 / v
    mean = (alpha_s * x0 / variance_s + a * x_t / v) / precision
    for walk, more in ((ddpm, {}), (ddim, {"eta": 1.0})):
        for z in (0.0, 1.0):
            # The first answer is x0; the second is x itself, so that the walk ends in x_s.
            x_s = walk(
                lambda x, t: x0 if t == grid[0] else x,
                x_t,
                grid,
                linear(),
                lambda step, z=z: torch.full_like(x0, z),
                **more,
            )
            # Rounding of numbers up to 5, and sigma_t^2 - a^2 sigma_s^2 cancels down to v, which is
            # 1e-4 in the first step.
            torch.testing.assert_close(
                x_s, mean + z / math.sqrt(precision), rtol=0, atol=2e-14 + 1e-15 / v
            )


def test_eta_scales_the_noise_and_nothing_else(generator):
    """std(eta) = eta std(1), and what is not noise is sigma_s^2 - std^2 of eps (Song et al. 2021,
    eq. 12 and 16).
    """
    x_t, x0 = torch.randn(2, 50, 3, 1, 1, generator=generator, dtype=torch.float64)
    place = 700
    after = 600
    eta = 0.3
    std = eta * math.sqrt(
        (1 - ALPHA_BAR[after]) / (1 - ALPHA_BAR[place]) * (1 - ALPHA_BAR[place] / ALPHA_BAR[after])
    )
    eps = (x_t - math.sqrt(ALPHA_BAR[place]) * x0) / math.sqrt(1 - ALPHA_BAR[place])
    grid = torch.tensor([place, after], dtype=torch.float64) / 999
    x_s = ddim(
        lambda x, t: x0 if t == grid[0] else x,
        x_t,
        grid,
        linear(),
        lambda step: torch.full_like(x0, 2.0),
        eta=eta,
    )
    expected = (
        math.sqrt(ALPHA_BAR[after]) * x0 + math.sqrt(1 - ALPHA_BAR[after] - std**2) * eps + 2 * std
    )
    torch.testing.assert_close(x_s, expected, rtol=0, atol=1e-12)


def test_eta_0_draws_nothing_and_other_eta_are_refused():
    def noise(step):
        raise AssertionError("a deterministic walk asked for noise")

    schedule = linear()
    x = torch.ones(1, 2, 1, 1)
    ddim(ring(schedule), x, trailing(3, schedule), schedule, noise)
    for eta in (-0.1, 1.1, math.nan):
        with pytest.raises(UserError) as refused:
            ddim(ring(schedule), x, trailing(3, schedule), schedule, noise, eta=eta)
        assert refused.value.key == "sampler.eta"


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("eta", [0.0, 0.6, None])
def test_parity_with_diffusers(eta, spacing, generator):
    """Ten steps on the betas of Stable Diffusion in float32, with one network and the same noise.
    eta None: ddpm.

    Their last step goes to alpha_bar = 1, which is the x0 that ours ends in.
    """
    schedule = scaled_linear()
    x = torch.randn(16, 3, 4, 4, generator=generator)
    noise = torch.randn(10, *x.shape, generator=generator)
    network = lambda x, timestep: (  # noqa: E731
        (x.roll(1, 1) + timestep.reshape(-1, 1, 1, 1) / 1000).sin() * 0.4 + 0.6 * x
    )
    betas = {
        "num_train_timesteps": 1000,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
    }
    options = betas | {"clip_sample": False, "timestep_spacing": spacing}
    theirs = (
        DDPMScheduler(**options) if eta is None else DDIMScheduler(**options, set_alpha_to_one=True)
    )
    theirs.set_timesteps(10)
    grid = {"trailing": trailing, "leading": leading}[spacing](10, schedule)
    assert (grid * 999).round().long().tolist() == theirs.timesteps.tolist()

    state = x
    states = []
    same = torch.Generator().manual_seed(1)
    for step, timestep in enumerate(theirs.timesteps):
        states.append(state)
        output = network(state, timestep.float().expand(len(x)))
        if eta is None:
            state = theirs.step(output, timestep, state, generator=same).prev_sample
        else:
            state = theirs.step(
                output, timestep, state, eta=eta, variance_noise=noise[step] if eta else None
            ).prev_sample
    if eta is None:  # it draws its noise itself, one tensor a step, none at timestep 0
        same = torch.Generator().manual_seed(1)
        noise = [torch.randn(x.shape, generator=same) for _ in range(10)]

    seen = []
    denoiser = Denoiser(network, schedule, Epsilon())
    ours = (ddpm if eta is None else ddim)(
        denoiser,
        x,
        grid,
        schedule,
        noise.__getitem__,
        lambda step, x, x0: seen.append(x),
        **({} if eta is None else {"eta": eta}),
    )
    # Their table is float32: alpha_bar is off by 1e-6, and x0 divides by alpha_bar^(1/2) = 0.07 at
    # the start.
    for mine, other in zip([*seen, ours], [*states, state], strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=2e-5)


NETWORK = lambda x, timestep: (  # noqa: E731
    (x.roll(1, 1) + timestep.reshape(-1, 1, 1, 1) / 1000).sin() * 0.4 + 0.6 * x
)
OF_STABLE_DIFFUSION = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
}
TRAILING = {**OF_STABLE_DIFFUSION, "timestep_spacing": "trailing"}
THEIRS = {  # ours by name: theirs, and whether its state is x / alpha
    "heun": (lambda: HeunDiscreteScheduler(**TRAILING), True),
    "dpmpp_2m": (
        lambda: DPMSolverMultistepScheduler(**TRAILING, solver_order=2, lower_order_final=False),
        False,
    ),
    "dpmpp_2m_sde": (
        lambda: DPMSolverMultistepScheduler(
            **TRAILING, solver_order=2, lower_order_final=False, algorithm_type="sde-dpmsolver++"
        ),
        False,
    ),
    "unipc": (lambda: UniPCMultistepScheduler(**TRAILING, solver_order=2), False),
    "euler": (lambda: EulerDiscreteScheduler(**TRAILING), True),
    "euler_ancestral": (lambda: EulerAncestralDiscreteScheduler(**TRAILING), True),
}


@pytest.mark.parametrize("name", [name for name in THEIRS if name in SAMPLERS])
def test_parity_with_the_samplers_of_diffusers(name, generator):
    """Ten steps on the betas of Stable Diffusion in float32, one network, the same noise; their
    last step is our last x0.
    """
    make, over_alpha = THEIRS[name]
    schedule = scaled_linear()
    theirs = make()
    theirs.set_timesteps(10)
    x = torch.randn(16, 3, 4, 4, generator=generator)
    noise = []
    alpha_bar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    state = x / math.sqrt(alpha_bar[-1]) if over_alpha else x
    same = torch.Generator().manual_seed(1)
    for timestep in theirs.timesteps:
        seen = theirs.scale_model_input(state, timestep)
        stochastic = (
            {"generator": same} if name in ("euler_ancestral", "dpmpp_2m_sde", "euler") else {}
        )
        state = theirs.step(
            NETWORK(seen, timestep.float().expand(len(x))), timestep, state, **stochastic
        ).prev_sample
    same = torch.Generator().manual_seed(1)
    noise = [torch.randn(x.shape, generator=same) for _ in range(10)]
    ours = instantiate(SAMPLERS[name])(
        Denoiser(NETWORK, schedule, Epsilon()),
        x,
        trailing(10, schedule),
        schedule,
        noise.__getitem__,
    )
    # Their tables are float32, sigma up to 14.6, and some interpolate sigma at the timestep: 1e-6
    # of 14.6, a few times.
    torch.testing.assert_close(ours, state, rtol=0, atol=2e-4)
