"""Channel conditions: the maps of depth, dropout of each apart, guidance over each apart."""

import math
from types import SimpleNamespace

import pytest
import torch
from untrained import make

from sdtrain.assemble.model import build_channels, check_channels
from sdtrain.conditioning.depth import Depth
from sdtrain.conditioning.interface import Inputs
from sdtrain.data.draws import Collate
from sdtrain.diffusion import classifier_free, two_conditions
from sdtrain.diffusion.guidance import CONDITIONED, NOTHING, UNCONDITIONED
from sdtrain.diffusion.noise import Gaussian
from sdtrain.errors import UserError
from sdtrain.schedules.linear import linear
from sdtrain.types import Row

HALF = torch.arange(64.0).view(1, 1, 8, 8) / 64
"""A depth map that rises from pixel to pixel."""


def inputs(depth, size=(4, 4)):
    kept = torch.zeros(len(depth), dtype=torch.bool)
    return Inputs([""] * len(depth), kept.long(), kept, latent_size=size, depth=depth)


def test_a_depth_map_is_scaled_to_its_own_range():
    depth = torch.cat([HALF, 0.2 + 0.1 * HALF, HALF * 0 + 0.3])
    none_dropped = torch.zeros(3, dtype=torch.bool)
    one, scaled, constant = Depth(dropout=0.0)(inputs(depth), none_dropped)
    assert one.shape == (1, 4, 4)
    torch.testing.assert_close(one, scaled, rtol=0, atol=1e-5)
    assert (one.min(), one.max()) == (-1, 1)
    assert (one.diff(dim=2) > 0).all() and (one.diff(dim=1) > 0).all()
    assert (constant == -1).all()


def test_a_dropped_map_is_one_that_no_picture_has():
    condition = Depth(dropout=0.1)
    depth = torch.cat([HALF, HALF])
    maps = condition(inputs(depth), torch.tensor([True, False]))
    assert (maps[0] == 0).all()
    assert maps[1].abs().max() == 1


def test_each_condition_is_dropped_at_its_own_rate_independent_of_the_other():
    """Marginal and joint rates of 4,000 samples within 4 standard errors."""
    count = 4000
    collate = Collate(
        seed=3,
        latent_shape=(1, 1, 1),
        posterior=False,
        stratified=False,
        global_batch=count,
        noise=Gaussian(),
        channels=("depth", "other"),
    )
    row = Row(image=torch.zeros(3, 8, 8), caption="a")
    batch = collate([row] * count, list(range(count)), count)
    text = batch.drop < 0.3
    depth, other = (batch.channel_drop < torch.tensor([0.2, 0.5])).T
    for dropped, rate in (
        (text, 0.3),
        (depth, 0.2),
        (other, 0.5),
        (text & depth, 0.06),
        (depth & other, 0.1),
        (text & other, 0.15),
    ):
        error = math.sqrt(rate * (1 - rate) / count)
        assert abs(dropped.double().mean() - rate) < 4 * error, rate
    alone = Collate(
        seed=3,
        latent_shape=(1, 1, 1),
        posterior=False,
        stratified=False,
        global_batch=count,
        noise=Gaussian(),
        channels=("other",),
    )([row] * 8, list(range(8)), count)
    assert torch.equal(alone.channel_drop[:, 0], batch.channel_drop[:8, 1])
    assert torch.equal(alone.noise, batch.noise[:8])


def test_the_dropout_of_a_model_uses_these_draws():
    model = make("text", {"depth": Depth(dropout=0.5)})
    collate = Collate(
        seed=0,
        latent_shape=(3, 8, 8),
        posterior=False,
        stratified=False,
        global_batch=16,
        noise=Gaussian(),
        channels=tuple(model.channels),
    )
    rows = [Row(image=torch.zeros(3, 8, 8), caption="a", depth=HALF[0])] * 16
    batch = collate(rows, list(range(16)), 16)
    dropped = model.inputs(batch).channels_dropped["depth"]
    assert torch.equal(dropped, batch.channel_drop[:, 0] < 0.5)
    assert 0 < dropped.sum() < 16
    maps = model.condition(model.inputs(batch)).channels
    assert torch.equal((maps == 0).all(dim=(1, 2, 3)), dropped)


def test_each_scale_of_two_conditions_leads_along_one():
    x = torch.zeros(1, 1, 2, 2)
    t = torch.tensor(0.5)
    base, depth_only, all_given = (torch.full_like(x, value) for value in (0.0, 1.0, 3.0))
    denoisers = {
        NOTHING: lambda x, t: base,
        UNCONDITIONED: lambda x, t: depth_only,
        CONDITIONED: lambda x, t: all_given,
    }
    for scale, channel_scale, expected in (
        (1.0, 1.0, 3.0),
        (2.0, 1.0, 5.0),  # only what the caption changes is doubled
        (1.0, 2.0, 4.0),  # only what depth changes is doubled
        (0.0, 1.0, 1.0),
        (1.0, 0.0, 2.0),
        (2.0, 2.0, 6.0),  # guidance over both at once
    ):
        guided = two_conditions(denoisers, scale, linear(), channel_scale=channel_scale)
        assert guided(x, t).unique().tolist() == [expected]
    plain = classifier_free(denoisers, 2.0, linear())
    with_channels = two_conditions(denoisers, 2.0, linear(), channel_scale=1.0)
    assert torch.equal(plain(x, t), with_channels(x, t))
    bounded = two_conditions(denoisers, 2.0, linear(), channel_scale=1.0, max_std=1.0)
    assert torch.isfinite(bounded(torch.randn(1, 1, 2, 2), t)).all()


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError) as refused:
        two_conditions({CONDITIONED: None, UNCONDITIONED: None}, 2.0, linear(), channel_scale=1.0)
    assert refused.value.key == "guidance"
    with pytest.raises(ValueError, match="dropout"):
        Depth(dropout=1.5)


def test_depth_maps_of_data_are_checked():
    image = torch.zeros(3, 8, 8)
    depth = HALF[0]
    check_channels({"depth": Depth(dropout=0.1)}, data_of(Row(image, "", depth=depth)))
    for bad in (None, depth * 3, depth - 1, depth * torch.nan, depth[:, :4]):
        with pytest.raises(UserError):
            check_channels({"depth": Depth(dropout=0.1)}, data_of(Row(image, "", depth=bad)))


def data_of(row):
    """A data set with one row."""
    return SimpleNamespace(split=lambda name: {(0, 0): row})


def test_a_name_that_torch_uses_is_refused():
    node = {"_target_": "sdtrain.conditioning.depth.Depth", "dropout": 0.1}
    assert list(build_channels({"model": {"channels": {"depth": node}}})) == ["depth"]
    with pytest.raises(UserError) as caught:
        build_channels({"model": {"channels": {"items": node}}})
    assert caught.value.key == "model.channels.items"
