"""Aspect-ratio buckets: their sizes, which picture gets which, and batches that are each of one
bucket.
"""

import math
import time
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from sdtrain.data.bucket_order import BucketStream, bucket_of_batch, place_in_round
from sdtrain.data.buckets import (
    Buckets,
    bucket_chooser,
    bucket_sizes,
    default_step,
    make_buckets,
)
from sdtrain.errors import UserError


@pytest.mark.parametrize(
    ("side", "step", "ratio"), [(512, 64, 2), (32, 8, 2), (32, 4, 3), (96, 8, 2.5), (64, 64, 4)]
)
def test_sizes_are_near_the_square_in_area_and_every_shape_has_its_twin(side, step, ratio):
    sizes = bucket_sizes(side, step, ratio)
    assert len(set(sizes)) == len(sizes)
    assert {(height, width) for width, height in sizes} == set(sizes)
    shapes = [width / height for width, height in sizes]
    assert shapes == sorted(shapes)
    for width, height in sizes:
        assert width % step == height % step == 0
        assert max(width, height) <= ratio * min(width, height)
        assert 0.8 * side**2 <= width * height <= 1.2 * side**2


def test_sizes_by_hand():
    assert bucket_sizes(32, 8, 2) == [(24, 48), (24, 40), (32, 32), (40, 24), (48, 24)]
    assert bucket_sizes(512, 64, 1.5) == [(448, 576), (512, 512), (576, 448)]
    assert bucket_sizes(32, 8, 1) == [(32, 32)]
    assert bucket_sizes(64, 64, 9) == [(64, 64)]
    assert bucket_sizes(16, 8, 1e12) == [(8, 32), (16, 16), (32, 8)]


def test_a_step_leaves_several_shapes_and_fits_the_model():
    # Picture, autoencoder's and UNet's downsampling: of Stable Diffusion, of the default model.
    expected = {
        (512, 8, 8): 64,
        (768, 8, 8): 64,
        (128, 8, 8): 32,
        (32, 4, 2): 8,
        (64, 4, 2): 8,
        (256, 4, 2): 32,
        (32, 1, 1): 4,
        # No larger multiples of 4 and 8 divide these sides.
        (100, 4, 1): 4,
        (100, 4, 2): 4,
        (200, 4, 2): 8,
        (1000, 8, 8): 40,
    }
    for (side, downsampling, unet), step in expected.items():
        assert default_step(side, downsampling, unet) == step
        assert side % step == 0
        assert len(bucket_sizes(side, step, 2.0)) >= 5


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("data.bucket_step", {"step": 0}),
        ("data.bucket_step", {"step": 33}),
        ("data.bucket_step", {"step": 32}),  # a square only
        ("data.bucket_step", {"step": 12}),  # no multiple is 32
        ("data.bucket_max_ratio", {"max_ratio": 0.5}),
        ("data.bucket_max_ratio", {"max_ratio": math.inf}),
        ("data.bucket_max_ratio", {"max_ratio": math.nan}),
    ],
)
def test_options_without_buckets_are_refused(key, values):
    options = {"buckets": True, "image_size": 32, "step": 8, "max_ratio": 2.0, "batch_size": 4}
    assert bucket_chooser(**options | {"buckets": False} | values) is None
    with pytest.raises(UserError) as refused:
        bucket_chooser(**options | values)
    assert refused.value.key == key


def test_a_picture_gets_the_nearest_shape_and_what_is_lost_is_told():
    sizes = [(24, 48), (32, 32), (48, 24)]
    # As a number of halvings: -1, 0, 1; the border lies at half a halving.
    pictures = [(100, 200), (100, 142), (100, 140), (50, 50), (140, 100), (142, 100), (900, 100)]
    made = make_buckets(pictures, sizes, weights=None, batch_size=1)
    assert made.bucket_of.tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert made.visits == (2, 3, 2)
    assert [made.size_of(index) for index in (0, 3, 6)] == sizes
    kept = [1, 142 / 200, 100 / 140, 1, 100 / 140, 142 / 200, 2 / 9]
    squares = [1 / 2, 100 / 142, 100 / 140, 1, 100 / 140, 100 / 142, 1 / 9]
    assert f"{1 - np.mean(kept):.1%} of the pixels" in made.note
    assert f"{1 - np.mean(squares):.1%} with squares" in made.note
    assert "joined" not in made.note


