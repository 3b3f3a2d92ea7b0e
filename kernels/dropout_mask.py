"""What dropout drops: a random 32-bit number for each element, from a seed and the element's place.

Philox 4x32-7 (Salmon et al. 2011) makes four numbers by 14 products of 64 bits; here it is five of
32. A counter goes through two rounds of xor-shift and multiply (as SplitMix, Steele et al. 2014),
keyed in each, and is shared by four elements whose places differ in two bits; the last product is
by a factor of each one's own. Backward draws again what forward drew, and a CPU draws what a GPU
draws. Seeds are random themselves: 63 bits of torch's generator.
"""

import numpy as np

from .cpu import loop
from .language import jit, tl

_GOLDEN = 0x9E3779B1  # odd, near 2^32 / φ: the step from counter to counter
_ROUND = 0x85EBCA6B  # the factor of the first round
_FACTORS = _A, _B, _C, _D = 0xC2B2AE35, 0x27D4EB2F, 0x165667B1, 0xD3A2646D  # of the four
GOLDEN, ROUND, FACTORS = (tl.constexpr(value) for value in (_GOLDEN, _ROUND, _FACTORS))


def threshold(p: float) -> int:
    """Numbers below it are dropped, for a dropped share p."""
    return int(p * 2**32)


def scale(p: float) -> float:
    """What is kept is multiplied by it, so that the mean stays."""
    return 2**32 / (2**32 - threshold(p))


def dropping(p: float) -> tuple[np.uint32, np.float32]:
    """Threshold and scale as compiled loops take them."""
    return np.uint32(threshold(p)), np.float32(scale(p))


@jit
def _spread(x):
    """uint32 → uint32, most bits of which depend on all of x (as in Appleby's MurmurHash3).

    The product comes last: an exclusive or of keys would be taken apart, for every element.
    """
    x = (x ^ (x >> 16)) * ROUND
    x = (x ^ (x >> 13)) * FACTORS[0]
    return (x ^ (x >> 16)) * GOLDEN


@jit
def keys(seed_ptr, stream):
    """Start of the counters, and the keys of the two rounds, of a seed and a stream of numbers."""
    seed = tl.load(seed_ptr)
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    start = _spread(low + (tl.full([], 0, tl.uint32) + stream) * GOLDEN)
    first_key = _spread(start ^ high)
    return start, first_key, _spread(first_key + GOLDEN)


@jit
def numbers(counter, far, near, first_key, second_key):
    """The number of each element. Of the four of a counter (uint32) it is the third or fourth where
    `far` is not 0, of these the second where `near` is not 0."""
    x = counter ^ (counter >> 16) ^ first_key
    x *= ROUND
    x = x ^ (x >> 15) ^ second_key
    of_first = tl.where(near == 0, FACTORS[0], FACTORS[1]).to(tl.uint32)
    of_last = tl.where(near == 0, FACTORS[2], FACTORS[3]).to(tl.uint32)
    return x * tl.where(far == 0, of_first, of_last)


@jit
def dropout(x, keys_of_seed, row, BH: tl.constexpr, THRESHOLD: tl.constexpr):
    """x [·, BH], the elements of rows row [·], where their number is ≥ THRESHOLD, else 0.

    What is kept is scaled so that the mean stays. Four neighbouring columns have one counter.
    """
    if THRESHOLD == 0:
        return x
    start, first_key, second_key = keys_of_seed
    column = tl.arange(0, BH)
    of_row = (row * BH).to(tl.uint32) * GOLDEN + start
    counter = of_row[:, None] + ((column & -4).to(tl.uint32) * GOLDEN)[None, :]
    far, near = (column & 2)[None, :], (column & 1)[None, :]
    kept = numbers(counter, far, near, first_key, second_key) >= THRESHOLD
    return tl.where(kept, x, 0.0) * (4294967296 / (4294967296 - THRESHOLD))


@loop
def _spread_out(x):
    """`_spread`, for compiled loops."""
    x = np.uint32((x ^ (x >> np.uint32(16))) * np.uint32(_ROUND))
    x = np.uint32((x ^ (x >> np.uint32(13))) * np.uint32(_A))
    return np.uint32((x ^ (x >> np.uint32(16))) * np.uint32(_GOLDEN))


@loop
def make_keys(seed, stream):
    """`keys`, for compiled loops: seed uint64 → three uint32."""
    low, high = np.uint32(seed & np.uint64(0xFFFFFFFF)), np.uint32(seed >> np.uint64(32))
    start = _spread_out(np.uint32(low + step(stream)))
    first_key = _spread_out(start ^ high)
    return start, first_key, _spread_out(np.uint32(first_key + np.uint32(_GOLDEN)))


@loop
def step(places):
    """From a counter to that of a place so many further."""
    return np.uint32(np.uint32(places) * np.uint32(_GOLDEN))


@loop
def mixed(counter, first_key, second_key):
    """What the number of an element is a multiple of, for compiled loops."""
    x = np.uint32(counter)
    x = x ^ (x >> np.uint32(16)) ^ first_key
    x = np.uint32(x * np.uint32(_ROUND))
    return x ^ (x >> np.uint32(15)) ^ second_key


@loop
def factor_of(far, near):
    """That of one of the four: of the third or fourth if `far`, of these the second if `near`."""
    return np.uint32((_D if near else _C) if far else (_B if near else _A))


@loop
def row_numbers(row, keys_of_seed, found):
    """Fill found [BH] uint32 with the numbers of a row, as `dropout` has them."""
    start, first_key, second_key = keys_of_seed
    start += step(row * len(found))
    for i in range(len(found) // 4):
        x = mixed(start + step(4 * i), first_key, second_key)
        found[4 * i], found[4 * i + 1] = np.uint32(x * np.uint32(_A)), np.uint32(x * np.uint32(_B))
        found[4 * i + 2] = np.uint32(x * np.uint32(_C))
        found[4 * i + 3] = np.uint32(x * np.uint32(_D))
