"""How weights move: learning rates by hand, clipping by hand, and no trace of a gradient that is
not finite."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sdtrain.errors import DivergedError, UserError
from sdtrain.training.optimisation import Constant, Cosine, Optimisation, OptimisedModule
from sdtrain.training.parameter_groups import GroupSettings, group_parameters
from sdtrain.training.progress import Progress


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
    schedule = Cosine(warmup_images=100, final_factor=0.1)
    assert schedule(images_seen, 1100) == pytest.approx(factor, abs=1e-15)


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


@pytest.mark.parametrize("schedule", [Cosine, Constant])
def test_a_negative_warm_up_is_refused(schedule):
    with pytest.raises(UserError) as caught:
        schedule(warmup_images=-1)
    assert caught.value.key == "lr_schedule.warmup_images"
    assert caught.value.exit_code == 2


def make(
    parameters,
    *,
    clip=math.inf,
    lr_schedule=None,
    cls=torch.optim.AdamW,
    max_skipped=None,
    groups=None,
    **settings,
):
    """parameters: a list, or by name."""
    optimisation = Optimisation(
        optimizer=partial(cls, **{"lr": 0.1} | settings),
        lr_schedule=lr_schedule or Constant(),
        max_images=1000,
        gradient_clip=clip,
        groups=groups,
        max_skipped=max_skipped,
    )
    if not isinstance(parameters, dict):
        parameters = {f"unet.{number}": each for number, each in enumerate(parameters)}
    return optimisation, optimisation.configure(parameters)


def test_the_rate_is_set_on_every_group_from_its_own_peak():
    named = {name: nn.Parameter(torch.ones(1)) for name in ("conditioner.a", "unet.a")}
    groups = GroupSettings(text_encoder_lr=0.2)
    optimisation, optimizer = make(named, groups=groups, lr_schedule=Cosine(warmup_images=100))
    # No state: the same answer at a second call.
    for images_seen, factor in ((50, 0.5), (550, 0.5), (50, 0.5), (1000, 0.0)):
        optimisation.set_learning_rate(optimizer, images_seen)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([0.2 * factor, 0.1 * factor], abs=1e-16)


def parameters():
    return [
        nn.Parameter(torch.tensor([1.0, -2.0, 3.0])),
        nn.Parameter(torch.tensor([[0.5], [4.0]])),
        nn.Parameter(torch.ones(2)),
    ]


def set_gradients(optimizer, values):
    """The last of the three parameters has none."""
    optimizer.zero_grad()
    first, second, _ = optimizer.param_groups[0]["params"]
    first.grad = torch.tensor(values[:3])
    second.grad = torch.tensor(values[3:]).reshape(2, 1)


def step(optimisation, optimizer, values, loss=1.0):
    """One step with these gradients. Returns the norm that is shown: that before clipping, NaN for
    a step not taken."""
    set_gradients(optimizer, values)
    optimisation.set_learning_rate(optimizer, 8)
    result = optimisation.clip(optimizer, torch.tensor(loss))
    optimizer.step()
    return result.shown_norm


def weights_of(optimizer):
    """Every weight, copied."""
    return [p.detach().clone() for p in optimizer.param_groups[0]["params"]]


def state_of(optimizer):
    """Every entry of the optimizer's state, copied. An entry not made yet counts as nothing."""
    copies = []
    for parameter in optimizer.param_groups[0]["params"]:
        if parameter in optimizer.state:
            entries = optimizer.state[parameter].items()
            copies.append({name: value.clone() for name, value in entries})
    return copies


def same(one, other):
    pairs = zip(one, other, strict=True)
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in pairs)


def same_state(one, other):
    """Whether every entry of `one` is in `other`, bit for bit."""
    for ours, theirs in zip(one, other, strict=True):
        if not all(value.equal(theirs[name]) for name, value in ours.items()):
            return False
    return True


GOOD = [[0.3, -0.1, 0.2, 1.0, -0.5], [-0.2, 0.4, 0.1, 0.3, 0.2]]


