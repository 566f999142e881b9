"""Keyed random numbers: every draw is a pure function of (seed, purpose, ordinal, index).

So nothing has to be saved to resume. Philox is a counter-based generator (Salmon et al. 2011,
"Parallel random numbers: as easy as 1, 2, 3"): its key is made of (seed, purpose), its counter of
(ordinal, index). Two draws that differ in any of the four share no random word.
"""

import hashlib

import numpy as np


def philox_key(seed: int, purpose: str) -> np.ndarray:
    """128-bit key for (seed, purpose): two uint64 words.

    Hashed, so that neighbouring seeds are as far apart as any others.
    """
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=16).digest()
    return np.frombuffer(digest, dtype=np.uint64).copy()


class KeyedRandom:
    """The random numbers of one purpose.

    One Philox object whose counter is set anew for each draw: half the price of a new generator per
    sample. The two low words of the counter belong to the draw itself (2^128 blocks), the two high
    ones to (index, ordinal).
    """

    def __init__(self, seed: int, purpose: str) -> None:
        self.seed = seed
        self.purpose = purpose
        self._key = philox_key(seed, purpose)
        self._bits = np.random.Philox(key=self._key)
        self._generator = np.random.Generator(self._bits)

    def at(self, ordinal: int, index: int = 0) -> np.random.Generator:
        """The generator at (ordinal, index), both in [0, 2^64). Valid until the next call."""
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
        """Standard normal float32 array of `shape`."""
        return self.at(ordinal, index).standard_normal(shape, dtype=np.float32)

    def uniform(self, ordinal: int, count: int, index: int = 0) -> np.ndarray:
        """`count` uniforms in [0, 1), float64."""
        return self.at(ordinal, index).random(count)

    def __reduce__(self):
        return KeyedRandom, (self.seed, self.purpose)