def test_a_bucket_smaller_than_a_batch_joins_the_nearest_and_is_counted():
    sizes = [(24, 48), (24, 40), (32, 32), (40, 24), (48, 24)]
    pictures = [(24, 48)] * 3 + [(24, 40)] * 8 + [(32, 32)] * 20 + [(40, 24)] * 5 + [(48, 24)] * 4
    made = make_buckets(pictures, sizes, weights=None, batch_size=8)
    # The 3 go to the 8; then of 5 and 4, neighbours, the 4 go to the 5.
    assert made.sizes == ((24, 40), (32, 32), (40, 24))
    assert made.visits == (11, 20, 9)
    assert "7 of 40 pictures" in made.note
    alone = make_buckets(pictures[:3], sizes, weights=None, batch_size=8)
    assert (len(alone.sizes), alone.visits) == (1, (3,))


def test_weights_take_the_place_of_the_number_of_pictures():
    sizes = [(24, 48), (32, 32), (48, 24)]
    pictures = [(24, 48)] * 4 + [(32, 32)] * 6 + [(48, 24)] * 4
    weights = [3] * 4 + [1] * 6 + [0] * 4
    made = make_buckets(pictures, sizes, weights=weights, batch_size=6)
    assert made.sizes == ((24, 48), (32, 32))
    assert made.visits == (12, 6)
    # A pass has as many visits as pictures at least: the weights are scaled up.
    small = make_buckets(pictures, sizes, weights=[w / 10 for w in weights], batch_size=3)
    assert small.visits == (7, 3)
    assert make_buckets(pictures, sizes, weights=[2.0] * 14, batch_size=1).visits == (4, 6, 4)


# The order


def random_counts(generator) -> list[int]:
    return generator.integers(1, 60, generator.integers(1, 9)).tolist()


def test_each_batch_of_a_round_is_one_of_one_bucket():
    generator = np.random.default_rng(0)
    for counts in ([1], [5], [1, 1, 1], [3, 3], [1, 100], *map(random_counts, [generator] * 30)):
        total = sum(counts)
        found = [bucket_of_batch(number, counts) for number in range(total)]
        assert len(set(found)) == total
        assert Counter(bucket for bucket, _ in found) == Counter(dict(enumerate(counts)))
        for number, (bucket, batch) in enumerate(found):
            assert place_in_round(bucket, batch, counts) == number
        # The next round goes on counting.
        later = [bucket_of_batch(3 * total + number, counts) for number in range(total)]
        assert later == [(bucket, 3 * counts[bucket] + batch) for bucket, batch in found]


def test_each_bucket_stays_within_half_a_batch_of_its_due():
    """After any number of batches there is a time at which every bucket's due is within half a
    batch of what it had: the intervals of those times overlap.
    """
    generator = np.random.default_rng(1)
    for _ in range(200):
        counts = random_counts(generator)
        had = [0] * len(counts)
        for number in range(sum(counts)):
            bucket, batch = bucket_of_batch(number, counts)
            assert batch == had[bucket]
            had[bucket] += 1
            earliest = max((h - 0.5) / n for h, n in zip(had, counts, strict=True))
            latest = min((h + 0.5) / n for h, n in zip(had, counts, strict=True))
            assert earliest <= latest + 1e-12


def stream(made: Buckets, batch_size=12, world=1, rank=0, start=0, accumulate=1, **more):
    size = batch_size // world // accumulate
    return BucketStream(
        buckets=made,
        seed=0,
        batch_size=batch_size,
        start=start,
        size=size,
        rank=rank,
        world=world,
        **more,
    )


