"""How weights move: learning rates by hand, clipping by hand, and no trace of a gradient that is not finite."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from sdtrain.errors import DivergedError
from sdtrain.training.optimisation import Constant, Cosine, Optimisation


@pytest.mark.parametrize(
    ("images_seen", "factor"),
    [
        (0, 0.0),
        (25, 0.25),
        (50, 0.5),
        (100, 1.0),  # warm-up over 100 images
        (350, 0.1 + 0.9 * (2 + math.sqrt(2)) / 4),
        (600, 0.55),
        (850, 0.1 + 0.9 * (2 - math.sqrt(2)) / 4),  # quarters of the half cosine
        (1100, 0.1),
        (5000, 0.1),
    ],
)
def test_cosine(images_seen, factor):
    assert Cosine(warmup_images=100, final_factor=0.1)(images_seen, 1100) == pytest.approx(
        factor, abs=1e-15
    )


@pytest.mark.parametrize(
    ("schedule", "images_seen", "factor"),
    [
        (Cosine(warmup_images=0), 0, 1.0),
        (Cosine(warmup_images=0), 500, 0.5),
        (Cosine(warmup_images=0), 1000, 0.0),
        (Cosine(warmup_images=1000), 1000, 1.0),
        (Cosine(warmup_images=4000), 1000, 0.25),
        (Constant(), 0, 1.0),
        (Constant(), 10**9, 1.0),
        (Constant(warmup_images=8), 2, 0.25),
        (Constant(warmup_images=8), 8, 1.0),
        (Constant(warmup_images=8), 9, 1.0),
    ],
)
def test_other_learning_rates(schedule, images_seen, factor):
    assert schedule(images_seen, 1000) == pytest.approx(factor, abs=1e-15)


def make(
    parameters,
    *,
    clip=math.inf,
    lr_schedule=None,
    cls=torch.optim.AdamW,
    max_skipped=None,
    **settings,
):
    optimisation = Optimisation(
        optimizer=partial(cls, **{"lr": 0.1} | settings),
        lr_schedule=lr_schedule or Constant(),
        max_images=1000,
        gradient_clip=clip,
        max_skipped=max_skipped,
    )
    return optimisation, optimisation.configure(parameters)


def test_the_rate_is_set_on_every_group_from_its_own_peak():
    first, second = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimisation, optimizer = make(
        [{"params": [first], "lr": 0.2}, {"params": [second]}],
        lr_schedule=Cosine(warmup_images=100),
    )
    for images_seen, factor in (
        (50, 0.5),
        (550, 0.5),
        (50, 0.5),
        (1000, 0.0),
    ):  # no state: the same answer at a second call
        optimisation.set_learning_rate(optimizer, images_seen)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
            [0.2 * factor, 0.1 * factor], abs=1e-16
        )


def parameters():
    return [
        nn.Parameter(torch.tensor([1.0, -2.0, 3.0])),
        nn.Parameter(torch.tensor([[0.5], [4.0]])),
        nn.Parameter(torch.ones(2)),
    ]


def step(optimisation, optimizer, values, loss=1.0):
    """One step with these gradients; the last parameter has none. Returns what clip saw."""
    optimizer.zero_grad()
    first, second, _ = optimizer.param_groups[0]["params"]
    first.grad, second.grad = torch.tensor(values[:3]), torch.tensor(values[3:]).reshape(2, 1)
    optimisation.set_learning_rate(optimizer, 8)
    norm = optimisation.clip(optimizer, torch.tensor(loss))
    optimizer.step()
    return norm


def tensors(optimizer):
    """Every weight and every entry of the optimizer's state, copied. An entry not made yet counts as nothing."""
    group = optimizer.param_groups[0]["params"]
    return [p.detach().clone() for p in group], [
        {k: v.clone() for k, v in optimizer.state[p].items()} for p in group if p in optimizer.state
    ]


def same(one, other):
    return len(one) == len(other) and all(
        torch.equal(a, b) for a, b in zip(one, other, strict=True)
    )


GOOD = [[0.3, -0.1, 0.2, 1.0, -0.5], [-0.2, 0.4, 0.1, 0.3, 0.2]]


