"""The order of pictures: an endless stream of ordinals, each epoch a keyed permutation.

The permutation is never written down: a Feistel network is a bijection on [0, 4^k), and walking its
cycles until one falls below N makes it one on [0, N) (Black and Rogaway 2002, "Ciphers with
arbitrary finite domains"). So 10^9 pictures cost what 10^3 cost, and resuming needs only the
ordinal.
"""

import hashlib
from collections.abc import Iterator

from torch.utils.data import Sampler

ROUNDS = 6


def permute(place: int, size: int, seed: int, epoch: int) -> int:
    """Where the keyed permutation of [0, size) for (seed, epoch) sends `place`."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    key = hashlib.blake2b(f"{seed}/order/{epoch}".encode(), digest_size=32).digest()
    while True:  # at most 4 turns on average: 4^half < 4 size, or 4 where size is 1
        left = place >> half
        right = place & mask
        for number in range(ROUNDS):
            digest = hashlib.blake2b(
                right.to_bytes(8, "little") + bytes([number]), digest_size=8, key=key
            ).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        place = (left << half) | right
        if place < size:
            return place


class Stream(Sampler[list[tuple[int, int]]]):
    """Micro-batches of (index, ordinal), without end and always full, across epoch ends.

    Each global micro-batch of world * size ordinals is cut into contiguous blocks, one per rank. It
    has no length: so Lightning neither skips batches after a resume nor cuts an accumulation window
    short.

    Args:
        length: pictures of the split.
        seed: of the run.
        start: the ordinal to begin with.
        size: pictures of one rank's micro-batch.
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
        """Which picture stands at this ordinal."""
        epoch, place = divmod(ordinal, self.length)
        return permute(place, self.length, self.seed, epoch)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        at = self.start + self.rank * self.size
        while True:
            yield [(self.index(ordinal), ordinal) for ordinal in range(at, at + self.size)]
            at += self.world * self.size