@pytest.mark.parametrize(
    "settings",
    [{"fused": True}, {"fused": False, "foreach": True}, {"fused": False, "foreach": False}],
    ids=["fused", "foreach", "loop"],
)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("clip", [math.inf, 0.5])
def test_a_gradient_that_is_not_finite_leaves_no_trace(settings, bad, clip):
    """Three runs: a bad step between two good ones, a bad step first, and none. All end in the same
    bits."""
    middle = make(parameters(), clip=clip, **settings)
    first = make(parameters(), clip=clip, **settings)
    twin = make(parameters(), clip=clip, **settings)

    before = weights_of(first[1])
    assert step(*first, [0.3, bad, 0.2, 1.0, -0.5]).isnan()
    assert same(weights_of(first[1]), before)
    for entries in state_of(first[1]):  # no moment, and no step counted
        assert not any(value.any() for value in entries.values())

    assert step(*middle, GOOD[0]).isfinite()
    weights = weights_of(middle[1])
    state = state_of(middle[1])
    assert not same(weights[:2], before[:2])
    step(*middle, [0.3, -0.1, 0.2, bad, -0.5])
    assert same(weights_of(middle[1]), weights)
    assert same_state(state, state_of(middle[1]))

    step(*first, GOOD[0])
    step(*twin, GOOD[0])
    for each in (middle, first, twin):
        assert step(*each, GOOD[1]).isfinite()
    for each in (middle, first):
        assert same(weights_of(each[1]), weights_of(twin[1]))
        assert same_state(state_of(twin[1]), state_of(each[1]))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_cancels_the_step_though_the_gradient_is(fused, loss):
    """An error of 1e20 has an infinite square and a finite gradient."""
    optimisation, optimizer = make(parameters(), fused=fused)
    before = weights_of(optimizer)
    assert step(optimisation, optimizer, GOOD[0], loss).isnan()
    assert same(weights_of(optimizer), before)
    step(optimisation, optimizer, GOOD[0])
    assert not same(weights_of(optimizer), before)


class Trained(OptimisedModule):
    """Three parameters in one process."""

    def __init__(self, optimisation: Optimisation, progress: Progress) -> None:
        super().__init__()
        self.weights = nn.ParameterList(parameters())
        self.optimisation = optimisation
        self.progress = progress
        reduce = SimpleNamespace(reduce=lambda value, **_: value)
        self.trainer = SimpleNamespace(strategy=reduce)

    def trained(self) -> dict[str, nn.Parameter]:
        return dict(self.named_parameters())

    def step(self, optimizer, values) -> None:
        set_gradients(optimizer, values)
        self.progress.images_seen += self.progress.batch_size
        self._window_loss = torch.tensor(1.0)
        self.configure_gradient_clipping(optimizer)
        optimizer.step()


@pytest.mark.parametrize("fused", [True, False])
def test_steps_left_out_are_counted_and_bounded_and_do_not_advance_the_rate(fused):
    progress = Progress(batch_size=10, max_images=1000)
    optimisation, _ = make(
        parameters(), fused=fused, max_skipped=2, lr_schedule=Cosine(warmup_images=100)
    )
    module = Trained(optimisation, progress)
    optimizer = module.configure_optimizers()
    for bad, skipped in ((False, 0), (True, 1), (False, 1), (True, 2)):
        before = weights_of(optimizer)
        module.step(optimizer, [0.3, math.nan if bad else 0.1, 0.2, 1.0, -0.5])
        assert progress.skipped_steps == skipped
        assert progress.step.applied == (not bad)
        assert same(weights_of(optimizer), before) == bad
    for _ in range(3):
        module.step(optimizer, GOOD[0])
    # 70 seen, 20 of them in vain: half the warm-up.
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5)
    with pytest.raises(DivergedError, match=r"3 steps.*trainer\.max_skipped=2") as caught:
        module.step(optimizer, [math.inf] * 5)
    assert caught.value.key == "optimizer.lr"
    assert caught.value.exit_code == 4


