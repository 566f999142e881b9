"""Every random number of a training step depends on its sample's ordinal alone, whoever collates it
with whom.
"""

import math

import numpy as np
import pytest
import torch

from sdtrain.data.draws import Collate
from sdtrain.data.order import Stream
from sdtrain.diffusion.noise import Gaussian
from sdtrain.training.datamodule import CollateBlock
from sdtrain.types import Row

SHAPE = (4, 2, 2)


def make(**changed):
    return Collate(
        **{
            "seed": 3,
            "latent_shape": SHAPE,
            "posterior": True,
            "stratified": True,
            "global_batch": 8,
            "noise": Gaussian(),
        }
        | changed
    )


def row(ordinal, depth=False):
    return Row(
        image=torch.full((3, 2, 2), float(ordinal)),
        caption=f"picture {ordinal}",
        label=ordinal % 5,
        depth=torch.ones(1, 2, 2) if depth else None,
    )


def collated(collate, ordinals):
    return collate([row(ordinal) for ordinal in ordinals], list(ordinals), 99)


def draws(batch):
    """Every random number of a batch, by ordinal."""
    return {
        ordinal: torch.cat(
            [
                batch.noise[i].flatten().double(),
                batch.posterior[i].flatten().double(),
                batch.u[i : i + 1],
                batch.drop[i : i + 1],
            ]
        )
        for i, ordinal in enumerate(batch.ordinal.tolist())
    }


@pytest.mark.parametrize("stratified", [True, False])
def test_numbers_depend_on_the_ordinal_alone(stratified):
    whole = draws(collated(make(stratified=stratified), range(64)))
    groupings = {
        "one by one": [[ordinal] for ordinal in range(64)],
        "odd micro-batches": [range(at, min(at + 5, 64)) for at in range(0, 64, 5)],
        "shuffled": torch.randperm(64, generator=torch.Generator().manual_seed(0))
        .reshape(4, 16)
        .tolist(),
        "blocks of two ranks": [
            range(at, at + 4) for rank in range(2) for at in range(4 * rank, 64, 8)
        ],
    }
    for name, groups in groupings.items():
        collate = make(stratified=stratified)
        seen = {}
        for group in groups:
            seen |= draws(collated(collate, group))
        assert seen.keys() == whole.keys()
        assert all(torch.equal(seen[ordinal], whole[ordinal]) for ordinal in whole), name


def test_purposes_and_seeds_share_nothing():
    batch = collated(make(), range(64))
    other = collated(make(seed=4), range(64))
    numbers = [batch.noise, batch.posterior, other.noise, other.posterior]
    assert (
        len(torch.cat([n.flatten() for n in numbers]).unique()) > 0.999 * 4 * 64 * 16
    )  # float32 normals meet by chance now and then
    assert not (batch.u == other.u).any()
    assert not (batch.drop == other.drop).any()


def test_stratified_one_u_in_each_stratum_of_every_global_batch():
    u = collated(make(latent_shape=(1, 1, 1)), range(8 * 400)).u.reshape(400, 8)
    strata = (u * 8).floor().long()
    assert torch.equal(strata.sort(1).values, torch.arange(8).expand(400, 8))
    assert (
        len({tuple(one) for one in strata.tolist()}) > 380
    )  # 400 of 8! = 40320 orders: two of them meet about twice
    jitter = (u * 8 - strata).flatten()
    assert len(jitter.unique()) == 3200
    assert abs(jitter.mean().item() - 0.5) < 4 / math.sqrt(12 * 3200)


def kolmogorov(u):
    """sqrt(n) times the largest distance of the distribution of u from the uniform one: above 1.95
    once in a thousand.
    """
    u = u.sort().values
    steps = torch.arange(len(u) + 1, dtype=torch.float64) / len(u)
    return math.sqrt(len(u)) * max((steps[1:] - u).max().item(), (u - steps[:-1]).max().item())


@pytest.mark.parametrize("place", [0, 1, 7])
def test_stratified_u_is_uniform_at_each_place(place):
    """One place of the global batch over 3000 optimizer steps."""
    u = collated(make(latent_shape=(1, 1, 1)), range(place, 8 * 3000, 8)).u
    assert kolmogorov(u) < 1.95
    centred = u - 0.5
    assert abs((centred[1:] * centred[:-1]).mean().item() * 12) < 4 / math.sqrt(3000)


