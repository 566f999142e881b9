"""Order the training pictures in batches that each come from one bucket.

The stream is endless, its batches are full, and each is a function of its number, so that a resume
needs only that number. Beside the members of each bucket nothing is stored, and to find the bucket
of a batch takes 0.3 ms with 9 buckets of 10^8 pictures together.

A pass over the data makes n_b visits to pictures of bucket b. A round has sum(n) batches, n_b of
them from bucket b, so it is as long as batch_size passes. The batches are spread by their due
times: the j-th batch of bucket b is due at (2j + 1) / (2 n_b) of the round, and the batches of all
buckets follow each other in the order of these times. So, after any number of batches, there is
one time at which each bucket is within half a batch of its due.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from sdtrain.data.buckets import Buckets
from sdtrain.data.order import Visits


def place_in_round(bucket: int, batch: int, counts: Sequence[int]) -> int:
    """Return the place, in its round, of a bucket's batch: how many batches come before it.

    Args:
        bucket: its number.
        batch: in [0, counts[bucket]), among those of its bucket in the round.
        counts: n_b, the visits of each bucket in a pass over the data, each at least 1.

    Exact, in integers of any size. Two batches that are due at the same time follow each other in
    the order of their buckets. Takes O(len(counts)) steps.
    """
    own = counts[bucket]
    before = 0
    for other, count in enumerate(counts):
        # Batch i of the other bucket is due earlier if
        # (2i + 1) / (2 count) < (2 batch + 1) / (2 own), that is i < late / (2 own).
        late = (2 * batch + 1) * count - own
        if other < bucket:
            before += late // (2 * own) + 1  # the number of i <= late / (2 own)
        else:
            before -= -late // (2 * own)  # the number of i < late / (2 own), rounded up
    return before


def bucket_of_batch(number: int, counts: Sequence[int]) -> tuple[int, int]:
    """Return the bucket of a batch, and how many batches of that bucket came before it.

    Args:
        number: of the batch, from 0, in the endless stream.
        counts: n_b, as in `place_in_round`.

    The place of a bucket's batches rises with their number, so that each bucket is searched by
    bisection: O(len(counts)^2 log(max(counts))) steps.
    """
    completed_rounds, place = divmod(number, sum(counts))
    for bucket, count in enumerate(counts):

        def place_of(batch: int, bucket: int = bucket) -> int:
            return place_in_round(bucket, batch, counts)

        batch = bisect_left(range(count), place, key=place_of)
        if batch < count and place_of(batch) == place:
            return bucket, completed_rounds * count + batch
    raise AssertionError(f"no bucket has batch {number} of {counts}")


class BucketStream(Sampler[list[tuple[int, int]]]):
    """Yields micro-batches of (index, ordinal) as `order.Stream` does, each global batch of one
    bucket. The passes over each bucket have orders of their own, see `Visits`.

    Args:
        buckets: of the pictures.
        seed: of the run.
        batch_size: pictures of one optimizer step, over all ranks and micro-batches.
        start: the first ordinal, a multiple of batch_size.
        size: number of pictures in a micro-batch of one rank; world * size divides batch_size.
        rank, world: this rank, and the number of ranks.
        weights: how often each picture is visited, see `Visits`.
    """

    def __init__(
        self,
        *,
        buckets: Buckets,
        seed: int,
        batch_size: int,
        start: int,
        size: int,
        rank: int,
        world: int,
        weights: Sequence[float] | np.ndarray | None = None,
    ) -> None:
        self.counts = buckets.visits
        self.members = buckets.members()
        self.visits = []
        for part, members in enumerate(self.members):
            own_weights = None if weights is None else np.asarray(weights)[members]
            visits = Visits(length=len(members), seed=seed, weights=own_weights, part=part)
            self.visits.append(visits)
        self.batch_size = batch_size
        self.start = start
        self.size = size
        self.rank = rank
        self.world = world

    def indices(self, batch: int, first: int, size: int) -> list[int]:
        """Return the indices of `size` pictures of a global batch, from its `first` one on."""
        bucket, earlier = bucket_of_batch(batch, self.counts)
        visits = self.visits[bucket]
        members = self.members[bucket]
        begin = earlier * self.batch_size + first
        indices = []
        for visit in range(begin, begin + size):
            epoch, place = divmod(visit, visits.count)
            indices.append(int(members[visits.index(place, epoch)]))
        return indices

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        ordinal = self.start + self.rank * self.size
        while True:
            batch, first = divmod(ordinal, self.batch_size)
            indices = self.indices(batch, first, self.size)
            yield list(zip(indices, range(ordinal, ordinal + self.size), strict=True))
            ordinal += self.world * self.size