def test_the_loss_of_a_step_is_that_of_all_its_micro_batches():
    optimisation, _ = make(parameters(), max_skipped=1)
    module = Trained(optimisation, Progress(batch_size=4, max_images=1000))
    optimizer = module.configure_optimizers()
    for losses, applied in (([2.0, 3.0], True), ([math.inf, 1.0], False)):
        set_gradients(optimizer, GOOD[0])
        for seen, loss in enumerate(losses, 1):
            batch = SimpleNamespace(stream_end=2 * seen)
            module.record_losses(batch, torch.tensor([loss, loss]), None)
        module.configure_gradient_clipping(optimizer)
        assert module.progress.step.loss.item() == 2 * sum(losses)
        assert module.progress.step.applied == applied


def test_skipped_steps_are_counted_on_after_a_resume():
    before = Trained(make(parameters())[0], Progress(batch_size=10, max_images=1000))
    before.progress.skipped_steps = 2
    checkpoint = {}
    before.on_save_checkpoint(checkpoint)
    after = Trained(make(parameters())[0], Progress(batch_size=10, max_images=1000))
    after.on_load_checkpoint(checkpoint)
    assert after.progress.skipped_steps == 2


def test_clipping_by_hand():
    """|(3, 0, 4, 0, 12)| = 13: scaled to 1/2, or left alone below the limit."""
    for clip, factor in ((6.5, 0.5), (13.5, 1.0), (math.inf, 1.0)):
        optimisation, optimizer = make(parameters(), clip=clip)
        norm = step(optimisation, optimizer, [3.0, 0.0, 4.0, 0.0, 12.0])
        assert norm.ndim == 0
        assert norm.item() == pytest.approx(13, rel=1e-6)
        grads = torch.cat([p.grad.flatten() for p in optimizer.param_groups[0]["params"][:2]])
        wanted = torch.tensor([3.0, 0.0, 4.0, 0.0, 12.0]) * factor
        # float32; torch adds 1e-6 to the norm
        torch.testing.assert_close(grads, wanted, rtol=1e-6, atol=0)


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
    moments = state_of(old)
    assert same_state(moments, state_of(new))
    new_optimisation.set_learning_rate(new, 8)
    (group,) = new.param_groups
    assert group["lr"] == 0.01
    assert group["weight_decay"] == 0.0
    assert tuple(group["betas"]) == (0.5, 0.6)
    assert group["eps"] == 1e-3
    # And they act. Adam by hand, corrected by the count of steps, 2:
    # m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2
    before = weights_of(new)[0]
    step(new_optimisation, new, GOOD[1])
    g = torch.tensor(GOOD[1][:3])
    m = 0.5 * moments[0]["exp_avg"] + 0.5 * g
    v = 0.6 * moments[0]["exp_avg_sq"] + 0.4 * g**2
    expected = before - 0.01 * (m / (1 - 0.5**2)) / ((v / (1 - 0.6**2)).sqrt() + 1e-3)
    torch.testing.assert_close(weights_of(new)[0], expected, rtol=1e-6, atol=1e-6)


def test_parameters_are_grouped_by_rate_and_decay():
    named = {
        "unet.norm.weight": nn.Parameter(torch.ones(2)),
        "unet.conv.weight": nn.Parameter(torch.ones(2, 2, 1, 1)),
        "unet.conv.bias": nn.Parameter(torch.ones(2)),
        "conditioner.embedding.weight": nn.Parameter(torch.ones(3, 2)),
    }
    together = group_parameters(named, GroupSettings())
    assert together == [{"params": list(named.values())}]
    apart = group_parameters(
        named, GroupSettings(text_encoder_lr=0.5, decay_norms_and_biases=False)
    )
    found = {}
    for group in apart:
        for parameter in group["params"]:
            (name,) = (key for key, value in named.items() if value is parameter)
            found[name] = (group.get("lr"), group.get("weight_decay"))
    assert found == {
        "unet.norm.weight": (None, 0.0),
        "unet.conv.weight": (None, None),
        "unet.conv.bias": (None, 0.0),
        "conditioner.embedding.weight": (0.5, None),
    }


def test_a_rate_of_a_frozen_text_encoder_is_refused():
    named = {"unet.weight": nn.Parameter(torch.ones(2))}
    with pytest.raises(UserError) as caught:
        group_parameters(named, GroupSettings(text_encoder_lr=0.5))
    assert caught.value.key == "optimizer.text_encoder_lr"
    with pytest.raises(UserError):
        GroupSettings(text_encoder_lr=-1.0)