def test_plain_u_is_uniform_and_not_stratified():
    u = collated(make(stratified=False, latent_shape=(1, 1, 1)), range(8000)).u
    assert u.dtype == torch.float64
    assert kolmogorov(u) < 1.95
    strata = (u.reshape(-1, 8) * 8).floor().sort(1).values
    assert (strata == torch.arange(8)).all(1).float().mean() < 0.02  # 8! / 8^8 = 0.0024


@pytest.mark.parametrize("stratified", [True, False])
def test_caption_drop_has_its_rate_and_is_independent(stratified):
    count = 16000
    collate = make(stratified=stratified, latent_shape=(1, 1, 1), posterior=False)
    batch = collated(collate, range(count))
    for rate in (0.1, 0.5):
        dropped = (batch.drop < rate).double()
        standard_error = math.sqrt(rate * (1 - rate) / count)
        assert abs(dropped.mean().item() - rate) < 4 * standard_error, rate
        other = {f"its neighbour at {lag}": (dropped[lag:], dropped[:-lag]) for lag in (1, 2, 8)}
        other |= {
            "u": (dropped, batch.u),
            "u, the extremes": (dropped, (batch.u - 0.5).abs()),
            "noise": (dropped, batch.noise.flatten().double()),
        }
        for name, (a, b) in other.items():
            assert abs(np.corrcoef(a, b)[0, 1]) < 4 / math.sqrt(len(a)), (rate, name)


def test_a_batch_carries_its_rows():
    batch = make(posterior=False)([row(5, depth=True), row(2, depth=True)], [5, 2], 77)
    assert batch.image.shape == (2, 3, 2, 2)
    assert batch.image[:, 0, 0, 0].tolist() == [5, 2]
    assert batch.caption == ["picture 5", "picture 2"]
    assert batch.label.tolist() == [0, 2]
    assert batch.label.dtype == torch.int64
    assert batch.depth.shape == (2, 1, 2, 2)
    assert batch.noise.shape == (2, *SHAPE)
    assert batch.noise.dtype == torch.float32
    assert batch.posterior is None
    assert batch.ordinal.tolist() == [5, 2]
    assert batch.stream_end == 77
    assert collated(make(), [5]).depth is None


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_rank_knows_where_the_run_stands(world):
    """After micro-batch k all ranks together have seen start + (k + 1) x world x size ordinals, and
    each rank says so.
    """
    for rank in range(world):
        stream = iter(Stream(length=10, seed=0, start=30, size=3, rank=rank, world=world))
        collate = CollateBlock(make(), rank, world)
        ends = [
            collate([(row(ordinal), ordinal) for _, ordinal in next(stream)]).stream_end
            for _ in range(5)
        ]
        assert ends == [30 + (k + 1) * world * 3 for k in range(5)]


def test_rows_may_bring_moments_in_the_place_of_their_picture():
    moments = [torch.full((2, *SHAPE), float(ordinal)) for ordinal in range(2)]
    rows = [Row(image=None, caption="", moments=of_row) for of_row in moments]
    batch = make()(rows, [0, 1], 2)
    assert batch.image is None
    assert torch.equal(batch.moments, torch.stack(moments))
    pictures = collated(make(), [0, 1])
    assert pictures.moments is None
    # They are no draw: those of the same ordinals are the same.
    assert all(torch.equal(draws(batch)[o], draws(pictures)[o]) for o in range(2))


def test_each_micro_batch_of_each_rank_seeds_its_network_anew():
    """32 steps of 8 pictures, on two ranks in two micro-batches each."""
    collate = make()
    found = []
    for start in range(0, 8 * 32, 2):
        seeds = {collated(each, range(start, start + 2)).network_seed for each in (collate, make())}
        assert len(seeds) == 1
        found += seeds
    assert len(set(found)) == 128
    assert all(0 <= seed < 1 << 63 for seed in found)
    assert collated(make(seed=4), range(2)).network_seed not in found
