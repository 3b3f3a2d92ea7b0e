"""Random numbers as a pure function of integers (splitmix64), inside numba code and out.

Every random decision about data is `draw(key, counter)` for a key made from (seed, epoch, shard,
example …). Nothing has a state, so workers, ranks and restarts cannot change what is drawn.
"""

import numpy as np

from fastelectra.data.jit import njit

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # the odd number nearest 2^64 / golden ratio
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


@njit
def draw(key, counter):
    """The `counter`-th number of the stream `key`: 64 random bits (uint64)."""
    x = np.uint64(key) + (np.uint64(counter) + np.uint64(1)) * _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


@njit
def uniform(key, counter):
    """A float64 in [0, 1) with 24 random bits: exact in float32, where it stays below 1."""
    return np.float64(draw(key, counter) >> np.uint64(40)) * (1.0 / (1 << 24))


@njit
def below(key, counter, bound):
    """An integer in [0, bound), bound at most 2^32."""
    return np.int64(((draw(key, counter) >> np.uint64(32)) * np.uint64(bound)) >> np.uint64(32))


@njit
def permutation(key, count):
    """A random order of 0 … count − 1 (int64 [count], Fisher–Yates)."""
    order = np.arange(count)
    for last in range(count - 1, 0, -1):
        other = below(key, last, last + 1)
        order[last], order[other] = order[other], order[last]
    return order


def key_of(*numbers: int) -> np.uint64:
    """The key of the stream that `numbers` (each in [0, 2^64)) name, in their order."""
    key = np.uint64(0)
    for number in numbers:
        key = np.uint64(draw(key, np.uint64(number)))
    return key