@pytest.mark.parametrize(
    "settings",
    [{"fused": True}, {"fused": False, "foreach": True}, {"fused": False, "foreach": False}],
    ids=["fused", "foreach", "loop"],
)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("clip", [math.inf, 0.5])
def test_a_gradient_that_is_not_finite_leaves_no_trace(settings, bad, clip):
    """Three runs: with a bad step between two good ones, with a bad step first, and without any. All end in the same bits."""
    optimisation, optimizer = make(parameters(), clip=clip, **settings)
    late_optimisation, late = make(parameters(), clip=clip, **settings)
    twin_optimisation, twin = make(parameters(), clip=clip, **settings)

    before, _ = tensors(late)
    assert step(
        late_optimisation, late, [0.3, bad, 0.2, 1.0, -0.5]
    ).isnan()  # the norm of a step not taken is nan in the log
    assert same(tensors(late)[0], before)
    assert not any(
        value.any() for state in tensors(late)[1] for value in state.values()
    )  # no moment, and no step counted

    assert step(optimisation, optimizer, GOOD[0]).isfinite()
    weights, state = tensors(optimizer)
    assert not same(weights[:2], before[:2])
    step(optimisation, optimizer, [0.3, -0.1, 0.2, bad, -0.5])
    after, state_after = tensors(optimizer)
    assert same(after, weights)
    assert all(
        a[name].equal(b[name]) for a, b in zip(state, state_after, strict=True) for name in a
    )

    step(late_optimisation, late, GOOD[0])
    step(twin_optimisation, twin, GOOD[0])
    for pair in ((optimisation, optimizer), (late_optimisation, late), (twin_optimisation, twin)):
        assert step(*pair, GOOD[1]).isfinite()
    weights, state = tensors(twin)
    for one in (optimizer, late):
        assert same(tensors(one)[0], weights)
        assert all(
            a[name].equal(b[name])
            for a, b in zip(state, tensors(one)[1], strict=True)
            for name in a
        )


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_cancels_the_step_though_the_gradient_is(fused, loss):
    """An error of 1e20 has an infinite square and a finite gradient."""
    optimisation, optimizer = make(parameters(), fused=fused)
    before, _ = tensors(optimizer)
    assert step(optimisation, optimizer, GOOD[0], loss).isnan()
    assert same(tensors(optimizer)[0], before)
    step(optimisation, optimizer, GOOD[0])
    assert not same(tensors(optimizer)[0], before)


@pytest.mark.parametrize("fused", [True, False])
def test_steps_left_out_are_counted_and_bounded_and_do_not_advance_the_rate(fused):
    optimisation, optimizer = make(
        parameters(), fused=fused, max_skipped=2, lr_schedule=Cosine(warmup_images=100)
    )
    for bad, skipped in ((False, 0), (True, 1), (False, 1), (True, 2)):
        before, _ = tensors(optimizer)
        step(optimisation, optimizer, [0.3, math.nan if bad else 0.1, 0.2, 1.0, -0.5])
        assert (optimisation.skipped, optimisation.stepped) == (skipped, not bad)
        assert same(tensors(optimizer)[0], before) == bad
    optimisation.set_learning_rate(optimizer, 70, batch_size=10)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(
        0.1 * 0.5
    )  # 70 seen, 20 of them in vain: half the warm-up
    with pytest.raises(DivergedError, match=r"3 steps.*trainer\.max_skipped=2"):
        step(optimisation, optimizer, [math.inf] * 5)


def test_clipping_by_hand():
    """|(3, 0, 4, 0, 12)| = 13: scaled to 1/2, or left alone below the limit."""
    for clip, factor in ((6.5, 0.5), (13.5, 1.0), (math.inf, 1.0)):
        optimisation, optimizer = make(parameters(), clip=clip)
        norm = step(optimisation, optimizer, [3.0, 0.0, 4.0, 0.0, 12.0])
        assert norm.ndim == 0
        assert norm.item() == pytest.approx(13, rel=1e-6)
        grads = torch.cat([p.grad.flatten() for p in optimizer.param_groups[0]["params"][:2]])
        torch.testing.assert_close(
            grads, torch.tensor([3.0, 0.0, 4.0, 0.0, 12.0]) * factor, rtol=1e-6, atol=0
        )  # float32; torch adds 1e-6 to the norm


def test_what_the_configuration_says_wins_over_a_loaded_optimizer():
    """A resumed run with another lr, weight decay and betas takes them, and keeps the moments."""
    old_optimisation, old = make(parameters(), weight_decay=0.5, betas=(0.8, 0.9))
    step(old_optimisation, old, GOOD[0])
    new_optimisation, new = make(
        parameters(),
        lr=0.02,
        weight_decay=0.0,
        betas=(0.5, 0.6),
        eps=1e-3,
        lr_schedule=Constant(warmup_images=16),
    )
    new.load_state_dict(old.state_dict())
    moments = tensors(old)[1]
    assert all(
        a[name].equal(b[name]) for a, b in zip(moments, tensors(new)[1], strict=True) for name in a
    )
    new_optimisation.set_learning_rate(new, 8)
    (group,) = new.param_groups
    assert (group["lr"], group["weight_decay"], tuple(group["betas"]), group["eps"]) == (
        0.01,
        0.0,
        (0.5, 0.6),
        1e-3,
    )
    # And they act. Adam by hand: m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2, corrected by the count of steps, 2.
    before = tensors(new)[0][0]
    step(new_optimisation, new, GOOD[1])
    g = torch.tensor(GOOD[1][:3])
    m, v = 0.5 * moments[0]["exp_avg"] + 0.5 * g, 0.6 * moments[0]["exp_avg_sq"] + 0.4 * g**2
    expected = before - 0.01 * (m / (1 - 0.5**2)) / ((v / (1 - 0.6**2)).sqrt() + 1e-3)
    torch.testing.assert_close(tensors(new)[0][0], expected, rtol=1e-6, atol=1e-6)
