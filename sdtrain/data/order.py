"""Order the training pictures: an endless stream of ordinals, each pass a keyed permutation.

The permutation is computed, not stored: a Feistel network is a bijection on [0, 4^k), and applying
it repeatedly until the value falls below N ("cycle walking") gives one on [0, N) (Black and Rogaway
2002, "Ciphers with arbitrary finite domains"). So 10^9 pictures cost as much as 10^3, and a resume
needs only the ordinal.
"""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from sdtrain.randomness import KeyedRandom

ROUNDS = 6


def permute(place: int, size: int, seed: int | str, epoch: int) -> int:
    """Return the image of `place` under the permutation of [0, size) keyed by (seed, epoch)."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    key = hashlib.blake2b(f"{seed}/order/{epoch}".encode(), digest_size=32).digest()
    while True:  # at most 4 iterations on average: 4^half < 4 size, or 4 if size is 1
        left = place >> half
        right = place & mask
        for round_number in range(ROUNDS):
            digest = hashlib.blake2b(
                right.to_bytes(8, "little") + bytes([round_number]), digest_size=8, key=key
            ).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        place = (left << half) | right
        if place < size:
            return place


class Visits:
    """Says which picture is visited at each place of each pass over the pictures.

    Without weights, or if all are equal, a pass visits each picture once. Whole numbers are counts
    of visits. Other weights are scaled so that their sum is a whole number, and at least the number
    of pictures with a weight above 0; a pass then visits a picture of weight w either floor(w) or
    ceil(w) times, and w times on average.

    The places of a pass are permuted, then mapped by systematic sampling (Madow 1949, "On the
    theory of systematic sampling"): place k reads the picture whose share of the cumulated weights
    contains (k + u) total / count, with one uniform u for each pass.

    Args:
        length: number of pictures.
        seed: of the run.
        weights: one for each picture, at least 0, not all 0; None if they are equal.
        part: number of the part of a data set, whose order is independent of that of other parts;
            None for a whole one.
    """

    def __init__(
        self,
        *,
        length: int,
        seed: int,
        weights: Sequence[float] | np.ndarray | None = None,
        part: int | None = None,
    ) -> None:
        self.count = length
        """Number of visits in a pass."""
        self._key = seed if part is None else f"{seed}/{part}"
        self._ends = None
        if weights is None:
            return
        weights = np.asarray(weights, np.float64)
        if (weights == weights[0]).all():
            return
        self._ends = weights.cumsum()
        self._last = int(weights.nonzero()[0][-1])
        self.count = max(round(float(self._ends[-1])), int(np.count_nonzero(weights)))
        self._width = self._ends[-1] / self.count
        self._offset = KeyedRandom(seed, "visits" if part is None else f"visits/{part}")

    def index(self, place: int, epoch: int) -> int:
        """Return the index of the picture that pass `epoch` visits at `place`, in [0, count)."""
        place = permute(place, self.count, self._key, epoch)
        if self._ends is None:
            return place
        point = (place + self._offset.uniform(epoch, 1)[0]) * self._width
        # The last one, because rounding may yield the end of the whole.
        return min(int(self._ends.searchsorted(point, side="right")), self._last)


class Stream(Sampler[list[tuple[int, int]]]):
    """Yields micro-batches of (index, ordinal), without end and always full, across epoch ends.

    Each global micro-batch of world * size ordinals is cut into contiguous blocks, one per rank.
    The sampler has no length, so that Lightning neither skips batches after a resume nor cuts an
    accumulation window short.

    Args:
        length: number of pictures in the split.
        seed: of the run.
        start: the first ordinal.
        size: number of pictures in a micro-batch of one rank.
        rank, world: this rank, and the number of ranks.
        weights: how often each picture is visited, see `Visits`.
        prior: the visits of further pictures, whose indices follow those of the split; every second
            ordinal is one of theirs. None: there are none.
    """

    def __init__(
        self,
        *,
        length: int,
        seed: int,
        start: int,
        size: int,
        rank: int,
        world: int,
        weights: Sequence[float] | np.ndarray | None = None,
        prior: Visits | None = None,
    ) -> None:
        self.visits = Visits(length=length, seed=seed, weights=weights)
        self.length = length
        self.prior = prior
        self.start = start
        self.size = size
        self.rank = rank
        self.world = world

    def index(self, ordinal: int) -> int:
        """Return the index of the picture at this ordinal, counted from the start of training."""
        if self.prior is None:
            epoch, place = divmod(ordinal, self.visits.count)
            return self.visits.index(place, epoch)
        turn, is_prior = divmod(ordinal, 2)
        visits = self.prior if is_prior else self.visits
        epoch, place = divmod(turn, visits.count)
        index = visits.index(place, epoch)
        return self.length + index if is_prior else index

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first = self.start + self.rank * self.size
        while True:
            yield [(self.index(ordinal), ordinal) for ordinal in range(first, first + self.size)]
            first += self.world * self.size
