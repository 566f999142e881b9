"""Keyed draws: the same whatever happened before, and independent of every other key."""

import hashlib
import math
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from sdtrain.randomness import KeyedRandom

# Pairs of keys (seed, purpose, ordinal, index) that differ in one part, by as little as possible.
BASE = (5, "noise", 1000, 0)
NEIGHBOURS = [
    (6, "noise", 1000, 0),
    (0, "noise", 1000, 0),
    (-5, "noise", 1000, 0),
    (5 + 2**32, "noise", 1000, 0),
    (5 + 2**64, "noise", 1000, 0),
    (5, "noisf", 1000, 0),
    (5, "noise ", 1000, 0),
    (5, "", 1000, 0),
    (5, "noise", 1001, 0),
    (5, "noise", 0, 0),
    (5, "noise", 1000 + 2**32, 0),
    (5, "noise", 2**64 - 1, 0),
    (5, "noise", 1000, 1),
    (5, "noise", 1000, 2**32),
    (5, "noise", 1000, 2**64 - 1),
    (5, "noise", 0, 1000),
]


def draw(key, count):
    seed, purpose, ordinal, index = key
    return KeyedRandom(seed, purpose).normal(ordinal, (count,), index)


def test_a_draw_is_a_function_of_its_key_alone():
    keyed = KeyedRandom(5, "noise")
    first = keyed.normal(1000, (3, 5))
    uniform = keyed.uniform(1000, 4, index=7)
    assert first.dtype == np.float32
    assert uniform.dtype == np.float64
    np.random.seed(1)
    # Odd numbers of words and 32-bit draws leave buffers half used: the next draw must not see
    # them.
    for ordinal in (3, 1000, 2**63, 0):
        generator = keyed.at(ordinal, 9)
        generator.integers(7, size=3, dtype=np.uint32)
        generator.random(1, dtype=np.float32)
        generator.standard_normal(1)
        assert np.array_equal(keyed.normal(1000, (3, 5)), first)
        assert np.array_equal(keyed.uniform(1000, 4, index=7), uniform)
    assert np.array_equal(KeyedRandom(5, "noise").normal(1000, (3, 5)), first)
    assert np.array_equal(keyed.normal(1000, (15,)), first.ravel())


def test_the_generator_is_philox_at_the_key():
    """Against a generator that numpy makes anew: key from a hash of seed and purpose, counter (0,
    0, ordinal, index).
    """
    key = np.frombuffer(hashlib.blake2b(b"5/noise", digest_size=16).digest(), dtype=np.uint64)
    keyed = KeyedRandom(5, "noise")
    for ordinal, index in ((0, 0), (1000, 3), (2**64 - 1, 2**40)):
        fresh = np.random.Generator(
            np.random.Philox(key=key, counter=np.array([0, 0, ordinal, index], dtype=np.uint64))
        )
        assert np.array_equal(
            keyed.normal(ordinal, (101,), index), fresh.standard_normal(101, dtype=np.float32)
        )


def test_other_processes_draw_the_same():
    code = (
        "from sdtrain.randomness import KeyedRandom\n"
        "print(KeyedRandom(0, 'noise').uniform(3, 4, 1).tolist())"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": salt},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for salt in ("1", "2")
    ]
    assert outputs == [f"{KeyedRandom(0, 'noise').uniform(3, 4, 1).tolist()}\n"] * 2


@pytest.mark.parametrize("key", NEIGHBOURS)
def test_neighbouring_keys_are_independent(key):
    """No number in common place by place, and no correlation: of 200 000 pairs it has a standard
    error of 1 / sqrt(200 000).
    """
    count = 200_000
    ours = draw(BASE, count).astype(np.float64)
    theirs = draw(key, count).astype(np.float64)
    assert (
        ours == theirs
    ).mean() < 1e-5  # float32 normals fall together by chance about once in 10^7
    assert abs(np.corrcoef(ours, theirs)[0, 1]) < 4 / math.sqrt(count)
    assert abs(np.corrcoef(ours**2, theirs**2)[0, 1]) < 4 / math.sqrt(count)
    for lag in (1, 4):  # nor are they each other's numbers a block of Philox later
        assert abs(np.corrcoef(ours[lag:], theirs[:-lag])[0, 1]) < 4 / math.sqrt(count - lag)


def test_no_random_word_is_shared():
    """10 000 words of each key, all distinct: 64-bit words meet once in 10^8 such tests."""
    words = [
        KeyedRandom(seed, purpose).at(ordinal, index).bit_generator.random_raw(10_000)
        for seed, purpose, ordinal, index in [BASE, *NEIGHBOURS]
    ]
    assert len(np.unique(np.concatenate(words))) == 10_000 * (1 + len(NEIGHBOURS))


def test_draws_of_successive_ordinals_are_independent():
    """The first numbers of ordinal after ordinal, as training takes them, are themselves a white
    sequence.
    """
    keyed = KeyedRandom(0, "noise")
    count = 30_000
    rows = np.stack([keyed.normal(ordinal, (3,)) for ordinal in range(count)]).astype(np.float64)
    for column in rows.T:
        for lag in (1, 2, 8):
            assert abs((column[lag:] * column[:-lag]).mean()) < 4 / math.sqrt(count)
    correlation = np.corrcoef(rows.T)[np.triu_indices(3, 1)]
    assert np.abs(correlation).max() < 4 / math.sqrt(count)


def test_seed_0_is_a_seed():
    assert np.array_equal(
        KeyedRandom(0, "noise").normal(0, (8,)), KeyedRandom(0, "noise").normal(0, (8,))
    )
    for other in (1, 2**32, 2**64):
        assert not (
            KeyedRandom(0, "noise").normal(0, (8,)) == KeyedRandom(other, "noise").normal(0, (8,))
        ).any()


def test_moments_of_normals_and_uniforms():
    """Over 4000 ordinals of 250 numbers. E x, x^2, x^3, x^4 = 0, 1, 0, 3 with variances 1, 2, 15,
    96; uniforms: 1/2 and 1/12.
    """
    keyed = KeyedRandom(7, "noise")
    count = 1_000_000
    x = (
        np.stack([keyed.normal(ordinal, (250,)) for ordinal in range(4000)])
        .astype(np.float64)
        .ravel()
    )
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean() - expected) < 4 * math.sqrt(variance / count)
    u = np.stack([keyed.uniform(ordinal, 250, index=1) for ordinal in range(4000)]).ravel()
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 1 / 2) < 4 * math.sqrt(1 / 12 / count)
    # A histogram of 100 cells: chi-square has mean 99 and standard deviation sqrt(2 x 99).
    cells = np.bincount((u * 100).astype(int), minlength=100)
    assert abs(((cells - count / 100) ** 2 / (count / 100)).sum() - 99) < 4 * math.sqrt(2 * 99)


def test_pickles_to_the_same_numbers():
    keyed = KeyedRandom(5, "noise")
    keyed.normal(1, (3,))
    copy = pickle.loads(pickle.dumps(keyed))
    assert np.array_equal(copy.normal(1000, (9,), 2), KeyedRandom(5, "noise").normal(1000, (9,), 2))
