"""Order the training pictures: an endless stream of ordinals, each epoch a keyed permutation.

The permutation is computed, not stored: a Feistel network is a bijection on [0, 4^k), and applying
it repeatedly until the value falls below N ("cycle walking") gives one on [0, N) (Black and Rogaway
2002, "Ciphers with arbitrary finite domains"). So 10^9 pictures cost as much as 10^3, and a resume
needs only the ordinal.
"""

import hashlib
from collections.abc import Iterator

from torch.utils.data import Sampler

ROUNDS = 6


def permute(place: int, size: int, seed: int, epoch: int) -> int:
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
    """

    def __init__(
        self, *, length: int, seed: int, start: int, size: int, rank: int, world: int
    ) -> None:
        self.length = length
        self.seed = seed
        self.start = start
        self.size = size
        self.rank = rank
        self.world = world

    def index(self, ordinal: int) -> int:
        """Return the index of the picture at this ordinal."""
        epoch, place = divmod(ordinal, self.length)
        return permute(place, self.length, self.seed, epoch)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first = self.start + self.rank * self.size
        while True:
            yield [(self.index(ordinal), ordinal) for ordinal in range(first, first + self.size)]
            first += self.world * self.size
