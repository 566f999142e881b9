"""Keyed random numbers: every draw is a pure function of (seed, purpose, ordinal, index).

A run therefore resumes exactly without any saved generator state. Philox is a counter-based
generator (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). Its key is derived
from (seed, purpose), its counter from (ordinal, index). Draws that differ in any of the four have
no random word in common.
"""

import hashlib

import numpy as np


def philox_key(seed: int, purpose: str) -> np.ndarray:
    """Return the 128-bit key for (seed, purpose), as two uint64 words.

    It is a hash, so that the keys of consecutive seeds are as unrelated as any others.
    """
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=16).digest()
    return np.frombuffer(digest, dtype=np.uint64).copy()


class KeyedRandom:
    """The random numbers of one purpose.

    There is one Philox object, whose counter is set for each draw: that takes half the time of a
    new generator for each sample. The two low words of the counter count the blocks of one draw (up
    to 2^128), the two high words hold (ordinal, index).
    """

    def __init__(self, seed: int, purpose: str) -> None:
        self.seed = seed
        self.purpose = purpose
        self._key = philox_key(seed, purpose)
        self._bits = np.random.Philox(key=self._key)
        self._generator = np.random.Generator(self._bits)

    def at(self, ordinal: int, index: int = 0) -> np.random.Generator:
        """Return the generator at (ordinal, index), both in [0, 2^64).

        It is valid until the next call.
        """
        self._bits.state = {
            "bit_generator": "Philox",
            "state": {
                "counter": np.array([0, 0, ordinal, index], dtype=np.uint64),
                "key": self._key,
            },
            "buffer": np.zeros(4, dtype=np.uint64),
            "buffer_pos": 4,
            "has_uint32": 0,
            "uinteger": 0,
        }
        return self._generator

    def normal(self, ordinal: int, shape: tuple[int, ...], index: int = 0) -> np.ndarray:
        """Return a standard normal float32 array of `shape`."""
        return self.at(ordinal, index).standard_normal(shape, dtype=np.float32)

    def uniform(self, ordinal: int, count: int, index: int = 0) -> np.ndarray:
        """Return `count` uniform float64 numbers in [0, 1)."""
        return self.at(ordinal, index).random(count)

    def __reduce__(self):
        return KeyedRandom, (self.seed, self.purpose)