@pytest.fixture(scope="module")
def made() -> Buckets:
    """Of 1,000 pictures of many shapes."""
    generator = np.random.default_rng(2)
    shapes = np.exp(generator.normal(0, 0.5, 1000))
    pictures = np.stack([1000 * np.sqrt(shapes), 1000 / np.sqrt(shapes)], axis=1).round()
    return make_buckets(pictures, bucket_sizes(64, 8, 3.0), weights=None, batch_size=12)


@pytest.mark.parametrize("world", [1, 2])
def test_three_passes_over_a_thousand_pictures(made, world):
    """Each picture is seen three times, give or take the one pass that its bucket is in the middle
    of; each batch is full, of one bucket, and shows no picture twice but across the end of a pass.
    """
    batches = 3 * 1000 // 12
    ranks = [islice(stream(made, world=world, rank=rank), batches) for rank in range(world)]
    seen = Counter()
    orders = {}
    for number, blocks in enumerate(zip(*ranks, strict=True)):
        items = [item for block in blocks for item in block]
        assert [ordinal for _, ordinal in items] == list(range(12 * number, 12 * number + 12))
        indices = [index for index, _ in items]
        (bucket,) = {int(made.bucket_of[index]) for index in indices}
        seen.update(indices)
        orders.setdefault(bucket, []).extend(indices)
    assert len(orders) == len(made.sizes) >= 9
    assert set(seen) == set(range(1000))
    assert set(seen.values()) <= {2, 3, 4}
    for bucket, indices in orders.items():
        members = np.flatnonzero(made.bucket_of == bucket).tolist()
        passes = [indices[at : at + len(members)] for at in range(0, len(indices), len(members))]
        for one in passes[:2]:
            assert sorted(one) == members
        assert passes[0] != passes[1]


def test_a_whole_round_shows_each_picture_as_often_as_a_batch_has_pictures():
    made = Buckets(((1, 2), (1, 1), (2, 1)), np.array([0] * 5 + [1] * 8 + [2] * 3), (5, 8, 3))
    seen = Counter()
    for block in islice(stream(made, batch_size=4), 16):
        seen.update(index for index, _ in block)
    assert seen == Counter(dict.fromkeys(range(16), 4))


def test_ranks_micro_batches_and_resumes_give_the_same_stream(made):
    whole = [item for block in islice(stream(made), 90) for item in block]
    for world, accumulate in ((2, 1), (4, 1), (2, 3), (1, 6)):
        streams = []
        for rank in range(world):
            one = stream(made, world=world, rank=rank, accumulate=accumulate)
            streams.append(islice(one, 90 * accumulate))
        again = []
        for blocks in zip(*streams, strict=True):
            again += [item for block in blocks for item in block]
        assert again == whole
    for start in (12, 12 * 41):
        resumed = islice(stream(made, start=start), 90 - start // 12)
        assert [item for block in resumed for item in block] == whole[start:]


def test_weights_are_kept_within_a_bucket_and_between_buckets():
    pictures = [(24, 48)] * 10 + [(32, 32)] * 10
    weights = [1.0] * 5 + [3.0] * 5 + [1.0] * 10
    sizes = [(24, 48), (32, 32)]
    made = make_buckets(pictures, sizes, weights=weights, batch_size=6)
    seen = Counter()
    for block in islice(stream(made, batch_size=6, weights=weights), sum(made.visits)):
        seen.update(index for index, _ in block)
    assert seen == Counter({index: 6 * int(weight) for index, weight in enumerate(weights)})


def test_a_hundred_million_pictures_cost_what_a_thousand_cost():
    counts = [10**8 // 20 + 7 * bucket for bucket in range(20)]
    began = time.process_time()
    found = [bucket_of_batch(number, counts) for number in range(10**7, 10**7 + 50)]
    assert time.process_time() - began < 1
    assert len(set(found)) == 50
