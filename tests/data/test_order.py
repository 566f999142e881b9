"""The order of pictures: a permutation for every epoch, and a stream that ranks cut into blocks
without gap or overlap.
"""

import math
import time
import tracemalloc
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from sdtrain.data.order import Stream, Visits, permute

SIZES = [1, 2, 3, 7, 64, 1000]


def order(size, seed=0, epoch=0):
    return [permute(place, size, seed, epoch) for place in range(size)]


@pytest.mark.parametrize("size", [*SIZES, 4, 5, 16, 17, 255, 256, 257])
@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (0, 1), (3, -1), (2**40, 10**6)])
def test_bijection(size, seed, epoch):
    assert sorted(order(size, seed, epoch)) == list(range(size))


def test_every_epoch_and_seed_has_its_own_order():
    orders = [order(64, seed, epoch) for seed in (0, 1, 10, 2**32) for epoch in (0, 1, -1, 11)]
    assert len({tuple(one) for one in orders}) == len(orders)
    assert order(64, 5, 2) == order(64, 5, 2)
    # Two random orders agree in one place on average; 120 pairs in 120, with a standard deviation
    # of sqrt(120).
    agreements = sum(
        a == b
        for i, one in enumerate(orders)
        for other in orders[:i]
        for a, b in zip(one, other, strict=True)
    )
    assert abs(agreements - 120) < 4 * math.sqrt(120)


def chi_square(counts, cells, draws):
    return sum((counts[cell] - draws / cells) ** 2 for cell in range(cells)) / (draws / cells)


@pytest.mark.parametrize("size", [3, 7, 64])
@pytest.mark.parametrize("place", [0, 2])
def test_a_place_lands_everywhere_equally_often(size, place):
    """Over 6400 epochs. Chi-square of k cells has mean k - 1 and variance 2 (k - 1)."""
    counts = Counter(permute(place, size, 1, epoch) for epoch in range(6400))
    assert abs(chi_square(counts, size, 6400) - (size - 1)) < 4 * math.sqrt(2 * (size - 1))


def test_neighbours_are_scattered():
    """Where places 0 and 1 land together, on a coarse board of 8 x 8: 64 cells, over 6400 epochs of
    1000 places.
    """
    cells = Counter(
        permute(0, 1000, 1, epoch) // 125 * 8 + permute(1, 1000, 1, epoch) // 125
        for epoch in range(6400)
    )
    assert abs(chi_square(cells, 64, 6400) - 63) < 4 * math.sqrt(
        2 * 63
    )  # the two never land on one place: a bias of 1e-3, unseen here


def test_within_one_epoch_it_looks_shuffled():
    """The correlation of place and image over one epoch of 1000 has a standard error of 1 /
    sqrt(999).
    """
    for epoch in range(10):
        image = order(1000, 0, epoch)
        covariance = sum((place - 499.5) * (at - 499.5) for place, at in enumerate(image)) / 1000
        assert abs(covariance / ((1000**2 - 1) / 12)) < 4 / math.sqrt(999)
        rises = sum(
            a < b for a, b in zip(image, image[1:], strict=False)
        )  # mean 499.5, variance 1001 / 12
        assert abs(rises - 499.5) < 4 * math.sqrt(1001 / 12)


def test_a_billion_costs_what_a_thousand_costs():
    """2000 places of 10^9: no array (a list of a billion would be gigabytes) and far below a second
    of processor time.
    """
    tracemalloc.start()
    began = time.process_time()
    images = [permute(place, 10**9, 0, 0) for place in range(2000)]
    spent, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert spent < 2
    assert peak < 2**20
    assert len(set(images)) == 2000
    assert (
        0 <= min(images) < 10**7 < 10**9 - 10**7 < max(images) < 10**9
    )  # 2000 uniform draws miss a hundredth once in 10^8


def blocks(count, **arguments):
    return list(
        islice(
            iter(
                Stream(
                    **{"length": 10, "seed": 0, "start": 0, "size": 4, "rank": 0, "world": 1}
                    | arguments
                )
            ),
            count,
        )
    )


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("start", [0, 5, 23])
def test_blocks_of_the_ranks_tile_the_stream(world, start):
    """Length 10 and micro-batches of 3 x world: epoch ends fall inside them. Each ordinal occurs
    once, in order, and each block is full.
    """
    ranks = [blocks(20, start=start, size=3, rank=rank, world=world) for rank in range(world)]
    assert all(len(block) == 3 for rank in ranks for block in rank)
    stream = [
        item for micro_batch in zip(*ranks, strict=True) for block in micro_batch for item in block
    ]
    assert [ordinal for _, ordinal in stream] == list(range(start, start + 60 * world))
    one = [item for block in blocks(60 * world, start=start, size=1) for item in block]
    assert stream == one


def test_every_epoch_shows_every_picture_once():
    items = [item for block in blocks(40, length=7) for item in block]
    epochs = [
        [index for index, ordinal in items if ordinal // 7 == epoch] for epoch in range(160 // 7)
    ]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 20
    assert [item for block in blocks(40, length=7, seed=1) for item in block] != items


def test_starting_at_an_ordinal_is_skipping_to_it():
    whole = blocks(30, length=11)
    assert blocks(12, length=11, start=18 * 4) == whole[18:]
    assert blocks(6, length=11, start=18 * 4, rank=1, world=2) == whole[19::2]


def test_it_has_no_length():
    with pytest.raises(TypeError):
        len(Stream(length=10, seed=0, start=0, size=4, rank=0, world=1))


def counts_of(weights, epochs=1, **options):
    """How often each picture is visited in each of the first passes, [epochs, N]."""
    visits = Visits(length=len(weights), seed=5, weights=weights, **options)
    counts = np.zeros((epochs, len(weights)), int)
    for epoch in range(epochs):
        for place in range(visits.count):
            counts[epoch, visits.index(place, epoch)] += 1
    return counts


def test_whole_weights_are_counts_of_visits():
    for weights in ([1, 2, 3], [0, 5, 0, 1, 1, 0], [1, 0], [1000, 1], [2.0, 2.0]):
        expected = weights if len(set(weights)) > 1 else [1] * len(weights)
        for counts in counts_of(weights, 20):
            assert counts.tolist() == expected, weights


def test_other_weights_are_mean_visits():
    """Or in proportion to them. Each pass rounds them up or down."""
    passes = 400
    for weights in (
        [0.5, 1.25, 2.25],
        [1.7, 0.1, 0.0, 2.2],
        [0.7, 0.2, 0.1],
        [0.003, 0.001, 0.008],
    ):
        counts = counts_of(weights, passes)
        share = np.array(weights) / sum(weights)
        mean = share * counts.sum() / passes
        assert (counts >= np.floor(mean)).all() and (counts <= np.ceil(mean)).all(), weights
        # A count is one of two neighbours: its standard deviation is at most 1/2.
        assert abs(counts.mean(0) - mean).max() < 4 * 0.5 / math.sqrt(passes), weights
        assert (counts[:, share == 0] == 0).all()


def test_equal_weights_change_nothing_and_parts_have_their_own_order():
    plain = blocks(30, length=7)
    assert blocks(30, length=7, weights=[3.0] * 7) == plain
    orders = set()
    for part in (None, 0, 1):
        visits = Visits(length=50, seed=0, part=part)
        orders.add(tuple(visits.index(place, 0) for place in range(50)))
    assert len(orders) == 3


def test_a_weighted_stream_resumes_and_is_cut_by_ranks():
    weights = [1.0, 2.5, 0.0, 4.0]
    whole = blocks(30, length=4, weights=weights)
    assert all(index != 2 for block in whole for index, _ in block)
    assert blocks(12, length=4, weights=weights, start=18 * 4) == whole[18:]
    assert blocks(6, length=4, weights=weights, start=18 * 4, rank=1, world=2) == whole[19::2]
